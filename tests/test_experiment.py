"""The door for configs: what comes in as written, and for everything else one sentence with the way out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from sr3_jax.cli import main as cli
from sr3_jax.config import experiment
from sr3_jax.config.experiment import check_batch, complete, load_config, read
from sr3_jax.config.schema import DEFAULTS
from sr3_jax.errors import UserError
from tests import tiny


def refusal(function, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(
        "def get_config():\n    return {'train': {'batch_size': 24}, 'model': {'channels': 16}}\n"
    )
    return path


# ---- What is taken


@pytest.mark.parametrize("kind", [dict, ConfigDict, FrozenConfigDict])
def test_dicts_and_config_dicts_are_taken_alike(kind):
    given = {"model": {"channels": 8, "multipliers": (1, 2), "num_blocks": (1, 1)}, "data": {"scale": 2}}
    config = complete(kind(given))
    assert config["model"]["channels"] == 8 and config["model"]["multipliers"] == (1, 2)
    assert config["data"]["scale"] == 2
    assert config["model"]["film"] is False and set(config) == set(DEFAULTS)  # the rest are the defaults
    mixed = complete({"model": kind(given["model"])})
    assert mixed["model"] == config["model"] and type(mixed["model"]) is dict
    assert experiment.build_network(kind(given["model"])).multipliers == (1, 2)


def test_reading_leaves_the_defaults_and_what_was_given_as_they_were():
    before, given = json.dumps(DEFAULTS), {"train": {"seed": 5}}
    complete(given)["train"]["batch_size"] = 1
    assert json.dumps(DEFAULTS) == before and given == {"train": {"seed": 5}}


def test_a_config_read_from_json_is_the_same_config():
    config = read(tiny.config("x")).config
    assert read(json.loads(json.dumps(config))).config == config


def test_an_experiment_is_what_its_config_says():
    made = read(
        tiny.config(
            "x",
            diffusion={
                "space": "image",
                "prediction": "y0",
                "norm": "l1",
                "weighting": "min_snr",
                "schedule": "cosine",
            },
            optim={"learning_rate": 0.5, "warmup_steps": 4, "decay": "cosine", "clip_norm": 0.0},
            train={"num_steps": 8},
        )
    )
    objective = made.objective
    assert (objective.prediction, objective.norm, objective.task.scale) == ("y0", "l1", 4)
    assert objective.schedule.num_steps == 100
    assert float(objective.weighting(np.float32(0.5), "y0")) == 1.0
    z = objective.space.encode(np.ones((1, 1, 1, 3)), {"upsampled": np.ones((1, 1, 1, 3))})
    assert z.mean() == 1  # the image, not its residual
    rates = [float(made.lr_schedule()(step)) for step in (0, 3, 8)]
    np.testing.assert_allclose(rates, [0.125, 0.5, 0], atol=1e-7)
    assert read(tiny.config("x", diffusion={"weighting": "none"})).objective.weighting is None
    assert made.section("optim")["decay"] == "cosine"
    for schedule in ("linear", "quadratic"):
        values = {"schedule": schedule, "beta_start": 1e-4, "beta_end": 2e-2}
        beta = read(tiny.config("x", diffusion=values)).objective.schedule.beta
        assert (beta[0], beta[-1]) == (pytest.approx(1e-4), pytest.approx(2e-2))


def test_overrides_are_read_by_the_type_of_their_field(config_file):
    config = load_config(
        config_file,
        [
            "--config.train.batch_size=32",
            "--config.train.num_steps=1_000",
            "--config.train.minutes=4",
            "--config.optim.learning_rate=2.5e-4",
            "--config.model.film=True",
            "--config.model.remat=true",
            "--config.model.mid_attention=FALSE",
            "--config.model.multipliers=1,2",
            "--config.model.num_blocks=(1, 3)",
            "--config.model.attention_levels=[0]",
            "--config.data.source=folder:/a b/c=d",
            "--config.data.eval_source=7",
            "--config.train.init_from=",
            "--config.mesh.fsdp=-1",
            "--config.train.batch_size=40",
        ],
    )
    train, model, data = config["train"], config["model"], config["data"]
    assert (train["batch_size"], train["num_steps"], train["minutes"]) == (
        40,
        1000,
        4.0,
    )  # the last one counts
    assert type(train["minutes"]) is float and config["optim"]["learning_rate"] == 2.5e-4
    assert (model["film"], model["remat"], model["mid_attention"]) == (True, True, False)
    assert (model["multipliers"], model["num_blocks"], model["attention_levels"]) == ((1, 2), (1, 3), (0,))
    assert (data["source"], data["eval_source"], train["init_from"]) == ("folder:/a b/c=d", "7", "")
    assert config["mesh"]["fsdp"] == -1
    assert model["channels"] == 16  # of the file


# ---- What is refused, field by field


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.batch_sise=8", "config.train has no field 'batch_sise'; did you mean 'batch_size'?"),
        ("trian.batch_size=8", "config has no section 'trian'; did you mean 'train'?"),
        ("mesh.zzz=8", "config.mesh has no field 'zzz'; there are data, fsdp"),
        ("zzz.zzz=8", "config has no section 'zzz'; there are model, diffusion, data, "),
        (
            "train.batch_size=many",
            "config.train.batch_size must be a whole number, got 'many'; the default is 256",
        ),
        ("train.batch_size=8.0", "config.train.batch_size must be a whole number, got 8.0; "),
        ("train.batch_size=1e3", "config.train.batch_size must be a whole number, got 1000.0; "),
        ("train.batch_size=True", "config.train.batch_size must be a whole number, got True; "),
        ("train.batch_size=", "config.train.batch_size must be a whole number, got ''; "),
        ("optim.learning_rate=fast", "config.optim.learning_rate must be a number, got 'fast'; "),
        ("optim.learning_rate=1e999", "config.optim.learning_rate must be a number, got inf; "),
        ("optim.learning_rate=nan", "config.optim.learning_rate must be a number, got 'nan'; "),
        ("model.film=1", "config.model.film must be true or false, got 1; the default is False"),
        ("model.film=yes", "config.model.film must be true or false, got 'yes'; "),
        ("model.multipliers=3", "config.model.multipliers must be a tuple of whole numbers, got 3; "),
        (
            "model.multipliers=1,2.5",
            "config.model.multipliers must be a tuple of whole numbers, got (1, 2.5); ",
        ),
        ("model.multipliers=(1,", "config.model.multipliers must be a tuple of whole numbers, got '(1,'; "),
    ],
)
def test_overrides_that_cannot_be_are_refused(config_file, override, sentence):
    assert refusal(load_config, config_file, [f"--config.{override}"]).startswith(sentence)


@pytest.mark.parametrize(
    "override",
    ["--config.train=8", "--batch=8", "8", "train.batch_size=8", "--config.train.batch_size", "--config.=8"],
)
def test_arguments_that_are_no_override_are_refused(config_file, override):
    assert refusal(load_config, config_file, [override]) == (
        f"{override!r} is not understood; override a field as --config.SECTION.FIELD=VALUE"
    )


@pytest.mark.parametrize(
    ("section", "fields", "sentence"),
    [
        ("model", {"layout": "vgg"}, "config.model.layout must be one of biggan, efficient, got 'vgg'"),
        ("model", {"patch": 3}, "config.model.patch must be one of 1, 2, 4, got 3"),
        ("model", {"norm": "batch"}, "config.model.norm must be one of group, pixel, got 'batch'"),
        ("model", {"dtype": "float16"}, "config.model.dtype must be one of float32, bfloat16, got 'float16'"),
        ("model", {"channels": 6}, "config.model.channels must be a multiple of 4, got 6"),
        ("model", {"channels": 0}, "config.model.channels must be a multiple of 4, got 0"),
        (
            "model",
            {"multipliers": ()},
            "config.model.multipliers must hold one whole number above 0 for each level, ",
        ),
        (
            "model",
            {"multipliers": (0,)},
            "config.model.multipliers must hold one whole number above 0 for each level",
        ),
        (
            "model",
            {"num_blocks": (1, 1)},
            "config.model.num_blocks must hold 1 numbers above 0, one for each mult",
        ),
        (
            "model",
            {"num_blocks": (0,)},
            "config.model.num_blocks must hold 1 numbers above 0, one for each mult",
        ),
        (
            "model",
            {"attention_levels": (1,)},
            "config.model.attention_levels must hold levels from 0 to 0, got (1,)",
        ),
        ("model", {"dropout": 1.0}, "config.model.dropout must be at least 0 and under 1, got 1.0"),
        ("model", {"num_classes": -1}, "config.model.num_classes must be 0 or the number of labels, got -1"),
        (
            "model",
            {"mid_attention": True, "head_channels": 3},
            "config.model.head_channels must be 0 (one head) or ",
        ),
        (
            "model",
            {"attention_levels": (0,), "head_channels": 8},
            "config.model.head_channels must be 0 (one head)",
        ),
        (
            "diffusion",
            {"space": "latent"},
            "config.diffusion.space must be one of image, residual, got 'latent'",
        ),
        (
            "diffusion",
            {"prediction": "x0"},
            "config.diffusion.prediction must be one of eps, v, y0, got 'x0'",
        ),
        ("diffusion", {"norm": "l3"}, "config.diffusion.norm must be one of l1, l2, got 'l3'"),
        (
            "diffusion",
            {"weighting": "p2"},
            "config.diffusion.weighting must be one of none, min_snr, got 'p2'",
        ),
        (
            "diffusion",
            {"schedule": "exp"},
            "config.diffusion.schedule must be one of linear, quadratic, cosine, got",
        ),
        ("diffusion", {"residual_scale": 0.0}, "config.diffusion.residual_scale must be above 0, got 0.0"),
        ("diffusion", {"num_steps": 1}, "config.diffusion.num_steps must be at least 2, got 1"),
        (
            "diffusion",
            {"beta_start": 0.0},
            "config.diffusion.beta_start must be above 0 and under 1, got 0.0",
        ),
        ("diffusion", {"beta_end": 2}, "config.diffusion.beta_end must be above 0 and under 1, got 2.0"),
        (
            "diffusion",
            {"beta_end": 0.99, "num_steps": 5000},
            "config.diffusion makes no noise schedule (gamma must ",
        ),
        (
            "data",
            {"crop": 18},
            "config.data.crop must be a multiple of 4, for shrink, the network's stride and the scale, got",
        ),
        (
            "data",
            {"crop": 16, "scale": 3},
            "config.data.crop must be a multiple of 6, for shrink, the network's stride and ",
        ),
        ("data", {"crop": 0}, "config.data.crop must be above 0, got 0"),
        ("data", {"scale": 0}, "config.data.scale must be above 0, got 0"),
        ("data", {"threads": 0}, "config.data.threads must be above 0, got 0"),
        ("data", {"cache_mb": -1}, "config.data.cache_mb must be 0 or more, got -1"),
        ("data", {"framing": "stretch"}, "config.data.framing must be one of crop, square, got 'stretch'"),
        ("optim", {"learning_rate": 0.0}, "config.optim.learning_rate must be above 0, got 0.0"),
        ("optim", {"learning_rate": -1e-4}, "config.optim.learning_rate must be above 0, got -0.0001"),
        ("optim", {"learning_rate": float("nan")}, "config.optim.learning_rate must be a number, got nan"),
        ("optim", {"warmup_steps": -1}, "config.optim.warmup_steps must be 0 or more, got -1"),
        ("optim", {"decay": "linear"}, "config.optim.decay must be one of constant, cosine, got 'linear'"),
        ("optim", {"clip_norm": -1.0}, "config.optim.clip_norm must be 0 or more, got -1.0"),
        ("optim", {"b1": 1.0}, "config.optim.b1 must be at least 0 and under 1, got 1.0"),
        ("optim", {"b2": 1.5}, "config.optim.b2 must be at least 0 and under 1, got 1.5"),
        ("optim", {"ema_decay": 1.0}, "config.optim.ema_decay must be at least 0 and under 1, got 1.0"),
        ("train", {"num_steps": 0}, "config.train.num_steps must be above 0, got 0"),
        ("train", {"minutes": -1.0}, "config.train.minutes must be 0 or more, got -1.0"),
        ("train", {"batch_size": 0}, "config.train.batch_size must be above 0, got 0"),
        ("train", {"accumulation": 0}, "config.train.accumulation must be above 0, got 0"),
        ("train", {"log_every": 0}, "config.train.log_every must be above 0, got 0"),
        ("train", {"seed": -1}, "config.train.seed must be from 0 to 4294967295, got -1"),
        ("train", {"seed": 2**32}, "config.train.seed must be from 0 to 4294967295, got 4294967296"),
        ("train", {"seed": "1"}, "config.train.seed must be a whole number, got '1'"),
        ("eval", {"every": 0}, "config.eval.every must be above 0, got 0"),
        ("eval", {"num_images": 0}, "config.eval.num_images must be above 0, got 0"),
        ("eval", {"steps": 0}, "config.sampling.steps must be above 0, got 0"),
        (
            "eval",
            {"solver": "euler"},
            "config.sampling.solver must be one of ancestral, ddim, dpmpp_2m, heun, got 'eul",
        ),
        ("checkpoint", {"every": 0}, "config.checkpoint.every must be above 0, got 0"),
        ("checkpoint", {"keep": 0}, "config.checkpoint.keep must be above 0, got 0"),
    ],
)
def test_values_that_cannot_work_are_refused(section, fields, sentence):
    assert refusal(read, tiny.config("x", **{section: fields})).startswith(sentence)


def test_sections_that_are_none_are_refused():
    assert refusal(read, {"modell": {}}) == "config has no section 'modell'; did you mean 'model'?"
    assert refusal(read, {"model": 3}).startswith("config.model must hold fields, such as ")


@pytest.mark.parametrize(
    ("batch", "accumulation", "devices", "processes", "multiple", "nearest"),
    [
        (12, 1, 8, 1, 8, 16),
        (14, 1, 8, 1, 8, 16),
        (24, 2, 8, 1, 16, 32),
        (1, 1, 8, 1, 8, 8),
        (8, 1, 4, 3, 12, 12),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(batch, accumulation, devices, processes, multiple, nearest):
    config = read(tiny.config("x", train={"batch_size": batch, "accumulation": accumulation})).config
    text = refusal(check_batch, config, devices=devices, processes=processes)
    assert text.startswith(f"config.train.batch_size={batch} does not divide over {devices} devices ")
    assert (
        f"config.train.accumulation={accumulation}: give a multiple of {multiple}, such as {nearest}" in text
    )
    config = read(tiny.config("x", train={"batch_size": nearest, "accumulation": accumulation})).config
    check_batch(config, devices=devices, processes=processes)


# ---- What is refused, file by file


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no such file; the presets are in configs/"),
        ("x = 1\n", "does not load (AttributeError: "),
        ("def get_config(:\n", "does not load (SyntaxError: "),
        ("import no_such_module\n", "does not load (ModuleNotFoundError: "),
        ("def get_config():\n    return 1 / 0\n", "does not load (ZeroDivisionError: division by zero)"),
        ("def get_config():\n    return None\n", "does not load (TypeError: "),
        ("def get_config(name):\n    return {}\n", "does not load (TypeError: "),
        ("def get_config():\n    return {'model': {'depth': 3}}\n", "config.model has no field 'depth'; "),
        ("def get_config():\n    return {'model': None}\n", "config.model must hold fields, such as "),
        ("def get_config():\n    return {'depth': 3}\n", "config has no section 'depth'; "),
    ],
)
def test_files_that_are_no_config_are_refused(tmp_path, content, sentence):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    text = refusal(load_config, path)
    assert sentence in text and (str(path) in text or text.startswith("config"))


def test_a_file_that_is_no_python_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("model: 3")
    assert refusal(load_config, tmp_path / "config.yaml").endswith(
        "is not a Python file; give one that defines get_config()"
    )
    assert "there is no such file" in refusal(load_config, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--config.train.batch_sise=8"],
            "config.train has no field 'batch_sise'; did you mean 'batch_size'?",
        ),
        (["--config.train.batch_size=x"], "config.train.batch_size must be a whole number, got 'x'"),
        (["--config.train.batch_size=12"], "config.train.batch_size=12 does not divide over 8 devices"),
        (["--config.model.multipliers=1,2"], "config.model.num_blocks must hold 2 numbers above 0"),
        (["--config.mesh.data=3"], "mesh.data=3 and mesh.fsdp=1 do not fit 8 devices"),
        (["--config.data.source=folder:none"], "none"),
        (["--config.data.crop=18"], "config.data.crop must be a multiple of "),
        (["--workdir"], "expected one argument"),
    ],
)
def test_the_command_line_says_it_in_one_sentence_with_code_2(tmp_path, capsys, arguments, sentence):
    folder = tiny.images(tmp_path / "images", count=1)
    path = tmp_path / "config.py"
    path.write_text(f"def get_config():\n    return {tiny.config(folder)!r}\n")
    workdir = tmp_path / "workdir"
    given = ["train", f"--config={path}", f"--workdir={workdir}", "--config.train.num_steps=1"]
    if "--workdir" in arguments:
        given.remove(f"--workdir={workdir}")
    assert cli.main([*given, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("sr3 train: ") and sentence in err
    assert "Traceback" not in err
    assert not workdir.exists()


def test_a_missing_config_file_has_code_2_and_no_traceback_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "sr3_jax", "train", "--config=none.py", f"--workdir={tmp_path}"]
    root = Path(experiment.__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 2
    assert done.stderr == "sr3 train: --config=none.py: there is no such file; the presets are in configs/\n"
