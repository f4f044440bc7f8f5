"""Models: images of any size, keys, labels, tiles, and loading."""

from __future__ import annotations

import json
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as PillowImage

from sr3_jax import memory
from sr3_jax.cli import main as cli
from sr3_jax.config import build
from sr3_jax.config.load import complete
from sr3_jax.distributed import sharding
from sr3_jax.errors import UserError
from sr3_jax.inference import loading as models
from sr3_jax.inference import program, tiling
from sr3_jax.inference.upscale_files import Job, upscale_files
from sr3_jax.metrics import consistency
from sr3_jax.sampling import Sampling
from sr3_jax.train import checkpoints, experiment, weights
from sr3_jax.train.state import start_from
from tests import tiny


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


def config(**sections) -> dict:
    return json.loads(json.dumps(experiment.read(tiny.config(**sections)).config))  # as stored in a file


def params_of(config: dict, *, size: float = 0.1):
    network = build.build_network(complete(config)["model"])
    shapes = jax.eval_shape(lambda key: build.init_params(network, key), jax.random.key(0))
    return tiny.perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), size=size)


def make(*, size: float = 0.1, **sections) -> models.Model:
    values = config(**sections)
    return models.from_config(values, params_of(values, size=size), name="tiny")


@pytest.fixture(scope="module")
def model() -> models.Model:
    return make()


@pytest.fixture(scope="module")
def bicubic() -> models.Model:
    """A network that predicts y0 = 0 in residual space, so that its output is the bicubic image."""
    return make(size=0.0, diffusion={"prediction": "y0"})


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def keys(*seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(np.array(seeds))


# ---- Upscaling


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 30), (37, 91)])
def test_any_size_is_upscaled_and_a_zero_network_gives_bicubic(bicubic, height, width):
    images = random_images(2, height, width)
    output = bicubic.upscale(images, jax.random.key(0))
    assert output.shape == (2, 4 * height, 4 * width, 3) and output.dtype == np.uint8
    for one, out in zip(images, output, strict=True):
        padded = np.pad(one, ((0, 8), (0, 8), (0, 0)), mode="edge").astype(np.float32)
        size = (4 * padded.shape[1], 4 * padded.shape[0])
        for channel in range(3):
            wanted = PillowImage.fromarray(padded[..., channel]).resize(size, PillowImage.Resampling.BICUBIC)
            wanted = np.clip(np.asarray(wanted), 0, 255)[: 4 * height, : 4 * width]
            assert np.abs(out[..., channel] - wanted).max() < 0.51


def test_images_are_edge_padded_and_cropped(model):
    images = random_images(1, 7, 9)
    padded = np.pad(images, ((0, 0), (0, 1), (0, 7), (0, 0)), mode="edge")
    whole = model.upscale(padded, jax.random.key(1))
    np.testing.assert_array_equal(model.upscale(images, jax.random.key(1)), whole[:, :28, :36])


def test_output_is_determined_by_the_key(model):
    images = random_images(2, 8, 8)
    output = model.upscale(images, jax.random.key(1))
    np.testing.assert_array_equal(output, model.upscale(images, jax.random.key(1)))
    other = model.upscale(images, jax.random.key(2))
    assert np.mean(output != other) > 0.5


def test_per_image_keys_make_outputs_independent_of_the_batch(model):
    images = random_images(3, 8, 8)
    together = model.upscale(images, keys(5, 6, 7))
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(model.upscale(images[order], keys(7, 5, 6)), together[order])
    single = model.upscale(images[1:2], keys(6))
    difference = np.abs(single[0].astype(int) - together[1])  # other batch sizes may round differently
    assert difference.max() <= 1 and difference.mean() < 0.01
    assert np.mean(model.upscale(images[:1], keys(8)) != together[0]) > 0.5


def test_each_shape_is_compiled_once_and_only_run_if_it_fits_into_memory(model, monkeypatch):
    compiled, free = [], 10**15

    def listen(event: str, seconds: float, *, fun_name: str = "", **_) -> None:
        if event.endswith("backend_compile_duration") and "generate_jit" in fun_name:
            compiled.append(event)

    def forbidden(*arguments, **options):
        raise AssertionError("it ran")

    jax.monitoring.register_event_duration_secs_listener(listen)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: free)
    for seed in range(3):
        model.upscale(random_images(2, 9, 11), seed, steps=3)
    assert len(compiled) == 1
    free = 1000
    forbidden.lower = program.generate_jit.lower  # compiling is allowed
    monkeypatch.setattr(program, "generate_jit", forbidden)
    for shape in ((2, 9, 11), (3, 7, 7)):  # one that has run before, and a new one
        with pytest.raises(memory.OutOfMemory, match="--tile"):
            model.upscale(random_images(*shape), steps=3)
    assert len(compiled) == 2


def test_batch_is_split_over_devices(model, monkeypatch):
    seen = []
    real = program.generate_jit

    def upscale(*arguments, **options):
        seen.append(real.lower(*arguments, **options).compile().as_text())
        output, finite = real(*arguments, **options)
        seen.append(output)
        return output, finite

    upscale.lower = real.lower
    monkeypatch.setattr(program, "generate_jit", upscale)
    images = np.concatenate([random_images(1, 8, 8)] * 16)
    images[8:] = 255 - images[8:]
    output = model.upscale(images, keys(*range(16)))
    text, array = seen
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 32, 32, 3)}
    assert len({shard.device for shard in array.addressable_shards}) == 8
    rows = re.findall(r"\w+\[(\d+),\d+,\d+,\d+\]\S* convolution\(", text)
    assert len(rows) > 5 and set(rows) == {"2"}
    assert not re.search(r"\w+\[16,\d+,\d+,\d+\]", text)
    for row in (0, 9):  # equal in a batch of another size
        single = model.upscale(images[row : row + 1], keys(row))
        assert np.abs(single[0].astype(int) - output[row]).max() <= 1


@pytest.mark.parametrize(("batch", "devices"), [(1, 1), (2, 2), (6, 6), (7, 7), (9, 3), (16, 8)])
def test_device_count_divides_the_batch(batch, devices):
    assert sharding.mesh_for_batch(batch).size == devices


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("size", [(6, 9), (20, 100)], ids=["one_block", "blocks"])
def test_watching_the_steps_does_not_change_a_byte(solver, size, model):
    """Each step is reported with the images so far; the last ones are the output."""
    image, sampling = random_images(*size), Sampling(solver, 3)
    tile = 64 if size[1] > 64 else None
    seen = []
    watched = model.watched(lambda step, steps, images: seen.append((step, steps, images)))
    output = watched.upscale(image, 5, sampling=sampling, tile=tile)
    np.testing.assert_array_equal(output, model.upscale(image, 5, sampling=sampling, tile=tile))
    assert [entry[:2] for entry in seen] == [(1, 3), (2, 3), (3, 3)] * (len(seen) // 3) and seen
    if tile is None:
        np.testing.assert_array_equal(seen[-1][2][0, : output.shape[0], : output.shape[1]], output)


def test_an_exception_of_the_watcher_stops_the_sampling(model):
    seen = []

    def stop(step: int, steps: int, images: np.ndarray) -> None:
        seen.append(step)
        raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        model.watched(stop).upscale(random_images(6, 9), 0, steps=3)
    assert seen == [1]


def test_output_depends_on_the_image(model):
    dark, light = (np.full((1, 8, 8, 3), level, np.uint8) for level in (40, 200))
    for image in (dark, light):
        assert abs(model.upscale(image, jax.random.key(0)).mean() - image.mean()) < 40


def test_default_steps_and_solver_are_the_models(model):
    images = random_images(1, 8, 8)

    def run(**options):
        return model.upscale(images, jax.random.key(3), **options)

    own = run()
    assert (model.sampling.steps, model.sampling.solver) == (2, "ddim")
    np.testing.assert_array_equal(own, run(steps=2, solver="ddim"))
    assert np.any(own != run(steps=3))
    assert np.any(own != run(solver="ancestral"))
    for solver in ("dpmpp_2m", "heun"):
        assert run(solver=solver).shape == own.shape
    assert run(steps=1).shape == own.shape


@pytest.mark.parametrize(
    ("options", "named"),
    [({"steps": 0}, "steps.*0"), ({"steps": -3}, "steps.*-3"), ({"solver": "euler"}, "solver.*euler")],
)
def test_invalid_steps_and_solvers_fail(model, options, named):
    with pytest.raises(UserError, match=named):
        model.upscale(random_images(1, 8, 8), jax.random.key(0), **options)


@pytest.mark.parametrize(
    "images", [np.zeros((8, 8), np.uint8), random_images(1, 8, 8)[..., :1], random_images(1, 8, 8) / 255.0]
)
def test_arrays_that_are_not_uint8_rgb_fail(model, images):
    with pytest.raises(ValueError, match="uint8"):
        model.upscale(images, jax.random.key(0))


@pytest.mark.parametrize(
    ("stride", "scale"),
    [({"patch": 4, "multipliers": (1, 1, 1), "num_blocks": (1, 1, 1)}, 3), ({"patch": 1}, 6)],
)
def test_padding_fits_both_scale_and_stride(stride, scale):
    odd = make(size=0.0, model=stride, data={"crop": 48, "scale": scale})
    assert odd.upscale(random_images(1, 9, 11), jax.random.key(0)).shape == (1, 9 * scale, 11 * scale, 3)


def test_buckets_are_few_close_and_multiples_of_the_unit():
    for unit in (1, 2, 5, 16):
        sides = {side: tiling.bucket(side, unit) for side in range(1, 3000)}
        for side, bucket in sides.items():
            assert bucket >= side and bucket % unit == 0
            assert bucket - side < max(8, side / 16) + unit
        assert len(set(sides.values())) < 100


def test_image_of_the_training_size_is_not_padded(model):
    """A network trained on whole small images depends on where they end."""
    assert tiling.bucket(7, 1, exact=10) == 7 and tiling.bucket(7, 2, exact=10) == 8
    assert tiling.bucket(11, 1, exact=10) == 16
    side = model.config["data"]["crop"] // 4
    plan = model.tiling(side, side)
    assert (plan.count, plan.rows.size, plan.columns.size) == (1, side, side)


def test_labels_are_required_checked_and_used():
    labeled = make(model={"num_classes": 10}, data={"label_dropout": 0.0})
    images = np.concatenate([random_images(1, 8, 8)] * 2)
    with pytest.raises(UserError, match=r"tiny.*label.*0 to 9"):
        labeled.upscale(images, keys(3, 3))
    with pytest.raises(UserError, match=r"tiny.*0 to 9, got 10"):
        labeled.upscale(images, keys(3, 3), labels=np.array([0, 10]))
    with pytest.raises(ValueError, match=r"labels must be 2 .* \(3,\)"):
        labeled.upscale(images, keys(3, 3), labels=np.array([0, 1, 2]))
    with pytest.raises(UserError, match=r"tiny.*without labels"):
        make().upscale(images, keys(3, 3), labels=np.array([0, 1]))
    first, other = labeled.upscale(images, keys(3, 3), labels=np.array([2, 5]))
    assert (first != other).any()
    free = make(model={"num_classes": 10}, data={"label_dropout": 0.5})
    none, with_label = (
        free.upscale(images, keys(3, 3)),
        free.upscale(images, keys(3, 3), labels=np.array([2, 5])),
    )
    assert (none[0] == none[1]).all() and (none != with_label).any()


BASE = {
    "model": {"low_res": False, "num_classes": 3},
    "diffusion": {"space": "image", "prediction": "v"},
    "data": {"scale": 1, "label_dropout": 0.1, "crop": 16, "shrink": 2},
    "stage": {"name": "base", "size": 8},
}


def test_base_stage_generates_images_from_keys_and_labels():
    base = make(size=0.3, **BASE)
    together = base.generate(3, keys(4, 5, 4), labels=np.array([0, 0, 1]))
    assert together.shape == (3, 8, 8, 3) and together.dtype == np.uint8
    assert (together[0] != together[1]).any() and (together[0] != together[2]).any()
    single = base.generate(1, keys(5), labels=np.array([0]))
    assert np.abs(single[0].astype(int) - together[1]).max() <= 1
    assert base.generate(2, jax.random.key(0), size=12).shape == (2, 12, 12, 3)
    with pytest.raises(UserError, match=r"size must be a multiple of 2 for model tiny, got 9"):
        base.generate(1, keys(0), size=9)
    with pytest.raises(UserError, match=r"tiny.*sr3 generate"):
        base.upscale(random_images(1, 8, 8), keys(0))
    with pytest.raises(UserError, match=r"tiny.*sr3 upscale"):
        make().generate(1, keys(0))
    assert base.stage == build.Stage("base", 8, None) and make().stage == build.Stage("", 0, 4)


def test_guidance_extrapolates_from_no_label():
    """0 ignores the label, 1 uses it, and above 1 the output changes; the network gets twice the batch."""
    base = make(size=0.3, **BASE)
    labels = np.array([1, 2])

    def generate_jit(guidance, labels=labels):
        return base.generate(2, keys(7, 8), labels=labels, sampling=replace(base.sampling, guidance=guidance))

    np.testing.assert_array_equal(generate_jit(0.0), base.generate(2, keys(7, 8)))
    labeled = base.generate(2, keys(7, 8), labels=labels)
    np.testing.assert_array_equal(generate_jit(1.0), labeled)
    assert (generate_jit(3.0) != labeled).any()
    before = program.generate_jit._cache_size()
    generate_jit(2.0)
    assert program.generate_jit._cache_size() == before
    with pytest.raises(UserError, match=r"guidance=2 .*label_dropout"):
        make().upscale(random_images(1, 8, 8), keys(0), sampling=Sampling("ddim", 2, guidance=2.0))


def test_sampling_augments_with_the_given_strength():
    augmented = make(
        model={"augment": True}, data={"augment": "blur", "augment_largest": 2.0, "augment_share": 0.5}
    )
    images, plain = random_images(2, 8, 8), augmented.upscale(random_images(2, 8, 8), keys(0, 1))

    def at(strength):
        return augmented.upscale(images, keys(0, 1), sampling=replace(augmented.sampling, augment=strength))

    np.testing.assert_array_equal(at(0.0), plain)
    assert np.abs(at(1.0).astype(int) - plain).mean() > np.abs(at(0.2).astype(int) - plain).mean() > 0
    with pytest.raises(UserError, match=r"augment=0\.5 .*config\.model\.augment"):
        make().upscale(images, keys(0, 1), sampling=Sampling("ddim", 2, augment=0.5))


def test_back_projection_is_a_default_of_the_config_and_brings_the_output_closer_to_its_input():
    images = random_images(2, 8, 8)
    projected = make(size=0.0, diffusion={"prediction": "y0"}, sampling={"back_projection": 3})
    assert projected.sampling.override(steps=3).back_projection == 3

    def off(rounds: int) -> float:
        sampling = replace(projected.sampling, back_projection=rounds)
        return float(np.mean(consistency(projected.upscale(images, sampling=sampling), images)))

    assert off(3) < off(1) < off(0) / 2
    np.testing.assert_array_equal(
        projected.upscale(images),
        projected.upscale(images, sampling=replace(projected.sampling, back_projection=3)),
    )
    base = make(**BASE)
    with pytest.raises(UserError, match=r"back_projection=2 .*low-res"):
        base.generate(1, keys(0), labels=np.array([0]), sampling=replace(base.sampling, back_projection=2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_output_fails(value):
    values = config()
    params = params_of(values)
    params["output"]["bias"][0] = value
    ill = models.from_config(values, params, name="ill")
    with pytest.raises(FloatingPointError, match=r"model ill .*not finite"):
        ill.upscale(random_images(1, 8, 8), jax.random.key(0))


# ---- Tiles


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ancestral"])
def test_tiles_change_the_output_by_rounding_only(solver):
    strong = make(size=0.4, diffusion={"prediction": "y0"}, sampling={"solver": solver, "steps": 3})
    image = PillowImage.fromarray(random_images(12, 16)).resize((121, 78), PillowImage.Resampling.BICUBIC)
    whole = strong.upscale(np.asarray(image), seed=4)
    assert strong.tiling(78, 121).count == 1 and strong.tiling(78, 121, tile=64).count == 6
    before = program.generate_jit._cache_size()
    in_tiles = strong.upscale(np.asarray(image), seed=4, tile=64)
    assert program.generate_jit._cache_size() == before + 1  # one program for all tiles
    assert whole.std() > 20
    assert np.mean(np.abs(in_tiles.astype(int) - whole) > 1) < 0.001


def test_bands_of_a_large_image_are_its_output_from_top_to_bottom():
    strong = make(size=0.3, diffusion={"prediction": "y0"})
    image, counts = random_images(1, 100, 70)[0], []
    bands = list(strong.upscale_bands(image, seed=1, tile=64, on_tiles=counts.append))
    assert len(bands) > 1 and sum(counts) == strong.tiling(100, 70, tile=64).count
    np.testing.assert_array_equal(np.concatenate(bands), strong.upscale(image, seed=1, tile=64))


def test_tiles_share_batches_across_rows():
    """2 x 3 tiles on 4 devices are 2 batches, not 3."""
    image, counts = random_images(1, 170, 110)[0], []
    model = make(size=0.3, diffusion={"prediction": "y0"})
    bands = list(model.upscale_bands(image, seed=1, tile=72, batch_size=4, on_tiles=counts.append))
    assert counts == [4, 2] and len(bands) == 3
    whole = model.upscale(image, seed=1, tile=10**4)
    assert np.mean(np.abs(np.concatenate(bands).astype(int) - whole) > 1) < 0.001


@pytest.mark.parametrize("tile", [None, 64])
def test_outscale_of_an_array_equals_that_of_a_file_and_of_a_stream(tmp_path, tile):
    model = make(size=0.3, diffusion={"prediction": "y0"})
    image = random_images(1, 20, 70)[0]
    PillowImage.fromarray(image).save(tmp_path / "a.png")
    for outscale in (1.5, 5.0):  # one pass, and two
        job = Job(tmp_path / "a.png", tmp_path / f"{outscale}.png")
        assert not upscale_files(model, [job], seed=3, tile=tile, outscale=outscale).failed
        expected = np.asarray(PillowImage.open(job.target))
        assert expected.shape == (round(20 * outscale), round(70 * outscale), 3)
        np.testing.assert_array_equal(model.upscale(image, 3, tile=tile, outscale=outscale), expected)
        np.testing.assert_array_equal(
            np.asarray(model.upscale(PillowImage.fromarray(image), 3, tile=tile, outscale=outscale)), expected
        )
        (streamed,) = model.upscale_many([image], 3, batch_size=1, tile=tile, outscale=outscale)
        np.testing.assert_array_equal(streamed, expected)
    by_key = model.upscale(image, jax.random.key(3), outscale=5.0)
    assert by_key.shape == (100, 350, 3)
    for wrong in (0.5, 65.0):
        with pytest.raises(UserError, match=f"outscale .*{wrong:g}"):
            model.upscale(image, outscale=wrong)


@pytest.mark.parametrize(("suffix", "outscale"), [("png", None), ("jpg", 3)])
def test_memory_does_not_grow_with_the_image(bicubic, tmp_path, suffix, outscale):
    """Arrays only: benchmarks/large_images.py measures whole processes. The large output has 11 MB of pixels more."""
    peaks = []
    for height in (234, 2000):  # tiles of one size
        PillowImage.fromarray(random_images(1, 20, 13)[0]).resize((130, height)).save(
            tmp_path / f"{height}.png"
        )
        job = Job(tmp_path / f"{height}.png", tmp_path / "out" / f"{height}.{suffix}")
        tracemalloc.start()
        try:
            assert not upscale_files(bicubic, [job], tile=128, outscale=outscale).failed
            peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 4


# ---- Loading


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A workdir with a config and a checkpoint whose moving average differs from its weights."""
    folder, values = tmp_path_factory.mktemp("run"), config()
    checkpoints.write_config(folder, values)
    read = experiment.read(values)
    state = start_from(params_of(values), read.optimizer(), sharding.make_mesh())
    state = jax.tree.map(jnp.copy, state)
    state = type(state)(
        jnp.int32(7), jax.tree.map(jnp.zeros_like, state.params), state.ema_params, state.opt_state
    )
    with checkpoints.Checkpoints(folder) as store:
        store.save(state)
    return folder


def test_workdir_and_export_give_the_same_bytes(workdir, model, tmp_path, capsys):
    exported = tmp_path / "model.safetensors"
    assert cli.main(["export", str(workdir), "-o", str(exported)]) == 0
    assert str(exported) in capsys.readouterr().out
    images, outputs = random_images(1, 8, 8), []
    for path in (workdir, exported):
        loaded = models.load(path)
        assert (loaded.scale, loaded.sampling) == (4, Sampling("ddim", 2))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))
        outputs.append(loaded.upscale(images, jax.random.key(9)))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(
        outputs[0], model.upscale(images, jax.random.key(9))
    )  # the moving average, not the weights
    assert models.load(workdir).name == f"{workdir} at step 7"
    assert models.load(exported).name == "model.safetensors"


def test_bfloat16_export_is_close(workdir, model, tmp_path):
    exported = tmp_path / "model.safetensors"
    assert cli.main(["export", str(workdir), "-o", str(exported), "--dtype", "bfloat16"]) == 0
    loaded = models.load(exported)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype("float32")}
    images = random_images(1, 8, 8)
    difference = loaded.upscale(images, jax.random.key(9)).astype(int) - model.upscale(
        images, jax.random.key(9)
    )
    assert 0 < np.abs(difference).mean() < 1


def test_export_needs_the_safetensors_suffix(workdir, tmp_path, capsys):
    assert cli.main(["export", str(workdir), "-o", str(tmp_path / "model.ckpt")]) == 2
    assert "model.ckpt must end in .safetensors" in capsys.readouterr().err


def test_shipped_model_is_loaded_by_name(model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    weights.export(tmp_path / "tiny_4x.safetensors", model.params, config())
    assert models.load("tiny_4x").name == "tiny_4x"
    with pytest.raises(UserError) as error:
        models.load("tiny_8x")
    assert "'tiny_8x'" in str(error.value) and "(tiny_4x)" in str(error.value)


@pytest.mark.parametrize("name", ["no/such/model", "x" * 5000, "nul\0"])
def test_unknown_model_names_fail(name):
    assert "no model " in load_error(name)


def load_error(path) -> str:
    with pytest.raises(UserError) as error:
        models.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_that_are_not_workdirs_fail(tmp_path):
    assert f"{tmp_path} has no config.json" in load_error(tmp_path)
    checkpoints.write_config(tmp_path, config())
    assert f"{tmp_path} has no checkpoint" in load_error(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in load_error(tmp_path)


def broken(change) -> dict:
    values = config()
    change(values)
    return values


@pytest.mark.parametrize(
    "values",
    [
        {},
        [],
        broken(lambda c: c.pop("diffusion")),
        broken(lambda c: c["diffusion"].pop("prediction")),
        broken(lambda c: c["model"].update(depth=3)),
        broken(lambda c: c.update(model=[1])),
        broken(lambda c: c["model"].update(channels="many")),
        broken(lambda c: c["model"].update(multipliers=3)),
        broken(lambda c: c["diffusion"].update(num_steps=-1)),
    ],
)
def test_config_of_another_version_fails(values, tmp_path):
    weights.export(tmp_path / "model.safetensors", params_of(config()), values)
    assert str(tmp_path / "model.safetensors") in load_error(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda p: p.pop("input"), "input.bias"),
        (lambda p: p["output"].update(kernel=np.ones((3, 3, 4, 3), np.float32)), "output.kernel"),
        (lambda p: p.update(more=np.ones(3, np.float32)), "more"),
    ],
)
def test_weights_of_another_network_fail(change, where, tmp_path):
    params = params_of(config())
    change(params)
    weights.export(tmp_path / "model.safetensors", params, config())
    text = load_error(tmp_path / "model.safetensors")
    assert "model.safetensors" in text and re.search(rf"\b{re.escape(where)}\b", text)
