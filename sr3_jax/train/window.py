"""Means and speed over the steps between two lines of metrics.jsonl."""

from __future__ import annotations

import time


class MetricWindow:
    """Means over the steps since the last log line, and the time they took."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.loss: float | None = None  # a moving average, for the eye
        self.rate: float | None = None  # images a second in this window
        self._restart()

    def _restart(self) -> None:
        self._losses: list[float] = []
        self._norms: list[float] = []
        self.waited = 0.0
        self._start = time.monotonic()

    def skip(self, seconds: float) -> None:
        """Take out time that was not training: compilation, evaluation, saving."""
        self._start += seconds

    def add(self, loss: float, grad_norm: float) -> None:
        self._losses.append(loss)
        self._norms.append(grad_norm)
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        seconds = time.monotonic() - self._start
        self.rate = len(self._losses) * self._batch_size / max(seconds, 1e-9)

    def summary(self) -> dict[str, float]:
        """Means of the window; `data_wait` is the share of time spent waiting for batches."""
        count, seconds = max(1, len(self._losses)), max(time.monotonic() - self._start, 1e-9)
        values = {
            "loss": sum(self._losses) / count,
            "grad_norm": sum(self._norms) / count,
            "step_ms": 1e3 * seconds / count,
            "images_per_second": count * self._batch_size / seconds,
            "data_wait": self.waited / seconds,
        }
        self._restart()
        return values
