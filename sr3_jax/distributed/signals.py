"""Stop a long job cleanly: SIGTERM, SIGHUP and Ctrl-C as a value to poll."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_PATIENCE = 0.7  # seconds for Python to act on a second signal


@contextmanager
def stop_signals(finishing: str = "this step") -> Iterator[Callable[[], int]]:
    """Catch the first SIGINT, SIGTERM or SIGHUP in this context; a second one of the same kind acts immediately.

    Python runs its signal handlers only between two of its instructions, which a long computation on a device delays by
    minutes. So a thread prints a line as soon as the first signal arrives, and ends the process if a second one has no
    effect within a second. SIGHUP, which a terminal sends when it closes, is not caught if it is already ignored, as
    under `nohup`.

    Args:
        finishing: what the caller still finishes after the first signal, for that line.

    Yields:
        A function that returns 0, or once a signal has arrived its exit code by the convention of shells: 130 for
        SIGINT, 143 for SIGTERM, 129 for SIGHUP. Launchers restart a job that exits with 143. Outside the main thread,
        where Python cannot handle signals, it always returns 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    code = 0

    def handler(number: int, frame: Any) -> None:
        nonlocal code
        code = 128 + number
        signal.signal(number, before[number])

    caught = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader, caught, finishing), name="signals", daemon=True)
    watcher.start()
    other = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # gets the number of each signal at once
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in caught}
    try:
        yield lambda: code
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(other)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, caught: Collection[int], finishing: str) -> None:
    """Until the pipe is closed: report the first signal, and end the process soon after a second one of its kind."""
    seen: set[int] = set()
    while numbers := os.read(reader, 64):
        for number in (one for one in numbers if one in caught):
            if number in seen:
                while select.select([reader], [], [], _PATIENCE)[0]:
                    if not os.read(reader, 64):
                        return
                os._exit(128 + number)
            seen.add(number)
            if len(seen) > 1:
                continue
            again = "press Ctrl-C again" if number == signal.SIGINT else "send the signal again"
            with suppress(OSError, ValueError):  # the terminal may be gone
                start = "\n" if sys.stderr.isatty() else ""  # below a progress bar
                print(f"{start}Stopping after {finishing}; {again} to stop now", file=sys.stderr, flush=True)


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
