"""Take README's pictures of a run's report: `make screenshots`, or

    python docs/screenshots.py runs/demo docs/images

Both widths, light and dark, in headless Chromium (apt-get install chromium).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from rlhf.report import write_report

WIDTHS = {"desk": (1280, 1290), "phone": (390, 1290)}


def main(run: Path, images: Path) -> None:
    """One picture a width and theme of the page's top, and one of an open prompt."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        sys.exit("error: no chromium on PATH; apt-get install chromium")
    images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = write_report(run, Path(folder) / "report.html")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for theme in ("light", "dark"):
            for name, (width, height) in WIDTHS.items():
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=theme
                )
                page.goto(report.as_uri())
                page.screenshot(path=images / f"report-{name}-{theme}.png")
                page.close()
        page = browser.new_page(viewport={"width": 1280, "height": 1100}, color_scheme="light")
        page.goto(report.as_uri())
        page.locator("#show").select_option("pair")
        page.locator("details.prompt summary").first.click()
        page.locator("#filters").evaluate("filters => filters.scrollIntoView()")
        page.screenshot(path=images / "report-prompts.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
