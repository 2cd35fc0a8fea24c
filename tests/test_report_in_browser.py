"""Reports in a real browser, Debian's Chromium (make test-long): nothing is asked of the network, nothing hostile runs, sliders move."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, annotated, attack, evaluation, folder, run, selection

from raysys.reporting.html import report

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


@dataclass
class Opened:
    page: Any
    """Playwright's."""
    said: list[str] = field(default_factory=list)
    """On the console, errors that were thrown, dialogs."""
    asked: list[str] = field(default_factory=list)
    """URLs that are not the page itself or in it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def open_page(file: str, **how: Any) -> Opened:
        contexts.append(browser.new_context(**how))
        opened = Opened(contexts[-1].new_page())
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.on("dialog", lambda dialog: (opened.said.append(dialog.message), dialog.dismiss()))
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        opened.page.goto(f"file://{file}")
        opened.page.wait_for_load_state("networkidle")
        opened.asked = [url for url in opened.asked if not url.startswith("data:") and url != f"file://{file}"]
        return opened

    yield open_page
    for context in contexts:
        context.close()


def assert_quiet_and_whole(opened: Opened) -> None:
    assert opened.said == [] and opened.asked == []
    broken = opened.page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert broken == 0


def test_a_hostile_caption_stays_text(visit: Callable[..., Opened], tmp_path: Path) -> None:
    source = annotated(tmp_path)
    for out in (source, selection(tmp_path, source)):
        opened = visit(report(str(out)))
        assert_quiet_and_whole(opened)
        captions = opened.page.locator(".caption").all_inner_texts()
        assert HOSTILE in captions
        assert opened.page.evaluate("document.querySelectorAll('img[onerror], figure script, li b, title b').length") == 0
        assert any("“<b>SALE</b>” 0.95" in text for text in opened.page.locator("li").all_text_contents())


def test_a_slider_moves_the_counts_the_cursor_and_the_verdicts(visit: Callable[..., Opened], tmp_path: Path) -> None:
    opened = visit(report(str(selection(tmp_path, annotated(tmp_path)))))
    threshold = opened.page.locator(".threshold").first
    slider, kept, cursor = (threshold.locator(name) for name in ("input", "output", "#cursor"))
    near = threshold.locator(".near").first

    def state() -> tuple[str, str, float, bool]:
        shift = float(re.findall(r"translate\(([-\d.]+)", cursor.get_attribute("transform"))[0])
        return threshold.locator("b").first.inner_text(), kept.inner_text(), shift, "kept" in near.get_attribute("class")

    assert state() == ("0", "2 of 4 samples kept, 50.0%", 0.0, False)
    slider.focus()
    for _ in range(12):
        opened.page.keyboard.press("ArrowRight")
    value, text, shift, is_kept = state()
    assert value == "0.09" and text == "3 of 4 samples kept, 75.0%" and shift > 0 and is_kept  # the sign covers 8 %
    opened.page.keyboard.press("Home")
    assert state()[1:] == ("2 of 4 samples kept, 50.0%", 0.0, False)
    assert opened.said == []


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (360, "light"), (1280, "dark")])
def test_pages_fit_a_phone_and_are_readable_in_the_dark(
    visit: Callable[..., Opened], tmp_path: Path, width: int, scheme: str
) -> None:
    out = folder(tmp_path, "demo", {"note": "x" * 300}, {})
    selection(tmp_path, annotated(tmp_path))
    for name in ("raw", "filtered"):
        run(tmp_path / name)
    evaluation(tmp_path / "evaluation", attack(tmp_path / "attacked"), "raw", "filtered")
    opened = visit(report(str(out)), viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert_quiet_and_whole(opened)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to push sideways
    back, text = opened.page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert contrast(back, text) > 7  # WCAG 2.2, level AAA
    assert (luminance(back) < 0.1) == (scheme == "dark")
    tick = opened.page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert contrast(back, tick) > 7


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_report_of_a_real_demo(
    visit: Callable[..., Opened], ray_cluster: None, run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, err = run_cli("demo", f"output={tmp_path / 'D'}", "num_scenes=1000", "train.steps=4", "train.log_every=1")
    assert status == 0, err
    opened = visit(str(tmp_path / "D" / "report.html"))
    assert_quiet_and_whole(opened)
    counted = opened.page.locator(".threshold output").first
    before = counted.inner_text()
    opened.page.locator(".threshold input").first.focus()
    opened.page.keyboard.press("End")
    assert counted.inner_text() == "1,000 of 1,000 samples kept, 100.0%" != before
