#!/usr/bin/env python
"""Write docs/images/web.png: the page of `sr3 web` after three samples of a bundled test photograph at 4x.

    pip install -e '.[browser]'; apt-get install chromium
    python experiments/web_figure.py

The photograph is shrunk by the model's scale first, as in the README's first figure.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "sr3_jax" / "data" / "photos" / "test" / "kingfisher.jpg"
OUTPUT = ROOT / "docs" / "images" / "web.png"
SCALE, SAMPLES = 4, 3
WINDOW = {"width": 1280, "height": 1000}


def take_screenshot(address: str, low_res: Path) -> None:
    """Upscale a file on the page at `address`, and write the screenshot."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(600_000)
        page.goto(address)
        page.locator("#images input[type=file]").set_input_files(str(low_res))
        page.locator("#images").get_by_text(low_res.stem).first.wait_for()
        page.get_by_label("Samples").first.fill(str(SAMPLES))
        page.get_by_role("button", name="Upscale", exact=True).click()
        page.get_by_role("status").filter(has_text=f"{SAMPLES} done").wait_for()
        page.get_by_text(f"over {SAMPLES} samples").wait_for()
        page.wait_for_timeout(1000)
        page.screenshot(path=OUTPUT, full_page=True)
        browser.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        low_res = Path(folder, PHOTO.with_suffix(".png").name)
        image = Image.open(PHOTO).convert("RGB")
        image.resize([side // SCALE for side in image.size], Image.Resampling.BICUBIC).save(low_res)
        line = [sys.executable, "-m", "sr3_jax", "web", "--port", "0"]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = next(text.split()[2] for text in server.stdout if text.startswith("sr3 web: http"))
            take_screenshot(address, low_res)
            server.terminate()
    print(f"Wrote {OUTPUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
