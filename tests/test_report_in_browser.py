"""The report in a real browser (make test-long)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from raysys.output import open_output
from raysys.reporting.html import report

pytestmark = pytest.mark.long


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed (apt-get install chromium)")
def test_the_page_opens_without_asking_for_anything_outside(tmp_path: Path) -> None:
    out = open_output(str(tmp_path / "R"), "train", {"model": "<script>document.title='broken'</script>"})
    (tmp_path / "R" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    out.finish({"steps": 2})
    page = report(out.path)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", f"file://{page}"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "<title>broken" not in done.stdout and "&lt;script&gt;document.title" in done.stdout
    assert "<svg" in done.stdout and "Refused to" not in done.stderr
