"""The weights of the highest held-out PSNR: how the paper chooses its regression (section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sr3_jax.distributed.sharding import to_host
from sr3_jax.train.metric_writer import read_metrics
from sr3_jax.train.weights import export
from sr3_jax.types import Params

BEST_FILE = "best.safetensors"


class Best:
    """Keeps them as WORKDIR/best.safetensors, a model like any other.

    Args:
        config: what the file carries beside the weights.
        first_step: evaluations of a resumed run's log up to it count; what comes after is done again.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any], mesh: Mesh, first_step: int) -> None:
        self._path, self._config, self._mesh = workdir / BEST_FILE, config, mesh
        rows = (row for row in read_metrics(workdir) if row["step"] <= first_step)
        self._psnr = max((row["eval_psnr"] for row in rows if "eval_psnr" in row), default=float("-inf"))

    def __call__(self, psnr: float, ema_params: Params) -> None:
        """Write these weights if no earlier ones had a PSNR as high. All processes must call it."""
        if psnr <= self._psnr:
            return
        self._psnr = psnr
        params = to_host(ema_params, self._mesh)
        if jax.process_index() == 0:
            export(self._path, params, self._config)
