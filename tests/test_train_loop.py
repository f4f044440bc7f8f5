"""Training runs: logs, bit-exact resume, stopping, and errors.

Tests of the order of events use a stand-in for the step, with given losses; the others use the real step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax import image_ops, memory, metrics
from sr3_jax.data import sources
from sr3_jax.data.batches import center_crops
from sr3_jax.data.sources import Source
from sr3_jax.degradations import PRESETS
from sr3_jax.distributed import sharding
from sr3_jax.errors import UserError
from sr3_jax.inference.loading import load
from sr3_jax.train import checkpoints, experiment, goodput, held_out, loop, step_metrics, weights
from sr3_jax.train.state import abstract_state
from sr3_jax.train.step import LOG_SNR_BINS
from tests import tiny

ROOT = Path(experiment.__file__).resolve().parent.parent
HELD_OUT = 5  # images; not a multiple of the devices
REAL = {
    "train": {"num_steps": 6, "log_every": 2},
    "eval": {"every": 3, "num_images": HELD_OUT},
    "checkpoint": {"every": 3, "keep": 10},
}
TIMED = {
    *("step_ms", "images_per_second", "data_wait", "tflops_per_device", "goodput", "seconds_total"),
    *(f"seconds_{name}" for name in goodput.LOSSES),
}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.images(tmp_path_factory.mktemp("images"))


def run(folder: Path, workdir: Path, sections: dict | None = None, **more) -> int:
    sections = {
        name: (sections or {}).get(name, {}) | more.get(name, {}) for name in {**(sections or {}), **more}
    }
    return loop.train(experiment.read(tiny.config(folder, **sections)), workdir)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps_of(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def restored(workdir: Path):
    """The newest checkpoint of a workdir, on the host."""
    read = experiment.read(checkpoints.read_config(workdir))
    with checkpoints.Checkpoints(workdir, keep=99) as store:
        return jax.device_get(
            store.restore(abstract_state(read.init_params, read.optimizer(), sharding.make_mesh()))
        )


def same_bits(tree, wanted) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


# ---- A real run


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run of 6 steps."""
    workdir = tmp_path_factory.mktemp("whole")
    assert run(folder, workdir, REAL) == 0
    return workdir


def test_run_writes_log_samples_config_and_checkpoints(whole, folder):
    assert steps_of(whole) == [3, 6]
    given = experiment.read(tiny.config(folder, **REAL)).config
    assert experiment.read(checkpoints.read_config(whole)).config == given
    assert sorted(path.name for path in (whole / "samples").iterdir()) == [
        "samples_0000003.png",
        "samples_0000006.png",
    ]
    logged = lines(whole)
    assert [line["step"] for line in logged] == [2, 3, 4, 6, 6]
    for line in (logged[0], logged[2], logged[3]):
        bins = {name for name in line if name in LOG_SNR_BINS}
        assert set(line) == {"step", "loss", "grad_norm", "learning_rate", *TIMED, *bins}
        assert min(line[name] for name in bins) < line["loss"] < max(line[name] for name in bins)
        assert 0.1 < line["loss"] < 10 and line["grad_norm"] > 0 and 0 <= line["data_wait"] <= 1
        assert line["images_per_second"] == pytest.approx(8e3 / line["step_ms"])
    assert [line["learning_rate"] for line in logged if "loss" in line] == pytest.approx([1e-3] * 3)
    for line in (logged[1], logged[4]):
        assert set(line) == {
            *("step", "eval_loss", "eval_psnr", "eval_consistency"),
            *("eval_psnr_bicubic", "eval_consistency_bicubic"),
        }
    state = restored(whole)
    assert state.step == 6
    assert not same_bits(state.params, state.ema_params)


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, folder, tmp_path):
    assert run(folder, tmp_path, REAL, train={"num_steps": 3}) == 0
    assert steps_of(tmp_path) == [3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')  # the log of a killed run
    assert run(folder, tmp_path, REAL) == 0
    assert same_bits(restored(tmp_path), restored(whole))

    def numbers(workdir: Path, first: int) -> list[dict]:
        return [
            {name: value for name, value in line.items() if name not in TIMED}
            for line in lines(workdir)
            if line["step"] > first and (line["step"] != 4 or "eval_loss" in line)
        ]

    # The line of step 4 is the mean over steps 3 and 4 in one run, and over step 4 only in the other.
    assert numbers(tmp_path, 3) == numbers(whole, 3)
    # The checkpoint saved during one run equals the last one of the other run.
    for workdir in (whole, tmp_path):
        shutil.copytree(workdir / "checkpoints" / "3", tmp_path / workdir.name / "checkpoints" / "3")
    names = (whole.name, tmp_path.name)
    early = [checkpoints.load_ema(tmp_path / name) for name in names]
    assert early[0][1] == 3 and same_bits(early[0], early[1])


def test_pairs_are_trained_and_evaluated_on_and_resume_bit_for_bit(folder, tmp_path):
    low_res = tiny.images(tmp_path / "lr", side=24 // 4, seed=9)  # not those that bicubic would give
    source = f"pairs:{low_res}:{folder}"
    sections = REAL | {"data": {"source": source, "eval_source": source}}
    assert run(folder, tmp_path / "whole", sections) == 0
    assert run(folder, tmp_path / "parts", sections, train={"num_steps": 3}) == 0
    assert run(folder, tmp_path / "parts", sections) == 0
    assert same_bits(restored(tmp_path / "whole"), restored(tmp_path / "parts"))
    crops = center_crops(sources.open_source(source), crop=16, count=HELD_OUT)
    bicubic = image_ops.to_uint8(image_ops.upsample(image_ops.to_unit(crops["low_res"]), 4))
    wanted = float(metrics.psnr(bicubic, crops["image"]).mean())
    assert lines(tmp_path / "whole")[-1]["eval_psnr_bicubic"] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UserError, match=r"scale 2"):
        run(folder, tmp_path / "other", sections | {"data": {"source": source, "scale": 2}})


def test_writers_of_the_config_are_used(folder, tmp_path, monkeypatch):
    StandIn(monkeypatch)
    for writers in ("none", "tensorboard"):
        workdir = tmp_path / writers
        assert run(folder, workdir, plain(num_steps=1, log_every=1), train={"writers": writers}) == 0
        assert lines(workdir) and (workdir / "tensorboard").exists() == (writers == "tensorboard")


def test_complete_run_does_nothing_when_started_again(whole, folder, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "copy")
    before = lines(workdir)
    assert run(folder, workdir, REAL) == 0
    assert lines(workdir) == before and steps_of(workdir) == [3, 6]
    assert f"6 steps; saved in {workdir}" in capsys.readouterr().err


def test_evaluation_missing_after_a_kill_is_run_on_resume(folder, tmp_path, monkeypatch):
    """The checkpoint of the step exists, but the log has no evaluation of it."""
    stand_in = StandIn(monkeypatch)
    sections = plain(num_steps=3, log_every=1) | {"eval": {"every": 3}}
    assert run(folder, tmp_path, sections) == 0
    log = tmp_path / "metrics.jsonl"
    whole = log.read_text()
    log.write_text("".join(line for line in whole.splitlines(True) if "eval_" not in line))
    assert run(folder, tmp_path, sections) == 0
    assert [line for line in log.read_text().splitlines() if "eval_" in line] == [
        line for line in whole.splitlines() if "eval_" in line
    ]
    count = len(stand_in.evaluated)
    assert run(folder, tmp_path, sections) == 0 and len(stand_in.evaluated) == count  # not evaluated twice


def test_evaluation_covers_all_images_once_and_is_reproducible(folder, whole, monkeypatch):
    """With five images on eight devices, the means are over the five."""
    seen = {}
    monkeypatch.setattr(held_out, "image_grid", lambda rows, **titles: seen.update(rows=rows, **titles))
    objective = experiment.read(tiny.config(folder, **REAL)).objective
    crops = np.random.default_rng(0).integers(0, 256, (HELD_OUT, 16, 16, 3), dtype=np.uint8)
    evaluate = held_out.HeldOutEvaluation(
        objective, {"image": crops}, sharding.make_mesh(), steps=2, solver="ddim", seed=0
    )
    params = restored(whole).ema_params
    with monkeypatch.context() as full:
        full.setattr(memory, "free_host_bytes", lambda: 1)
        with pytest.raises(memory.OutOfMemory, match=r"config\.eval\.num_images"):
            evaluate(params)
    values, _ = evaluate(params)
    assert evaluate(params)[0] == values
    low_res = image_ops.degrade(image_ops.to_unit(crops), 4)
    bicubic = image_ops.to_uint8(image_ops.upsample(low_res, 4))
    assert values["eval_psnr_bicubic"] == pytest.approx(float(metrics.psnr(bicubic, crops).mean()), rel=1e-4)
    low_res = image_ops.to_uint8(low_res)
    wanted = float(metrics.consistency(bicubic, low_res).mean())
    assert values["eval_consistency_bicubic"] == pytest.approx(wanted, rel=1e-3)
    assert seen["column_titles"] == ["low-res", "bicubic", "output", "ground truth"]
    assert len(seen["rows"]) == HELD_OUT
    outputs = np.stack([row[2] for row in seen["rows"]])
    assert values["eval_psnr"] == pytest.approx(float(metrics.psnr(outputs, crops).mean()), rel=1e-4)
    for index, row in enumerate(seen["rows"]):
        for cell, column in ((0, low_res), (1, bicubic), (3, crops)):
            np.testing.assert_array_equal(row[cell], column[index])
        assert row[2].shape == (16, 16, 3) and np.any(row[2] != row[1])


@pytest.mark.parametrize(("rows", "degradation"), [(1, "clean"), (5, "clean"), (5, "photo")])
def test_held_out_metrics_do_not_depend_on_the_number_of_devices(folder, whole, rows, degradation):
    objective = experiment.read(tiny.config(folder, **REAL)).objective
    objective = replace(objective, task=replace(objective.task, degradation=PRESETS[degradation]))
    crops = np.random.default_rng(0).integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8)
    params = restored(whole).ema_params
    found = []
    for count in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:count])
        options = {"steps": 2, "solver": "ancestral", "seed": 0}
        found.append(held_out.HeldOutEvaluation(objective, {"image": crops}, mesh, **options)(params)[0])
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4), name


# ---- The order of events, with a stand-in for the step


class StandIn:
    """A step with given losses that adds 1 to the state, and an evaluation that does nothing, for a tiny network.

    `events` records the order of calls.
    """

    def __init__(self, monkeypatch, losses=(1.0,) * 100, norms=(1.0,) * 100) -> None:
        self.events: list[tuple] = []
        self.states: list = []
        self.evaluated: list = []
        real_jit, real_fetch, real_global = jax.jit, step_metrics.fetch_finite, sharding.to_global

        def make_train_step(objective, optimizer, *, ema_decay, accumulation, skip_nonfinite):
            self.options = {"ema_decay": ema_decay, "accumulation": accumulation}
            return self.step

        def jit(function=None, **options):
            if function != self.step:
                return real_jit(function, **options)
            compiled = real_jit(function, **options)

            def dispatch(state, batch, key):
                self.states.append(state)
                self.events.append(("dispatch", len(self.states)))
                return compiled(state, batch, key)

            dispatch.trace = compiled.trace
            return dispatch

        def fetch_finite(step, metrics, workdir):
            self.events.append(("read", step))
            return real_fetch(step, metrics, workdir)

        def to_global(batch, mesh, **options):
            self.events.append(("fetch",))
            return real_global(batch, mesh, **options)

        class HeldOutEvaluation:
            def __init__(held_out, objective, batch, mesh, **options) -> None:
                self.held_out = batch

            def __call__(held_out, params):
                self.evaluated.append(jax.device_get(params))
                return {"eval_loss": 1.0}, np.zeros((4, 4, 3), np.uint8)

        def init_params(self, key):
            return {"w": jax.random.normal(key, (3,))}

        self._losses, self._norms = jnp.asarray(losses), jnp.asarray(norms)
        for target, name, value in (
            (loop, "make_train_step", make_train_step),
            (step_metrics, "fetch_finite", fetch_finite),
            (loop, "HeldOutEvaluation", HeldOutEvaluation),
            (experiment.Experiment, "init_params", init_params),
            (sharding, "to_global", to_global),
            (jax, "jit", jit),
        ):
            monkeypatch.setattr(target, name, value)

    def step(self, state, batch, key):
        values = {"loss": self._losses[state.step], "grad_norm": self._norms[state.step]}
        ema = jax.tree.map(lambda leaf: leaf + 1, state.ema_params)  # and 1 more below
        return jax.tree.map(lambda leaf: leaf + 1, dataclasses.replace(state, ema_params=ema)), values


def plain(**train) -> dict:
    return {"train": {"log_every": 100} | train, "eval": {"every": 100}, "checkpoint": {"every": 100}}


def test_each_log_line_is_the_mean_over_its_steps(folder, tmp_path, monkeypatch):
    StandIn(monkeypatch, losses=np.arange(1.0, 9), norms=10 * np.arange(1.0, 9))
    sections = plain(num_steps=8, log_every=3) | {"eval": {"every": 2}, "checkpoint": {"every": 5}}
    assert run(folder, tmp_path, sections) == 0
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in logged] == [
        (3, 2.0, 20.0),
        (6, 5.0, 50.0),
        (8, 7.5, 75.0),  # the last steps too
    ]
    assert [line["learning_rate"] for line in logged] == pytest.approx([1e-3] * 3)
    assert [line["step"] for line in lines(tmp_path) if "eval_loss" in line] == [2, 4, 6, 8]
    assert steps_of(tmp_path) == [5, 8]


def test_lost_time_is_logged_by_its_cause_and_summed_up(folder, tmp_path, monkeypatch, capsys):
    """Each batch, save and evaluation takes a known time in which nothing else happens."""
    StandIn(monkeypatch)
    seconds = {"data": 0.1, "checkpoint": 0.4, "evaluation": 0.6}

    def slower(function, what):
        def call(*args, **options):
            time.sleep(seconds[what])
            return function(*args, **options)

        return call

    monkeypatch.setattr(sharding, "to_global", slower(sharding.to_global, "data"))
    monkeypatch.setattr(checkpoints.Checkpoints, "save", slower(checkpoints.Checkpoints.save, "checkpoint"))
    monkeypatch.setattr(loop, "evaluate_and_log", slower(loop.evaluate_and_log, "evaluation"))
    sections = plain(num_steps=8, log_every=4) | {"eval": {"every": 4}, "checkpoint": {"every": 4}}
    assert run(folder, tmp_path, sections) == 0
    first, last = (line for line in lines(tmp_path) if "loss" in line)
    assert last["data_wait"] > 0.7
    for what, count in (("data", 6), ("checkpoint", 1), ("evaluation", 1)):  # at the last line
        assert count * seconds[what] < last[f"seconds_{what}"] < count * seconds[what] + 0.9
    assert first["seconds_evaluation"] == first["seconds_restart"] == 0 < first["seconds_start"]
    lost = sum(last[f"seconds_{name}"] for name in goodput.LOSSES)
    assert last["goodput"] == pytest.approx(1 - lost / last["seconds_total"])
    assert last["step_ms"] < 250  # without saving and evaluating
    summary = capsys.readouterr().err.splitlines()[-2]
    assert "training" in summary and summary.index("evaluating") > 0 and summary.index("saving") > 0


@pytest.mark.parametrize(("step", "wait", "lost"), [(0.5, 0.2, 0.0), (0.2, 0.5, 0.3), (0.0, 0.3, 0.3)])
def test_waiting_for_data_while_a_step_runs_is_not_lost(tmp_path, step, wait, lost):
    time_spent = goodput.Goodput()
    options = {"batch_size": 8, "log_every": 1, "num_steps": 9, "lr_schedule": lambda step: 1e-3}
    with loop.MetricWriter(tmp_path, total_steps=9) as writer:
        windows = step_metrics.StepMetrics(writer, workdir=tmp_path, goodput=time_spent, **options)
        with windows.waiting_for_data({"loss": SimpleNamespace(block_until_ready=lambda: time.sleep(step))}):
            time.sleep(wait)
    assert time_spent.metrics()["seconds_data"] == pytest.approx(lost, abs=0.15)


def test_time_adds_up_over_restarts_and_repeated_training_is_lost():
    rows = [
        {
            "step": 10,
            "seconds_total": 100.0,
            "seconds_start": 30.0,
            "seconds_data": 5.0,
            "seconds_restart": 1.0,
        },
        {"step": 10, "eval_loss": 1.0},
        {"step": 15, "seconds_total": 140.0, "seconds_start": 30.0, "seconds_data": 25.0},
        {"step": 20, "seconds_total": None},
    ]
    time_spent = goodput.Goodput(rows, first_step=12, started=time.monotonic() - 7)
    time_spent.lose("start", 3)
    found = time_spent.metrics()
    assert found["seconds_total"] == pytest.approx(147, abs=0.5)
    assert (found["seconds_start"], found["seconds_data"], found["seconds_restart"]) == (33, 5, 41)
    assert found["goodput"] == pytest.approx((147 - 33 - 5 - 41) / 147, abs=0.01)


def test_speed_of_the_devices_is_logged(folder, tmp_path, monkeypatch):
    """MFU where the peak of the device is known, memory where it is reported."""
    StandIn(monkeypatch)
    monkeypatch.setattr(loop, "flops", lambda jaxpr: 8e12)  # over eight devices
    assert run(folder, tmp_path / "unknown", plain(num_steps=2, log_every=1)) == 0
    for line in lines(tmp_path / "unknown")[:2]:
        assert line["tflops_per_device"] == pytest.approx(1e3 / line["step_ms"])
        assert not {"mfu", "device_memory_gb"} & set(line)
    monkeypatch.setattr(step_metrics, "peak_flops", lambda kind: 4e12)
    gpus = [
        SimpleNamespace(memory_stats=lambda use=use: {"bytes_in_use": use, "peak_bytes_in_use": 2 * use})
        for use in (1e9, 3e9)
    ]
    assert step_metrics.device_memory(gpus) == {"device_memory_gb": 3, "device_memory_peak_gb": 6}
    monkeypatch.setattr(step_metrics, "device_memory", lambda devices: {"device_memory_gb": 3})
    assert run(folder, tmp_path / "known", plain(num_steps=2, log_every=1)) == 0
    for line in lines(tmp_path / "known")[:2]:
        assert line["mfu"] == pytest.approx(line["tflops_per_device"] / 4)
        assert line["device_memory_gb"] == 3


def profiled_steps(workdir: Path) -> list[int]:
    """The steps in the profile of a workdir."""
    [file] = (workdir / "profile").rglob("*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
    ]
    return [int(dict(event.stats)["step_num"]) for event in events if event.name == "train"]


@pytest.mark.parametrize(
    ("window", "steps"),
    [
        ("2:4", [2, 3]),
        ("0:3", [1, 2]),  # not the first step, which compiles
        ("4:99", [4, 5]),  # the run ends first
    ],
)
def test_window_of_steps_is_profiled(folder, tmp_path, monkeypatch, capsys, window, steps):
    stand_in, start_trace, dispatched = StandIn(monkeypatch), jax.profiler.start_trace, []

    def record(*args, **options):
        dispatched.append(len(stand_in.states))
        start_trace(*args, **options)

    monkeypatch.setattr(jax.profiler, "start_trace", record)
    assert run(folder, tmp_path, plain(num_steps=6, profile_steps=window)) == 0
    assert profiled_steps(tmp_path) == steps and dispatched == steps[:1]
    assert str(tmp_path / "profile") in capsys.readouterr().err


def test_profile_that_fails_does_not_stop_the_run(folder, tmp_path, monkeypatch, capsys):
    StandIn(monkeypatch)
    jax.profiler.start_trace(str(tmp_path / "other"))  # only one at a time
    try:
        assert run(folder, tmp_path / "run", plain(num_steps=3, profile_steps="1:2")) == 0
    finally:
        jax.profiler.stop_trace()
    assert str(tmp_path / "run" / "profile") in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.parametrize("window", ["5", "5:5", "6:5", ":5", "5:", "-1:5", "a:b", "1:2:3"])
def test_window_of_another_form_fails(folder, tmp_path, window):
    with pytest.raises(UserError, match=rf"config\.train\.profile_steps .*'{window}'"):
        run(folder, tmp_path, plain(profile_steps=window))


def test_log_line_per_step_has_its_loss_and_learning_rate(folder, tmp_path, monkeypatch):
    StandIn(monkeypatch, losses=np.arange(1.0, 9))
    run(folder, tmp_path, plain(num_steps=4, log_every=1), optim={"warmup_steps": 4})
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert [(line["step"], line["loss"]) for line in logged] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert [line["learning_rate"] for line in logged] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])


def test_next_step_is_dispatched_before_metrics_are_read(folder, tmp_path, monkeypatch):
    stand_in = StandIn(monkeypatch)
    run(folder, tmp_path, plain(num_steps=4))
    assert stand_in.events == [
        ("fetch",),
        *(("dispatch", 1), ("fetch",)),
        *(("dispatch", 2), ("fetch",), ("read", 1)),
        *(("dispatch", 3), ("fetch",), ("read", 2)),
        *(("dispatch", 4), ("fetch",), ("read", 3), ("read", 4)),
    ]


def test_state_is_donated_to_the_next_step(folder, tmp_path, monkeypatch):
    stand_in = StandIn(monkeypatch)
    run(folder, tmp_path, plain(num_steps=4))
    assert len(stand_in.states) == 4
    assert all(leaf.is_deleted() for state in stand_in.states for leaf in jax.tree.leaves(state))


def test_options_are_passed_to_the_step_and_the_ema_is_evaluated(folder, tmp_path, monkeypatch):
    stand_in = StandIn(monkeypatch)
    run(
        folder,
        tmp_path,
        plain(num_steps=2, accumulation=2, batch_size=16),
        optim={"ema_decay": 0.7},
        checkpoint={"keep": 1, "every": 1},
    )
    assert stand_in.options == {"ema_decay": 0.7, "accumulation": 2}
    assert steps_of(tmp_path) == [2]
    state = restored(tmp_path)
    assert same_bits(stand_in.evaluated[-1], state.ema_params)
    assert not same_bits(state.params, state.ema_params)


def test_step_that_does_not_fit_into_memory_fails_before_it_runs(folder, tmp_path, monkeypatch):
    stand_in = StandIn(monkeypatch)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1)
    with pytest.raises(UserError, match=r"config\.train\.batch_size"):
        run(folder, tmp_path, plain(num_steps=2))
    assert stand_in.states == []


def test_held_out_evaluation_that_does_not_fit_into_memory_loses_nothing(folder, tmp_path, monkeypatch):
    StandIn(monkeypatch)

    def too_large(evaluation, best, writer, step, params):
        raise memory.OutOfMemory("a held-out evaluation needs more", needed=2, free=1)

    monkeypatch.setattr(loop, "evaluate_and_log", too_large)
    with pytest.raises(UserError, match="held-out"):
        run(folder, tmp_path, plain(num_steps=9) | {"eval": {"every": 4}})
    assert steps_of(tmp_path) == [4]


# ---- Stopping


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_returns_its_exit_code(folder, tmp_path, monkeypatch, capsys, number, code):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    StandIn(monkeypatch)
    progress = loop.MetricWriter.progress

    def interrupted(writer, step, **values):
        progress(writer, step, **values)
        if step == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(loop.MetricWriter, "progress", interrupted)
    assert run(folder, tmp_path, plain(num_steps=50)) == code
    assert steps_of(tmp_path) == [4]  # the vote before the signal decided on this step
    assert "step 4" in capsys.readouterr().err.splitlines()[-1]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    monkeypatch.setattr(loop.MetricWriter, "progress", progress)
    assert run(folder, tmp_path, plain(num_steps=5)) == 0
    assert "resuming at step 4" in capsys.readouterr().err
    assert steps_of(tmp_path) == [4, 5]


def test_signal_postpones_the_evaluation_to_the_next_start(folder, tmp_path, monkeypatch):
    stand_in = StandIn(monkeypatch)
    progress = loop.MetricWriter.progress

    def interrupted(writer, step, **values):
        progress(writer, step, **values)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.MetricWriter, "progress", interrupted)
    sections = plain(num_steps=6) | {"eval": {"every": 4}}
    assert run(folder, tmp_path, sections) == 143
    assert steps_of(tmp_path) == [4] and not stand_in.evaluated
    monkeypatch.setattr(loop.MetricWriter, "progress", progress)
    assert run(folder, tmp_path, sections) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "eval_loss" in line] == [4, 6]


def test_signal_during_an_evaluation_leaves_it_to_the_next_start(folder, tmp_path, monkeypatch):
    stand_in = StandIn(monkeypatch)
    sections = plain(num_steps=4) | {"eval": {"every": 2}}
    with monkeypatch.context() as patch:

        def left(held_out, params):
            signal.raise_signal(signal.SIGTERM)

        patch.setattr(loop.HeldOutEvaluation, "__call__", left)
        assert run(folder, tmp_path, sections) == 143
        assert steps_of(tmp_path) == [2] and "eval_loss" not in (tmp_path / "metrics.jsonl").read_text()
    assert run(folder, tmp_path, sections) == 0
    assert [line["step"] for line in lines(tmp_path) if "eval_loss" in line] == [2, 4]
    assert len(stand_in.evaluated) == 2


def test_evaluation_is_left_while_the_device_computes(folder, whole):
    objective = experiment.read(tiny.config(folder, **REAL)).objective
    crops = np.zeros((8, 16, 16, 3), np.uint8)
    mesh = sharding.make_mesh()
    options = {"steps": 90, "solver": "ddim", "seed": 0}
    evaluate = held_out.HeldOutEvaluation(objective, {"image": crops}, mesh, **options, stopped=lambda: 143)
    assert evaluate(restored(whole).ema_params) is None


def test_lost_data_saves_the_run_and_exits_with_1(folder, tmp_path, monkeypatch, capsys):
    """The folder goes away during training and, as an unmounted one, is empty at the next start."""
    StandIn(monkeypatch)
    monkeypatch.setattr(sources, "RETRY_SECONDS", (0.01,))
    images, away = shutil.copytree(folder, tmp_path / "images"), tmp_path / "away"
    workdir, sections = tmp_path / "workdir", plain(num_steps=50) | {"data": {"cache_mb": 0}}
    progress = loop.MetricWriter.progress

    def lose(writer, step, **values):
        progress(writer, step, **values)
        if step == 2:
            images.rename(away)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricWriter, "progress", lose)
        with pytest.raises(sources.DataUnavailable, match=f"saved at step .*{images}") as error:
            run(images, workdir, sections)
    assert error.value.exit_code == 1
    [step] = steps_of(workdir)
    images.mkdir()
    with pytest.raises(sources.DataUnavailable, match=f"{images}"):
        run(images, workdir, sections)
    images.rmdir()
    away.rename(images)
    assert run(images, workdir, sections) == 0
    assert f"resuming at step {step}" in capsys.readouterr().err


@pytest.fixture
def interruptible():
    """Handle Ctrl-C as in a terminal, even if the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_second_ctrl_c_acts_immediately(folder, tmp_path, monkeypatch):
    StandIn(monkeypatch)

    def twice(writer, step, **values):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.MetricWriter, "progress", twice)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, plain(num_steps=50))


def test_sigterm_of_the_command(folder, tmp_path):
    """A separate process that gets SIGTERM during training saves and exits with code 143."""
    config, workdir = tmp_path / "config.py", tmp_path / "workdir"
    sections = REAL | plain(num_steps=10**6, log_every=1)
    config.write_text(f"def get_config():\n    return {tiny.config(folder, **sections)!r}\n")
    command = [sys.executable, "-m", "sr3_jax", "train", f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {  # shares the compilation cache of the tests
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment) as process:
        patience = time.monotonic() + 240
        log = workdir / "metrics.jsonl"
        while not (log.exists() and log.stat().st_size) and process.poll() is None:
            assert time.monotonic() < patience
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    step = int(re.search(r"step (\d+)", err.splitlines()[-1])[1])
    assert steps_of(workdir) == [step]


@pytest.mark.parametrize(
    ("losses", "norms", "step"),
    [
        ([1, 1, 1, np.nan, 1, 1], [1] * 6, 4),  # at a step with a checkpoint
        ([1, 1, np.inf, 1, 1, 1], [1] * 6, 3),
        ([1] * 6, [1, 1, 1, 1, np.nan, 1], 5),
        ([1, 1, 1, 1, 1, np.nan], [1] * 6, 6),  # the last step
    ],
)
def test_non_finite_loss_stops_the_run_and_is_not_saved(folder, tmp_path, monkeypatch, losses, norms, step):
    StandIn(monkeypatch, losses=losses, norms=norms)
    with pytest.raises(UserError) as error:
        run(folder, tmp_path, plain(num_steps=6), checkpoint={"every": 2}, eval={"every": 3})
    text = str(error.value)
    assert f"step {step}" in text and "\n" not in text
    assert str(tmp_path) in text and "config.optim.learning_rate" in text
    assert steps_of(tmp_path) == list(range(2, step, 2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored(tmp_path)))


def test_non_finite_steps_are_skipped_and_counted(folder, tmp_path, monkeypatch, capsys):
    nan, inf = np.nan, np.inf
    StandIn(monkeypatch, losses=[1, nan, 3, 4, nan, inf, 7, 8], norms=[1, 1, inf, 4, 1, 1, 7, 8])
    optim = {"skip_nonfinite": 2, "warmup_steps": 8}
    assert run(folder, tmp_path, plain(num_steps=8, log_every=2), optim=optim) == 0
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert [(line["loss"], line["grad_norm"], line["skipped_steps"]) for line in logged] == [
        (1, 1, 1),
        (4, 4, 2),
        (None, None, 4),  # no step is left
        (7.5, 7.5, 4),
    ]
    rates = [1e-3 * update / 8 for update in (1, 2, 2, 4)]  # by the updates that were made
    assert [line["learning_rate"] for line in logged] == pytest.approx(rates)
    assert capsys.readouterr().err.count("skipped") == 4


def test_too_many_non_finite_steps_in_a_row_stop_the_run(folder, tmp_path, monkeypatch):
    StandIn(monkeypatch, losses=[1, np.nan, 1, np.nan, np.nan, np.nan, 1, 1])
    with pytest.raises(UserError, match=r"step 6 .*nan.*config\.optim\.learning_rate"):
        run(folder, tmp_path, plain(num_steps=8) | {"checkpoint": {"every": 1}}, optim={"skip_nonfinite": 2})
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_non_finite_loss_at_a_signal_is_not_saved(folder, tmp_path, monkeypatch):
    StandIn(monkeypatch, losses=[1, 1, np.nan])
    progress = loop.MetricWriter.progress

    def interrupted(writer, step, **values):
        progress(writer, step, **values)
        if step == 2:  # step 3, whose loss has not been read, is running
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.MetricWriter, "progress", interrupted)
    with pytest.raises(UserError, match=r"step 3 .*nan"):
        run(folder, tmp_path, plain(num_steps=50))
    assert steps_of(tmp_path) == []


def test_time_limit_stops_evaluates_and_saves(folder, tmp_path, monkeypatch, capsys):
    stand_in, seconds = StandIn(monkeypatch), iter(range(10**6))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    assert run(folder, tmp_path, plain(num_steps=1000, minutes=0.5)) == 0
    [step] = steps_of(tmp_path)
    assert 3 <= step <= 31  # the clock advances by a second per call
    assert len(stand_in.evaluated) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "0.5 minutes" in last and f"step {step}" in last
    monkeypatch.undo()


def test_checkpoints_by_minutes_and_milestones(folder, tmp_path, monkeypatch):
    StandIn(monkeypatch)
    clock = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    progress, save, saved = loop.MetricWriter.progress, checkpoints.Checkpoints.save, []

    def twenty_seconds(writer, step, **values):
        progress(writer, step, **values)
        clock[0] += 20

    def record(store, state, **options):
        saved.append(int(state.step))
        save(store, state, **options)

    monkeypatch.setattr(loop.MetricWriter, "progress", twenty_seconds)
    monkeypatch.setattr(checkpoints.Checkpoints, "save", record)
    sections = plain(num_steps=24) | {
        "checkpoint": {"every": 100, "keep": 1, "minutes": 2, "keep_period": 10}
    }
    assert run(folder, tmp_path, sections) == 0
    by_minutes = [step for step in saved[:-1] if step % 10]
    assert 10 in saved and 20 in saved and len(by_minutes) >= 2
    gaps = np.diff([0, *saved[:-1]])
    assert max(gaps) <= 9  # six steps take two minutes, the vote and the metrics come up to three steps later
    assert min(np.diff([step for step in (0, *saved) if step < 10])) >= 6
    assert steps_of(tmp_path) == [10, 20, 24]


# ---- Starting and resuming


@pytest.fixture
def stopped_at_3(folder, tmp_path) -> Path:
    """A workdir with a checkpoint of the stand-in step."""
    with pytest.MonkeyPatch.context() as patch:
        StandIn(patch)
        assert run(folder, tmp_path / "run", plain(num_steps=3)) == 0
    return tmp_path / "run"


def test_damaged_checkpoint_fails_and_is_not_overwritten(stopped_at_3, folder):
    shutil.rmtree(stopped_at_3 / "checkpoints" / "3" / "train")
    before = sorted(stopped_at_3.rglob("*"))
    with pytest.raises(UserError, match=r"checkpoints/3 .*new workdir"):
        run(folder, stopped_at_3, plain(num_steps=6))
    assert sorted(stopped_at_3.rglob("*")) == before


@pytest.mark.parametrize(
    ("section", "field", "value", "was"),
    [
        ("model", "channels", 8, 4),
        ("model", "multipliers", (2,), (1,)),
        ("model", "film", True, False),
        ("diffusion", "prediction", "eps", "v"),
        ("optim", "ema_decay", 0.5, 0.9),
        ("data", "scale", 2, 4),
    ],
)
def test_resume_with_another_network_or_task_fails(stopped_at_3, folder, section, field, value, was):
    config = (stopped_at_3 / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        run(folder, stopped_at_3, plain(num_steps=6), **{section: {field: value}})
    for named in (f"config.{section}.{field}", repr(value), repr(was), str(stopped_at_3)):
        assert named in str(error.value)
    assert (stopped_at_3 / "config.json").read_bytes() == config


def test_run_of_an_older_version_resumes_if_new_fields_have_their_defaults(stopped_at_3, folder, monkeypatch):
    config = checkpoints.read_config(stopped_at_3)
    del config["model"]["film"], config["model"]["patch"]
    checkpoints.write_config(stopped_at_3, config)
    with pytest.raises(UserError, match=r"config\.model\.patch is 2 .* 1"):
        run(folder, stopped_at_3, plain(num_steps=4))
    config["model"]["patch"] = 2
    checkpoints.write_config(stopped_at_3, config)
    StandIn(monkeypatch)
    assert run(folder, stopped_at_3, plain(num_steps=4)) == 0
    assert checkpoints.read_config(stopped_at_3)["model"]["film"] is False


@pytest.mark.parametrize("kind", ["workdir", "export"])
def test_init_from_starts_from_given_weights(whole, folder, tmp_path, monkeypatch, kind):
    model, start, init_params = load(whole), whole, experiment.Experiment.init_params
    if kind == "export":
        start = tmp_path / "model.safetensors"
        weights.export(start, model.params, model.config)
    StandIn(monkeypatch)
    monkeypatch.setattr(experiment.Experiment, "init_params", init_params)
    assert run(folder, tmp_path / "new", plain(num_steps=1, init_from=str(start))) == 0
    state = restored(tmp_path / "new")
    assert state.step == 1
    for tree, added in ((state.params, 1), (state.ema_params, 2)):  # from the stand-in step
        assert jax.tree.structure(tree) == jax.tree.structure(model.params)
        for leaf, given in zip(jax.tree.leaves(tree), jax.tree.leaves(model.params), strict=True):
            np.testing.assert_allclose(leaf, given + added, rtol=1e-6)


def test_init_from_a_model_without_augmentation_adds_that_input(whole, folder, tmp_path, monkeypatch):
    init_params = experiment.Experiment.init_params
    StandIn(monkeypatch)
    monkeypatch.setattr(experiment.Experiment, "init_params", init_params)
    augmented = {"model": {"augment": True}, "data": {"augment": "noise"}}
    assert run(folder, tmp_path / "new", plain(num_steps=1, init_from=str(whole)), **augmented) == 0
    params, given = load(tmp_path / "new").params, load(whole).params
    assert set(params) - set(given) == {"augment_in", "augment_out"}
    np.testing.assert_allclose(params["augment_out"]["kernel"], 2)  # 0 and the stand-in's 2


def test_init_from_with_another_network_or_no_model_fails(whole, folder, tmp_path):
    start = str(whole)
    with pytest.raises(UserError, match=rf"config.train.init_from='{start}' .*config.model"):
        run(folder, tmp_path / "new", plain(num_steps=1, init_from=start), model={"channels": 8})
    with pytest.raises(UserError, match="'none'"):
        run(folder, tmp_path / "new", plain(num_steps=1, init_from="none"))


def labeled(*labels: int) -> Source:
    """A source of images with these labels."""
    image = np.zeros((16, 16, 3), np.uint8)
    return Source("labeled", lambda index: {"image": image.copy(), "label": labels[index]}, len(labels))


@pytest.mark.parametrize("which", ["source", "eval_source"])
def test_class_conditional_network_needs_labels(folder, tmp_path, monkeypatch, which):
    open_source = loop.open_source
    monkeypatch.setattr(
        loop,
        "open_source",
        lambda name, **options: labeled(0) if "yes" in name else open_source(name, **options),
    )
    other = {"source": "eval_source", "eval_source": "source"}[which]
    with pytest.raises(UserError) as error:
        run(folder, tmp_path, plain(), model={"num_classes": 3}, data={other: "yes"})
    assert "config.model.num_classes=3" in str(error.value) and f"folder:{folder}" in str(error.value)


@pytest.mark.parametrize("label", [3, -1])
def test_label_out_of_range_fails(folder, tmp_path, monkeypatch, label):
    monkeypatch.setattr(loop, "open_source", lambda name, **options: labeled(0, 2, 1, label))
    StandIn(monkeypatch)
    with pytest.raises(UserError, match=f"num_classes=3 .*label {label}"):
        run(folder, tmp_path, plain(num_steps=2), model={"num_classes": 3})


def test_damaged_first_image_does_not_stop_a_run(folder, tmp_path, monkeypatch):
    images = shutil.copytree(folder, tmp_path / "images")
    first = min(images.iterdir())
    first.write_bytes(first.read_bytes()[:200])
    stand_in = StandIn(monkeypatch)
    assert run(images, tmp_path / "run", plain(num_steps=2), eval={"num_images": 8}) == 0
    assert len(stand_in.held_out["image"]) == 7
