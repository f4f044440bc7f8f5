"""Memory of `sr3 web` and the pace of its progress, in a browser, with 4 GB of address space for the server.

    pip install -e '.[browser]'; apt-get install chromium
    python benchmarks/web_page.py -o docs/large_images.json && python -m experiments.pages large_images

Memory is the peak of the resident set of the server (VmHWM of /proc), under `ulimit -v`; the browser is not part of it.
Progress is the text and the bar of the page, read ten times a second: its gaps are the times between two changes after
the first step, which waits for the compilation. A shipped model takes hours for 12 megapixels on one core, so it is
cancelled after some minutes, which is measured too; a network of a few hundred weights goes to the end of the image.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.large_images import hardware, peak_gb, photograph, tiny_model  # noqa: E402

SIZES = {"0.02 MP": (160, 120), "12 MP": (4000, 3000)}  # width, height
CASES = (("0.02 MP", "photo_4x"), ("12 MP", "photo_4x"), ("12 MP", "tiny"))
LIMIT_GB = 4.0
_STATE = "(document.querySelector('.sr3-progress [role=progressbar]') || {ariaValueText: ''}).ariaValueText"


def watch(page: Page, *, minutes: float) -> dict[str, Any]:
    """Read the progress until the request ends, or for some minutes from its first step on, and then cancel it."""
    last, changed, gaps, first = "", 0.0, [], 0.0
    while not (ended := page.get_by_role("status").filter(has_text="done in").count()):
        text, now = str(page.evaluate(_STATE)), time.monotonic()
        if text and text != last:
            if " step " in last:
                gaps.append(now - changed)
            elif " step " in text:
                first = now
            last, changed = text, now
        if first and now - first > 60 * minutes:
            break
        time.sleep(0.1)
    row: dict[str, Any] = {"finished": bool(ended), "changes": len(gaps) + 1, "last": last.split(", ", 1)[-1]}
    row |= {
        "gap_median": sorted(gaps)[len(gaps) // 2],
        "gap_most": max(gaps),
        "seconds": time.monotonic() - first,
    }
    if not ended:
        cancelled = time.monotonic()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("Cancelled").wait_for()
        row["cancel_seconds"] = time.monotonic() - cancelled
    return row


def measure(size: str, model: str, *, minutes: float, browser: str, folder: Path) -> dict[str, Any]:
    """One image through the page of a new server."""
    image = photograph(folder / f"{size.split()[0]}MP.jpg", SIZES[size])
    name = str(tiny_model(folder / "tiny.safetensors")) if model == "tiny" else model
    line = [sys.executable, "-m", "sr3_jax", "web", "--port", "0", "--device", "cpu", "--model", name]
    command = ["bash", "-c", f'ulimit -v {int(LIMIT_GB * 1e9 / 1024)}; exec "$@"', "bash", *line]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": tempfile.mkdtemp(dir=folder)}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server,
        sync_playwright() as driver,
    ):
        assert server.stdout is not None
        address = next(text.split()[2] for text in server.stdout if text.startswith("sr3 web: http"))
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(600_000)
        page.goto(address)
        page.locator("#images input[type=file]").set_input_files(str(image))
        page.locator("#images").get_by_text(image.stem).first.wait_for()
        if model == "tiny":
            page.get_by_label("Steps").first.fill("1")
        page.get_by_role("button", name="Upscale", exact=True).click()
        row = watch(page, minutes=minutes)
        peak = peak_gb(server.pid)
        chromium.close()
        server.terminate()
    return {"input": size, "model": model, "address_space_gb": LIMIT_GB, "peak_gb": peak, **row}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5, help="of a shipped model (default: %(default)s)")
    parser.add_argument(
        "--only", type=int, nargs="+", default=range(len(CASES)), help=f"indices of cases: {CASES}"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="JSON file; what is not measured now is kept from it"
    )
    args = parser.parse_args()
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("Chromium was not found on the PATH: apt-get install chromium")
    report: dict[str, Any] = {}
    if args.output and args.output.is_file():
        report = json.loads(args.output.read_text(encoding="utf-8"))
    for size, model in (CASES[index] for index in args.only):
        minutes = 600.0 if model == "tiny" else args.minutes
        with tempfile.TemporaryDirectory(prefix="sr3_page") as folder:
            row = measure(size, model, minutes=minutes, browser=browser, folder=Path(folder))
        row |= {
            "command": shlex.join(["python", "benchmarks/web_page.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "versions": {name: version(name) for name in ("sr3_jax", "jax", "gradio")},
        }
        print(json.dumps(row), flush=True)
        kept = [old for old in report.get("page", ()) if (old["input"], old["model"]) != (size, model)]
        report["page"] = [*kept, row]
        if args.output:
            args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
