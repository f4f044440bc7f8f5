"""Profiles of a window of training steps, for xprof and TensorBoard."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax

from sr3_jax.storage import is_url, upload_folder

PROFILE_FOLDER = "profile"


class Profiler:
    """Profiles the devices of process 0 in a window of steps. A context manager, which ends an open window.

    Step n leads from n to n + 1 updates. The first step after a start, which compiles, is never in the window. A
    profile that fails is reported and never stops training.

    Args:
        window: the steps, see `config.build.profile_window`.
        workdir: the profile is written to its folder `profile`.
        first_step: that this start resumes from.
        report: prints a line.
    """

    def __init__(
        self, window: range, workdir: Path, *, first_step: int, report: Callable[[str], None]
    ) -> None:
        first = max(window.start, first_step + 1)
        self._window = range(first, window.stop) if jax.process_index() == 0 else range(0)
        self._folder, self._report = workdir / PROFILE_FOLDER, report
        self._active = False
        self._copy: tempfile.TemporaryDirectory | None = None  # for workdirs in an object store

    def before_step(self, step: int, running: Any) -> None:
        """Start or end the window, if `step` is the one for it.

        Args:
            running: the results of the step that was dispatched last; the window starts and ends after it.
        """
        if self._active and step not in self._window:
            jax.block_until_ready(running)
            self._stop()
        elif not self._active and step in self._window:
            jax.block_until_ready(running)
            self._start()

    def step(self, step: int) -> AbstractContextManager[Any]:
        """Mark the dispatch of a step in the profile."""
        if not self._active:
            return nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._stop()

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it slows the loop down and fills the file
        if is_url(self._folder):
            self._copy = tempfile.TemporaryDirectory()
        try:
            folder = self._copy.name if self._copy else self._folder
            jax.profiler.start_trace(folder, profiler_options=options)
            self._active = True
        except Exception as error:  # such as a profiler server that is in use
            self._fail(error)

    def _stop(self) -> None:
        self._active = False
        try:
            jax.profiler.stop_trace()
            if self._copy is not None:
                upload_folder(Path(self._copy.name), self._folder)
            self._report(f"Profile written to {self._folder}: xprof --logdir={self._folder} shows it")
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._window = range(0)
        self._report(f"No profile in {self._folder} ({str(error).splitlines()[0][:200]}): training goes on")
