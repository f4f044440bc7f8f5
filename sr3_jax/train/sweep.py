"""Sweeps: a grid of config values, each combination trained in a workdir of its own, and a table of the results."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sr3_jax.config import schema
from sr3_jax.config.load import load_config
from sr3_jax.errors import UserError
from sr3_jax.files import make_folder, parse_json, sha256_hex, write_text
from sr3_jax.train import experiment
from sr3_jax.train.metric_writer import read_metrics

END_FILE = "sweep.json"  # in the workdir of a run: how it ended, and with which config
SUMMARY_FILES = ("summary.json", "summary.csv")
_BEST = {"eval_loss": min, "eval_psnr": max, "eval_consistency": min}
_LONGEST_NAME = 200  # characters; file systems allow 255 bytes


@dataclass(frozen=True)
class Run:
    """One combination of a sweep.

    Attributes:
        name: of its workdir, made from the values.
        values: 'SECTION.FIELD' -> value.
        config: its complete config.
        arguments: of `sr3 train`, without the workdir.
    """

    name: str
    values: Mapping[str, Any]
    config: Mapping[str, Any]
    arguments: tuple[str, ...]


def plan_sweep(config: str, grid: Sequence[str], overrides: Sequence[str]) -> list[Run]:
    """The runs of a sweep in order, the last field of the grid changing fastest.

    Args:
        config: a preset or config file.
        grid: SECTION.FIELD=A,B,...; values of fields that are tuples are separated by ';'.
        overrides: options '--config.SECTION.FIELD=VALUE' of all runs.

    Raises:
        UserError: a grid is invalid, or a combination is not a valid config.
    """
    axes: dict[tuple[str, str], dict[Any, str]] = {}
    for text in grid:
        field, equals, given = text.removeprefix("config.").partition("=")
        section, dot, name = field.partition(".")
        if not equals or not dot:
            raise UserError(f"--grid={text} must be SECTION.FIELD=A,B, such as optim.learning_rate=1e-4,3e-4")
        if (section, name) in axes:
            raise UserError(f"--grid={text} repeats config.{field}: give all its values in one --grid")
        separator = ";" if isinstance(schema.lookup(section, name).default, tuple) else ","
        texts = [one.strip() for one in given.split(separator)]
        parsed = {schema.parse(section, name, one): one for one in texts}
        if len(parsed) < len(texts):
            raise UserError(f"--grid={text} has the same value twice: remove one")
        axes[section, name] = parsed
    runs: list[Run] = []
    for combination in itertools.product(*(axis.items() for axis in axes.values())):
        values = {".".join(key): value for key, (value, _) in zip(axes, combination, strict=True)}
        options = [
            f"--config.{'.'.join(key)}={text}" for key, (_, text) in zip(axes, combination, strict=True)
        ]
        complete = load_config(config, [*overrides, *options])
        name = _folder_name(values)
        try:
            experiment.read(complete)
        except UserError as error:
            raise UserError(f"run {name}: {error}") from error
        runs.append(Run(name, values, complete, (f"--config={config}", *overrides, *options)))
    return runs


def run_sweep(runs: Sequence[Run], workdir: Path, *, index: int | None = None) -> int:
    """Train runs one after another, each as a process of its own; finished ones are skipped and others resumed.

    The summary is written after each run.

    Args:
        index: train only this run, from 0.

    Returns:
        0 when all are finished; 1 when some have failed, which are named; 128 + its number when a signal stopped the
        sweep, after the run has saved. With `index`, the exit code of the run.

    Raises:
        UserError: no such index; the workdir cannot be written.
    """
    if index is not None and not 0 <= index < len(runs):
        raise UserError(f"--index={index} is out of range: the sweep has runs 0 to {len(runs) - 1}")
    make_folder(workdir)
    chosen = list(runs) if index is None else [runs[index]]
    failed = []
    for number, run in enumerate(chosen, 1):
        if _status(run, workdir) == "finished":
            continue
        print(f"run {number} of {len(chosen)}: {run.name}", flush=True)
        code = _train(run, workdir / run.name, group=workdir.absolute().name)
        stopped = code in (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP)
        if not stopped:
            end = {"config": _hash(run), "exit_code": code}
            write_text(make_folder(workdir / run.name) / END_FILE, json.dumps(end) + "\n")
        write_summary(runs, workdir)
        if stopped or index is not None:
            return code
        if code:
            failed.append(f"run {run.name} failed with exit code {code}")
            print(failed[-1], file=sys.stderr, flush=True)
    write_summary(runs, workdir)
    return 1 if failed else 0


def summarize(runs: Sequence[Run], workdir: Path) -> list[dict[str, Any]]:
    """A row for each run: its values, status, last step, and the last and best held-out metrics."""
    rows = []
    for index, run in enumerate(runs):
        logged = read_metrics(workdir / run.name)
        row: dict[str, Any] = {"index": index, "run": run.name, **run.values}
        row["status"] = _status(run, workdir)
        row["step"] = max((line["step"] for line in logged), default=0)
        for name, best in _BEST.items():
            values = [line[name] for line in logged if isinstance(line.get(name), int | float)]
            row[name] = values[-1] if values else None
            row[f"best_{name}"] = best(values) if values else None
        rows.append(row)
    return rows


def write_summary(runs: Sequence[Run], workdir: Path) -> None:
    """Write summary.json and summary.csv, from what is on disk. UserError if they cannot be written."""
    rows = summarize(runs, workdir)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for name, text in zip(SUMMARY_FILES, (json.dumps(rows, indent=2) + "\n", table.getvalue()), strict=True):
        write_text(workdir / name, text)


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table for a terminal."""
    names = [name for name in rows[0] if name != "run" and any(row[name] is not None for row in rows)]
    cells = [[name.removeprefix("eval_").replace("best_eval_", "best ") for name in names]]
    cells += [[_shown(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [zip(row, widths, strict=True) for row in cells]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in line) for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _folder_name(values: Mapping[str, Any]) -> str:
    """SECTION.FIELD=VALUE,... as a portable name; a long one ends in a hash."""
    parts = [
        f"{field}={'-'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for field, value in values.items()
    ]
    name = ",".join(re.sub(r"[^\w.=+-]+", "_", part) for part in parts) or "run"
    changed = name != ",".join(parts) or len(name) > _LONGEST_NAME
    return f"{name[:_LONGEST_NAME]}-{sha256_hex({'parts': parts})[:8]}" if changed else name


def _hash(run: Run) -> str:
    return sha256_hex(json.loads(json.dumps(run.config)))


def _status(run: Run, workdir: Path) -> str:
    """'finished' or 'failed', where the run has ended with this config; else 'started' or 'not started'."""
    try:
        end = parse_json((workdir / run.name / END_FILE).read_bytes())
        if end["config"] == _hash(run):  # with more steps, for example, it goes on
            return "failed" if end["exit_code"] else "finished"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return "started" if (workdir / run.name).is_dir() else "not started"


def _train(run: Run, workdir: Path, *, group: str) -> int:
    """The exit code of `sr3 train`, which gets the signals that this process gets, once each."""
    command = [sys.executable, "-m", "sr3_jax", "train", *run.arguments, f"--workdir={workdir}"]
    received: list[int] = []  # before the process has started
    started: list[subprocess.Popen] = []

    def forward(number: int, _: Any) -> None:
        if not started:
            received.append(number)
        for process in started:
            process.send_signal(number)

    before = {
        number: signal.signal(number, forward)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
    }
    try:
        # In a session of its own, since a terminal would send Ctrl-C to both.
        environment = {"WANDB_RUN_GROUP": group, **os.environ}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        started.append(process)
        for number in received:
            process.send_signal(number)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
