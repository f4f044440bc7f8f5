"""`sr3 sweep`: the runs of a grid, a failing run, restarts, signals and the summary."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sr3_jax.cli.main import main
from sr3_jax.config.load import load_config
from sr3_jax.errors import UserError
from sr3_jax.train.sweep import plan_sweep
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def config(tmp_path) -> str:
    """A config file for two images, with a single evaluation."""
    folder = tiny.images(tmp_path / "images", count=2)
    train = {"num_steps": 2, "batch_size": 8, "log_every": 1}
    values = tiny.config(folder, train=train, eval={"every": 2, "num_images": 1})
    (tmp_path / "tiny_config.py").write_text(f"def get_config():\n    return {values!r}\n")
    return str(tmp_path / "tiny_config.py")


def test_grid_is_every_combination_with_the_overrides(config):
    grid = ["optim.learning_rate=1e-4,3e-4", "data.mirror=true,false", "config.diffusion.norm=l2"]
    runs = plan_sweep(config, grid, ["--config.train.seed", "7"])
    assert [tuple(run.values.values()) for run in runs] == [
        (1e-4, True, "l2"),
        (1e-4, False, "l2"),
        (3e-4, True, "l2"),
        (3e-4, False, "l2"),
    ]
    assert len({run.name for run in runs}) == 4
    assert all("learning_rate" in run.name and Path(run.name).name == run.name for run in runs)
    assert runs[2].config["optim"]["learning_rate"] == 3e-4 and runs[2].config["train"]["seed"] == 7
    file, *options = runs[1].arguments
    assert load_config(file.removeprefix("--config="), options) == runs[1].config


def test_tuples_and_paths_are_values_too(config):
    (run,) = plan_sweep(config, ["model.multipliers=1,", "data.source=folder:/a/b"], [])
    assert run.values == {"model.multipliers": (1,), "data.source": "folder:/a/b"}
    assert Path(run.name).name == run.name
    blocks = ["--config.model.num_blocks=1,1"]
    wide = plan_sweep(config, ["model.multipliers=1,1;1,2", f"data.source=folder:{'x' * 300}"], blocks)
    assert [run.values["model.multipliers"] for run in wide] == [(1, 1), (1, 2)]
    assert len({run.name for run in wide}) == 2 and max(len(run.name) for run in wide) < 250


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        (["learning_rate=1"], "--grid=learning_rate=1"),
        (["optim.learning_rat=1"], "learning_rate"),
        (["optim.learning_rate=1e-4,0.0001"], "twice"),
        (["optim.b1=0.9", "optim.b1=0.8"], "config.optim.b1"),
        (["optim.learning_rate=fast"], "'fast'"),
        (["optim.b1=0.5,2"], "2"),
        (["model.multipliers=1,2"], "multipliers"),  # num_blocks has one level
    ],
)
def test_invalid_grids_fail_before_any_run(config, grid, text):
    with pytest.raises(UserError, match=text):
        plan_sweep(config, grid, [])


def test_failing_run_is_named_the_others_go_on_and_a_restart_continues(config, tmp_path, capfd):
    absent, images = f"folder:{tmp_path}/absent", f"folder:{tmp_path}/images"
    workdir = tmp_path / "sweep"
    command = ["sweep", f"--config={config}", f"--workdir={workdir}", f"--grid=data.source={absent},{images}"]
    assert main(command) == 1
    out, err = capfd.readouterr()
    failed, finished = json.loads((workdir / "summary.json").read_text())
    assert f"run {failed['run']} failed with exit code 2" in err
    assert (failed["status"], failed["step"], failed["eval_psnr"]) == ("failed", 0, None)
    assert (finished["status"], finished["step"]) == ("finished", 2)
    assert finished["best_eval_psnr"] == finished["eval_psnr"] > 0
    assert "finished" in out and f"{finished['eval_psnr']:.4g}" in out
    with (workdir / "summary.csv").open() as file:
        assert [row["data.source"] for row in csv.DictReader(file)] == [absent, images]
    assert (workdir / finished["run"] / "checkpoints" / "2").is_dir()
    assert main([*command, "--index=1"]) == 0  # finished
    assert main([*command, "--index=0"]) == 2
    out, err = capfd.readouterr()
    assert "run 1 of 1" in out and finished["run"] not in out and "absent" in err
    assert main([*command, "--index=2"]) == 2
    assert main([*command, "--list"]) == 0
    assert "runs 0 to 1" in capfd.readouterr().err


def test_signal_saves_the_run_and_stops_the_sweep(config, tmp_path):
    workdir = tmp_path / "sweep"
    command = [sys.executable, "-m", "sr3_jax", "sweep", f"--config={config}", f"--workdir={workdir}"]
    options = ["--grid=train.seed=0,1", "--config.train.num_steps=1000000", "--config.eval.every=1000000"]
    sweep = subprocess.Popen([*command, *options], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""})
    try:
        deadline = time.monotonic() + 300
        while not any('"loss"' in path.read_text() for path in workdir.glob("*/metrics.jsonl")):
            assert sweep.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        sweep.send_signal(signal.SIGTERM)
        assert sweep.wait(timeout=120) == 143
    finally:
        sweep.kill()
    (run,) = (path for path in workdir.iterdir() if path.is_dir())
    assert list((run / "checkpoints").iterdir())
