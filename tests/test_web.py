"""`sr3 web` in a real browser, over HTTP and from a program: one server with a tiny model for all tests.

With SR3_SCREENSHOTS=DIR, the tests also write screenshots of the page into DIR.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
from PIL import Image

from sr3_jax.cli.main import main
from sr3_jax.config.build import build_network, init_params
from sr3_jax.config.load import complete
from sr3_jax.train.weights import export
from tests import hostile, tiny

gradio = pytest.importorskip("gradio", reason="the extra sr3_jax[web] is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="the extra sr3_jax[browser] is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
PATIENCE = 100_000.0  # milliseconds
PASSWORD = "correct horse"


def environment(folder: Path) -> dict[str, str]:
    """One device, and temporary files in a folder of the test."""
    flags = {"XLA_FLAGS": "", "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **flags, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}


def command(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "sr3_jax", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment(folder), timeout=300)


@dataclass(frozen=True)
class Server:
    """A running `sr3 web`, the files that the tests upload, and what the command makes of them."""

    address: str
    process: subprocess.Popen[str]
    temporary: Path
    images: Path
    outputs: Path
    errors: str


def start(folder: Path, *arguments: object) -> tuple[subprocess.Popen[str], str]:
    """A server and its address."""
    line = [sys.executable, "-m", "sr3_jax", "web", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(folder), cwd=folder
    )
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith("sr3 web: http"):
            return process, text.split()[2]
    raise AssertionError(f"the server ended with {process.wait()}")


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=60)


def metrics(step: int) -> dict[str, float]:
    both = {"eval_psnr": 20 + step / 100, "eval_psnr_bicubic": 21.0, "eval_consistency": 3.0}
    return {"step": step, "loss": 1 / (1 + step)} | (both if step % 100 == 0 else {})


def evaluation() -> dict[str, object]:
    """A report of one method on two images, as `sr3 evaluate` writes it."""
    images = {"fox": {"psnr": [21.5]}, "<b>owl</b>": {"psnr": [19.25]}}
    row = {"method": "tiny", "scale": 4, "solver": "ddim", "steps": 2, "detail": "", "nfe": 2, "own": True}
    row |= {"summary": {"psnr": {"mean": 20.4, "low": 19.2, "high": 21.5}}, "images": images}
    settings = {"source": "photos:test", "images": 2, "samples": 1, "seed": 0, "crop": None, "batch": 1}
    return {"rows": [row], "protocol": settings, "models": [], "hardware": "a CPU"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    images, outputs, temporary = folder / "images", folder / "outputs", folder / "tmp"
    for one in (images, temporary, folder / "run" / "samples", folder / "scores"):
        one.mkdir(parents=True)
    config = complete(tiny.config(sampling={"steps": 20, "solver": "ancestral"}, data={"crop": 32}))
    params = init_params(build_network(config["model"]), jax.random.key(0))
    export(folder / "tiny.safetensors", tiny.perturbed(params), config)
    Image.fromarray(hostile.pixels(40, 56)).save(images / "photo.png")
    Image.fromarray(hostile.pixels(30, 20, seed=1)).save(images / "other.jpg", quality=90)
    (images / "text.png").write_text("<script>alert(1)</script>")
    (images / "cut.png").write_bytes((images / "photo.png").read_bytes()[:900])
    (images / "bomb.png").write_bytes(hostile.png(60000, 60000, 8, 2, b""))
    (folder / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps(metrics(step)) + "\n" for step in range(0, 301, 10))
    )
    for name in ("run/samples/samples_0000300.png", "scores/grid.png"):
        Image.fromarray(hostile.pixels(60, 90, seed=2)).save(folder / name)
    (folder / "scores" / "evaluation.json").write_text(json.dumps(evaluation()))
    model = folder / "tiny.safetensors"
    process, address = start(
        temporary, "--model", model, "--workdir", folder / "run", "--evaluation", folder / "scores"
    )
    done = command(
        *("upscale", images, "-o", outputs, "--model", model, "--seed", 3, "--steps", 4), folder=temporary
    )
    assert done.returncode == 1, done.stderr  # the hostile files
    yield Server(address, process, temporary, images, outputs, done.stderr)
    if process.poll() is None:
        stop(process)


# ---- In a browser


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=[*flags, "--disable-component-update"])
        yield started
        started.close()


@pytest.fixture
def page(browser, server):
    """The page in a new window. A request to any other server, or an error in the console, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    opened, wrong = context.new_page(), []

    def check(request) -> None:
        if not request.url.startswith((server.address, "data:", "blob:")):
            wrong.append(request.url)

    context.on("request", check)
    opened.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    opened.goto(server.address)
    opened.get_by_role("button", name="Upscale", exact=True).wait_for()
    yield opened
    context.close()
    assert not wrong


def screenshot(page, name: str) -> None:
    if folder := os.environ.get("SR3_SCREENSHOTS"):
        page.screenshot(path=Path(folder, f"{name}.png"), full_page=True)


def upload(page, *files: Path) -> None:
    page.locator("#images input[type=file]").set_input_files([str(file) for file in files])
    for file in files:
        page.locator("#images").get_by_text(file.stem).first.wait_for()


def upscale(page, *files: Path, **fields: int) -> None:
    upload(page, *files)
    for label, value in {"Seed": 3, "Steps": 4, **fields}.items():
        page.get_by_label(label, exact=False).first.fill(str(value))
    page.get_by_role("button", name="Upscale", exact=True).click()


def done(page, count: int) -> None:
    page.get_by_role("status").filter(has_text=f"{count} done").wait_for()


def downloaded(page, link) -> bytes:
    with page.expect_download() as download:
        link.click()
    return Path(download.value.path()).read_bytes()


@in_browser
def test_an_image_through_the_page_is_the_commands(page, server):
    """Upload, progress, divider by keyboard, zoom, download: the same bytes as those of `sr3 upscale`."""
    screenshot(page, "start")
    upscale(page, server.images / "photo.png")
    bar = page.get_by_role("progressbar", name="Upscaling")
    bar.wait_for()
    done(page, 1)
    divider = page.get_by_role("slider", name="Divider")
    divider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    shown = page.locator(".sr3-before").evaluate("image => getComputedStyle(image).clipPath")
    assert "40%" in shown, shown  # 100% - 60%
    screenshot(page, "result")
    sizes = page.locator(".sr3-stack img").evaluate_all(
        "images => images.map(i => [i.naturalWidth, i.naturalHeight])"
    )
    assert sizes == [[224, 160], [224, 160]]
    page.get_by_label("400 %").check()
    page.locator(".sr3-zoom4").wait_for()
    assert page.locator(".sr3-stack").evaluate("stack => stack.getBoundingClientRect().width") == 4 * 224
    link = page.locator("#files a").first
    assert link.get_attribute("download") == "photo_4x_seed3.png"
    assert downloaded(page, link) == (server.outputs / "photo.png").read_bytes()


@in_browser
def test_hostile_files_are_refused_in_the_words_of_the_command(page, server):
    bad = [server.images / name for name in ("text.png", "cut.png", "bomb.png")]
    upscale(page, *bad, server.images / "photo.png")
    done(page, 1)
    refused = page.get_by_role("alert").locator("li").all_inner_texts()
    expected = {
        line.removeprefix(f"{server.images}/") for line in server.errors.splitlines() if ".png: " in line
    }
    assert {*refused} == expected and len(expected) == 3
    screenshot(page, "refused")


@in_browser
def test_samples_have_a_spread_a_gallery_and_an_archive(page, server):
    upscale(page, server.images / "photo.png", server.images / "other.jpg", Samples=2)
    done(page, 4)
    page.get_by_text("standard deviation over 2 samples").wait_for()
    page.get_by_role("button", name="Another sample").click()
    page.get_by_text("standard deviation over 3 samples").wait_for()
    page.get_by_label("Thumbnail 6 of 6").click()
    page.locator("#facts").get_by_text("other_4x_seed5.jpg").wait_for()
    archive = zipfile.ZipFile(io.BytesIO(downloaded(page, page.locator("#zip"))))
    assert sorted(archive.namelist()) == sorted(
        f"{name}_4x_seed{seed}{suffix}"
        for name, suffix in (("photo", ".png"), ("other", ".jpg"))
        for seed in (3, 4, 5)
    )
    assert archive.read("other_4x_seed3.jpg") == (server.outputs / "other.jpg").read_bytes()
    screenshot(page, "samples")


@in_browser
def test_cancel_stops_within_a_step_and_frees_the_device(page, server, tmp_path):
    large = tmp_path / "large.png"
    Image.fromarray(hostile.pixels(200, 200)).save(large)
    upscale(page, large, Steps=99, Samples=16)
    page.locator(".sr3-progress").get_by_text("step ").wait_for()
    page.locator(".sr3-preview").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled").wait_for()
    page.get_by_label("Steps").fill("1")
    page.get_by_label("Samples").first.fill("1")
    page.get_by_role("button", name="Upscale", exact=True).click()
    done(page, 1)


@in_browser
def test_a_wrong_setting_is_refused(page, server):
    upscale(page, server.images / "photo.png", Outscale=100)
    page.get_by_text("outscale must be from 1 to 64, got 100").wait_for()


@in_browser
def test_keyboard_alone_upscales(page, server):
    """Tab reaches every control, in an order that ends in the button, and Enter presses it."""
    upload(page, server.images / "photo.png")
    page.get_by_label("Seed").focus()
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''")
        )
        if reached[-1] == "Upscale":
            break
    assert reached[-1] == "Upscale", reached
    page.keyboard.press("Enter")
    done(page, 1)
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('input, button, select, textarea, img')].filter(e => e.offsetParent && "
        "!(e.labels?.length || e.ariaLabel || e.title || e.innerText?.trim() || e.alt || "
        "e.getAttribute('aria-labelledby') || e.type === 'file')).map(e => e.outerHTML.slice(0, 200))"
    )
    assert unnamed == []


@in_browser
def test_training_run_and_evaluation(page, server):
    page.get_by_role("tab", name="Training run").click()
    page.get_by_text("step 300").first.wait_for()
    page.locator("#grid img").wait_for()
    page.locator(".vega-embed svg").first.wait_for()
    screenshot(page, "training")
    rows = (server.images.parent / "run" / "metrics.jsonl").open("a")
    with rows:
        rows.write(json.dumps(metrics(310)) + "\n")
    page.get_by_text("step 310").first.wait_for()
    page.get_by_role("tab", name="Evaluation").click()
    page.locator("#scores table").wait_for()
    worst = page.locator("#worst tbody tr")
    assert worst.all_inner_texts()[0].split() == ["<b>owl</b>", "19.25"]
    screenshot(page, "evaluation")


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser, server, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    opened.goto(server.address)
    opened.get_by_role("button", name="Upscale", exact=True).wait_for()
    upscale(opened, server.images / "photo.png", Samples=2)
    done(opened, 2)
    screenshot(opened, f"{scheme}_{width}")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    dark = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark.strip("rgba()").split(",")[:3])) < 200) == (scheme == "dark"), dark
    context.close()


# ---- Over HTTP


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_this_machine_and_only_uploads(server):
    assert status(server.address) == 200
    assert status(server.address, Host="attacker.example") == 421
    for path in (
        "/etc/passwd",
        "README.md",
        server.images / "photo.png",
        f"{server.temporary}/../run/metrics.jsonl",
    ):
        assert status(f"{server.address}/gradio_api/file={path}") in (403, 404), path
    assert status(f"{server.address}/gradio_api/proxy=http://127.0.0.1:1/") in (400, 403, 404, 405)
    page = urllib.request.urlopen(server.address, timeout=60).read().decode()
    hidden = page.replace(str(server.temporary), "")  # links to files of the page name its temporary folder
    for secret in (server.images.parent, Path.cwd(), sys.prefix):
        assert str(secret) not in hidden
    folders = [path for path in server.temporary.iterdir() if path.name.startswith("sr3-web-")]
    assert [oct(folder.stat().st_mode & 0o777) for folder in folders] == ["0o700"]


def test_a_program_gets_the_bytes_of_the_command(server, tmp_path):
    from gradio_client import Client, handle_file

    client = Client(server.address, download_files=tmp_path, verbose=False, analytics_enabled=False)
    files = client.predict(
        files=[handle_file(str(server.images / "photo.png"))], seed=3, steps=4, api_name="/upscale"
    )
    assert Path(files[0]).read_bytes() == (server.outputs / "photo.png").read_bytes()
    for wrong in ({"seed": -1}, {"model": "/etc/passwd"}, {"file_format": "exe"}, {"steps": 0}):
        with pytest.raises(Exception, match=r"seed|model|format|steps|choices"):
            client.predict(
                **{"files": [handle_file(str(server.images / "photo.png"))], **wrong}, api_name="/upscale"
            )
    with pytest.raises(Exception):  # noqa: B017 - of the client
        client.predict(files=[{"path": f"{server.images}/photo.png"}], api_name="/upscale")
    with pytest.raises(Exception, match="addresses are not fetched"):
        client.predict(
            files=[{"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}],
            api_name="/upscale",
        )


def test_remote_access_needs_a_password(tmp_path, capsys):
    users = tmp_path / "users"
    users.write_text(f"ada:{PASSWORD}\n")
    for arguments, field in (
        (("--host", "0.0.0.0"), "--allow-remote"),
        (("--host", "0.0.0.0", "--allow-remote"), "--auth"),
        (("--auth", tmp_path / "none"), "--auth"),
        (("--workdir", tmp_path / "none"), "--workdir"),
        (("--evaluation", tmp_path), "--evaluation"),
    ):
        assert main(["web", *map(str, arguments)]) == 2
        assert field in capsys.readouterr().err
    process, address = start(tmp_path, "--host", "0.0.0.0", "--allow-remote", "--auth", users)
    try:
        local = address.replace("0.0.0.0", "127.0.0.1")
        assert status(f"{local}/gradio_api/info") == 401
        assert status(f"{local}/config") == 401
        assert status(f"{local}/login") in (200, 405)
    finally:
        assert stop(process) == 0
    assert not list(tmp_path.glob("sr3-web-*"))
