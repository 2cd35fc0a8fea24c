"""A part of a report as a picture, by Debian's Chromium. The README's, after ``make demo``:

python tools/screenshot.py outputs/demo/report.html tools/demo_report.webp --section "What each threshold would keep" --height 1000
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path, help="a file that Pillow can write: .webp, .png")
    parser.add_argument("--width", type=int, default=1200, help="of the window, px")
    parser.add_argument("--height", type=int, default=1300, help="of what is shown, px")
    parser.add_argument("--section", help="heading of the section at the top; the page's top if it is not said")
    parser.add_argument("--dark", action="store_true")
    words = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        size = {"width": words.width, "height": words.height}
        page = browser.new_page(viewport=size, color_scheme="dark" if words.dark else "light")  # type: ignore[arg-type]
        page.goto(words.report.resolve().as_uri())
        if words.section:
            page.get_by_role("heading", name=words.section).evaluate("heading => heading.scrollIntoView()")
        png = page.screenshot()
        browser.close()
    Image.open(io.BytesIO(png)).convert("RGB").save(words.out, quality=80)


if __name__ == "__main__":
    main()
