"""The config files: the paper's networks by their size, the paper's hyperparameters, and that every file is whole."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sr3_jax.config import experiment
from sr3_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Table 1 and section 3 of the paper; the last column is what this reading of its text counts to.
#                     channels, multipliers, blocks, dropout, low, high, millions in the paper, here
PAPER = {
    "faces_16_128": (128, (1, 2, 4, 8, 8), 3, 0.2, 16, 128, 550, 560.7),
    "imagenet_64_256": (128, (1, 2, 4, 4, 8, 8), 3, 0.0, 64, 256, 625, 617.1),
    "faces_64_512": (64, (1, 2, 4, 8, 8, 16, 16), 3, 0.0, 64, 512, 625, 609.8),
    "faces_256_1024": (16, (1, 2, 4, 8, 16, 32, 32, 32), 2, 0.0, 256, 1024, 150, 148.7),
}


def load(name: str) -> dict:
    return experiment.load_config(CONFIGS / f"{name}.py")


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_the_papers_and_counted_from_shapes_alone(name):
    *_, paper, here = PAPER[name]
    config = load(name)
    alive, start = len(jax.live_arrays()), time.process_time()
    millions = experiment.count_parameters(config) / 1e6
    assert time.process_time() - start < 20
    assert len(jax.live_arrays()) - alive < 10  # a key and its like, none of the hundreds of weights
    assert millions == pytest.approx(paper, rel=0.03)
    assert millions == pytest.approx(here, abs=0.1)


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers_table(name):
    channels, multipliers, blocks, dropout, low, high, *_ = PAPER[name]
    config = load(name)
    model, diffusion, data, optim, train = (
        config[section] for section in ("model", "diffusion", "data", "optim", "train")
    )
    assert (model["channels"], model["multipliers"], model["dropout"]) == (channels, multipliers, dropout)
    assert model["num_blocks"] == (blocks,) * len(multipliers)
    # attention at 16x16 alone, besides the bottom
    assert [high // 2**level for level in model["attention_levels"]] == [16] and model["mid_attention"]
    assert (model["layout"], model["patch"], model["norm"], model["head_channels"]) == (
        "biggan",
        1,
        "group",
        0,
    )
    assert (data["crop"], data["scale"]) == (high, high // low)
    assert (diffusion["space"], diffusion["prediction"], diffusion["norm"], diffusion["weighting"]) == (
        "image",
        "eps",
        "l1",
        "none",
    )
    assert (diffusion["schedule"], diffusion["num_steps"]) == ("linear", 2000)
    assert (diffusion["beta_start"], diffusion["beta_end"]) == (1e-6, 1e-2)
    assert (train["batch_size"], train["num_steps"]) == (256, 1_000_000)
    assert (optim["learning_rate"], optim["warmup_steps"], optim["decay"]) == (1e-4, 10_000, "constant")
    assert (optim["ema_decay"], config["sampling"]["solver"]) == (0.9999, "ancestral")


STAGES = [path for path in sorted(CONFIGS.glob("[!_]*.py")) if not path.stem.startswith("cascade_")]
CASCADES = sorted(CONFIGS.glob("cascade_*.py"))


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_every_config_is_whole_and_its_docstring_gives_its_command(path):
    read = experiment.read(experiment.load_config(path))
    assert f"sr3 train --config=configs/{path.name} " in path.read_text(encoding="utf-8")
    assert np.isclose(read.objective.schedule.gamma64[0], 1)
    experiment.check_batch(read.config, devices=8, processes=1)


@pytest.mark.parametrize("path", CASCADES, ids=lambda path: path.stem)
def test_every_cascade_chains(path):
    """Each stage takes the size that the one before it makes."""
    configs = [experiment.read(config).config for config in experiment.load_cascade(path)]
    assert not configs[0]["model"]["low_res"] and all(config["model"]["low_res"] for config in configs[1:])
    made = [config["stage"]["size"] for config in configs]
    taken = [config["stage"]["size"] // config["data"]["scale"] for config in configs]
    assert made[:-1] == taken[1:] and str(made[-1]) in path.stem
    assert all(
        size == config["data"]["crop"] // config["data"]["shrink"]
        for size, config in zip(made, configs, strict=True)
    )
    assert f"sr3 train --config=configs/{path.name} " in path.read_text(encoding="utf-8")


def test_a_cascade_is_no_single_config():
    with pytest.raises(UserError, match=r"is a cascade of base_fashion_8\.py, .*: name one of these"):
        experiment.load_config(CONFIGS / "cascade_fashion_32.py")
    assert experiment.load_cascade(CONFIGS / "photos_4x.py") == []
