"""Stop a long job cleanly: SIGTERM, SIGHUP and Ctrl-C as a value to poll."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Catch the first SIGINT, SIGTERM or SIGHUP in this context; a second one of the same kind acts immediately.

    SIGHUP, which a terminal sends when it closes, is not caught if it is already ignored, as under `nohup`.

    Yields:
        A function that returns 0, or once a signal has arrived its exit code by the convention of shells: 130 for
        SIGINT, 143 for SIGTERM, 129 for SIGHUP. Launchers restart a job that exits with 143. Outside the main thread,
        where Python cannot handle signals, it always returns 0.
    """
    code = 0

    def handler(number: int, frame: Any) -> None:
        nonlocal code
        code = 128 + number
        signal.signal(number, before[number])

    in_main_thread = threading.current_thread() is threading.main_thread()
    caught = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in caught if in_main_thread}
    try:
        yield lambda: code
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def exit_if_stopped(code: int, message: str = "Stopped. Run the same command again to resume.") -> None:
    """Exit with the code that the function of `stop_signals` returned, unless it is 0.

    Args:
        message: printed to stderr before exiting.

    Raises:
        SystemExit: with that code.
    """
    if code:
        print(message, file=sys.stderr)
        raise SystemExit(code)
