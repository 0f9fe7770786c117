#!/usr/bin/env bash
# Debian packages that some tests use: a browser for the pages, STILTS for the Virtual Observatory's own validators.
# Installed where that is allowed without a question; elsewhere those tests are skipped and say why.
set -u
wanted=()
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || wanted+=(chromium)
command -v stilts >/dev/null || wanted+=(stilts)
[ ${#wanted[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing ${wanted[*]} for the tests of pages and of the Virtual Observatory services"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -q && apt-get install -q -y --no-install-recommends "${wanted[@]}"; } >/tmp/cumbre-test-packages.log 2>&1 ||
    echo "not installed (see /tmp/cumbre-test-packages.log); their tests are skipped"
else
  echo "some tests are skipped without: sudo apt-get install -y ${wanted[*]}"
fi
exit 0
