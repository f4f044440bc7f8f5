"""The learning rate at each step; Adam and clipping against their formulas in float64; Muon by its properties."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from sr3_jax.train.optim import lr_schedule, make_optimizer


def rates(schedule: optax.Schedule, steps) -> np.ndarray:
    return np.array([float(schedule(step)) for step in steps])


def test_warmup_is_linear_and_then_constant():
    schedule = lr_schedule(0.1, warmup_steps=4)
    np.testing.assert_allclose(rates(schedule, [0, 1, 2, 3, 4, 5, 10**6]), [0.025, 0.05, 0.075] + [0.1] * 4)


@pytest.mark.parametrize("warmup", [0, 1])
def test_no_warmup_starts_at_the_full_rate(warmup):
    np.testing.assert_allclose(rates(lr_schedule(0.1, warmup_steps=warmup), [0, 1, 5]), 0.1)


def test_cosine_decays_to_zero_at_the_last_step():
    schedule = lr_schedule(0.1, warmup_steps=2, decay="cosine", num_steps=10)
    half = 0.05 * (1 + np.cos(np.pi * np.arange(9) / 8))
    np.testing.assert_allclose(rates(schedule, range(1, 11)), [0.1, *half], atol=1e-8)
    np.testing.assert_allclose(rates(schedule, [11, 100]), 0, atol=1e-8)


def test_unknown_decay_fails():
    with pytest.raises(ValueError, match="'constant' or 'cosine', got 'linear'"):
        lr_schedule(0.1, warmup_steps=0, decay="linear")


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adam_with_clipping_matches_its_formula(clip_norm):
    optimizer = make_optimizer("adam", lr_schedule(0.01, warmup_steps=2), b1=0.8, b2=0.9, clip_norm=clip_norm)
    generator = np.random.default_rng(0)
    params = {"a": generator.standard_normal((2, 3)).astype(np.float32), "b": np.ones(2, np.float32)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    wanted = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: 0.0 for name in params}
    second = dict(first)
    for step, size in enumerate([10.0, 0.01, 3.0]):  # clipped, not clipped, clipped
        grads = {
            name: size * generator.standard_normal(v.shape).astype(np.float32) for name, v in params.items()
        }
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((grad.astype(np.float64) ** 2).sum() for grad in grads.values()))
        shrink = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for name, grad in grads.items():
            first[name] = 0.8 * first[name] + 0.2 * shrink * grad
            second[name] = 0.9 * second[name] + 0.1 * (shrink * grad) ** 2
            unbiased = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.9 ** (step + 1))
            wanted[name] -= [0.005, 0.01, 0.01][step] * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        for name in params:
            np.testing.assert_allclose(params[name], wanted[name], rtol=1e-5)


def test_muon_orthogonalizes_inner_kernels_and_leaves_the_rest_to_adam():
    shapes = {
        "input": {"kernel": (3, 3, 4, 8)},
        "down_0_0": {"Conv_0": {"kernel": (3, 3, 8, 16), "bias": (16,)}, "embedding": {"kernel": (24, 16)}},
        "output": {"kernel": (3, 3, 8, 12)},
    }
    generator = np.random.default_rng(1)
    grads = jax.tree.map(
        lambda shape: generator.standard_normal(shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    params = jax.tree.map(np.zeros_like, grads)
    rate, options = 0.1, {"b1": 0.9, "b2": 0.99}
    muon = make_optimizer("muon", lr_schedule(rate, warmup_steps=0), **options)
    updates, _ = muon.update(grads, muon.init(params), params)
    for leaf in (updates["input"], updates["output"], updates["down_0_0"]["Conv_0"]["bias"]):
        for update in jax.tree.leaves(leaf):  # Adam's first step has one size
            np.testing.assert_allclose(np.abs(update), np.abs(update).max(), rtol=1e-3)
    for kernel in (updates["down_0_0"]["Conv_0"]["kernel"], updates["down_0_0"]["embedding"]["kernel"]):
        singular = np.linalg.svd(np.asarray(kernel).reshape(-1, 16), compute_uv=False)
        assert singular.max() / singular.min() < 2  # Newton-Schulz makes them nearly equal
        assert np.sqrt(np.mean(np.square(kernel))) == pytest.approx(0.2 * rate, rel=0.3)
