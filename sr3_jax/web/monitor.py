"""The tabs of a training run and of an evaluation: files on disk, read again while the page is open."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd

from sr3_jax.errors import UserError
from sr3_jax.evaluation.results import protocol, reported_metrics, rows_table
from sr3_jax.files import read_json
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.image_io.image_file import ImageError, read_rgb
from sr3_jax.metrics import METRICS
from sr3_jax.train.metric_writer import METRICS_FILE, read_metrics

_POINTS = 500  # of a curve
_EVERY = 5.0  # seconds
_WORST = 8  # images in the table of worst cases
_LATEST = "latest"
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# Charts of a training run: title, and the metrics in it with their names.
_CHARTS: Sequence[tuple[str, Mapping[str, str]]] = (
    ("Loss", {"loss": "training", "eval_loss": "held out"}),
    ("Held-out PSNR, dB", {"eval_psnr": "model", "eval_psnr_bicubic": "bicubic"}),
    ("Held-out consistency, 1e-5", {"eval_consistency": "model", "eval_consistency_bicubic": "bicubic"}),
)
_COLORS = {"blue": "#3b82f6", "orange": "#d97706"}  # of the first and the second metric


def training_tab(workdir: Path, blocks: gr.Blocks) -> None:
    """Charts from metrics.jsonl and the grids in samples/, refreshed while the page is open."""
    summary = gr.Markdown(elem_id="run")
    with gr.Row():
        plots = [
            gr.LinePlot(
                x="step",
                y="value",
                color="curve",
                color_map=dict(zip(names.values(), _COLORS.values(), strict=True)),
                height=300,
                min_width=300,
                x_title="step",
                y_title=" ",
                color_title=" ",
                label=f"{title} ({', '.join(map(' '.join, zip(names.values(), _COLORS, strict=True)))})",
                buttons=[],
            )
            for title, names in _CHARTS
        ]
    step = gr.Dropdown([_LATEST], value=_LATEST, label="Samples at step", elem_id="step")
    grid = gr.Image(label="Held-out samples", interactive=False, elem_id="grid", buttons=["fullscreen"])
    seen = gr.State("")

    def refresh(chosen: str, before: str) -> dict[Any, Any]:
        grids = _grids(workdir)
        state = f"{_version(workdir / METRICS_FILE)} {len(grids)} {chosen}"
        if state == before:
            return {seen: before}
        rows = read_metrics(workdir)
        charts = {plot: curves(rows, names) for plot, (_, names) in zip(plots, _CHARTS, strict=True)}
        names = [_LATEST, *(str(number) for number in reversed(grids))]
        shown = grids.get(int(chosen)) if chosen.isdecimal() else next(reversed(grids.values()), None)
        return {
            summary: _progress(rows, workdir.name),
            **charts,
            step: gr.Dropdown(names, value=chosen if chosen in names else _LATEST),
            grid: None if shown is None else _pixels(shown),
            seen: state,
        }

    everything = [summary, *plots, step, grid, seen]
    gr.Timer(_EVERY).tick(refresh, [step, seen], everything, **_PRIVATE)
    step.input(refresh, [step, seen], everything, **_PRIVATE)
    blocks.load(refresh, [step, seen], everything, **_PRIVATE)


def curves(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> pd.DataFrame:
    """Columns step, value and curve: the metrics `names`, thinned to at most 500 points each.

    Args:
        rows: of metrics.jsonl.
        names: metric -> name of its curve.
    """
    parts = []
    for key, name in names.items():
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        kept = sorted({round(index) for index in np.linspace(0, len(points) - 1, min(len(points), _POINTS))})
        parts += [(*points[index], name) for index in kept]
    return pd.DataFrame(parts, columns=["step", "value", "curve"])


def _progress(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Markdown: the last value of each metric."""
    if not rows:
        return f"**{_plain(name)}**: no metrics yet. This page refreshes by itself."
    last: dict[str, Any] = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if value is not None}
    shown = {key: value for key, value in last.items() if key != "step" and isinstance(value, int | float)}
    cells = " · ".join(f"{_plain(key)} {value:.4g}" for key, value in shown.items())
    return f"**{_plain(name)}**, step {max(int(row['step']) for row in rows)}: {cells}"


def _plain(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~-])", r"\\\1", printable(text))


def _grids(workdir: Path) -> dict[int, Path]:
    """The sample grids of a run by step, in order."""
    found = {}
    for path in (workdir / "samples").glob("samples_*.png"):
        number = path.stem.removeprefix("samples_")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))


def _version(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_mtime_ns}-{status.st_size}"


def _pixels(path: Path) -> np.ndarray | None:
    try:
        return read_rgb(path)
    except ImageError:  # being replaced, or removed
        return None


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The report that `sr3 evaluate` has written into a folder.

    Raises:
        UserError: there is none, or it is something else.
    """
    path = folder / "evaluation.json"
    try:
        report = read_json(path)
        rows_table(report["rows"])
        protocol(report)
    except OSError as error:
        raise UserError(
            f"--evaluation={printable(folder)}: evaluation.json {reason(error)}: give the folder of `sr3 evaluate -o`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--evaluation={printable(folder)}: evaluation.json is not of this version: run sr3 evaluate again"
        ) from error
    return report


def evaluation_tab(folder: Path) -> None:
    """Tables, worst cases and image grids of an evaluation."""
    report = read_evaluation(folder)
    gr.Markdown(rows_table(report["rows"]), elem_classes="sr3-table", elem_id="scores")
    with gr.Accordion("Confidence intervals and protocol", open=False):
        gr.Markdown(rows_table(report["rows"], intervals=True), elem_classes="sr3-table")
        gr.Markdown("\n".join(f"- {_plain(line)}" for line in protocol(report)))
    for path in sorted(folder.glob("grid*.png")):
        pixels = _pixels(path)
        if pixels is not None:
            label = "Worst, median and best image" if path.stem == "grid" else path.stem.removeprefix("grid_")
            gr.Image(pixels, label=label, interactive=False, buttons=["fullscreen"])
    gr.HTML(worst_cases(report), elem_classes="sr3-table", elem_id="worst")


def worst_cases(report: Mapping[str, Any]) -> str:
    """HTML: the images with the lowest PSNR of the first model, the worst first, with their other metrics."""
    rows = report["rows"]
    row = next((one for one in rows if one["solver"]), rows[0])
    columns = [metric for metric in reported_metrics([row]) if metric.group == "image"]

    def value(image: Mapping[str, Sequence[float | None]], key: str) -> float | None:
        values = image.get(key) or [None]
        known = [float("inf") if one is None else one for one in values]
        return sum(known) / len(known)

    images = sorted(row["images"].items(), key=lambda item: value(item[1], "psnr") or 0.0)[:_WORST]
    head = "".join(
        f"<th scope='col'>{html.escape(text)}</th>" for text in ("image", *(m.heading for m in columns))
    )
    body = "".join(
        f"<tr><th scope='row'>{html.escape(printable(name))}</th>"
        + "".join(f"<td>{METRICS[metric.key].format(value(image, metric.key))}</td>" for metric in columns)
        + "</tr>"
        for name, image in images
    )
    return (
        f"<table><caption>Worst images of {html.escape(row['method'])} by PSNR</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
