"""Figures of docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.tables import present, rows_frame
from sr3_jax.metrics import METRICS

PANELS = ("lpips", "frechet_alexnet", "top1", "psnr")
BASELINES = {"regression": "#555555", "bicubic": "#aaaaaa"}


def curves(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Plot each metric against NFE, one line per solver of SR3, baselines dashed; False if there is nothing to plot.

    Metadata that changes between runs is left out, so that equal rows give equal bytes.
    """
    frame = rows_frame(rows)
    sampled = frame[(frame["method"] == "sr3") & (frame["detail"] == "")]
    panels = present(sampled, PANELS)
    if sampled.empty or not panels:
        return False
    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, key in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        for solver, line in sampled.groupby("solver", sort=True):
            line = line.sort_values("nfe")
            axes.plot(line["nfe"].astype(float), line[key], marker="o", markersize=3, label=f"SR3, {solver}")
        for method, color in BASELINES.items():
            level = frame.loc[frame["method"] == method, key]
            if level.notna().any():
                axes.axhline(float(level.iloc[0]), color=color, linestyle="--", label=method)
        axes.set(xscale="log", xlabel="NFE", title=METRICS[key].heading)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize="small"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True
