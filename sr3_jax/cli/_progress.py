"""Progress of a long command on stderr: a bar on a terminal, a line every 30 seconds in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Bar(tqdm):
    """A tqdm bar that also counts while it is disabled, which tqdm does not."""

    done = 0
    _name, _detail, _since = "", "", 0.0

    def working_on(self, name: str, detail: str = "") -> None:
        """Say what is computed now. It is shown with the time since the name was first given."""
        if name != self._name:
            self._name, self._since = name, time.monotonic()
        self._detail = detail
        self.show()

    def show(self) -> None:
        """Draw the bar again with the current time."""
        seconds = int(time.monotonic() - self._since)
        parts = [self._name, self._detail, tqdm.format_interval(seconds)] if self._name else []
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
        return (
            f"{name}{self.done}{total} {self.unit}s done after {tqdm.format_interval(int(seconds))}{detail}"
        )


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
