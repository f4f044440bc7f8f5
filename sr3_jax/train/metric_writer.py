"""Logging of a training run: metrics.jsonl, sample PNGs, TensorBoard, Weights & Biases and a progress bar.

Only process 0 logs. The others pass `enabled=False`, which turns every method into a no-op. Logging never stops
training: if a log cannot be written (disk full, lost network), one warning says so, and training goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

import numpy as np
from PIL import Image as PillowImage
from tqdm import tqdm

from sr3_jax.errors import UserError
from sr3_jax.files import parse_json, read_jsonl
from sr3_jax.image_io.errors import printable
from sr3_jax.storage import AppendedFile, as_path, atomic_write, is_url

PLAIN_SECONDS = 30.0  # between progress lines if stderr is a file or a pipe
METRICS_FILE = "metrics.jsonl"
WRITERS = ("tensorboard", "wandb")
_PREFIX = "sr3"  # of names of TensorBoard files, so that tensorboardX opens them as an `AppendedFile`
_UPLOAD_SECONDS = 20.0  # at the end of a run: a preempted machine has 30


class Log(Protocol):
    """One place that the metrics and images of a run are written to. A method may raise any exception."""

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step; they may be NaN or infinite."""
        ...

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write uint8 [H,W,3]."""
        ...

    def close(self, *, failed: bool) -> None:
        """Flush and close; `failed` says that an exception ends the run."""
        ...


class MetricWriter:
    """Writes the logs of a training run into its workdir. Use it as a context manager, or call `close`.

    metrics.jsonl and samples/ are always written, since resuming reads the former.

    Args:
        total_steps: the number of steps of the run, for the progress bar.
        first_step: the step that the run resumes from. Later lines of metrics.jsonl are dropped, since the run writes
            these steps again, and so is an incomplete last line.
        enabled: False on all processes but the first.
        minutes: time limit of the run, counted from now; None for no limit. The progress shows the earlier end.
        writers: names of the other logs, from `WRITERS`.
        config: the config of the run, for Weights & Biases.

    Raises:
        UserError: the workdir cannot be written, or the package of a log is not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        first_step: int = 0,
        enabled: bool = True,
        minutes: float | None = None,
        writers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.workdir = as_path(workdir)
        self.total_steps = total_steps
        self.enabled = enabled
        self._minutes = minutes
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time of the first call of `progress`
        self._last_line = -math.inf
        self._bar: tqdm | None = None
        self._failed: set[str] = set()
        self._logs: dict[str, Log] = {}
        if not enabled:
            return
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._logs[METRICS_FILE] = _Jsonl(self.workdir / METRICS_FILE, first_step)
            self._logs["samples"] = _Samples(self.workdir / "samples")
            if "tensorboard" in writers:
                self._logs["TensorBoard"] = _TensorBoard(self.workdir / "tensorboard", first_step)
        except OSError as error:
            raise UserError(
                f"workdir {workdir} cannot be written ({error.strerror or error}): use another one"
            ) from error
        if "wandb" in writers:
            check_writers(writers)
            with self._non_fatal("Weights & Biases"):
                self._logs["Weights & Biases"] = _Wandb(self.workdir, config or {})
        if sys.stderr.isatty():
            width = os.get_terminal_size(sys.stderr.fileno()).columns  # 0 in some containers
            self._bar = tqdm(
                total=1.0,
                bar_format="{desc} {percentage:3.0f}% {bar}{postfix}",
                miniters=0,
                file=sys.stderr,
                dynamic_ncols=width > 0,
                ncols=None if width else 80,
            )

    def write_scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Append {"step": step, name: value, ...} to metrics.jsonl, flush it, and write the values to the other logs.

        JSON has no NaN and infinity, so metrics.jsonl has null instead.
        """
        numbers = {name: float(value) for name, value in values.items()} if self.enabled else {}
        for name, log in self._logs.items():
            with self._non_fatal(name):
                log.write_scalars(int(step), numbers)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write uint8 [H,W,3] atomically to WORKDIR/samples/NAME_STEP.png, and to the other logs."""
        for title, log in self._logs.items():
            with self._non_fatal(title):
                log.write_image(int(step), name, np.asarray(image))

    def progress(
        self, step: int, *, loss: float | None = None, images_per_second: float | None = None
    ) -> None:
        """Show that `step` steps are done: a bar in a terminal, otherwise a line every 30 s and at the last step."""
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
            self._bar.update(self._fraction_done(step, now) - self._bar.n)
        elif now - self._last_line >= PLAIN_SECONDS or step >= self.total_steps:
            self._last_line = now
            print(", ".join([title, *parts]), file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """Print a line to stderr, above the progress bar if there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Print a line every 30 s while something takes long that makes no steps."""
        ended, start = threading.Event(), time.monotonic()

        def say() -> None:
            while not ended.wait(PLAIN_SECONDS):
                self.message(f"{what}: {tqdm.format_interval(int(time.monotonic() - start))}")

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def sync(self) -> None:
        """Have all lines in metrics.jsonl now, also in a bucket, which otherwise gets them each minute."""
        if isinstance(lines := self._logs.get(METRICS_FILE), _Jsonl):
            with self._non_fatal(METRICS_FILE):
                lines.sync()

    def close(self, *, failed: bool = False) -> None:
        """Flush and close all logs; a second call does nothing.

        Args:
            failed: whether an exception ends the run.
        """
        if self._bar is not None:
            self._bar.close()
        logs, self._logs = self._logs, {}
        for log in logs.values():
            with suppress(Exception):
                log.close(failed=failed)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    @contextmanager
    def _non_fatal(self, log: str) -> Iterator[None]:
        """Turn an error into one warning per log."""
        try:
            yield
        except Exception as error:  # the libraries of others raise anything
            if log not in self._failed:
                self._failed.add(log)
                text = printable(" ".join(str(getattr(error, "strerror", None) or error).split())[:200])
                self.message(
                    f"{log} of {self.workdir} cannot be written ({text or type(error).__name__}): training goes on "
                    "without it"
                )

    def _seconds_left(self, step: int, now: float) -> float | None:
        """Until the time limit or the last step, whichever is earlier; None if unknown.

        The speed is measured from the first call of `progress` on, which excludes compilation.
        """
        estimates = [] if self._minutes is None else [self._started + 60 * self._minutes - now]
        if self._first is not None and step > self._first[0]:
            estimates.append((self.total_steps - step) * (now - self._first[1]) / (step - self._first[0]))
        return max(0.0, min(estimates)) if estimates else None

    def _fraction_done(self, step: int, now: float) -> float:
        of_time = (now - self._started) / (60 * self._minutes) if self._minutes else 0.0
        return min(1.0, max(of_time, step / max(self.total_steps, 1)))


class _Jsonl:
    """metrics.jsonl: on a local disk, a line is in the file when `write_scalars` returns."""

    def __init__(self, path: Path, first_step: int) -> None:
        _drop_later_lines(path, first_step)
        self._lines = AppendedFile(path)
        self._line_is_cut = False  # by a failed write

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        data = b"\n" * self._line_is_cut + json.dumps(line).encode() + b"\n"
        self._line_is_cut = True
        self._lines.write(data)
        self._line_is_cut = False

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        pass

    def sync(self) -> None:
        self._lines.sync()

    def close(self, *, failed: bool) -> None:
        self._lines.close()


class _Samples:
    """Images as FOLDER/NAME_STEP.png."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._folder / f"{name}_{step:07d}.png") as file:
            PillowImage.fromarray(image).save(file, format="PNG")

    def close(self, *, failed: bool) -> None:
        pass


class _AppendedFiles:
    """How tensorboardX opens the files whose names start with `_PREFIX`."""

    @staticmethod
    def open(name: str) -> AppendedFile:
        return AppendedFile(as_path(name.removeprefix(f"{_PREFIX}:")))


class _TensorBoard:
    """A TensorBoard event file, written by the calling thread.

    Not tensorboardX's SummaryWriter: once its thread has failed, on a full disk for example, every further call blocks.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # Slow imports that only process 0 needs
        from tensorboardX import record_writer, summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # otherwise it warns about every NaN
        self._summary, self._event = summary, Event
        folder.mkdir(parents=True, exist_ok=True)
        record_writer.register_writer_factory(_PREFIX, _AppendedFiles)
        self._file = EventsWriter(f"{_PREFIX}:{folder / 'events'}")
        if first_step:  # TensorBoard hides earlier events of this and later steps
            self._write(first_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step, summary=self._summary.scalar(name, value))
        self._file.flush()

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._write(step, summary=self._summary.image(name, image, dataformats="HWC"))
        self._file.flush()

    def close(self, *, failed: bool) -> None:
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))


class _Wandb:
    """A Weights & Biases run; its environment variables (WANDB_PROJECT, WANDB_MODE, ...) hold.

    The id of the run is in WORKDIR/wandb/run_id, so that a resumed training continues it. Rows have the step as a value
    that the plots use as their axis, since the library drops a row whose own step number is not above the last one: a
    resumed run repeats steps, and in offline mode the library does not know the last one.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
        import wandb  # the extra `wandb`

        file = workdir / "wandb" / "run_id"  # the library writes its own files to the same folder
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as opened:
                opened.write(f"{secrets.token_hex(6)}\n".encode())
        name = workdir.name if is_url(workdir) else workdir.absolute().name
        if is_url(workdir):
            self._folder = tempfile.TemporaryDirectory()  # of the library's own files
            workdir = Path(self._folder.name)
        self._wandb = wandb
        self._run: Any = wandb.init(
            id=file.read_text().strip(),
            resume="allow",
            dir=str(workdir),
            project=os.environ.get("WANDB_PROJECT", "sr3_jax"),
            name=os.environ.get("WANDB_NAME", name),
            config=json.loads(json.dumps(config)),
            settings=wandb.Settings(
                console="off",  # stderr stays ours
                finish_timeout=_UPLOAD_SECONDS,
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log({"step": step, **values})

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._log({"step": step, name: self._wandb.Image(image)})

    def close(self, *, failed: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def _log(self, values: dict[str, Any]) -> None:
        run, self._run = self._run, None  # after an error it is not tried again: each try may take seconds
        if run is not None:
            run.log(values)
            self._run = run


def check_writers(writers: Sequence[str]) -> None:
    """UserError if the package of a log is not installed."""
    if "wandb" in writers and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "config.train.writers has wandb, which is not installed: run pip install 'sr3_jax[wandb]', or use "
            "config.train.writers=tensorboard"
        )


def _drop_later_lines(path: Path, first_step: int) -> None:
    """Remove incomplete lines, and those of steps after first_step; the others keep their bytes."""
    if not path.exists():
        return

    def is_valid(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and _step_of(parse_json(line)) <= first_step
        except ValueError:
            return False

    lines = path.read_bytes().splitlines(keepends=True)
    valid = [line for line in lines if is_valid(line)]
    if len(valid) < len(lines):
        with atomic_write(path) as file:
            file.write(b"".join(valid))


def _step_of(row: Any) -> float:
    """The step of a row of metrics.jsonl; infinity if the row is invalid."""
    try:
        return float(row["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The valid rows of a run's metrics.jsonl; [] if there is no such file."""
    return [row for row in read_jsonl(workdir / METRICS_FILE) if math.isfinite(_step_of(row))]
