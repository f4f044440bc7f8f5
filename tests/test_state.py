"""The training state: creation, sharding, and the moving average."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as Spec

from sr3_jax.distributed import sharding
from sr3_jax.train.optim import lr_schedule, make_optimizer
from sr3_jax.train.state import (
    abstract_state,
    create_state,
    init_state,
    parameter_table,
    skipped_steps,
    start_from,
    update_ema,
)
from tests import tiny

OPTIMIZER = optax.adam(1e-3)
MESHES = [(8, 1), (1, 8), (2, 4)]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


@pytest.fixture
def small_arrays_are_split(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 1000)


def init_params(key):
    return {"kernel": jax.random.normal(key, (3, 16, 32)), "bias": jnp.full((16,), 0.5)}


def flat(tree) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
def test_state_is_created_sharded_and_equal_on_any_mesh(data, fsdp, small_arrays_are_split):
    state = create_state(init_params, OPTIMIZER, jax.random.key(7), sharding.make_mesh(data=data, fsdp=fsdp))
    kernels = [leaf for path, leaf in flat(state).items() if "kernel" in path]
    assert len(kernels) == 4  # weights, moving average, Adam's two moments
    for leaf in kernels:
        assert leaf.sharding.spec == (Spec(None, None, "fsdp") if fsdp > 1 else Spec())
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(3, 16, 32 // fsdp)}
    for path, leaf in flat(state).items():
        assert "kernel" in path or leaf.sharding.is_fully_replicated, path

    wanted = jax.jit(init_params)(jax.random.key(7))
    for name in wanted:
        np.testing.assert_array_equal(state.params[name], wanted[name])
        np.testing.assert_array_equal(state.ema_params[name], wanted[name])
    assert state.step.dtype == jnp.int32 and int(state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_abstract_state_matches_the_state(small_arrays_are_split):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    state = create_state(init_params, OPTIMIZER, jax.random.key(0), mesh)
    abstract = abstract_state(init_params, OPTIMIZER, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for wanted, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert not isinstance(wanted, jax.Array)
        assert (wanted.shape, wanted.dtype, wanted.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)


@pytest.mark.parametrize("host", [True, False])
def test_start_from_copies_the_given_weights(host, small_arrays_are_split):
    given = jax.jit(init_params)(jax.random.key(3))
    given = jax.device_get(given) if host else given
    mesh = sharding.make_mesh(data=2, fsdp=4)
    state = start_from(given, OPTIMIZER, mesh)
    for tree in (state.params, state.ema_params):
        for name in given:
            np.testing.assert_array_equal(tree[name], given[name])
    assert int(state.step) == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    shardings = [leaf.sharding for leaf in jax.tree.leaves(abstract_state(init_params, OPTIMIZER, mesh))]
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == shardings
    # The arrays do not share buffers: donating the state must not delete the given weights.
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(state)
    assert np.isfinite(given["kernel"]).all()


def test_ema_warms_up_to_its_decay():
    generator, decay = np.random.default_rng(0), 0.9
    params = [generator.standard_normal(5).astype(np.float32) for _ in range(200)]
    average = wanted = generator.standard_normal(5).astype(np.float32)
    update = jax.jit(lambda ema, new, step: update_ema({"w": ema}, {"w": new}, step, decay)["w"])
    for step, new in enumerate(params):
        average = update(average, new, jnp.int32(step))
        keep = min(decay, (1 + step) / (10 + step))
        wanted = keep * np.asarray(wanted, np.float64) + (1 - keep) * new
        if step in (0, 1, 10, 79, 80, 81, 199):  # (1 + step) / (10 + step) is 0.9 at step 80
            np.testing.assert_allclose(average, wanted, rtol=1e-4, atol=1e-6)


def test_ema_of_constant_weights_is_bit_exact():
    weights = {"w": np.random.default_rng(1).standard_normal(100).astype(np.float32)}
    np.testing.assert_array_equal(update_ema(weights, weights, jnp.int32(5), 0.9999)["w"], weights["w"])


def test_parameter_table_has_one_line_for_each_level():
    names = (
        "down_0_0",
        "down_0_1_attention",
        "down_1",
        "mid_0",
        "mid_attention",
        "noise_in",
        "noise_out",
        "out",
    )
    table = parameter_table({name: {"kernel": np.zeros((10, 2**index))} for index, name in enumerate(names)})
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [(name, int(count.replace(",", ""))) for name, count, _ in rows] == [
        ("down_0", 30),
        ("down_1", 40),
        ("mid", 240),
        ("noise", 960),
        ("out", 1280),
    ]
    assert rows[-1][2] == "50.2%"


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_skipped_steps_are_those_that_the_optimizer_has_not_counted(name):
    optimizer = make_optimizer(name, lr_schedule(1e-3, warmup_steps=2), b1=0.9, b2=0.99, clip_norm=1.0)
    state = init_state({"block": {"kernel": jnp.ones((4, 4))}}, optimizer)
    assert skipped_steps(state) == 0
    for _ in range(3):
        _, opt_state = optimizer.update(state.params, state.opt_state, state.params)
        state = dataclasses.replace(state, opt_state=opt_state)
    assert skipped_steps(dataclasses.replace(state, step=jnp.int32(5))) == 2
