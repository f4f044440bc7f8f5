"""Metrics of training steps: fetched one step late, checked, averaged over a log window and written."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import optax

from sr3_jax.errors import UserError
from sr3_jax.train.metric_writer import MetricWriter


class StepMetrics:
    """Takes the metrics of each step as device arrays, and fetches those of step n after step n+1 was dispatched.

    Fetching them at once would leave the device idle between steps.

    Args:
        writer: gets a line every `log_every` steps and after the last step.
        lr_schedule: step -> learning rate, logged next to the metrics.
        workdir: named in the error about a loss that is not finite.
    """

    def __init__(
        self,
        writer: MetricWriter,
        *,
        batch_size: int,
        log_every: int,
        num_steps: int,
        lr_schedule: optax.Schedule,
        workdir: Path,
    ) -> None:
        self._writer, self._workdir = writer, workdir
        self._batch_size, self._log_every, self._num_steps = batch_size, log_every, num_steps
        self._lr_schedule = lr_schedule
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._smooth_loss: float | None = None  # for the progress bar
        self._rate: float | None = None  # images per second, also for it
        self._start_window()

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Take the metrics of the step that was just dispatched; fetch and log those of the one before."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Fetch, check and log the metrics that are still on the device, if any.

        Raises:
            UserError: the loss or the gradient norm is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss, grad_norm = fetch_finite(step, metrics, self._workdir)
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self._smooth_loss = loss if self._smooth_loss is None else 0.98 * self._smooth_loss + 0.02 * loss
        if (
            len(self._losses) > 1 or self._rate is None
        ):  # the first of a window may have ended before it began
            self._rate = len(self._losses) * self._batch_size / self._seconds()
        self._writer.progress(step, loss=self._smooth_loss, images_per_second=self._rate)
        if step % self._log_every == 0 or step == self._num_steps:
            self._writer.write_scalars(
                step, self._summary() | {"learning_rate": float(self._lr_schedule(step - 1))}
            )
            self._start_window()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the time spent inside from the speed: compilation, evaluation, saving."""
        before = time.monotonic()
        yield
        self._start += time.monotonic() - before

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as waiting for the next batch."""
        before = time.monotonic()
        yield
        self._waited += time.monotonic() - before

    def _start_window(self) -> None:
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._waited = 0.0
        self._start = time.monotonic()

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _summary(self) -> dict[str, float]:
        """Means over the window; `data_wait` is the fraction of time spent waiting for batches."""
        count, seconds = max(1, len(self._losses)), self._seconds()
        return {
            "loss": sum(self._losses) / count,
            "grad_norm": sum(self._grad_norms) / count,
            "step_ms": 1e3 * seconds / count,
            "images_per_second": count * self._batch_size / seconds,
            "data_wait": self._waited / seconds,
        }


def fetch_finite(step: int, metrics: Mapping[str, jax.Array], workdir: Path) -> tuple[float, float]:
    """The loss and gradient norm of a step. UserError if one is not finite: a state with NaNs is never saved."""
    loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"the loss of step {step} is {loss} and its gradient norm {grad_norm}: training stopped without saving "
            f"this step; the last good checkpoint is in {workdir}. Lower config.optim.learning_rate, raise "
            "config.optim.warmup_steps or set config.optim.clip_norm, and train in a new workdir"
        )
    return loss, grad_norm
