"""The command line's door, and `sr3 upscale` behind it, with a stand-in for the model."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from hostile import encode, pixels
from stand_in import StandIn

import sr3_jax
from sr3_jax import cli
from sr3_jax.cli.main import commands, main
from sr3_jax.config import build
from sr3_jax.config.load import complete
from sr3_jax.image_io.image_file import read_rgb
from sr3_jax.inference import model
from sr3_jax.train.weights import export

# As sr3_jax.images itself asks for on import, which pytest undoes.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stand_in(monkeypatch):
    """What `sr3 upscale` gets for a model; `loaded` holds the names asked for."""
    stand_in = StandIn()
    stand_in.loaded = []
    monkeypatch.setattr(model, "load", lambda name: (stand_in.loaded.append(name), stand_in)[1])
    return stand_in


@pytest.fixture
def folder(tmp_path):
    """Two images, one of them deep, and a file that is none."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(encode(pixels(), "PNG"))
    (tmp_path / "in" / "sub" / "deep.png").write_bytes(
        encode(pixels()[..., 0].astype(np.uint16) * 257, "PNG")
    )
    (tmp_path / "in" / "notes.txt").write_bytes(b"hello")
    return tmp_path


# --- the door


def test_help_lists_every_command_with_its_line(capsys):
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
    ("arguments", "sentence"),
    [
        (["upscal"], "unknown command 'upscal': did you mean 'upscale'?"),
        (["xyzzy"], "unknown command 'xyzzy': `sr3 --help` lists the commands."),
        (["--verbose"], "unknown option '--verbose'"),
        (["upscale"], "arguments are required: "),
        (["upscale", "a", "-o", "b", "--steps", "0"], "--steps: 0 is too small"),
        (["upscale", "a", "-o", "b", "--steps", "many"], "--steps: invalid whole number value: 'many'"),
        (["upscale", "a", "-o", "b", "--batch-size", "-1"], "--batch-size: -1 is too small"),
        (["upscale", "a", "-o", "b", "--seed", "-1"], "--seed: -1 is not a seed"),
        (["upscale", "a", "-o", "b", "--max-megapixels", "nan"], "--max-megapixels: nan"),
        (["upscale", "a", "-o", "b", "--step", "3"], "unrecognized arguments: --step"),
        (["upscale", "a", "-o", "b", "--two\nlines"], r"unrecognized arguments: --two\nlines"),
        (["upscale", "absent", "-o", "b"], "input 'absent' does not exist"),
        (["upscale", os.fsdecode(b"\xff\n"), "-o", "b"], r"input '\xff\n' does not exist"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A folder of commands of our own beside the real ones: write(name, source)."""
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(f'"""{name} is for a test."""\n{source}')
        monkeypatch.delitem(sys.modules, f"sr3_jax.cli.{name}", raising=False)

    return write


def test_unknown_arguments_go_to_the_commands_that_want_them(command, capsys):
    source = (
        "PASS_UNKNOWN = {wants}\n"
        "def add_arguments(parser): parser.add_argument('--config'); parser.add_argument('files', nargs='*')\n"
        "def run(args): print(args.config, args.files, getattr(args, 'rest', None)); return 5\n"
    )
    command("wants_more", source.format(wants=True))
    command("wants_none", source.format(wants=False))
    assert main(["wants-more", "--config=c.py", "--config.optim.rate=1"]) == 5
    assert capsys.readouterr().out == "c.py [] ['--config.optim.rate=1']\n"
    assert main(["wants-none", "--config=c.py", "--config.optim.rate=1"]) == 2
    assert "unrecognized arguments: --config.optim.rate=1" in capsys.readouterr().err


def test_interrupts_and_closed_pipes_end_quietly(command, capsys):
    source = "def add_arguments(parser): pass\ndef run(args): raise {error}\n"
    command("stopped", source.format(error="KeyboardInterrupt"))
    command("piped", source.format(error="BrokenPipeError"))
    assert main(["stopped"]) == 130
    assert capsys.readouterr().err == "\nStopped.\n"
    assert main(["piped"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("buffered", [True, False])
def test_a_closed_pipe_in_truth(buffered):
    """`sr3 --help | true`: no traceback, not even from the interpreter's last flush."""
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


def test_our_log_is_plain_sentences_on_stderr(command, capsys):
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


def test_upscale_says_what_became_of_each(folder, stand_in, capsys):
    arguments = ["upscale", str(folder / "in"), "-o", str(folder / "out"), "--model", "mine"]
    assert main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "2 done, 0 skipped (already there), 0 failed"
    assert any("deep.png: 16 bits" in line for line in out)
    assert any("1 file" in line for line in out)
    assert stand_in.loaded == ["mine"]
    assert read_rgb(folder / "out" / "sub" / "deep.png").shape == (20, 28, 3)
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 done, 2 skipped (already there), 0 failed"
    assert stand_in.loaded == ["mine"], "the model is loaded though there is nothing to do"
    assert main([*arguments, "--overwrite"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 done, 0 skipped (already there), 0 failed"


def test_options_reach_the_model(folder, stand_in, capsys):
    stand_in.noise = 40
    source = str(folder / "in" / "a.png")
    for name, seed in (("x", "3"), ("y", "3"), ("z", "4")):
        options = ["--steps", "3", "--solver", "heun", "--batch-size", "2", "--seed", seed]
        assert main(["upscale", source, *options, "-o", str(folder / f"{name}.png")]) == 0
    assert stand_in.calls == [((2, 10, 14, 3), 3, "heun")] * 3
    x, y, z = ((folder / f"{name}.png").read_bytes() for name in "xyz")
    assert x == y != z
    assert main(["upscale", source, "-o", str(folder / "small"), "--max-megapixels", "0.0001"]) == 1
    assert "over the limit of 0.0001 megapixels" in capsys.readouterr().err


def test_options_may_stand_between_inputs(folder, stand_in):
    first, second = (str(folder / "in" / name) for name in ("a.png", "sub/deep.png"))
    assert main(["upscale", first, "-o", str(folder / "out"), second]) == 0
    assert sorted(os.listdir(folder / "out")) == ["a.png", "deep.png"]


def test_a_folder_without_images_is_a_mistake(tmp_path, stand_in, capsys):
    (tmp_path / "in").mkdir()
    assert main(["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 2
    assert "no images in" in capsys.readouterr().err
    assert stand_in.loaded == []


def test_a_models_complaint_is_the_users(folder, stand_in, capsys):
    def before(images):
        raise sr3_jax.types.UserError("solver must be one of ddim, heun, got 'x'")

    stand_in.before = before
    assert main(["upscale", str(folder / "in"), "-o", str(folder / "out"), "--solver", "x"]) == 2
    assert capsys.readouterr().err.endswith("sr3 upscale: solver must be one of ddim, heun, got 'x'\n")


def test_names_reach_a_terminal_that_knows_ascii_alone(folder, stand_in, monkeypatch):
    (folder / "in" / "sub" / "deep.png").rename(folder / "in" / "sub" / "d\u00e9\u00e8p.png")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["upscale", str(folder / "in"), "-o", str(folder / "out")]) == 0
    assert rb"d\xe9\xe8p.png: 16 bits" in out.buffer.getvalue()


def test_a_folder_that_cannot_be_listed_is_a_failure(folder, stand_in, capsys, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(["upscale", str(folder / "in"), "-o", str(folder / "out")]) == 1
    captured = capsys.readouterr()
    assert f"{folder / 'in' / 'sub'}: permission denied\n" in captured.err
    assert captured.out.splitlines()[-1] == "1 done, 0 skipped (already there), 1 failed"


def test_ctrl_c_keeps_what_is_done(folder, stand_in, capsys):
    def before(images):
        if len(stand_in.calls) == 2:
            raise KeyboardInterrupt

    stand_in.before = before
    arguments = ["upscale", str(folder / "in"), "-o", str(folder / "out"), "--batch-size=1"]
    assert main(arguments) == 130
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 done, 1 skipped (already there), 0 failed"


def test_a_real_model_end_to_end(folder, capsys):
    """An exported network of a few weights: odd sizes, and the same bytes however often and wherever."""
    config = complete(tiny.config())
    network = model.build_network(config["model"])
    shapes = jax.eval_shape(lambda key: build.init_params(network, key), jax.random.key(0))
    params = tiny.perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    export(folder / "tiny.safetensors", params, config)
    (folder / "in" / "odd.png").write_bytes(encode(pixels(9, 13), "PNG"))
    options = ["--model", str(folder / "tiny.safetensors"), "--steps", "2"]
    assert main(["upscale", str(folder / "in"), "-o", str(folder / "one"), *options]) == 0
    assert main(["upscale", str(folder / "in" / "odd.png"), "-o", str(folder / "two.png"), *options]) == 0
    assert read_rgb(folder / "two.png").shape == (36, 52, 3)
    assert (folder / "two.png").read_bytes() == (folder / "one" / "odd.png").read_bytes()
    assert main(["upscale", str(folder / "in"), "-o", str(folder / "three"), *options, "--solver", "x"]) == 2
    assert "solver must be one of" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_finishes_its_image_and_the_next_run_goes_on(
    folder, stand_in, monkeypatch, capsys, number, code
):
    real = stand_in.upscale

    def upscale(images, key, **options):
        if not signalled:
            signalled.append(number)
            signal.raise_signal(number)
        return real(images, key, **options)

    signalled: list[int] = []
    monkeypatch.setattr(stand_in, "upscale", upscale)
    command = ["upscale", str(folder / "in"), "-o", str(folder / "out"), "--batch-size=1"]
    assert main(command) == code
    assert "Stopped. Run the same command again to go on from there." in capsys.readouterr().err
    first = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert len(first) >= 1
    assert main(command) == 0
    assert f"{2 - len(first)} done, {len(first)} skipped" in capsys.readouterr().out
