"""The presets: the paper's parameter counts and hyperparameters, and the validity of every preset."""

from __future__ import annotations

import importlib

import jax
import numpy as np
import pytest

from sr3_jax.config import count_parameters, load_config
from sr3_jax.config.load import PRESETS, load_cascade, preset_names
from sr3_jax.distributed.sharding import mesh_sizes
from sr3_jax.train.experiment import check_batch, read

CASCADES = [name for name in preset_names() if name.startswith("cascade_")]
SINGLE = [name for name in preset_names() if name not in CASCADES]
# Table A.1 and section 4 of the paper; the last column is the number of parameters that the paper gives, in millions.
#                     channels, multipliers, blocks, dropout, low, high, M parameters
PAPER = {
    "faces_16_128": (128, (1, 2, 4, 8, 8), 3, 0.2, 16, 128, 550),
    "imagenet_64_256": (128, (1, 2, 4, 4, 8, 8), 3, 0.0, 64, 256, 625),
    "faces_64_512": (64, (1, 2, 4, 8, 8, 16, 16), 3, 0.0, 64, 512, 625),
    "faces_256_1024": (16, (1, 2, 4, 8, 16, 32, 32, 32), 2, 0.0, 256, 1024, 150),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_follow_the_papers_table(name):
    channels, multipliers, blocks, dropout, low, high, _ = PAPER[name]
    config = load_config(name)
    model, diffusion, data, optim, train = (
        config[section] for section in ("model", "diffusion", "data", "optim", "train")
    )
    assert (model["channels"], model["multipliers"], model["dropout"]) == (channels, multipliers, dropout)
    assert model["num_blocks"] == (blocks,) * len(multipliers)
    # attention at 16x16 only, besides the lowest resolution
    assert [high // 2**level for level in model["attention_levels"]] == [16] and model["mid_attention"]
    assert (model["layout"], model["patch"], model["norm"], model["head_channels"]) == (
        "biggan",
        1,
        "group",
        0,
    )
    assert (data["crop"], data["scale"]) == (high, high // low)
    assert (diffusion["space"], diffusion["prediction"]) == ("image", "eps")
    assert (diffusion["norm"], diffusion["weighting"]) == ("l1", "none")
    assert (diffusion["schedule"], diffusion["num_steps"]) == ("linear", 2000)
    assert (diffusion["beta_start"], diffusion["beta_end"]) == (1e-6, 1e-2)
    assert (train["batch_size"], train["num_steps"]) == (256, 1_000_000)
    assert (optim["learning_rate"], optim["warmup_steps"], optim["decay"]) == (1e-4, 10_000, "constant")
    assert (optim["ema_decay"], config["sampling"]["solver"]) == (0.9999, "ddpm")


@pytest.mark.parametrize("name", SINGLE)
def test_a_preset_states_the_number_of_its_parameters(name):
    alive = len(jax.live_arrays())
    count = count_parameters(load_config(name))
    assert len(jax.live_arrays()) - alive < 10  # from shapes: a key, and none of the hundreds of weights
    assert count == importlib.import_module(f"{PRESETS}.{name}").PARAMETERS
    if name in PAPER:
        assert count / 1e6 == pytest.approx(PAPER[name][-1], rel=0.03)


@pytest.mark.parametrize("name", SINGLE)
def test_a_preset_is_valid(name):
    experiment = read(load_config(name))
    assert np.isclose(experiment.objective.schedule.gamma64[0], 1)
    check_batch(experiment.config, devices=8, processes=1)


@pytest.mark.parametrize(("name", "sizes"), [("faces_16_128", (1, 4)), ("photos_4x", (4, 1))])
def test_a_large_state_is_sharded_over_the_devices_that_there_are(name, sizes):
    experiment = read(load_config(name))
    assert mesh_sizes(4, **experiment.section("mesh"), state_bytes=experiment.state_bytes) == sizes


@pytest.mark.parametrize("name", CASCADES)
def test_the_stages_of_a_cascade_fit(name):
    """Each stage takes the size that the one before it generates."""
    configs = [read(config).config for config in load_cascade(name)]
    assert not configs[0]["model"]["low_res"] and all(config["model"]["low_res"] for config in configs[1:])
    made = [config["stage"]["size"] for config in configs]
    taken = [config["stage"]["size"] // config["data"]["scale"] for config in configs]
    assert made[:-1] == taken[1:] and str(made[-1]) in name
    assert made == [config["data"]["crop"] // config["data"]["shrink"] for config in configs]


def test_a_single_config_is_not_a_cascade():
    assert load_cascade("photos_4x") == []
