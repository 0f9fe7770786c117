"""The script of the tutorial is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support.archive_world import CURVE_POINTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "query-the-archive.md"


def test_the_script_plots_a_light_curve(world, tmp_path):
    (code,) = re.findall(r"```python light_curve.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "light_curve.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "light_curve.py", str(world.site.root)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "20 positions, 20 matches" in done.stdout  # objects of this site are 36 arc seconds apart
    assert "is 0.50 arc seconds away" in done.stdout
    assert (
        f"light_curve.png: {CURVE_POINTS + 1} points" in done.stdout
    )  # the administrator sees the newest too
    assert (tmp_path / "light_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_curl_commands_of_the_page_ask_what_there_is(world):
    import httpx

    text = PAGE.read_text()
    (query,) = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    headers = world.headers(world.admin)
    answer = httpx.post(f"{world.url}/tap/sync", data={"QUERY": query}, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    (cone,) = re.findall(r"web\.url\)(cone\?[^\"]*)\"", text)
    answer = httpx.get(f"{world.url}/{cone}", headers=headers, timeout=30)
    assert answer.status_code == 200
    assert answer.text.startswith("diaObjectId")
