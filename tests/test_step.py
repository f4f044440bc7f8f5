"""The training step: inputs of the network, learning, and equality on any mesh and with accumulation.

Shape legend: B batch, A accumulation. The optimizer has a large eps, so that its updates are smooth in the gradient
and rounding errors are not amplified.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image as PillowImage

from sr3_jax.diffusion.loss import denoising_loss, sample_noise
from sr3_jax.distributed import sharding
from sr3_jax.flops import flops
from sr3_jax.train import experiment
from sr3_jax.train.examples import Task, make_pair
from sr3_jax.train.held_out import held_out_jit
from sr3_jax.train.state import abstract_state, start_from
from sr3_jax.train.step import (
    LOG_SNR_BINS,
    batch_losses,
    flops_without_remat,
    jit_train_step,
    loss_by_log_snr,
    make_train_step,
)
from tests import tiny

OPTIMIZER = optax.adam(0.03, eps=1e-2)
DECAY = 0.9


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="module")
def objective():
    return experiment.read(tiny.config()).objective


@pytest.fixture(scope="module")
def params(objective):
    key = jax.random.key(0)
    return tiny.perturbed(jax.device_get(jax.jit(experiment.read(tiny.config()).init_params)(key)))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """uint8 [8,16,16,3], smooth."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 5, 5, 3), dtype=np.uint8)
    resize = PillowImage.Resampling.BICUBIC
    return np.stack([np.asarray(PillowImage.fromarray(one).resize((16, 16), resize)) for one in coarse])


class Run:
    """A compiled step on a mesh."""

    def __init__(self, objective, params, mesh: Mesh, *, rows: int = 8, **options) -> None:
        self.mesh, self.params = mesh, params
        step = jit_train_step(
            make_train_step(objective, OPTIMIZER, ema_decay=DECAY, **options), self.state(), mesh
        )
        image = jax.ShapeDtypeStruct((rows, 16, 16, 3), np.uint8, sharding=sharding.batch_sharding(mesh))
        key = jax.eval_shape(lambda: jax.random.key(0))
        self.compiled = step.lower(self.state(), {"image": image}, key).compile()

    def state(self, step: int = 0):
        state = start_from(self.params, OPTIMIZER, self.mesh)
        return dataclasses.replace(state, step=jax.device_put(jnp.int32(step), state.step.sharding))

    def batch(self, images: np.ndarray):
        return sharding.to_global({"image": images}, self.mesh)

    def __call__(self, images: np.ndarray, *, seed: int = 1, step: int = 0, count: int = 1):
        """The state on the host, and the metrics of each step, after `count` steps."""
        state, metrics = self.state(step), []
        for _ in range(count):
            state, values = self.compiled(state, self.batch(images), jax.random.key(seed))
            metrics.append(jax.device_get(values))
        return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def gradients(objective):
    """(weights, 8 crops, key) -> the mean loss and its gradient, on one device."""

    @jax.jit
    def run(params, rows, key):
        def loss(params):
            return jnp.mean(batch_losses(params, {"image": rows}, key, objective=objective, train=True)[0])

        return jax.value_and_grad(loss)(params)

    return run


@pytest.fixture(scope="module")
def one_device(objective, params) -> Run:
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    return Run(objective, params, Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 2))


@pytest.fixture(scope="module")
def eight_devices(objective, params) -> Run:
    return Run(objective, params, sharding.make_mesh())


@pytest.fixture(scope="module")
def sharded(objective, params):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "FSDP_MIN_BYTES", 64)
        run = Run(objective, params, sharding.make_mesh(data=2, fsdp=4))
        yield run


# ---- Inputs of the network


def test_condition_matches_pillow(images):
    target, cond = jax.jit(make_pair, static_argnums=1)(
        {"image": images, "label": np.arange(8)}, Task(scale=4)
    )
    np.testing.assert_allclose(target, images / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(cond["label"], np.arange(8))
    bicubic = PillowImage.Resampling.BICUBIC

    def resize(image: np.ndarray, side: int) -> np.ndarray:
        return np.asarray(PillowImage.fromarray(image.astype(np.float32)).resize((side, side), bicubic))

    for index in range(len(images)):
        for channel in range(3):
            low_res = np.clip(
                np.round(resize(images[index, ..., channel], 4)), 0, 255
            )  # the levels of an image file
            upsampled = 127.5 * (np.asarray(cond["upsampled"][index, ..., channel]) + 1)
            np.testing.assert_allclose(upsampled, resize(low_res, 16), atol=0.02)


def test_network_gets_the_noisy_target_and_its_condition(objective, images):
    seen = {}

    class Spy:
        def apply(self, variables, y_t, gamma, cond, *, train, rngs):
            seen.update(y_t=y_t, gamma=gamma, cond=cond, train=train, params=variables["params"])
            seen["mask"] = jax.random.bernoulli(rngs["dropout"], shape=(64,))
            return jnp.zeros_like(y_t)

    spied = dataclasses.replace(objective, network=Spy())
    batch = {"image": images, "label": np.arange(8, dtype=np.int32)}
    losses, _ = batch_losses("weights", batch, jax.random.key(0), objective=spied, train=True)
    assert losses.shape == (8,) and losses.dtype == jnp.float32
    assert seen["train"] is True and seen["params"] == "weights"
    target, cond = make_pair(batch, Task(scale=4))
    for name in ("upsampled", "label"):
        np.testing.assert_array_equal(seen["cond"][name], cond[name])
    # y_t = sqrt(gamma) z0 + sqrt(1 - gamma) eps with unit eps, and the loss is the mean of v^2.
    gamma = np.asarray(seen["gamma"])[:, None, None, None]
    z0 = 4.0 * np.asarray(target - cond["upsampled"])  # the residual space of the tiny config
    eps = (seen["y_t"] - np.sqrt(gamma) * z0) / np.sqrt(1 - gamma)
    noisy = (1 - gamma).ravel() > 0.01  # otherwise rounding errors are divided by almost 0
    assert abs(eps[noisy].std() - 1) < 0.1 and abs(eps[noisy].mean()) < 0.1
    v = np.sqrt(gamma) * eps - np.sqrt(1 - gamma) * z0
    np.testing.assert_allclose(losses[noisy], (v**2).mean((1, 2, 3))[noisy], rtol=1e-3)

    first = np.asarray(seen["mask"])
    batch_losses("weights", batch, jax.random.key(1), objective=spied, train=False)
    assert seen["train"] is False and np.any(
        first != seen["mask"]
    )  # the dropout key changes with the key of the step


def test_step_applies_dropout(objective, images):
    seen = []

    class Spy:
        regression = False

        def apply(self, variables, y_t, gamma, cond, *, train, rngs):
            seen.append(train)
            return y_t * variables["params"]["w"]

    step = make_train_step(dataclasses.replace(objective, network=Spy()), OPTIMIZER, ema_decay=DECAY)
    state = start_from({"w": np.ones((), np.float32)}, OPTIMIZER, sharding.make_mesh())
    jax.eval_shape(step, state, {"image": images}, jax.random.key(0))
    assert seen == [True]


# ---- One step


def test_overfitting_one_batch_lowers_the_loss(eight_devices, images):
    _, metrics = eight_devices(images, count=60)
    losses = [values["loss"] for values in metrics]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])


def test_one_step_matches_its_formula(eight_devices, gradients, params, images):
    """The gradient of the mean loss at fold_in(key, step), then the optimizer, then the moving average."""

    value, grads = gradients(params, images, jax.random.fold_in(jax.random.key(1), 5))
    updates, opt_state = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
    wanted = optax.apply_updates(params, updates)
    state, [metrics] = eight_devices(images, seed=1, step=5)
    assert state.step == 6
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    near(state.params, wanted)
    near(state.opt_state, opt_state)
    # the decay of the sixth update is (1 + 5) / (10 + 5)
    near(state.ema_params, jax.tree.map(lambda old, new: 0.4 * old + 0.6 * new, params, wanted))


def near(tree, wanted, atol: float = 2e-5) -> None:
    for (path, leaf), want in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(leaf, want, rtol=1e-4, atol=atol, err_msg=jax.tree_util.keystr(path))


def same_bits(tree, wanted) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_loss_is_summed_in_bins_of_log_snr():
    gamma = np.array([1e-4, 0.01, 0.05, 0.2, 0.4, 0.5, 0.9, 0.97, 0.9999, 0.99999, 1.0], np.float32)
    losses = np.arange(1.0, 12, dtype=np.float32)
    names = ["below_m6", "m6_m4", "m4_m2", "m2_0", "0_2", "2_4", "4_6", "above_6"]
    assert tuple(f"loss_log_snr_{name}" for name in names) == LOG_SNR_BINS
    sums, counts = loss_by_log_snr(losses, gamma)
    assert dict(zip(names, zip(sums, counts, strict=True), strict=True)) == {
        "below_m6": (1, 1),
        "m6_m4": (2, 1),
        "m4_m2": (3, 1),
        "m2_0": (9, 2),
        "0_2": (6, 1),
        "2_4": (15, 2),
        "4_6": (0, 0),
        "above_6": (30, 3),
    }


def test_bins_of_log_snr_have_the_noise_levels_of_the_step(eight_devices, objective, images):
    """All levels of the batch, whose mean loss is that of the step; and the levels that the loss samples itself."""
    _, [metrics] = eight_devices(images)
    sums, counts = metrics["by_log_snr"]
    assert counts.sum() == 8
    np.testing.assert_allclose(sums.sum() / 8, metrics["loss"], rtol=1e-5)
    seen = []

    def denoiser(y_t, gamma, cond):
        seen.append(gamma)
        return y_t

    key, schedule = jax.random.key(3), objective.schedule
    denoising_loss(denoiser, key, jnp.zeros((8, 4, 4, 3)), {}, schedule=schedule)
    again = jax.random.clone(key)
    np.testing.assert_array_equal(sample_noise(again, schedule, (8, 4, 4, 3))[0], seen[0])


def test_step_is_a_pure_function_of_state_batch_and_seed(eight_devices, images):
    state, metrics = eight_devices(images, seed=1, step=3)
    again, metrics_again = eight_devices(images, seed=1, step=3)
    assert same_bits((state, metrics), (again, metrics_again))
    for other in ({"seed": 2, "step": 3}, {"seed": 1, "step": 4}):
        assert eight_devices(images, **other)[1][0]["loss"] != metrics[0]["loss"]
    assert eight_devices(images[::-1].copy(), seed=1, step=3)[1][0]["loss"] != metrics[0]["loss"]


def test_non_finite_step_changes_nothing_but_the_step_number(eight_devices, objective, params, images):
    def weighting(gamma, prediction):  # the loss of about half of the batches is not finite
        return jnp.where(gamma[0] > 0.995, jnp.nan, 1.0)

    broken = dataclasses.replace(objective, weighting=weighting)
    run = Run(broken, params, sharding.make_mesh(), skip_nonfinite=True)
    before, finite = jax.device_get(run.state(3)), []
    for seed in range(1, 8):
        state, [metrics] = run(images, seed=seed, step=3)
        assert state.step == 4
        finite.append(np.isfinite(metrics["loss"]))
        if finite[-1]:
            near(state, eight_devices(images, seed=seed, step=3)[0])
        else:
            assert same_bits(dataclasses.replace(state, step=before.step), before)
    assert {True, False} == set(finite)


# ---- On any mesh


def test_results_are_equal_on_one_device_eight_devices_and_with_sharded_weights(
    one_device, eight_devices, sharded, images
):
    state, metrics = one_device(images, count=5)
    for run in (eight_devices, sharded):
        other, other_metrics = run(images, count=5)
        near(other, state)
        near(other_metrics, metrics)


def test_weights_stay_sharded_and_examples_stay_on_their_devices(sharded, images):
    state, _ = sharded.compiled(sharded.state(), sharded.batch(images), jax.random.key(0))
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    divisible = [leaf for leaf in jax.tree.leaves(sharded.params) if leaf.nbytes >= 64]
    assert len(split) == 4 * len(divisible) > 4 * 10  # weights, moving average, Adam's two moments
    for leaf in split:
        assert {np.prod(shard.data.shape) for shard in leaf.addressable_shards} == {leaf.size // 4}
    program = sharded.compiled.as_text()
    assert "all-gather(" in program
    # Every forward convolution of 8x8 pixels is on the one example of this device, not on the whole batch.
    rows = re.findall(r"f32\[(\d+),8,8,\d+\]\S* convolution\(", program)
    assert len(rows) > 10 and set(rows) == {"1"}


@pytest.mark.parametrize("name", ["eight_devices", "sharded"])
def test_old_state_is_donated(name, images, request):
    run = request.getfixturevalue(name)
    old = run.state()
    new, _ = run.compiled(old, run.batch(images), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(new))
    assert run.compiled.memory_analysis().alias_size_in_bytes == held


def test_weights_are_gathered_before_held_out_sampling_and_not_in_each_of_its_steps(objective, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 64)
    mesh = sharding.make_mesh(data=1, fsdp=8)
    state = abstract_state(experiment.read(tiny.config()).init_params, OPTIMIZER, mesh)
    image = jax.ShapeDtypeStruct((8, 16, 16, 3), np.uint8, sharding=sharding.batch_sharding(mesh))
    evaluation = held_out_jit(objective, mesh, rows=8, steps=3, solver="ddim")
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = evaluation.lower(state.ema_params, {"image": image}, key).compile().as_text()
    loops = [
        re.search(rf"^%{re.escape(name)} .*?^}}", program, re.MULTILINE | re.DOTALL)[0]
        for name in re.findall(r"body=%([\w.-]+)", program)
    ]
    assert "all-gather" in program and loops
    assert not any("all-gather" in loop for loop in loops)


@pytest.mark.parametrize(
    ("model", "accumulation"),
    [({}, 1), ({"remat": True, "remat_keeps": "convs"}, 2), ({"remat": True, "dtype": "bfloat16"}, 1)],
    ids=["plain", "remat and accumulation", "remat and bfloat16"],
)
def test_fully_sharded_step_matches_one_device(params, one_device, images, monkeypatch, model, accumulation):
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 64)
    objective = experiment.read(tiny.config(model=tiny.CONFIG["model"] | model)).objective
    rows = 8 * accumulation
    crops = np.concatenate([images] * accumulation)
    run = Run(objective, params, sharding.make_mesh(data=1, fsdp=8), rows=rows, accumulation=accumulation)
    new, _ = run.compiled(run.state(), run.batch(crops), jax.random.key(1))
    split = [leaf for leaf in jax.tree.leaves(new) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 20
    assert all(shard.data.size == leaf.size // 8 for leaf in split for shard in leaf.addressable_shards)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(new))
    assert run.compiled.memory_analysis().alias_size_in_bytes == held  # no second copy of the state
    found = re.findall(r"\w+\[(\d+),8,8,\d+\]\S* convolution\(", run.compiled.as_text())
    assert found and set(found) == {"1"}
    if accumulation == 1:
        state, metrics = run(crops, count=5)
        wanted, wanted_metrics = one_device(images, count=5)
    else:  # each part has its own keys
        state, metrics = run(crops, count=5)
        single = Run(objective, params, one_device.mesh, rows=rows, accumulation=accumulation)
        wanted, wanted_metrics = single(crops, count=5)
    if "dtype" not in model:
        near(state, wanted)
        near(metrics, wanted_metrics)
    else:  # 8 bits of mantissa
        losses = [[one["loss"] for one in of] for of in (metrics, wanted_metrics)]
        np.testing.assert_allclose(*losses, rtol=0.02)
        assert losses[0] != losses[1]


# ---- Accumulation


def test_accumulation_averages_the_gradients_of_strided_parts(objective, gradients, params, images):
    images = np.concatenate([images, 255 - images])
    run = Run(objective, params, sharding.make_mesh(), rows=16, accumulation=2)
    state, [metrics] = run(images, seed=4)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(4), 0), 2)
    parts = [gradients(params, images[start::2], keys[start]) for start in range(2)]
    value, grads = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    updates, _ = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
    near(state.params, optax.apply_updates(params, updates))
    rows = re.findall(r"f32\[(\d+),8,8,\d+\]\S* convolution\(", run.compiled.as_text())
    assert rows and set(rows) == {"1"}  # each device has one of the 8 rows of a part


def test_flops_do_not_count_what_remat_repeats(objective, params, images):
    arguments = (start_from(params, OPTIMIZER, sharding.make_mesh()), {"image": images}, jax.random.key(0))

    def count(remat: bool) -> float:
        network = objective.network.clone(remat=remat)
        step = make_train_step(dataclasses.replace(objective, network=network), OPTIMIZER, ema_decay=DECAY)
        return flops(jax.make_jaxpr(step)(*arguments))

    assert count(True) > count(False) > 0
    remat = dataclasses.replace(objective, network=objective.network.clone(remat=True))
    for accumulation in (1, 4):
        found = flops_without_remat(remat, OPTIMIZER, *arguments, accumulation=accumulation)
        assert found == pytest.approx(count(False))
