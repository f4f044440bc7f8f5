"""The weights of the highest held-out PSNR: how the paper chooses its regression (section 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sr3_jax.aliases import Params
from sr3_jax.checkpoint import export
from sr3_jax.parallel import to_host
from sr3_jax.report import METRICS_FILE

BEST_FILE = "best.safetensors"


class Best:
    """Keeps them as WORKDIR/best.safetensors, a model like any other.

    Args:
        config: what the file carries beside the weights.
        first_step: evaluations of a resumed run's log up to it count; what comes after is done again.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any], mesh: Mesh, first_step: int) -> None:
        self._path, self._config, self._mesh = workdir / BEST_FILE, config, mesh
        self._psnr = max(_evaluated(workdir / METRICS_FILE, first_step), default=float("-inf"))

    def __call__(self, psnr: float, ema_params: Params) -> None:
        """Write these weights if no earlier ones had a PSNR as high. All processes must call it."""
        if psnr <= self._psnr:
            return
        self._psnr = psnr
        params = to_host(ema_params, self._mesh)
        if jax.process_index() == 0:
            export(self._path, params, self._config)


def _evaluated(log: Path, last_step: int) -> list[float]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    values = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # half a line, of a run that was killed
            continue
        if "eval_psnr" in row and row["step"] <= last_step:
            values.append(float(row["eval_psnr"]))
    return values
