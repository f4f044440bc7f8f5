"""Progress of a long command on stderr: a bar on a terminal, a line every 30 seconds in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from sr3_jax.inference.program import OnStep


class Bar(tqdm):
    """A tqdm bar that also counts while it is disabled, which tqdm does not."""

    done = 0
    _name, _detail, _step, _since = "", "", "", 0.0

    def working_on(self, name: str, detail: str = "") -> None:
        """Say what is computed now. It is shown with the time since the name was first given."""
        if name != self._name:
            self._name, self._since = name, time.monotonic()
        self._detail, self._step = detail, ""
        self.show()

    def on_step(self, step: int, steps: int, images: object = None) -> None:
        """Say how far the sampler is: `on_step` of `Model.watched`."""
        self._step = f"step {step} of {steps}"
        self.show()

    def show(self) -> None:
        """Draw the bar again with the current time."""
        seconds = int(time.monotonic() - self._since)
        time_spent = tqdm.format_interval(seconds) if self._name else ""
        parts = [self._name, self._detail, self._step, time_spent]
        self.set_postfix_str(", ".join(filter(None, parts)))

    def update(self, n: float | None = 1) -> bool | None:
        self.done += int(n or 0)
        return super().update(n)

    def line(self, seconds: float) -> str:
        """One line for a log file."""
        name = f"{self.desc.rstrip(': ')}: " if getattr(self, "desc", None) else ""
        total = f" of {self.total}" if self.total else ""
        self.show()
        now = getattr(self, "postfix", None)
        detail = f" ({now})" if now else ""
        units = f"{self.unit}{'es' if self.unit.endswith('ch') else 's'}"
        return f"{name}{self.done}{total} {units} done after {tqdm.format_interval(int(seconds))}{detail}"


@contextmanager
def progress_bar(*, unit: str, total: int | None = None, every: float = 30.0) -> Iterator[Bar]:
    """A bar that counts `unit`; its clock goes on while the device computes.

    Args:
        every: seconds between two lines where stderr is not a terminal.
    """
    ended = threading.Event()
    with Bar(total=total, unit=unit, disable=None, file=sys.stderr) as bar:
        bar.unit = unit  # tqdm does not keep it while it is disabled
        interval = every if bar.disable else 1.0

        def tick() -> None:
            seconds = 0.0
            while not ended.wait(interval):
                seconds += interval
                if bar.disable:
                    print(bar.line(seconds), file=sys.stderr, flush=True)
                else:
                    bar.show()

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield bar
        finally:
            ended.set()
            ticker.join()


def step_reports(bar: Bar) -> OnStep | None:
    """What makes `Model.watched` report the steps to a bar. None on accelerators, which would wait for the host."""
    import jax

    return bar.on_step if jax.default_backend() == "cpu" else None


class Pace:
    """Estimates the time that is left of pieces of work of one kind, from those that are done.

    The first report of the first piece includes compilation: it gives an upper bound, until there is a second one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = (0, 0.0)  # what was done at that time
        self._seconds = 0.0  # each, without compilation; 0 while it is not known
        self._is_first = True

    @property
    def is_known(self) -> bool:
        """Whether the time of a piece is known without compilation."""
        return bool(self._seconds)

    def left(self, done: int, of: int) -> str:
        """The time left after `done` of `of`, in words; '' if nothing is known. Call it with the start, too."""
        now = self._clock()
        if done == 0:
            self._since, self._is_first = (0, now), not self._seconds
        count, seconds = done - self._since[0], now - self._since[1]
        bound = False
        if self._is_first and count > 0:
            self._since, self._is_first, bound = (done, now), False, True
            each = seconds / count
        elif count > 0 and not self._is_first:
            each = self._seconds = seconds / count
        else:
            each = self._seconds
        if not each or done == of:
            return ""
        return f"about {tqdm.format_interval(round(each * (of - done)))} left{' or less' * bound}"
