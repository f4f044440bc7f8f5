"""The paper's regression baseline: only the low-res image as input, one pass, and the best weights saved."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.config import count_parameters, load_config
from sr3_jax.distributed import sharding
from sr3_jax.errors import UserError
from sr3_jax.evaluation.outputs import model_methods
from sr3_jax.inference import loading as models
from sr3_jax.train import experiment, held_out, loop
from sr3_jax.train.examples import Task, make_pair
from sr3_jax.train.step import batch_losses
from tests import tiny

SWITCH = {
    "model": tiny.CONFIG["model"] | {"regression": True},
    "diffusion": tiny.CONFIG["diffusion"] | {"prediction": "y0"},
    "sampling": {"steps": 1, "solver": "ddim"},
}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="module")
def regression():
    return experiment.read(tiny.config(**SWITCH))


@pytest.fixture(scope="module")
def params(regression):
    return tiny.perturbed(jax.device_get(regression.init_params(jax.random.key(0))))


def test_the_networks_input_is_only_the_low_res_image(regression, params):
    network = regression.objective.network
    generator = np.random.default_rng(0)
    noisy, other, low = (generator.standard_normal((2, 16, 16, 3)).astype(np.float32) for _ in range(3))

    def run(y_t, gamma, upsampled):
        return network.apply({"params": params}, y_t, jnp.asarray(gamma), {"upsampled": upsampled})

    out = run(noisy, [0.1, 0.2], low)
    np.testing.assert_array_equal(out, run(other, [0.9, 0.5], low))
    assert np.abs(out - run(noisy, [0.1, 0.2], other)).max() > 1e-3
    # The same network but for the first convolution, which takes one image for two.
    twin = experiment.read(tiny.config())
    fewer = 3 * 3 * (3 * 2**2) * 4  # 3x3, the channels of an image in 2x2 squares, the network's width
    assert count_parameters(twin.config) - count_parameters(regression.config) == fewer


def test_its_loss_is_the_squared_error(regression, params):
    crops = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    objective = regression.objective
    found, _ = batch_losses(params, {"image": crops}, jax.random.key(0), objective=objective, train=False)
    image, cond = make_pair({"image": crops}, Task(scale=4))
    out = objective.network.apply({"params": params}, cond["upsampled"], jnp.ones(4), cond)
    wanted = jnp.mean((out - objective.space.encode(image, cond)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_it_upscales_in_one_pass_for_any_key(regression, params):
    model = models.from_config(json.loads(json.dumps(regression.config)), params, name="tiny")
    images = np.random.default_rng(2).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    outputs = [model.upscale(images, jax.random.key(seed)) for seed in (0, 1)]
    np.testing.assert_array_equal(*outputs)
    [row] = model_methods(model, "r", solvers=["heun", "ddim"], steps=[5, 10])
    assert (row.name, row.solver, row.steps, row.nfe) == ("r", None, None, 1)
    np.testing.assert_array_equal(row.upscale(images, jax.random.key(3)[None], np.zeros(1, int)), outputs[0])


# ---- The switch


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("diffusion", "prediction", "eps"),
        ("diffusion", "norm", "l1"),
        ("diffusion", "weighting", "min_snr"),
        ("sampling", "steps", 5),
        ("sampling", "solver", "heun"),
    ],
)
def test_a_field_that_is_incompatible_with_a_regression_fails(section, field, value):
    config = tiny.config(**SWITCH)
    config[section] = config[section] | {field: value}
    override = f"--config.{section}.{field}={value}"
    given = load_config("photos_4x", ["--config.model.regression", override])
    for wrong in (config, given):
        with pytest.raises(UserError) as error:
            experiment.read(wrong)
        assert f"config.{section}.{field} " in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize("name", ["faces_16_128", "photos_4x", "fashion_4x"])
def test_the_switch_changes_only_what_a_regression_needs(name):
    found, twin = load_config(name, ["--config.model.regression"]), load_config(name)
    changed = {
        f"{section}.{field}": value
        for section, fields in found.items()
        for field, value in fields.items()
        if twin[section][field] != value
    }
    assert changed.pop("model.regression") and changed.pop("checkpoint.best")
    assert changed.pop("sampling.steps") == 1 and changed.pop("sampling.solver") == "ddim"
    # The paper's rate where a preset has the paper's; a preset with its own rate keeps it.
    rate = {"optim.learning_rate": 1e-5} if name == "faces_16_128" else {}
    objective = {
        "faces_16_128": {"diffusion.prediction": "y0", "diffusion.norm": "l2"},
        "photos_4x": {"diffusion.norm": "l2", "model.output_skip": 0.0},
        "fashion_4x": {},
    }[name]
    assert changed == rate | objective
    assert experiment.read(found).objective.norm == "l2"


def test_explicit_fields_that_a_regression_allows_are_not_replaced():
    overrides = ["--config.model.regression", "--config.checkpoint.best=false"]
    config = load_config("faces_16_128", [*overrides, "--config.optim.learning_rate=3e-5"])
    assert config["checkpoint"]["best"] is False and config["optim"]["learning_rate"] == 3e-5
    assert load_config("faces_16_128", ["--config.model.regression=false"]) == load_config("faces_16_128")


# ---- The best parameters


def test_the_weights_with_the_highest_psnr_are_saved(regression, params, tmp_path):
    mesh = sharding.make_mesh()
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "eval_psnr": 20.0}\n{"step": 9, "eval_psnr": 30.0}\nhalf'
    )
    keep = held_out.BestCheckpoint(tmp_path, regression.config, mesh, 5)
    file = tmp_path / held_out.BEST_FILE
    keep(19.0, params)
    assert not file.exists()  # an earlier evaluation of this run was better
    for psnr, scale in ((21.0, 1.0), (23.0, 2.0), (22.0, 3.0)):
        keep(psnr, jax.tree.map(lambda leaf, scale=scale: leaf * scale, params))
    found = models.load(file)
    wanted = jax.tree.map(lambda leaf: leaf * 2.0, params)
    assert all(map(np.array_equal, jax.tree.leaves(found.params), jax.tree.leaves(wanted)))


def test_a_run_saves_its_best_weights(tmp_path):
    folder = tiny.images(tmp_path / "images")
    sections = SWITCH | {"checkpoint": {"best": True, "every": 4}, "eval": {"every": 2}}
    config = tiny.config(folder, **sections)
    assert loop.train(experiment.read(config), tmp_path / "run") == 0
    assert models.load(tmp_path / "run" / held_out.BEST_FILE).network.regression
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval_psnr" in line for line in lines) == 2


def test_the_best_weights_survive_a_kill_before_they_are_written(tmp_path, monkeypatch):
    """The metrics of an evaluation are logged last, so a run that is killed before evaluates the step again."""
    images = tiny.images(tmp_path / "images")
    sections = SWITCH | {
        "checkpoint": {"best": True, "every": 2},
        "eval": {"every": 2},
        "train": {"num_steps": 2},
    }
    config = tiny.config(images, **sections)

    def killed(*arguments):
        raise SystemExit(137)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(held_out, "export", killed)
        loop.train(experiment.read(config), tmp_path / "run")
    assert not (tmp_path / "run" / held_out.BEST_FILE).exists()
    assert loop.train(experiment.read(config), tmp_path / "run") == 0
    assert (tmp_path / "run" / held_out.BEST_FILE).exists()
