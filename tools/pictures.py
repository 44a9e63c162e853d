#!/usr/bin/env python
"""Make the pictures of README.md from the report of a demo run: report.png and features.png.

`make pictures` does this after `make demo`, and also draws views.png with tools/show_views.py. The
tool needs the package playwright, and Chromium or Chrome.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path

from moco.cli import tool
from moco.errors import InputError
from moco.files import check_new, creating

LAPTOP = {"width": 1366, "height": 768}
PICTURES = {"report.png": "", "features.png": "#map-of-features .panels"}  # elements; "": the top


def main() -> int:
    """Run the tool; return the exit status."""
    parser = tool.OneLineParser(description=__doc__)
    parser.add_argument("report", type=Path, help="page of tools/report.py or the demo")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--force", action="store_true", help="replace existing pictures")
    return tool.run(parser, draw)


def draw(args: argparse.Namespace) -> None:
    """Write the pictures. Raises InputError if there is no browser or no such page."""
    from PIL import Image

    if not args.report.is_file():
        raise InputError(f"{args.report}: no such file; make demo writes runs/demo/report.html")
    for name in PICTURES:
        check_new(args.out / name, args.force)
    for name, png in screenshots(args.report).items():
        with creating(args.out / name, args.force) as file:
            # a palette makes the files several times smaller
            Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(file, "png")
        print(args.out / name)


def screenshots(report: Path) -> dict[str, bytes]:
    """Return the pictures of a report by name, as PNG. Raises InputError without a browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        browser = None
    if not browser:
        raise InputError(
            "needs the package playwright and a browser: pip install playwright, and on Debian "
            "apt-get install chromium"
        )
    with sync_playwright() as playwright:
        # the sandbox does not work in containers, and the page is our own
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport=LAPTOP)
        page.goto(report.resolve().as_uri())
        found = {
            name: page.locator(element).first.screenshot() if element else page.screenshot()
            for name, element in PICTURES.items()
        }
        opened.close()
    return found


if __name__ == "__main__":
    sys.exit(main())
