"""The entry point of the command line, and `sr3 upscale` with a stand-in for the model."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from hostile import encode, pixels
from stand_in import StandIn

import sr3_jax
from sr3_jax import cli
from sr3_jax.cli import _progress
from sr3_jax.cli._progress import Pace, progress_bar
from sr3_jax.cli.main import commands, main
from sr3_jax.config import build
from sr3_jax.config.load import complete
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import read_rgb
from sr3_jax.inference import loading
from sr3_jax.train.weights import export

# image_file ignores these warnings on import, but pytest resets the filters.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stand_in(monkeypatch):
    """The model that `sr3 upscale` loads; `loaded` has the names that it asked for."""
    stand_in = StandIn()
    stand_in.loaded = []
    monkeypatch.setattr(loading, "load", lambda name: (stand_in.loaded.append(name), stand_in)[1])
    return stand_in


@pytest.fixture
def folder(tmp_path):
    """Two images, one of them with 16 bits, and a text file."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(encode(pixels(), "PNG"))
    (tmp_path / "in" / "sub" / "deep.png").write_bytes(
        encode(pixels()[..., 0].astype(np.uint16) * 257, "PNG")
    )
    (tmp_path / "in" / "notes.txt").write_bytes(b"hello")
    return tmp_path


def counts(out: str) -> list[int]:
    """The numbers of done, skipped and failed images in the last line of `sr3 upscale`."""
    return [int(number) for number in re.findall(r"\d+", out.splitlines()[-1])]


# --- The entry point


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    files = {path.stem for path in (ROOT / "sr3_jax" / "cli").glob("[!_]*.py")} - {"main"}
    assert {name.replace("-", "_") for name in commands()} == files >= {"upscale"}
    for name, line in commands().items():
        assert f"{name} " in out
        assert line in out
        assert line.endswith("."), name
    assert main([]) == 2


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sr3 {sr3_jax.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["upscal"], "unknown command 'upscal': did you mean 'upscale'?"),
        (["xyzzy"], "unknown command 'xyzzy'"),
        (["--verbose"], "unknown option '--verbose'"),
        (["upscale"], "arguments are required: "),
        (["upscale", "a", "-o", "b", "--steps", "0"], "--steps: 0 "),
        (["upscale", "a", "-o", "b", "--steps", "many"], "'many'"),
        (["upscale", "a", "-o", "b", "--batch-size", "-1"], "--batch-size: -1 "),
        (["upscale", "a", "-o", "b", "--seed", "-1"], "--seed: -1 "),
        (["upscale", "a", "-o", "b", "--max-megapixels", "nan"], "--max-megapixels: nan"),
        (["upscale", "a", "-o", "b", "--step", "3"], "unrecognized arguments: --step: did you mean --steps?"),
        (["upscale", "a", "--outptu=b"], "did you mean --output?"),
        (["train", "--config=photos_4x", "--work-dir", "b"], "did you mean --workdir?"),
        (["upscale", "a", "-o", "b", "--quality", "0"], "--quality: 0 "),
        (["upscale", "a", "-o", "b", "--quality", "9", "--format=png"], "--quality=9 has no effect"),
        (["upscale", "a", "-o", "b", "--two\nlines"], r"unrecognized arguments: --two\nlines"),
        (["upscale", "absent", "-o", "b"], "input 'absent' does not exist"),
        (["upscale", os.fsdecode(b"\xff\n"), "-o", "b"], r"input '\xff\n' does not exist"),
    ],
)
def test_user_errors_are_one_line(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A function write(name, source) that adds a command to the real ones."""
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(f'"""A test command."""\n{source}')
        monkeypatch.delitem(sys.modules, f"sr3_jax.cli.{name}", raising=False)

    return write


def test_unknown_arguments_are_passed_only_to_commands_that_take_them(command, capsys):
    source = (
        "PASS_UNKNOWN = {passed}\n"
        "def add_arguments(parser): parser.add_argument('--config'); parser.add_argument('files', nargs='*')\n"
        "def run(args): print(args.config, args.files, getattr(args, 'rest', None)); return 5\n"
    )
    command("wants_more", source.format(passed=True))
    command("wants_none", source.format(passed=False))
    assert main(["wants-more", "--config=c.py", "--config.optim.rate=1"]) == 5
    assert capsys.readouterr().out == "c.py [] ['--config.optim.rate=1']\n"
    assert main(["wants-none", "--config=c.py", "--config.optim.rate=1"]) == 2
    assert "unrecognized arguments: --config.optim.rate=1" in capsys.readouterr().err


def test_interrupts_and_closed_pipes_print_no_traceback(command, capsys):
    source = "def add_arguments(parser): pass\ndef run(args): raise {error}\n"
    command("stopped", source.format(error="KeyboardInterrupt"))
    command("piped", source.format(error="BrokenPipeError"))
    assert main(["stopped"]) == 130
    assert capsys.readouterr().err == "\nStopped.\n"
    assert main(["piped"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("buffered", [True, False])
def test_real_closed_pipe(buffered):
    """`sr3 --help | true` prints no traceback, not even from the flush at exit."""
    run = subprocess.Popen(
        [sys.executable, "-m", "sr3_jax", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"},
    )
    assert run.stdout is not None
    run.stdout.close()
    assert run.stderr is not None
    assert run.stderr.read() == b""
    assert run.wait() == 141


@pytest.mark.parametrize("closed", [False, True])
def test_full_or_closed_stdout(closed):
    """A command whose report cannot be printed is done: one line, and no exit code that launchers restart on."""
    where = "&-" if closed else "/dev/full"
    run = subprocess.run(
        ["sh", "-c", f'exec "$0" -m sr3_jax --help >{where}', sys.executable],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    assert run.returncode == (0 if closed else 2)
    assert run.stderr.count("\n") == (0 if closed else 1)


@pytest.mark.parametrize(("platforms", "options"), [("absent", []), ("", ["--device", "gpu"])])
def test_absent_device_is_one_line(tmp_path, platforms, options):
    if platforms != "absent" and any(
        importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)
    ):
        pytest.skip("the plugin of GPUs is installed")
    (tmp_path / "a.png").write_bytes(encode(pixels(), "PNG"))
    arguments = ["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), *options]
    run = subprocess.run(
        [sys.executable, "-m", "sr3_jax", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": platforms},
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("sr3 upscale")]
    assert (run.returncode, len(lines)) == (2, 1)
    assert "Traceback" not in run.stderr
    assert (f"JAX_PLATFORMS={platforms}" if platforms else "--device") in lines[0]


def test_texts_in_errors_and_logs_cannot_control_the_terminal(command, capsys):
    command(
        "paints",
        "import logging\nfrom sr3_jax.errors import UserError\ndef add_arguments(parser): pass\n"
        "def run(args): logging.getLogger('sr3_jax.x').info('a\\x1b[31m'); raise UserError('b\\x1b[31m')\n",
    )
    logger = logging.getLogger("sr3_jax")
    state = logger.level, logger.propagate, list(logger.handlers)
    try:
        assert main(["paints"]) == 2
    finally:
        logger.level, logger.propagate, logger.handlers = state
    error = capsys.readouterr().err
    assert error.count("\\x1b[31m") == 2 and "\x1b" not in error


def test_time_left_is_bounded_by_the_first_piece_and_then_leaves_its_compilation_out():
    now = 0.0
    pace = Pace(clock=lambda: now)

    def after(seconds: float, done: int) -> str:
        nonlocal now
        now += seconds
        return pace.left(done, 10)

    assert after(0, 0) == ""
    assert after(65, 1) == "about 09:45 left or less" and not pace.is_known
    assert after(10, 3) == "about 00:35 left" and pace.is_known
    assert after(5, 4) == "about 00:30 left" and after(30, 10) == ""
    assert after(100, 0) == "about 00:50 left", "the next image is of the same kind"
    assert after(20, 2) == "about 01:20 left"


def test_large_image_is_announced_with_the_time_that_it_takes(folder, stand_in, capsys):
    stand_in.most = 80
    (folder / "in" / "large.png").write_bytes(encode(pixels(200, 90), "PNG"))
    assert main(["upscale", str(folder / "in" / "large.png"), "-o", str(folder / "large.png")]) == 0
    assert "left" not in capsys.readouterr().err, "there was one report only"


def test_nothing_that_a_command_prints_can_control_the_terminal(command, capsys):
    """Whatever prints it, a print or a progress bar; line breaks and the bar's own returns stay."""
    command(
        "prints",
        "import sys\nfrom tqdm import tqdm\nbad = 'x\\x1b]0;title\\x07\\ry\\x9b2J\\u202e\\ud800'\n"
        "def add_arguments(parser): pass\n"
        "def run(args):\n"
        "    print(bad + '\\nnext')\n"
        "    print(bad, file=sys.stderr)\n"
        "    with tqdm(total=2, desc=bad, file=sys.stderr) as bar: bar.set_postfix_str(bad); bar.update()\n"
        "    return 0\n",
    )
    assert main(["prints"]) == 0
    printed = capsys.readouterr()
    assert "\\x1b]0;title\\x07\\ry\\x9b2J\\u202e\\ud800\nnext\n" in printed.out
    assert printed.err.count("\\x1b]0;title") >= 3
    for text in printed:
        assert not set(text) & set("\x1b\x07\x9b\u202e\ud800")
        assert "y" not in [part[:1] for part in text.split("\r")[1:]]


def test_progress_prints_lines_where_stderr_is_a_file(capsys):
    with progress_bar(total=3, unit="image", every=0.01) as bar:
        bar.update()
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and "1 of 3 images" in lines[-1]
    with progress_bar(unit="batch", every=0.01):
        time.sleep(0.1)
    assert "0 batches done" in capsys.readouterr().err


def test_progress_names_the_image_and_its_time_while_the_device_computes_it(
    folder, stand_in, capsys, monkeypatch
):
    monkeypatch.setattr(_progress.progress_bar.__wrapped__, "__kwdefaults__", {"total": None, "every": 0.5})
    stand_in.before = lambda images: time.sleep(1.2)
    assert main(["upscale", str(folder / "in" / "a.png"), "-o", str(folder / "out.png")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "a.png" in line]
    assert len(lines) >= 2 and "0 of 1 images" in lines[-1] and "00:01" in lines[-1]
    assert "step 1 of 10" in lines[-1]


def test_every_step_of_the_sampler_is_reported(tmp_path, monkeypatch):
    """Also by commands that load their models themselves."""
    seen = []
    monkeypatch.setattr(_progress.Bar, "on_step", lambda bar, step, steps, images: seen.append((step, steps)))
    config, model = complete(tiny.config()), tmp_path / "model.safetensors"
    export(model, build.init_params(build.build_network(config["model"]), jax.random.key(0)), config)
    images = tiny.images(tmp_path / "images", count=1, side=24)
    for line in (
        ["upscale", images, "-o", tmp_path / "upscaled", "--model", model],
        ["cascade", "--stages", model, "--low-res", images, "--unfinished", "-o", tmp_path / "cascade"],
        [
            "evaluate",
            "--model",
            model,
            "--data",
            f"folder:{images}",
            "--features=none",
            "-o",
            tmp_path / "scores",
        ],
    ):
        seen.clear()
        assert main([*map(str, line), "--steps=3"]) == 0
        assert seen == [(1, 3), (2, 3), (3, 3)], line[0]


def test_log_messages_go_to_stderr_without_prefix(command, capsys):
    command(
        "talks",
        "import logging\ndef add_arguments(parser): pass\n"
        "def run(args): logging.getLogger('sr3_jax.x').info('step %d', 3); return 0\n",
    )
    logger = logging.getLogger("sr3_jax")
    state = logger.level, logger.propagate, list(logger.handlers)
    try:
        assert main(["talks"]) == 0
        assert main(["talks"]) == 0
        assert capsys.readouterr().err == "step 3\nstep 3\n"
    finally:
        logger.level, logger.propagate, logger.handlers = state


# --- sr3 upscale


def test_upscale_summarizes_its_results(folder, stand_in, capsys):
    arguments = ["upscale", str(folder / "in"), "-o", str(folder / "out"), "--model", "mine"]
    assert main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert counts(out[-1]) == [2, 0, 0]
    assert any("deep.png: 16 bits" in line for line in out)
    assert any("1 non-image file" in line for line in out)
    assert stand_in.loaded == ["mine"]
    assert read_rgb(folder / "out" / "sub" / "deep.png").shape == (20, 28, 3)
    assert main(arguments) == 0
    assert counts(capsys.readouterr().out) == [0, 2, 0]
    assert stand_in.loaded == ["mine"], "the model was loaded although there was nothing to do"
    assert main([*arguments, "--overwrite"]) == 0
    assert counts(capsys.readouterr().out) == [2, 0, 0]


def test_metadata_that_an_output_cannot_hold_is_named_in_one_line_per_run(folder, stand_in, capsys):
    for name in "bc":
        data = encode(pixels(), "JPEG", comment="x", dpi=(300, 300))
        (folder / "in" / f"{name}.jpg").write_bytes(data)
    arguments = ["upscale", str(folder / "in"), "-o", str(folder / "out"), "--format", "webp"]
    assert main(arguments) == 0
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("note:")]
    assert "comment" in line and "b.jpg and 1 more" in line and "resolution" not in line


def test_options_are_passed_to_the_model(folder, stand_in, capsys):
    stand_in.noise = 40
    source = str(folder / "in" / "a.png")
    for name, seed in (("x", "3"), ("y", "3"), ("z", "4")):
        options = ["--steps", "3", "--solver", "heun", "--batch-size", "2", "--seed", seed]
        assert main(["upscale", source, *options, "-o", str(folder / f"{name}.png")]) == 0
    assert stand_in.calls == [((2, 10, 14, 3), 3, "heun")] * 3
    x, y, z = ((folder / f"{name}.png").read_bytes() for name in "xyz")
    assert x == y != z
    assert main(["upscale", source, "-o", str(folder / "small"), "--max-megapixels", "0.0001"]) == 1
    assert "limit of 0.0001 megapixels" in capsys.readouterr().err


def test_names_formats_and_quality_of_outputs(folder, stand_in):
    source, out = folder / "in" / "a.png", folder / "out"
    options = ["--format=jpg", "--suffix=_2x"]
    assert main(["upscale", "-i", str(source), str(folder / "in" / "sub"), "-o", str(out), *options]) == 0
    assert sorted(os.listdir(out)) == ["a_2x.jpg", "deep_2x.jpg"]
    assert main(["upscale", str(source), "-o", str(folder / "low.jpg"), "--quality", "20"]) == 0
    assert (folder / "low.jpg").stat().st_size < (out / "a_2x.jpg").stat().st_size
    assert main(["upscale", str(source), "-o", str(folder / "low.webp"), "--quality", "20"]) == 0
    assert (read_rgb(folder / "low.webp") != read_rgb(source).repeat(2, 0).repeat(2, 1)).any(), "lossless"
    assert main(["upscale", str(source), "-o", str(folder / "x.png"), "--suffix=_2x"]) == 2


def test_outscale_limits_what_the_last_pass_gets(folder, stand_in, capsys):
    """A 2x model needs two passes for 3x; the second one gets 20x28 pixels."""
    command = ["upscale", str(folder / "in" / "a.png"), "-o", str(folder / "out"), "--outscale=3"]
    assert main([*command, "--max-megapixels=0.0005"]) == 1
    assert "28x20 pixels before the last pass" in capsys.readouterr().err
    assert main([*command, "--max-megapixels=0.0006"]) == 0
    assert read_rgb(folder / "out" / "a.png").shape == (30, 42, 3)


def test_options_may_be_between_inputs(folder, stand_in):
    first, second = (str(folder / "in" / name) for name in ("a.png", "sub/deep.png"))
    assert main(["upscale", first, "-o", str(folder / "out"), second]) == 0
    assert sorted(os.listdir(folder / "out")) == ["a.png", "deep.png"]


def test_folder_without_images_fails(tmp_path, stand_in, capsys):
    (tmp_path / "in").mkdir()
    assert main(["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 2
    assert "no images in" in capsys.readouterr().err
    assert stand_in.loaded == []


def test_user_error_of_the_model_is_printed(folder, stand_in, capsys):
    def before(images):
        raise UserError("steps must be at most 5, got 9")

    stand_in.before = before
    assert main(["upscale", str(folder / "in"), "-o", str(folder / "out"), "--steps", "9"]) == 2
    assert capsys.readouterr().err.endswith("sr3 upscale: steps must be at most 5, got 9\n")


def test_names_are_escaped_for_an_ascii_terminal(folder, stand_in, monkeypatch):
    (folder / "in" / "sub" / "deep.png").rename(folder / "in" / "sub" / "d\u00e9\u00e8p.png")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["upscale", str(folder / "in"), "-o", str(folder / "out")]) == 0
    assert rb"d\xe9\xe8p.png: 16 bits" in out.buffer.getvalue()


def test_unreadable_folder_counts_as_failed(folder, stand_in, capsys, monkeypatch):
    scandir = os.scandir

    def fail(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    assert main(["upscale", str(folder / "in"), "-o", str(folder / "out")]) == 1
    captured = capsys.readouterr()
    assert f"{folder / 'in' / 'sub'}: permission denied\n" in captured.err
    assert counts(captured.out) == [1, 0, 1]


def test_real_model_end_to_end(folder, capsys):
    """An exported tiny model: odd sizes, and the same bytes in every run."""
    config = complete(tiny.config())
    network = build.build_network(config["model"])
    shapes = jax.eval_shape(lambda key: build.init_params(network, key), jax.random.key(0))
    params = tiny.perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    export(folder / "tiny.safetensors", params, config)
    (folder / "in" / "odd.png").write_bytes(encode(pixels(9, 13), "PNG"))
    options = ["--model", str(folder / "tiny.safetensors"), "--steps", "2"]
    assert main(["upscale", str(folder / "in"), "-o", str(folder / "one"), *options]) == 0
    assert main(["upscale", str(folder / "in" / "odd.png"), "-o", str(folder / "two.png"), *options]) == 0
    assert read_rgb(folder / "two.png").shape == (36, 52, 3)
    assert (folder / "two.png").read_bytes() == (folder / "one" / "odd.png").read_bytes()
    odd = str(folder / "in" / "odd.png")
    for name, option in (("whole", "--outscale=4"), ("tiled", "--tile=64"), ("cpu", "--device=cpu")):
        assert main(["upscale", odd, "-o", str(folder / f"{name}.png"), *options, option]) == 0
        assert (folder / f"{name}.png").read_bytes() == (folder / "two.png").read_bytes(), option
    half = str(folder / "half.png")
    assert main(["upscale", odd, "-o", half, *options, "--outscale=2.5", "--dtype=bfloat16"]) == 0
    assert read_rgb(Path(half)).shape == (22, 32, 3)
    assert main(["upscale", str(folder / "in"), "-o", str(folder / "three"), *options, "--solver", "x"]) == 2
    assert "solver must be one of" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_signal_finishes_the_image_and_the_next_run_resumes(
    folder, stand_in, monkeypatch, capsys, number, code
):
    real = stand_in.upscale

    def upscale(images, key, **options):
        if not signaled:
            signaled.append(number)
            signal.raise_signal(number)
        return real(images, key, **options)

    signaled: list[int] = []
    monkeypatch.setattr(stand_in, "upscale", upscale)
    command = ["upscale", str(folder / "in"), "-o", str(folder / "out"), "--batch-size=1"]
    assert main(command) == code
    assert "Run the same command again" in capsys.readouterr().err
    first = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert len(first) >= 1
    assert main(command) == 0
    assert counts(capsys.readouterr().out) == [2 - len(first), len(first), 0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config=photos_4x_small", "--workdir=s3://bucket/run"],
        ["upscale", "a.png", "-o", "s3://bucket/out"],
        ["evaluate", "-o", "s3://bucket/scores"],
        ["search-schedule", "--model=photo_4x", "--data=photos:test", "-o", "gs://bucket/search"],
        ["export", "photo_4x", "-o", "s3://bucket/model.safetensors"],
        ["generate", "--model=fashion_base_8", "-o", "gs://bucket/out"],
        ["cascade", "--stages", "fashion_base_8", "-o", "gs://bucket/out"],
        ["prepare", "gs://bucket/images", "--name=mine"],
        ["train-classifier", "--data=photos:train", "-o", "gs://bucket/probe.safetensors"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_urls_that_a_command_does_not_support_fail_and_create_no_folder(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "://bucket" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
