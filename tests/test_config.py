"""Loading a config: presets and files by name, overrides, types, ranges, renamed fields, and the reference."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from sr3_jax import config as package
from sr3_jax.config import schema
from sr3_jax.config.build import build_degradation, check_config
from sr3_jax.config.fields import SECTIONS
from sr3_jax.config.load import complete, complete_stored, load_cascade, load_config
from sr3_jax.degradations import PRESETS, DegradationRound
from sr3_jax.errors import UserError


def error_of(function, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(folder: Path, body: str, name: str = "config.py") -> Path:
    path = folder / name
    path.write_text(body)
    return path


@pytest.fixture
def config_file(tmp_path) -> Path:
    return write(
        tmp_path,
        "def get_config():\n    return {'train': {'batch_size': 24}, 'model': {'channels': 16}}\n",
    )


# ---- The schema


def test_long_values_are_shortened_in_errors():
    with pytest.raises(UserError) as caught:
        schema.check_type("train", "num_steps", "x" * 10**6)
    assert "config.train.num_steps" in str(caught.value) and len(str(caught.value)) < 500


def test_every_default_is_within_its_own_range():
    schema.check_ranges(schema.defaults())


def test_defaults_are_a_new_config_each_time(config_file):
    config = load_config(config_file)
    config["train"]["batch_size"] = 1
    assert schema.defaults()["train"]["batch_size"] == 256
    assert load_config(config_file)["train"]["batch_size"] == 24


def test_the_reference_lists_every_field_with_its_default_and_help():
    text = schema.render_text()
    page = schema.markdown()
    for section, name, field in schema.fields():
        assert f"{section}.{name}=" in text
        assert f"| `{name}`" in page and field.help in page
        assert field.help.endswith(".")
    assert "ancestral, ddpm, ddim, dpmpp_2m, heun" in page  # the choices of a field


# ---- Valid configs


@pytest.mark.parametrize("kind", [dict, ConfigDict, FrozenConfigDict])
def test_dicts_and_config_dicts_are_equivalent(kind):
    given = {"model": {"channels": 8, "multipliers": (1, 2), "num_blocks": (1, 1)}, "data": {"scale": 2}}
    config = complete(kind(given))
    assert config["model"]["channels"] == 8 and config["model"]["multipliers"] == (1, 2)
    assert config["data"]["scale"] == 2
    assert config["model"]["film"] is False and set(config) == set(SECTIONS)  # the rest are defaults
    assert complete({"model": kind(given["model"])})["model"] == config["model"]
    assert json.loads(json.dumps(config))  # plain values


def test_numpy_values_become_plain_values():
    config = complete(
        ConfigDict(
            {
                "model": {"channels": np.int32(8), "multipliers": np.array([1, 2]), "film": np.True_},
                "optim": {"learning_rate": np.float32(0.5)},
                "data": {"source": np.str_("folder:x")},
            }
        )
    )
    assert json.loads(json.dumps(config["model"]))["multipliers"] == [1, 2]
    assert type(config["model"]["channels"]) is int and config["model"]["film"] is True
    assert config["optim"]["learning_rate"] == 0.5
    assert complete({"model": {"num_blocks": [np.int64(1)]}})["model"]["num_blocks"] == (1,)


def test_overrides_are_parsed_by_the_type_of_their_field(config_file):
    config = load_config(
        config_file,
        [
            "--config.train.batch_size=32",
            "--config.train.num_steps=1_000",
            "--config.eval.every=1e5",
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
    assert config["eval"]["every"] == 100_000 and type(config["eval"]["every"]) is int
    assert (model["film"], model["remat"], model["mid_attention"]) == (True, True, False)
    assert (model["multipliers"], model["num_blocks"], model["attention_levels"]) == ((1, 2), (1, 3), (0,))
    assert (data["source"], data["eval_source"], train["init_from"]) == ("folder:/a b/c=d", "7", "")
    assert config["mesh"]["fsdp"] == -1
    assert model["channels"] == 16  # from the file


def test_an_override_may_have_a_space_or_be_a_bare_switch(config_file):
    arguments = ["--config.model.film", "--config.mesh.fsdp", "-1", "--config.data.mirror", "false"]
    config = load_config(config_file, [*arguments, "--config.checkpoint.best"])
    assert config["model"]["film"] is True and config["checkpoint"]["best"] is True
    assert config["mesh"]["fsdp"] == -1 and config["data"]["mirror"] is False


def test_a_file_can_change_lines_of_a_preset_and_take_an_argument(tmp_path):
    path = write(
        tmp_path,
        "from sr3_jax.configs import photos_4x\n"
        "import numpy as np\n"
        "def get_config(steps='7'):\n"
        "    config = photos_4x.get_config()\n"
        "    config.train.num_steps = 1e5\n"  # the type of a field is checked on loading, not by ConfigDict
        "    config.mesh.fsdp = 2\n"  # a section that the preset does not mention
        "    config.sampling.steps = int(steps)\n"
        "    return config\n",
    )
    config = package.load_config(path)
    assert config["train"]["num_steps"] == 100_000 and config["mesh"]["fsdp"] == 2
    assert config["sampling"]["steps"] == 7 and config["data"]["crop"] == 96
    assert package.load_config(f"{path}:9")["sampling"]["steps"] == 9


def test_a_file_can_import_its_neighbors(tmp_path):
    write(tmp_path, "BATCH = 3\n", name="neighbor_of_config.py")
    path = write(
        tmp_path,
        "import neighbor_of_config as other\ndef get_config():\n    return {'train': {'batch_size': other.BATCH}}\n",
    )
    assert load_config(path)["train"]["batch_size"] == 3
    assert str(tmp_path) not in sys.path


def test_a_cascade_may_name_files_next_to_it(tmp_path):
    for name, size in (("first", 8), ("second", 16)):
        write(
            tmp_path,
            f"def get_config():\n    return {{'stage': {{'name': '{name}', 'size': {size}}}}}\n",
            f"{name}.py",
        )
    path = write(tmp_path, "def get_config():\n    return {'stages': ('first.py', 'second.py')}\n")
    configs = load_cascade(path, ["--config.train.seed=3"])
    assert [(config["stage"]["name"], config["train"]["seed"]) for config in configs] == [
        ("first", 3),
        ("second", 3),
    ]
    assert "first.py" in error_of(load_config, path)
    write(tmp_path, "def get_config():\n    return {'stage': {'name': 'first'}}\n", "second.py")
    assert "config.stage.name" in error_of(load_cascade, path)  # two stages of one name


# ---- Invalid fields


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.batch_sise=8", ["config.train", "'batch_sise'", "did you mean 'batch_size'?"]),
        ("trian.batch_size=8", ["'trian'", "did you mean 'train'?"]),
        ("mesh.zzz=8", ["config.mesh", "'zzz'", "data, fsdp"]),
        ("zzz.zzz=8", ["'zzz'", "model, diffusion, "]),
        ("train.batch_size=many", ["config.train.batch_size", "a whole number", "'many'", "default is 24"]),
        ("train.batch_size=8.5", ["config.train.batch_size", "a whole number", "8.5"]),
        ("train.batch_size=inf", ["config.train.batch_size", "a whole number", "'inf'"]),
        ("train.batch_size=True", ["config.train.batch_size", "a whole number", "True"]),
        ("train.batch_size=", ["config.train.batch_size", "a whole number", "''"]),
        ("optim.learning_rate=fast", ["config.optim.learning_rate", "a number", "'fast'", "0.0001"]),
        ("optim.learning_rate=1e999", ["config.optim.learning_rate", "a number", "inf"]),
        ("optim.learning_rate=nan", ["config.optim.learning_rate", "a number", "'nan'"]),
        ("model.film=1", ["config.model.film", "true or false", "1", "False"]),
        ("model.film=yes", ["config.model.film", "true or false", "'yes'"]),
        ("model.multipliers=3", ["config.model.multipliers", "a tuple of whole numbers", "3"]),
        ("model.multipliers=1,2.5", ["config.model.multipliers", "(1, 2.5)"]),
        ("model.multipliers=(1,", ["config.model.multipliers", "'(1,'"]),
        ("eval.steps=5", ["config.eval.steps", "config.sampling.steps"]),  # renamed
        ("diffusion.kind=v", ["config.diffusion.kind", "config.diffusion.prediction"]),
        ("train.batch_size", ["config.train.batch_size", "value"]),
        ("train=8", ["--config.train=8", "--config.SECTION.FIELD=VALUE"]),
        ("=8", ["--config.=8", "--config.SECTION.FIELD=VALUE"]),
    ],
)
def test_invalid_overrides_fail_with_the_field_and_the_value(config_file, override, parts):
    text = error_of(load_config, config_file, [f"--config.{override}"])
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("argument", ["--batch=8", "8", "train.batch_size=8"])
def test_other_arguments_fail(config_file, argument):
    assert repr(argument) in error_of(load_config, config_file, [argument])


def test_the_default_in_an_error_is_the_presets(config_file):
    assert "the default is 16" in error_of(load_config, "photos_4x", ["--config.train.batch_size=x"])


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "layout", "vgg"),
        ("model", "patch", 3),
        ("model", "norm", "batch"),
        ("model", "dtype", "float16"),
        ("model", "channels", 0),
        ("model", "dropout", 1.0),
        ("model", "num_classes", -1),
        ("model", "head_channels", -1),
        ("diffusion", "space", "latent"),
        ("diffusion", "prediction", "x0"),
        ("diffusion", "norm", "l3"),
        ("diffusion", "weighting", "p2"),
        ("diffusion", "schedule", "exp"),
        ("diffusion", "residual_scale", 0.0),
        ("diffusion", "num_steps", 1),
        ("diffusion", "beta_start", 0.0),
        ("diffusion", "beta_end", 1.0),
        ("data", "crop", 0),
        ("data", "scale", 0),
        ("data", "threads", 0),
        ("data", "cache_mb", -1),
        ("data", "framing", "stretch"),
        ("data", "label_dropout", 1.0),
        ("data", "augment_share", 0.0),
        ("optim", "learning_rate", 0.0),
        ("optim", "warmup_steps", -1),
        ("optim", "decay", "linear"),
        ("optim", "clip_norm", -1.0),
        ("optim", "b1", 1.0),
        ("optim", "ema_decay", 1.0),
        ("train", "num_steps", 0),
        ("train", "minutes", -1.0),
        ("train", "batch_size", 0),
        ("train", "accumulation", 0),
        ("train", "log_every", 0),
        ("train", "seed", -1),
        ("train", "seed", 2**32),
        ("eval", "every", 0),
        ("eval", "num_images", 0),
        ("sampling", "steps", 0),
        ("sampling", "solver", "euler"),
        ("checkpoint", "every", 0),
        ("checkpoint", "keep", 0),
        ("stage", "size", -1),
    ],
)
def test_values_outside_their_range_fail_with_the_field_and_the_value(config_file, section, name, value):
    text = error_of(load_config, config_file, [f"--config.{section}.{name}={value}"])
    assert f"config.{section}.{name} " in text and repr(value) in text


# ---- Invalid files


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no such file"),
        ("x = 1\n", "AttributeError"),
        ("def get_config(:\n", "SyntaxError"),
        ("import no_such_module\n", "ModuleNotFoundError"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError"),
        ("def get_config():\n    return None\n", "NoneType"),
        ("def get_config(name):\n    return {}\n", "TypeError"),
        ("def get_config():\n    return {'model': {'depth': 3}}\n", "'depth'"),
        ("def get_config():\n    return {'model': None}\n", "config.model"),
        ("def get_config():\n    return {'modell': {}}\n", "did you mean 'model'?"),
        ("def get_config():\n    return {'eval': {'steps': 3}}\n", "config.sampling.steps"),
        ("def get_config():\n    return {'train': {'seed': '1'}}\n", "config.train.seed"),
    ],
)
def test_files_that_are_not_a_config_fail(tmp_path, content, part):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    text = error_of(load_config, path)
    assert part in text and (str(path) in text or text.startswith("config"))


def test_a_file_that_is_not_python_fails(tmp_path):
    path = write(tmp_path, "model: 3", name="config.yaml")
    assert "config.yaml" in error_of(load_config, path)
    assert str(tmp_path) in error_of(load_config, tmp_path)


def test_an_unknown_preset_fails_with_the_nearest_name():
    assert "'photos_4x'" in error_of(load_config, "photo_4x")
    assert "--config=photos_4x --config.model.regression" in error_of(load_config, "photos_4x_regression")


# ---- Configs of trained models


def test_a_stored_config_of_older_field_names_is_migrated_and_logged(caplog, monkeypatch):
    old = {
        "model": {"channels": 8, "multipliers": [1, 2], "num_blocks": [1, 1]},
        "diffusion": {"kind": "v"},
        "data": {"scale": 2},
        "eval": {"steps": 3, "solver": "heun", "every": 7},
    }
    before = json.dumps(old)
    monkeypatch.setattr(logging.getLogger("sr3_jax"), "propagate", True)  # a command may have turned it off
    with caplog.at_level(logging.INFO, logger="sr3_jax"):
        config = complete_stored(old, "out/run")
    assert config["diffusion"]["prediction"] == "v"
    assert config["sampling"]["steps"] == 3 and config["sampling"]["solver"] == "heun"
    assert config["eval"]["every"] == 7
    assert config["model"]["multipliers"] == (1, 2) and config["stage"]["size"] == 0  # completed
    assert json.dumps(old) == before
    assert "out/run" in caplog.text and "diffusion.prediction" in caplog.text
    caplog.clear()
    assert complete_stored(json.loads(json.dumps(config)), "out/run") == config
    assert not caplog.records


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"model": {"channels": 8, "wings": 2}}, "'wings'"),
        ({"attic": {}}, "'attic'"),
        ({"model": {"channels": 8, "layout": "vgg"}}, "config.model.layout"),
        ({"model": {"channels": "8"}}, "config.model.channels"),
        ({"model": None}, "sections"),
        ({"model": {"channels": 10**9}}, "config.model.channels"),
        ({"model": {"channels": 0}}, "config.model.channels"),
        ({"model": {"channels": 8, "num_blocks": [10**7] * 4}}, "config.model.num_blocks"),
        ({"model": {"channels": 8, "multipliers": [1] * 10**5}}, "config.model.multipliers"),
        ({"model": {"channels": 8, "dropout": 10**400}}, "config.model.dropout"),
        ({"diffusion": {"prediction": "v", "num_steps": 10**9}}, "config.diffusion.num_steps"),
        ({"diffusion": {}}, "config.diffusion.prediction"),  # a default here would sample noise
    ],
)
def test_a_stored_config_that_does_not_fit_names_its_owner_and_the_field(sections, part):
    stored = {"model": {"channels": 8}, "diffusion": {"prediction": "v"}, "data": {"scale": 2}} | sections
    text = error_of(complete_stored, stored, "out/run")
    assert "out/run" in text and part in text


@pytest.mark.parametrize("stored", [[], None, {}])
def test_a_stored_value_that_is_not_a_config_names_its_owner(stored):
    assert "out/run" in error_of(complete_stored, stored, "out/run")


# ---- Without jax, from any folder


def test_presets_load_by_name_from_any_folder_without_jax(tmp_path):
    code = (
        "import sys; from sr3_jax.config.load import complete, preset_names; from sr3_jax.configs import photos_4x\n"
        "config = complete(photos_4x.get_config()); assert config['data']['scale'] == 4\n"
        "assert 'photos_4x' in preset_names() and 'jax' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )


# ---- Degradation


def test_degradation_presets_set_the_fields_that_are_not_given():
    config = load_config(
        "photos_4x", ["--config.data.degradation=wild", "--config.degradation.jpeg_quality=20,40"]
    )
    wild = PRESETS["wild"]
    expected = replace(wild, first=replace(wild.first, jpeg_quality=(20.0, 40.0)))
    assert build_degradation(config) == expected
    assert build_degradation(complete_stored(config, "m")) == expected  # a stored config is complete
    assert build_degradation(load_config("photos_4x")).is_clean


def test_eps_prediction_implies_an_ancestral_solver_unless_one_is_given():
    def solver(*overrides: str) -> str:
        return load_config("photos_4x_small", ["--config.model.output_skip=0", *overrides])["sampling"][
            "solver"
        ]

    eps = "--config.diffusion.prediction=eps"
    assert solver() == solver("--config.diffusion.prediction=v") == "dpmpp_2m"
    assert solver(eps) == "ancestral"
    assert solver(eps, "--config.sampling.solver=heun") == "heun"
    assert load_config("faces_16_128")["sampling"]["solver"] == "ddpm"


def test_fields_of_a_degradation_have_the_defaults_of_its_rounds():
    rounds = asdict(DegradationRound())
    assert schema.defaults()["degradation"] == rounds
    assert schema.defaults()["second_degradation"] == {k: v for k, v in rounds.items() if k != "resize"}


@pytest.mark.parametrize("text", ["40,20", "5", "0,10", "a,b", "(1,2,3)"])
def test_a_range_is_two_ascending_numbers_within_bounds(text):
    found = error_of(load_config, "photos_4x", [f"--config.degradation.jpeg_quality={text}"])
    assert "config.degradation.jpeg_quality" in found


def test_resizing_between_rounds_needs_a_second_round():
    config = load_config("photos_4x", ["--config.degradation.resize=0.5,1"])
    assert "config.degradation.resize" in error_of(check_config, config)


def test_control_characters_in_a_stored_config_are_refused():
    """They would reach the terminal wherever the config is printed."""
    stored = json.loads(json.dumps(complete({})))
    stored["stage"]["name"] = "\x1b]0;title\x07"
    assert "control characters" in error_of(complete_stored, stored, "out/run")
