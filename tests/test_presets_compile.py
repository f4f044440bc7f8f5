"""Every config's training step and sampler compile, from shapes: its levels and settings, less deep and less wide."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sr3_jax.config import experiment
from sr3_jax.distributed import sharding
from sr3_jax.train.held_out import held_out_jit
from sr3_jax.train.state import abstract_state
from sr3_jax.train.step import jit_train_step, make_train_step
from tests import tiny

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Regressions have their twins' network, and these another config's at another size.
LIKE_OTHERS = {"orl_8x", "photos_4x_small", "fashion_8_16"}
NAMES = sorted(
    path.stem
    for path in CONFIGS.glob("[!_]*.py")
    if not path.stem.startswith("cascade_")
    and not path.stem.endswith("_regression")
    and path.stem not in LIKE_OTHERS
)


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick_compilation():
        yield


def reduced(name: str) -> experiment.Experiment:
    """Two levels at most of one block, four channels, the smallest crop, two examples, two steps of the sampler."""
    config = experiment.load_config(CONFIGS / f"{name}.py")
    multipliers, attended = config["model"]["multipliers"][:2], config["model"]["attention_levels"]
    levels = len(multipliers)
    config["model"] |= {
        "channels": 4,
        "multipliers": multipliers,
        "num_blocks": (1,) * levels,
        "head_channels": 0,
    }
    config["model"]["attention_levels"] = (levels - 1,) if attended else ()
    stride = config["model"]["patch"] * 2 ** (levels - 1)
    config["data"]["crop"] = config["data"]["shrink"] * math.lcm(stride, config["data"]["scale"])
    config["stage"]["size"] = 0
    config["train"] |= {"batch_size": 2, "accumulation": 1}
    config["sampling"]["steps"] = min(2, config["sampling"]["steps"])
    return experiment.read(config)


@pytest.mark.parametrize("name", NAMES)
def test_the_training_step_and_the_sampler_compile(name):
    small = reduced(name)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    optimizer, crop = small.optimizer(), small.section("data")["crop"]
    state = abstract_state(small.init_params, optimizer, mesh)
    batch = {"image": jax.ShapeDtypeStruct((2, crop, crop, 3), jnp.uint8)}
    if small.section("model")["num_classes"]:
        batch["label"] = jax.ShapeDtypeStruct((2,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jit_train_step(make_train_step(small.objective, optimizer, ema_decay=0.9), state, mesh)
    assert step.lower(state, batch, key).compile().memory_analysis().argument_size_in_bytes > 0
    section = small.section("eval")
    sampler = held_out_jit(small.objective, mesh, rows=2, steps=section["steps"], solver=section["solver"])
    values, images = sampler.lower(state.ema_params, batch, key).compile().out_info
    assert images["output"].shape == (2, *(crop // small.section("data")["shrink"],) * 2, 3)
    assert ("eval_psnr" in values) == small.section("model")["low_res"]
