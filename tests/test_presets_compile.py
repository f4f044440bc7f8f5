"""The training step and the sampler of every preset compile: from shapes, with fewer and narrower levels."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from sr3_jax.config import load_config
from sr3_jax.config.load import preset_names
from sr3_jax.distributed import sharding
from sr3_jax.train.experiment import Experiment, read
from sr3_jax.train.held_out import held_out_jit
from sr3_jax.train.state import abstract_state
from sr3_jax.train.step import jit_train_step, make_train_step
from tests import tiny

# These have the network of another preset, at another size or on other data.
LIKE_OTHERS = {
    "orl_8x",
    "photos_4x_small",
    "fashion_8_16",
    "faces_64_256",
    "imagenet_64_256",
    "adm_128_512",
    "faces_64_512_patch2",
    "faces_256_1024_patch4",
}
NAMES = [name for name in preset_names() if not name.startswith("cascade_") and name not in LIKE_OTHERS]


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick_compilation():
        yield


def reduced(name: str) -> Experiment:
    """At most two levels of one block, four channels, the smallest crop, two examples, two sampling steps."""
    config = load_config(name)
    multipliers, attended = config["model"]["multipliers"][:2], config["model"]["attention_levels"]
    levels = len(multipliers)
    config["model"] |= {
        "channels": 4,
        "multipliers": multipliers,
        "num_blocks": (1,) * levels,
        "head_channels": 0,
        "norm_groups": 2 if config["model"]["network"] == "adm" else config["model"]["norm_groups"],
    }
    config["model"]["attention_levels"] = (levels - 1,) if attended else ()
    stride = config["model"]["patch"] * 2 ** (levels - 1)
    config["data"]["crop"] = config["data"]["shrink"] * math.lcm(stride, config["data"]["scale"])
    config["stage"]["size"] = 0
    config["train"] |= {"batch_size": 2, "accumulation": 1}
    config["sampling"]["steps"] = min(2, config["sampling"]["steps"])
    return read(config)


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
    section = small.section("sampling")
    sampler = held_out_jit(small.objective, mesh, rows=2, steps=section["steps"], solver=section["solver"])
    values, images = sampler.lower(state.ema_params, batch, key).compile().out_info
    assert images["output"].shape == (2, *(crop // small.section("data")["shrink"],) * 2, 3)
    assert ("eval_psnr" in values) == small.section("model")["low_res"]
