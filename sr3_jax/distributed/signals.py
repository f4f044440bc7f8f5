"""Asking a long job to stop: the signals of launchers and of Ctrl-C as a value to poll."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within it SIGINT and SIGTERM only set what the yielded function gives; a second one acts at once.

    The function gives 0, or the exit code of the signal that came: 128 + its number, as shells have it (130, 143).
    Launchers take 143 for "start me again". Outside the main thread, where Python takes no signals, it stays 0.
    """
    code = 0

    def handler(number: int, frame: Any) -> None:
        nonlocal code
        code = 128 + number
        signal.signal(number, before[number])

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield lambda: code
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def exit_if_stopped(
    code: int, told: str = "Stopped. Run the same command again to go on from there."
) -> None:
    """End the command with the code that `stop_signals` gives, if it gives one; what is finished stays finished.

    Raises:
        SystemExit: of that code.
    """
    if code:
        print(told, file=sys.stderr)
        raise SystemExit(code)
