"""What a run tells about itself: metrics.jsonl, TensorBoard, sample PNGs and a progress bar.

Only process 0 of a run reports: the others pass `enabled=False`, and then nothing is created or printed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from PIL import Image as PillowImage
from tqdm import tqdm

from sr3_jax.errors import UserError
from sr3_jax.files import atomic_write

PLAIN_SECONDS = 30.0  # between two progress lines where stderr is a file or a pipe

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """The writer of one training run, kept in `workdir`; a context manager, or call `close`.

    On creation the lines of metrics.jsonl with `step` > first_step are dropped (the run writes those steps
    again), and so is a last line that a kill has cut in half. With `minutes` the run also ends by the clock,
    counted from creation, and the time left is the lesser of the two. UserError if workdir cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        first_step: int = 0,
        enabled: bool = True,
        minutes: float | None = None,
    ) -> None:
        self.workdir = Path(workdir)
        self.total_steps = total_steps
        self.enabled = enabled
        self._minutes = minutes
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None  # the step and time of the first progress
        self._last_line = -math.inf
        self._bar: tqdm | None = None
        if not enabled:
            return
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            _drop_later_lines(self.workdir / METRICS_FILE, first_step)
            # Open as long as the run: closed by `close`, and every line is flushed.
            self._lines = open(self.workdir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"workdir {workdir} cannot be written ({error.strerror}): choose another"
            ) from error
        from tensorboardX import SummaryWriter  # here, because only process 0 needs it

        logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # else a NaN is a warning at every step
        # TensorBoard hides what an earlier run wrote at purge_step and after.
        purge = first_step + 1 if first_step else None
        self._board = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=purge, flush_secs=30)
        if sys.stderr.isatty():
            width = os.get_terminal_size(sys.stderr.fileno()).columns  # 0 in some containers
            form = "{desc} {percentage:3.0f}% {bar}{postfix}"
            fit = {"dynamic_ncols": True} if width else {"ncols": 80}
            self._bar = tqdm(total=1.0, bar_format=form, miniters=0, file=sys.stderr, **fit)

    def write_scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """One line {"step": step, name: value, ...} in metrics.jsonl, flushed, and the same in TensorBoard.

        JSON has no NaN or infinity: they are written as null. TensorBoard gets them as they are.
        """
        if not self.enabled:
            return
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": int(step)} | {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, int(step))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """uint8 [H,W,3] as WORKDIR/samples/NAME_0001000.png (whole or not at all) and in TensorBoard."""
        if not self.enabled:
            return
        folder = self.workdir / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}_{int(step):07d}.png"
        with atomic_write(path) as partial:
            PillowImage.fromarray(np.asarray(image)).save(partial, format="PNG")
        self._board.add_image(name, np.asarray(image), int(step), dataformats="HWC")

    def progress(
        self, step: int, *, loss: float | None = None, images_per_second: float | None = None
    ) -> None:
        """Show that `step` steps are done: a bar in a terminal, else a line every 30 s and at the last."""
        if not self.enabled:
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        title = f"step {step}" if self._minutes else f"step {step}/{self.total_steps}"
        parts = [] if loss is None else [f"loss {float(loss):.4f}"]
        parts += [] if images_per_second is None else [f"{float(images_per_second):.1f} images/s"]
        left = self._seconds_left(step, now)
        parts += [] if left is None else [f"{tqdm.format_interval(left)} left"]
        if self._bar is not None:
            self._bar.set_description_str(title, refresh=False)
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(self._share_done(step, now) - self._bar.n)
        elif now - self._last_line >= PLAIN_SECONDS or step >= self.total_steps:
            self._last_line = now
            print(", ".join([title, *parts]), file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """A line on stderr, above the bar where there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.close()
        self._lines.close()
        self._board.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _seconds_left(self, step: int, now: float) -> float | None:
        """By the clock and by the mean pace since the first progress (which compilation has not slowed)."""
        ends = [] if self._minutes is None else [self._started + 60 * self._minutes - now]
        if self._first is not None and step > self._first[0]:
            ends.append((self.total_steps - step) * (now - self._first[1]) / (step - self._first[0]))
        return max(0.0, min(ends)) if ends else None

    def _share_done(self, step: int, now: float) -> float:
        by_clock = (now - self._started) / (60 * self._minutes) if self._minutes else 0.0
        return min(1.0, max(by_clock, step / max(self.total_steps, 1)))


def _drop_later_lines(path: Path, first_step: int) -> None:
    """Keep, byte for byte, the whole lines of a metrics.jsonl that belong to steps <= first_step."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= first_step]
    if len(kept) < len(lines):
        with atomic_write(path) as partial:
            partial.write_bytes(b"".join(kept))


def _step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinity for what is not such a line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, as far as they are whole; none if there is no such file."""
    log = workdir / METRICS_FILE
    lines = log.read_bytes().splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]
