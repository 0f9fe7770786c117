#!/usr/bin/env bash
# Make the environment: find a Python 3.12 or 3.13 that really runs, create a virtual environment, install the
# locked packages and cumbre itself. Does nothing when the environment already fits the lock.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${CUMBRE_VENV:-.venv}"

runs() { # a shim of a version manager may be on PATH and refuse to run: try it
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not ((3, 12) <= sys.version_info < (3, 14)))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in "${CUMBRE_PYTHON:-}" python3.13 python3.12; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null && runs "$candidate" && { command -v "$candidate"; return; }
  done
  for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    [ -x "$candidate" ] && runs "$candidate" && { echo "$candidate"; return; }
  done
  if command -v uv >/dev/null; then
    candidate=$(uv python find '>=3.12,<3.14' 2>/dev/null || true)
    [ -n "$candidate" ] && runs "$candidate" && { echo "$candidate"; return; }
  fi
  candidate=$(command -v python3 || true)
  [ -n "$candidate" ] && runs "$candidate" && { echo "$candidate"; return; }
  return 1
}

stamp="$venv/.cumbre-lock"
wanted=$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1)
if [ -x "$venv/bin/cumbre" ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
  exit 0
fi
if ! python=$(find_python); then
  echo "cumbre needs Python 3.12 or 3.13, with venv; none was found on PATH, in ~/.pyenv/versions or by uv." >&2
  echo "On Debian 13 or Ubuntu 24.04 type:  sudo apt-get install -y python3 python3-venv" >&2
  echo "Elsewhere:                          uv python install 3.13   (or)   pyenv install 3.13" >&2
  echo "or name one:                        make demo CUMBRE_PYTHON=/path/to/python3.13" >&2
  exit 1
fi
echo "environment: $venv with $("$python" --version) ($python)"
[ -x "$venv/bin/python" ] && runs "$venv/bin/python" || "$python" -m venv --clear "$venv"
echo "installing the packages of requirements.lock (about 1.5 GB on disk)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
if ! "$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python" -r requirements.lock; then
  echo "uv could not install them; trying pip" >&2
  "$venv/bin/python" -m pip install --disable-pip-version-check -r requirements.lock
fi
"$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python" --no-deps -e . ||
  "$venv/bin/python" -m pip install --quiet --no-deps -e .
echo "$wanted" > "$stamp"
