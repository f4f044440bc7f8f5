"""The public API: `sr3_jax.load(...).upscale(...)` on every kind of input, and the package's public names."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import sr3_jax
from sr3_jax.cli.main import main
from sr3_jax.config import build
from sr3_jax.errors import UserError
from sr3_jax.inference.loading import from_config
from sr3_jax.train.weights import export
from tests import tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    from sr3_jax.config.load import complete

    config = complete(tiny.config())
    params = build.init_params(build.build_network(config["model"]), jax.random.key(0))
    file = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    export(file, tiny.perturbed(params), config)
    return file


@pytest.fixture(scope="module")
def model(path):
    return sr3_jax.load(path)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_pillow_image_becomes_one_four_times_as_large(model):
    image = Image.fromarray(pixels(6, 9, 3))
    output = model.upscale(image, seed=1)
    assert isinstance(output, Image.Image) and output.size == (36, 24) and output.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(output), model.upscale(np.asarray(image), seed=1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1"])
def test_modes_with_gray_or_alpha_keep_them(model, mode):
    image = Image.fromarray(pixels(6, 9, 4)).convert(mode if mode != "P" else "RGB").convert(mode)
    wanted = {"P": "RGB", "1": "L"}.get(mode, mode)
    assert model.upscale(image).mode == wanted


def test_a_path_gives_what_the_command_writes(model, path, tmp_path):
    source = tmp_path / "in.png"
    Image.fromarray(pixels(7, 5, 3)).save(source)
    arguments = ["upscale", str(source), "-o", str(tmp_path / "out.png"), "--model", str(path), "--seed", "3"]
    # The same batch shape: the command fills its batch up to the number of devices.
    assert main([*arguments, "--batch-size", "1"]) == 0
    with Image.open(tmp_path / "out.png") as written:
        np.testing.assert_array_equal(np.asarray(model.upscale(str(source), seed=3)), np.asarray(written))


def test_arrays_keep_their_rank_and_an_int_seed_makes_rows_independent(model):
    images = pixels(8, 6, 9, 3)
    batch = model.upscale(images, seed=5)
    assert batch.shape == (8, 24, 36, 3) and batch.dtype == np.uint8
    single = model.upscale(images[3], seed=5)
    assert single.shape == (24, 36, 3)
    assert np.abs(batch[3].astype(int) - single).max() <= 1  # another batch shape may round differently
    assert np.any(model.upscale(images[3], seed=6) != single)


def test_keys_are_taken_for_the_batch_or_per_image(model):
    images = pixels(2, 6, 9, 3)
    keys = jax.vmap(jax.random.key)(jax.numpy.array([5, 5], jax.numpy.uint32))
    np.testing.assert_array_equal(model.upscale(images, keys), model.upscale(images, 5))
    assert model.upscale(images, jax.random.key(5)).shape == (2, 24, 36, 3)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_fails(model, seed):
    with pytest.raises(ValueError, match=str(seed)):
        model.upscale(pixels(6, 9, 3), seed)


def test_a_missing_file_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        model.upscale(tmp_path / "nowhere.png")


def test_repr_is_one_short_line(model):
    assert "\n" not in repr(model) and len(repr(model)) < 120
    assert "tiny.safetensors" in repr(model) and "4x" in repr(model)


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, sr3_jax; assert 'load' in dir(sr3_jax)\n"
        "assert not {'jax', 'numpy', 'PIL'} & set(sys.modules), 'eager import'\n"
        "assert callable(sr3_jax.load) and sr3_jax.Sampling().steps == 25\n"
        "sr3_jax.diffusion.ddim(), sr3_jax.image_ops.to_unit, sr3_jax.metrics.psnr\n"
        "try: sr3_jax.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_of_the_core_resolves():
    from sr3_jax import diffusion

    assert all(getattr(diffusion, name) is not None for name in diffusion.__all__)


def test_a_model_from_its_config_samples_as_the_config_says(model):
    again = from_config(model.config, model.params, name="again")
    assert again.sampling == sr3_jax.Sampling("ddim", 2)


def test_upscale_many_yields_the_outputs_of_upscale_in_order(model, tmp_path):
    rng = np.random.default_rng(0)
    sides = [(8, 9), (20, 20), (8, 9), (7, 9), (90, 12), (8, 8)]
    arrays = [rng.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
    Image.fromarray(arrays[3]).save(tmp_path / "3.png")
    images = [*arrays[:2], Image.fromarray(arrays[2]), tmp_path / "3.png", *arrays[4:]]
    outputs = list(model.upscale_many(iter(images), seed=5, batch_size=2, tile=64))
    assert [type(output) is np.ndarray for output in outputs] == [True, True, False, False, True, True]
    for array, output in zip(arrays, outputs, strict=True):
        expected = model.upscale(array, seed=5, tile=64).astype(int)
        assert np.abs(np.asarray(output) - expected).max() <= 1  # of another batch shape


def test_upscale_many_fails_at_the_image_that_cannot_be_read(model, tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    (tmp_path / "bad.png").write_bytes(b"no image")
    outputs = model.upscale_many([image, tmp_path / "bad.png", image], batch_size=1)
    assert next(outputs).shape == (32, 32, 3)
    with pytest.raises(UserError, match="not an image"):
        next(outputs)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ancestral"])
def test_outputs_do_not_depend_on_global_settings_of_jax(model, solver):
    image = pixels(6, 9, 3)
    expected = model.upscale(image, seed=3, steps=2, solver=solver)
    with jax.enable_x64(True), jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        found = model.upscale(image, seed=3, steps=2, solver=solver)
    np.testing.assert_array_equal(found, expected)
