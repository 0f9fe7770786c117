"""Break the code on purpose, one place at a time, and see that a test fails.

``python tests/mutations/mutate.py [--only WORD] [--json FILE]`` works on a temporary copy of the last commit, so
the tree is never touched. First every test must pass as it is; then each mutation of ``mutations.toml`` is made,
its test run, and the mutation taken back. A test that still passes (SURVIVED) does not see what it is there
for. Exit code 0 only if every mutation was killed by a test that failed, not by one that could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("mutations.toml")
KILLED, SURVIVED, BROKEN = "killed", "SURVIVED", "BROKEN"
LIMIT_S = 900.0


@dataclass(frozen=True, slots=True)
class Mutation:
    """One place to break.

    Attributes
    ----------
    row
        Failure, or class of state-table rows, that the code is there for.
    file, old, new
        Where, and what stands there before and after; ``old`` must be there exactly once.
    test
        What must fail, as pytest takes it.
    """

    row: str
    file: str
    old: str
    new: str
    test: str


def table() -> list[Mutation]:
    """Every mutation, in the order of the file."""
    return [Mutation(**item) for item in tomllib.loads(TABLE.read_text())["mutation"]]


def misplaced(mutations: list[Mutation], root: Path) -> list[str]:
    """What does not fit the tree: text that is not there exactly once, tests that do not exist."""
    out = []
    for one in mutations:
        count = (root / one.file).read_text().count(one.old) if (root / one.file).is_file() else 0
        if count != 1:
            out.append(f"{one.row}: {one.file} has {count} times, expected once:\n{one.old}")
        path, _, name = one.test.partition("::")
        name = name.partition("[")[0]
        if not (root / path).is_file() or f"def {name}(" not in (root / path).read_text():
            out.append(f"{one.row}: no test {one.test}")
    return out


class Copy:
    """A working tree of the last commit, with this environment's interpreter."""

    def __init__(self) -> None:
        self._top = Path(tempfile.mkdtemp(prefix="cumbre-mutations-"))
        self.root = self._top / "main"
        git("worktree", "add", "--quiet", "--detach", self.root, "HEAD")
        if (shared := ROOT.parent / "shared").is_dir():
            (self._top / "shared").symlink_to(shared)

    def run(self, tests: list[str]) -> tuple[str, float]:
        """Run some tests; the end of what pytest says and the seconds it took. pytest's errors are BROKEN."""
        begun = time.monotonic()
        # Before the installed package: the copy's code is what is tested, in processes that tests start, too.
        environment = os.environ | {"PYTHONPATH": str(self.root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line", *tests]
        try:
            done = subprocess.run(
                words,
                cwd=self.root,
                env=environment,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{BROKEN} no end within {LIMIT_S:.0f} s", time.monotonic() - begun
        last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
        return last, time.monotonic() - begun

    def close(self) -> None:
        git("worktree", "remove", "--force", self.root)
        shutil.rmtree(self._top, ignore_errors=True)


def git(*words: object) -> None:
    subprocess.run(["git", "-C", str(ROOT), *map(str, words)], check=True, capture_output=True)


def judge(last: str) -> str:
    """What the last line of pytest says of a mutation."""
    if re.search(r"\b\d+ failed\b", last):
        return KILLED
    if re.search(r"\b\d+ passed\b", last) and "error" not in last:
        return SURVIVED
    return BROKEN


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="only rows or files with this word")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument(
        "--no-baseline", action="store_true", help="do not run the tests on unchanged code first"
    )
    arguments = parser.parse_args()
    every = table()
    chosen = [one for one in every if arguments.only.lower() in f"{one.row} {one.file}".lower()]
    copy = Copy()
    results = []
    try:
        if wrong := misplaced(every, copy.root):
            print("\n\n".join(wrong))
            return 2
        if not arguments.no_baseline:
            for test in dict.fromkeys(one.test for one in chosen):
                last, took_s = copy.run([test])
                if judge(last) != SURVIVED:
                    print(f"{test}: does not pass on unchanged code: {last}")
                    return 2
        for one in chosen:
            path = copy.root / one.file
            good = path.read_text()
            path.write_text(good.replace(one.old, one.new))
            try:
                last, took_s = copy.run([one.test])
            finally:
                path.write_text(good)
            results.append(asdict(one) | {"result": judge(last), "seconds": round(took_s, 1)})
            print(
                f"{judge(last):<9} {took_s:5.0f} s  {one.row}: {one.test.rpartition('::')[2]} ({last})",
                flush=True,
            )
    finally:
        copy.close()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    good_ones = sum(item["result"] == KILLED for item in results)
    print(f"{good_ones} of {len(results)} mutations killed")
    return 0 if good_ones == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
