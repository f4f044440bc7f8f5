"""Sampling settings: invalid values, the grids and solvers that they build, and the file next to a model."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from sr3_jax.cli import main as cli
from sr3_jax.config import build
from sr3_jax.config.load import complete
from sr3_jax.diffusion import solvers
from sr3_jax.diffusion.sampler import sample, sample_with_coefficients
from sr3_jax.diffusion.schedule import linear, respace
from sr3_jax.errors import UserError
from sr3_jax.files import sha256_hex
from sr3_jax.inference import loading as models
from sr3_jax.inference import program, sampling_file
from sr3_jax.inference.sampling_file import StoredSampling
from sr3_jax.sampling import SOLVERS, Sampling
from sr3_jax.train import experiment, weights
from tests import tiny

TRAINING = linear()
# Within the noise of the tiny config, whose 100 steps end at a log-SNR of 0.43.
SEARCHED = Sampling("ancestral", 3, "linear", log_snr_min=0.8, log_snr_max=6.0, variance=0.25)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


def config(**sections) -> dict:
    return json.loads(json.dumps(experiment.read(tiny.config(**sections)).config))


def params_of(values: dict, *, seed: int = 0):
    network = build.build_network(complete(values)["model"])
    shapes = jax.eval_shape(lambda key: build.init_params(network, key), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return tiny.perturbed(zeros, seed=seed)


def exported(path, *, seed: int = 0, **sections) -> models.Model:
    values = config(**sections)
    weights.export(path, params_of(values, seed=seed), values)
    return models.load(path)


def stored_for(model: models.Model, chosen: Sampling = SEARCHED) -> StoredSampling:
    return StoredSampling(
        chosen,
        sampling_file.params_fingerprint(model.params),
        sampling_file.config_fingerprint(model.config),
        model.name,
        {"metric": "lpips"},
    )


def images(count: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


# ---- Settings


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_end_points_the_grid_is_the_solvers_default(solver):
    grid = Sampling(solver, 7).grid(TRAINING)
    spacing = Sampling(solver).make_solver().spacing
    np.testing.assert_array_equal(grid.gamma64, respace(TRAINING, 7, spacing).gamma64)


def test_the_grid_has_the_given_end_points_and_spacing():
    grid = SEARCHED.grid(TRAINING)
    np.testing.assert_allclose(grid.log_snr[[1, -1]], [6.0, 0.8], rtol=1e-6)
    np.testing.assert_allclose(np.diff(grid.beta, 2), [0.0], atol=1e-7)


def test_variance_and_eta_are_passed_to_the_solver():
    def noise_of(chosen: Sampling) -> np.ndarray:
        return chosen.coefficients(TRAINING).noise

    for chosen, solver in [
        (Sampling("ancestral", 4, variance=0.3), solvers.ancestral(0.3)),
        (Sampling("ddim", 4, eta=0.3), solvers.ddim(0.3)),
        (Sampling("ancestral", 4), solvers.ancestral()),
    ]:
        wanted = solver.coefficients(respace(TRAINING, 4)).noise
        np.testing.assert_array_equal(noise_of(chosen), wanted)
        assert wanted[0] > 0
    assert not noise_of(Sampling("ddim", 4)).any()


@pytest.mark.parametrize(
    "chosen",
    [
        SEARCHED,
        Sampling("ddim", 4, "karras", eta=0.5),
        Sampling("ddim", 4),
        Sampling("dpmpp_2m", 4),
        Sampling("heun", 4),
    ],
    ids=lambda chosen: chosen.solver,
)
def test_coefficients_as_an_argument_give_what_the_schedule_gives(chosen):
    def network(y, gamma, cond):
        return 0.5 * y * gamma.reshape(-1, 1, 1, 1) ** 0.1

    arguments = {"denoiser": network, "cond": {}, "shape": (2, 3, 3, 1)}
    solver = chosen.make_solver()
    direct = sample(key=jax.random.key(0), **arguments, schedule=chosen.grid(TRAINING), solver=solver).image

    @jax.jit
    def traced(coefficients):
        key = jax.random.key(0)
        return sample_with_coefficients(
            key=key, **arguments, coefficients=coefficients, step=solver.compiled
        ).image

    np.testing.assert_allclose(traced(chosen.coefficients(TRAINING)), direct, atol=1e-6)


def test_samplings_of_one_solver_and_length_share_a_program(tmp_path):
    model = exported(tmp_path / "m.safetensors")
    model.upscale(images(), jax.random.key(0), sampling=Sampling("ancestral", 5))
    before = program.generate_jit._cache_size()
    outputs = [
        model.upscale(images(), jax.random.key(0), sampling=dataclasses.replace(SEARCHED, steps=5, **change))
        for change in ({}, {"variance": 0.9}, {"spacing": "karras"}, {"log_snr_min": 2.0})
    ]
    assert program.generate_jit._cache_size() == before
    assert len({output.tobytes() for output in outputs}) == 4


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"solver": "euler"}, "solver", "euler"),
        ({"solver": "no_such_module:solver"}, "solver", "no_such_module"),
        ({"solver": "math:no_such_function"}, "solver", "no_such_function"),
        ({"steps": 0}, "steps", "0"),
        ({"steps": 2.0}, "steps", "2.0"),
        ({"spacing": "even"}, "spacing", "even"),
        ({"solver": "ancestral", "variance": 1.5}, "variance", "1.5"),
        ({"solver": "ddim", "eta": -0.1}, "eta", "-0.1"),
        ({"eta": 0.5}, "eta", "dpmpp_2m"),
        ({"solver": "ddim", "variance": 1.0}, "variance", "ddim"),
        ({"guidance": -1}, "guidance", "-1"),
        ({"guidance": float("nan")}, "guidance", "nan"),
        ({"augment": True}, "augment", "True"),
        ({"log_snr_min": float("inf")}, "log_snr_min", "inf"),
    ],
)
def test_invalid_settings_name_the_field_and_the_value(settings, field, value):
    with pytest.raises(UserError) as error:
        Sampling(**settings)
    assert field in str(error.value) and value in str(error.value)


def euler() -> solvers.Solver:
    """A user's own solver: deterministic, first order."""
    return solvers.ddim()


def test_a_users_solver_is_found_by_its_import_path(tmp_path):
    model = exported(tmp_path / "m.safetensors")
    output = model.upscale(images(), 0, solver=f"{__name__}:euler", steps=3)
    np.testing.assert_array_equal(output, model.upscale(images(), 0, solver="ddim", steps=3))


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"log_snr_min": -12.0}, ["log_snr_min", "-10.034", "13.816", "-12"]),
        ({"log_snr_max": 14.0}, ["log_snr_max", "14"]),
        ({"log_snr_min": 3.0, "log_snr_max": 2.0}, ["log_snr_min", "2.000", "3.000"]),
        ({"steps": 2001, "spacing": "uniform"}, ["uniform", "2000", "2001"]),
    ],
)
def test_a_grid_outside_the_training_schedule_fails(settings, values):
    with pytest.raises(UserError) as error:
        Sampling(**settings).grid(TRAINING)
    assert all(value in str(error.value) for value in values)


def test_nfe_of_each_solver():
    assert [Sampling(solver, 5).nfe for solver in SOLVERS] == [5, 5, 5, 5, 9, 5]


def test_another_solver_or_number_of_steps_does_not_inherit_the_grid():
    base = dataclasses.replace(SEARCHED, guidance=2.0, augment=0.5)
    assert (
        base.override() is base
        and base.override(steps=3) is base
        and base.override(solver="ancestral") is base
    )
    assert base.override(steps=4) == Sampling("ancestral", 4, guidance=2.0, augment=0.5)
    assert base.override(solver="ddim") == Sampling("ddim", 3, guidance=2.0, augment=0.5)
    with pytest.raises(UserError, match="solver must be one of"):
        base.override(solver="euler")


# ---- The sampling file of a model


def test_stored_settings_are_the_models_default(tmp_path):
    path = tmp_path / "m.safetensors"
    model = exported(path)
    plain = model.upscale(images(), jax.random.key(0))
    sampling_file.write_sampling(tmp_path / "m.sampling.json", stored_for(model))
    tuned = models.load(path)
    assert (model.sampling, tuned.sampling) == (Sampling("ddim", 2), SEARCHED)
    own = tuned.upscale(images(), jax.random.key(0))
    np.testing.assert_array_equal(own, model.upscale(images(), jax.random.key(0), sampling=SEARCHED))
    assert np.any(own != plain)
    np.testing.assert_array_equal(plain, tuned.upscale(images(), jax.random.key(0), steps=2, solver="ddim"))
    untuned = model.upscale(images(), jax.random.key(0), steps=3, solver="ancestral")
    np.testing.assert_array_equal(
        own, tuned.upscale(images(), jax.random.key(0), steps=3, solver="ancestral")
    )
    assert np.any(own != untuned)


def test_stored_settings_are_read_back(tmp_path):
    stored = StoredSampling(SEARCHED, "a", "b", "c", {"metric": "lpips", "score": 0.25})
    sampling_file.write_sampling(tmp_path / "x.json", stored)
    assert sampling_file.read_sampling(tmp_path / "x.json") == stored


def test_a_file_for_other_weights_is_ignored_with_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sampling_file._log, "propagate", True)
    other = exported(tmp_path / "other.safetensors", seed=1)
    exported(tmp_path / "m.safetensors")
    stored = dataclasses.replace(stored_for(other), model=f"{other.name}\x1b[31m")
    sampling_file.write_sampling(tmp_path / "m.sampling.json", stored)
    assert models.load(tmp_path / "m.safetensors").sampling == Sampling("ddim", 2)
    (message,) = {record.getMessage() for record in caplog.records}
    assert "m.sampling.json" in message and "other.safetensors" in message and "ignored" in message
    assert "\x1b" not in message


@pytest.mark.parametrize("noise", [100, 90], ids=["same_schedule", "other_schedule"])
def test_later_steps_of_the_same_run_use_the_file_with_a_warning(noise, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sampling_file._log, "propagate", True)
    model = exported(tmp_path / "m.safetensors")
    later = dataclasses.replace(
        model, config=config(diffusion={"num_steps": noise}), params=params_of(config(), seed=2)
    )
    sampling_file.write_sampling(tmp_path / sampling_file.FILE, stored_for(model))
    used = sampling_file.find_sampling(
        tmp_path, own=model.sampling, params=later.params, config=later.config, name="run at step 9"
    )
    (message,) = {record.getMessage() for record in caplog.records}
    if noise == 100:
        assert used == SEARCHED and "run at step 9" in message
    else:
        assert used == model.sampling and "ignored" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_includes_the_stored_settings(dtype, tmp_path, capsys):
    model = exported(tmp_path / "m.safetensors")
    sampling_file.write_sampling(tmp_path / "m.sampling.json", stored_for(model))
    target = tmp_path / "out" / "new.safetensors"
    arguments = ["export", str(tmp_path / "m.safetensors"), "-o", str(target), "--dtype", dtype]
    assert cli.main(arguments) == 0
    assert str(tmp_path / "out" / "new.sampling.json") in capsys.readouterr().out
    assert models.load(target).sampling == SEARCHED
    assert capsys.readouterr().err == ""
    carried = sampling_file.read_sampling(tmp_path / "out" / "new.sampling.json")
    assert carried.found == {"metric": "lpips", "searched_with": "m.safetensors"}
    (tmp_path / "m.sampling.json").unlink()
    again = ["export", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "plain.safetensors")]
    assert cli.main(again) == 0 and not (tmp_path / "plain.sampling.json").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "not a valid sampling file"),
        ('{"sampling": {}}', "format"),
        ('{"format": "sr3_jax.sampling.9"}', "format version"),
        ('{"format": "sr3_jax.sampling.2", "sampling": {"steps": 0}}', "steps must be at least 1, got 0"),
        ('{"format": "sr3_jax.sampling.2", "sampling": {"order": 3}}', "order"),
        ('{"format": "sr3_jax.sampling.2", "sampling": {}, "weights": "x"}', "config"),
    ],
)
def test_a_damaged_file_fails_with_the_fix(text, reason, tmp_path):
    exported(tmp_path / "m.safetensors")
    (tmp_path / "m.sampling.json").write_text(text)
    with pytest.raises(UserError, match=reason) as error:
        models.load(tmp_path / "m.safetensors")
    assert "sr3 search-schedule" in str(error.value)


def test_fields_that_older_versions_lack_leave_fingerprints_of_configs_as_they_were():
    """Otherwise caches of evaluations and stored settings of a workdir would be lost."""
    config = complete(tiny.config())
    newer = ("network", "heads", "norm_groups", "timesteps", "learned_variance")
    older = {name: value for name, value in config["model"].items() if name not in newer}
    values = {"model": older, "diffusion": config["diffusion"], "scale": config["data"]["scale"]}
    assert sampling_file.config_fingerprint(config) == sha256_hex(values)
    for section, field in (("model", {"heads": 2}), ("data", {"upsampling": "bilinear"})):
        changed = config | {section: config[section] | field}
        assert sampling_file.config_fingerprint(changed) != sha256_hex(values)


def test_the_fingerprint_depends_on_every_weight():
    params = params_of(config())
    before = sampling_file.params_fingerprint(params)
    assert before == sampling_file.params_fingerprint(jax.tree.map(jax.numpy.asarray, params))
    params["output"]["bias"][2] += 1e-6
    assert sampling_file.params_fingerprint(params) != before
