"""Metrics of training steps: fetched one step late, checked, averaged over a log window and written."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
import optax

from sr3_jax.errors import UserError
from sr3_jax.flops import peak_flops
from sr3_jax.train.goodput import Goodput, Loss
from sr3_jax.train.metric_writer import MetricWriter
from sr3_jax.train.step import LOG_SNR_BINS


class StepMetrics:
    """Takes the metrics of each step as device arrays, and fetches those of step n after step n+1 was dispatched.

    Fetching them at once would leave the device idle between steps.

    Args:
        writer: gets a line every `log_every` steps and after the last step.
        lr_schedule: step -> learning rate, logged next to the metrics.
        workdir: named in the error about a loss that is not finite.
        goodput: takes the time that is lost.
        skip_nonfinite: steps in a row whose loss may be not finite; the step itself leaves the state as it was.
        skipped: steps that were skipped before this start.

    Attributes:
        step_flops: of a step on one device, known once the step is traced; 0 while unknown.
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
        goodput: Goodput,
        skip_nonfinite: int = 0,
        skipped: int = 0,
    ) -> None:
        self._writer, self._workdir, self._goodput = writer, workdir, goodput
        self._batch_size, self._log_every, self._num_steps = batch_size, log_every, num_steps
        self._lr_schedule = lr_schedule
        self._skip_nonfinite, self._skipped, self._skipped_in_a_row = skip_nonfinite, skipped, 0
        self.step_flops = 0.0
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
            NotFinite: the loss or the gradient norm is not finite, in more than `skip_nonfinite` steps in a row.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        self._steps += 1
        try:
            loss, grad_norm = fetch_finite(step, metrics, self._workdir)
        except NotFinite as error:
            self._skip(step, error)
        else:
            self._skipped_in_a_row = 0
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
            self._bins += [metrics["by_log_snr"]] if "by_log_snr" in metrics else []
            self._smooth_loss = loss if self._smooth_loss is None else 0.98 * self._smooth_loss + 0.02 * loss
        if self._steps > 1 or self._rate is None:  # the first of a window may have ended before it began
            self._rate = self._steps * self._batch_size / self._seconds()
        self._writer.progress(step, loss=self._smooth_loss, images_per_second=self._rate)
        if step % self._log_every == 0 or step == self._num_steps:
            self._writer.write_scalars(step, self._summary(step) | self._goodput.metrics())
            self._start_window()

    @contextmanager
    def untimed(self, what: Loss) -> Iterator[None]:
        """Exclude the time spent inside from the speed, and count it as lost."""
        before = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - before
            self._start += seconds
            self._goodput.lose(what, seconds)

    @contextmanager
    def waiting_for_data(self, running: Mapping[str, jax.Array]) -> Iterator[None]:
        """Count the part of the time spent inside in which the device waited too.

        Args:
            running: the metrics of the last step that was dispatched. A thread waits for them.
        """
        finished: list[float] = []

        def note() -> None:
            with suppress(Exception):  # the main thread gets it too
                jax.block_until_ready(running)
                finished.append(time.monotonic())

        before = time.monotonic()
        threading.Thread(target=note, name="step", daemon=True).start()
        yield
        if finished:
            seconds = max(0.0, time.monotonic() - max(before, finished[0]))
            self._waited += seconds
            self._goodput.lose("data", seconds)

    def _skip(self, step: int, error: NotFinite) -> None:
        """Count a step whose loss is not finite; raise the error if there were too many in a row."""
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self._skip_nonfinite:
            raise error
        self._skipped += 1
        self._writer.message(
            f"step {step}: loss {error.loss}, gradient norm {error.grad_norm}: skipped "
            f"({self._skipped_in_a_row} in a row; training stops after {self._skip_nonfinite})"
        )

    def _start_window(self) -> None:
        self._steps = 0
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._bins: list[jax.Array] = []  # fetched at the end of the window
        self._waited = 0.0
        self._start = time.monotonic()

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _summary(self, step: int) -> dict[str, float]:
        """Means over the window, and the memory of the devices.

        `data_wait` is the fraction of time in which the device waited for a batch.
        """
        count, seconds, finite = self._steps, self._seconds(), len(self._losses)
        found = {
            "loss": sum(self._losses) / finite if finite else math.nan,
            "grad_norm": sum(self._grad_norms) / finite if finite else math.nan,
            # a step that was skipped is not counted by the optimizer
            "learning_rate": float(self._lr_schedule(max(0, step - 1 - self._skipped))),
            "step_ms": 1e3 * seconds / count,
            "images_per_second": count * self._batch_size / seconds,
            "data_wait": self._waited / seconds,
        }
        if self._bins:
            sums, counts = np.asarray(jax.device_get(self._bins), np.float64).sum(axis=0)
            bins = zip(LOG_SNR_BINS, sums, counts, strict=True)
            found |= {name: float(total / number) for name, total, number in bins if number}
        if self._skip_nonfinite or self._skipped:
            found["skipped_steps"] = self._skipped
        devices = jax.local_devices()
        if self.step_flops:
            speed = self.step_flops * count / seconds
            found["tflops_per_device"] = speed / 1e12
            if peak := peak_flops(devices[0].device_kind):
                found["mfu"] = speed / peak
        return found | device_memory(devices)


def device_memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """GB in use now and at most so far, on the device that uses most; {} where the backend does not say (CPU)."""
    stats = [device.memory_stats() or {} for device in devices]
    names = {"device_memory_gb": "bytes_in_use", "device_memory_peak_gb": "peak_bytes_in_use"}
    return {
        name: max(each[key] for each in stats) / 1e9
        for name, key in names.items()
        if all(key in each for each in stats)
    }


class NotFinite(UserError):
    """The loss or the gradient norm of a step is not finite."""

    def __init__(self, message: str, *, loss: float, grad_norm: float) -> None:
        super().__init__(message)
        self.loss, self.grad_norm = loss, grad_norm


def fetch_finite(step: int, metrics: Mapping[str, jax.Array], workdir: Path) -> tuple[float, float]:
    """The loss and gradient norm of a step. NotFinite if one is not: a state with NaNs is never saved."""
    loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NotFinite(
            f"the loss of step {step} is {loss} and its gradient norm {grad_norm}: training stopped without saving "
            f"this step; the last good checkpoint is in {workdir}. Lower config.optim.learning_rate, raise "
            "config.optim.warmup_steps or set config.optim.clip_norm, and train in a new workdir",
            loss=loss,
            grad_norm=grad_norm,
        )
    return loss, grad_norm
