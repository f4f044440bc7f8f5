"""A config as a whole: the experiment that it describes, incompatible fields, and both on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sr3_jax.cli import main as cli
from sr3_jax.errors import UserError
from sr3_jax.train.experiment import check_batch, read
from tests import tiny


def error_of(function, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_config_from_json_is_the_same_config():
    config = read(tiny.config("x")).config
    assert read(json.loads(json.dumps(config))).config == config


def test_an_experiment_follows_its_config():
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
    for schedule in ("linear", "quadratic"):
        values = {"schedule": schedule, "beta_start": 1e-4, "beta_end": 2e-2}
        beta = read(tiny.config("x", diffusion=values)).objective.schedule.beta
        assert (beta[0], beta[-1]) == (pytest.approx(1e-4), pytest.approx(2e-2))


PAIRS = {"source": "pairs:low:high"}
BASE_MODEL = {"model": {"low_res": False}, "data": {"scale": 1}, "diffusion": {"space": "image"}}


@pytest.mark.parametrize(
    ("sections", "field", "value"),
    [
        ({"model": {"channels": 6}}, "model.channels", 6),
        ({"model": {"multipliers": ()}}, "model.multipliers", ()),
        ({"model": {"multipliers": (0,)}}, "model.multipliers", (0,)),
        ({"model": {"num_blocks": (1, 1)}}, "model.num_blocks", (1, 1)),
        ({"model": {"num_blocks": (0,)}}, "model.num_blocks", (0,)),
        ({"model": {"attention_levels": (1,)}}, "model.attention_levels", (1,)),
        ({"model": {"mid_attention": True, "head_channels": 3}}, "model.head_channels", 3),
        ({"model": {"attention_levels": (0,), "head_channels": 8}}, "model.head_channels", 8),
        ({"diffusion": {"beta_end": 0.99, "num_steps": 5000}}, "diffusion.beta_end", 0.99),
        ({"data": {"crop": 18}}, "data.crop", 18),
        ({"data": {"crop": 16, "scale": 3}}, "data.crop", 16),
        ({"data": {"augment": "noise", "augment_largest": 1.5}}, "data.augment_largest", 1.5),
        ({"model": {"augment": True}}, "model.augment", True),
        ({"model": {"output_skip": 0.1}, "diffusion": {"prediction": "v"}}, "diffusion.prediction", "v"),
        ({"diffusion": {"lpips": 0.5, "prediction": "eps"}}, "diffusion.lpips", 0.5),
        ({"diffusion": {"lpips": 0.5}, "data": {"crop": 32}}, "diffusion.lpips", 0.5),
        ({"data": {"label_dropout": 0.5}}, "data.label_dropout", 0.5),
        ({"stage": {"size": 6}}, "stage.size", 6),
        ({"data": {"framing": "square"}, "stage": {"size": 32}}, "stage.size", 32),
        ({"data": PAIRS | {"degradation": "photo"}}, "data.degradation", "photo"),
        ({"data": PAIRS | {"framing": "square"}}, "data.framing", "square"),
        ({"data": PAIRS | {"shrink": 2}}, "data.shrink", 2),
        (BASE_MODEL | {"data": {"scale": 2}}, "data.scale", 2),
        (BASE_MODEL | {"diffusion": {"space": "residual"}}, "diffusion.space", "residual"),
        (BASE_MODEL | {"stage": {"size": 8}}, "stage.size", 8),
        (BASE_MODEL | {"checkpoint": {"best": True}}, "checkpoint.best", True),
    ],
)
def test_fields_that_do_not_fit_each_other_fail(sections, field, value):
    text = error_of(read, tiny.config("x", **sections))
    assert f"config.{field}" in text and repr(value) in text


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
def test_a_batch_that_does_not_divide_fails(batch, accumulation, devices, processes, multiple, nearest):
    config = read(tiny.config("x", train={"batch_size": batch, "accumulation": accumulation})).config
    text = error_of(check_batch, config, devices=devices, processes=processes)
    assert f"config.train.batch_size={batch}" in text and f"config.train.accumulation={accumulation}" in text
    assert f"a multiple of {multiple}" in text and str(nearest) in text
    config = read(tiny.config("x", train={"batch_size": nearest, "accumulation": accumulation})).config
    check_batch(config, devices=devices, processes=processes)


# ---- On the command line


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--config.train.batch_sise=8"], "'batch_size'"),
        (["--config.train.batch_size", "x"], "config.train.batch_size"),
        (["--config.train.batch_size=12"], "config.train.batch_size=12"),
        (["--config.model.multipliers=1,2"], "config.model.num_blocks"),
        (["--config.mesh.data=3"], "mesh.data=3"),
        (["--config.data.source=folder:none"], "none"),
        (["--config.data.crop=18"], "config.data.crop"),
        (["--config=none.py"], "none.py"),
        (["--config=none"], "`sr3 configs`"),
        (["--workdir"], "expected one argument"),
    ],
)
def test_an_error_is_one_line_with_exit_code_2(tmp_path, capsys, arguments, part):
    folder = tiny.images(tmp_path / "images", count=1)
    path = tmp_path / "config.py"
    path.write_text(f"def get_config():\n    return {tiny.config(folder)!r}\n")
    workdir = tmp_path / "workdir"
    given = ["train", f"--config={path}", f"--workdir={workdir}", "--config.train.num_steps=1"]
    if "--workdir" in arguments:
        given.remove(f"--workdir={workdir}")
    assert cli.main([*given, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("sr3 train: ") and part in err
    assert not workdir.exists()


def test_a_bare_switch_and_a_negative_number_reach_the_config(capsys):
    overrides = ["--config.model.regression", "--config.mesh.fsdp", "-1", "--config.mesh.data", "1"]
    assert cli.main(["configs", "photos_4x", "--json", *overrides]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["model"]["regression"] is True and config["mesh"] == {"data": 1, "fsdp": -1}


def test_configs_lists_the_presets_and_prints_one(capsys):
    assert cli.main(["configs"]) == 0
    out = capsys.readouterr().out
    assert "photos_4x (5.1 M parameters)" in out and "sr3 train --config=faces_16_128 " in out
    assert cli.main(["configs", "cascade_fashion_32", "--config.train.seed=7"]) == 0
    out = capsys.readouterr().out
    assert out.count("model:") == 3 and out.count("* seed") == 3
    assert cli.main(["configs", "photos_4x", "--config.data.crop=90"]) == 2
    assert "config.data.crop" in capsys.readouterr().err


def test_models_lists_the_shipped_models(capsys):
    assert cli.main(["models"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("photo_4x ")]
    assert line.split()[1:5] == ["4x", "5.1", "M", "photos_4x"] and "10 steps" in line


def test_the_help_of_train_lists_the_fields(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "model.channels=128" in out and "diffusion.prediction=eps" in out and "eps, v, y0" in out
