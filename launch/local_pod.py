"""Starts several processes on one machine, joined by jax.distributed.

    bash launch/local_pod.sh [--dry-run] [--logs DIR] N K COMMAND...     N processes of K simulated CPU devices each
    bash launch/local_gpus.sh [--dry-run] [--logs DIR] N COMMAND...      N processes of one GPU each; N may be `all`

COMMAND is any program, such as `sr3 train ...`. Each process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID. In a simulated pod it also gets JAX_PLATFORMS=cpu, and the number of devices is added to XLA_FLAGS; with
GPUs it gets the index of its own, which counts those in CUDA_VISIBLE_DEVICES if that is set. Process 0 writes to the
terminal. Lines of process 1 are prefixed with "[1] ", or with --logs appended to DIR/1.log.

SIGTERM and Ctrl-C are forwarded to all processes. When one process fails, the others get SIGTERM shortly after.
Processes still running SR3_GRACE seconds (default 30) after their signal are killed. The exit code is that of the first
process that failed (128 + the signal number if a signal ended it), 0 if none did, 2 for wrong arguments.

No process outlives the launcher, even if the launcher itself is killed: a child of the launcher supervises the
processes, adopts their orphans, and is notified by the kernel when the launcher dies (Linux only; the rest works on any
Unix).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from typing import NoReturn

FORWARDED = (signal.SIGTERM, signal.SIGINT)
NEVER = float("inf")
_PDEATHSIG, _SUBREAPER = 1, 36  # of prctl, in linux/prctl.h
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


ON_GPUS = sys.argv[1:2] == ["--gpus"]  # from local_gpus.sh
SCRIPT, USAGE = ("local_gpus.sh", "N COMMAND...") if ON_GPUS else ("local_pod.sh", "N K COMMAND...")


def fail(sentence: str) -> NoReturn:
    print(f"{SCRIPT}: {sentence}", file=sys.stderr)
    sys.exit(2)


def log(sentence: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"{SCRIPT}: {sentence}", file=sys.stderr, flush=True)


def positive(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        fail(f"{name} must be a positive integer, got '{text}': {SCRIPT} {USAGE}")
    return int(text)


def count_gpus() -> int | None:
    """The GPUs that a process may use; None if that is unknown."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def process_count(text: str, *, dry_run: bool) -> int:
    """The number of processes, checked against the number of GPUs."""
    if not ON_GPUS:
        return positive("N (number of processes)", text)
    gpus = None if dry_run and text != "all" else count_gpus()
    if text == "all":
        if not gpus:
            fail(
                "no GPU was found with nvidia-smi or in CUDA_VISIBLE_DEVICES: give their number instead of 'all'."
            )
        return gpus
    count = positive("N (number of GPUs)", text)
    if gpus is not None and count > gpus:
        fail(f"N is {count}, but there are {gpus} GPUs: use a smaller number, or 'all'.")
    return count


def parse(arguments: list[str]) -> tuple[bool, str | None, int, int, list[str]]:
    """(dry run, folder of the logs, number of processes, simulated devices per process (0: GPUs), command)."""
    dry_run, logs, rest = False, None, list(arguments)
    while rest and rest[0].startswith("-"):
        option, _, value = rest.pop(0).partition("=")
        if option in ("-h", "--help"):
            print(__doc__)
            sys.exit(0)
        elif option == "--dry-run":
            dry_run = True
        elif option == "--logs":
            logs = value or (rest.pop(0) if rest else "")
            if not logs:
                fail("--logs needs a directory: --logs DIR.")
        else:
            fail(f"unknown option '{option}': --dry-run, --logs DIR and --help go before N.")
    numbers = 1 if ON_GPUS else 2
    if len(rest) <= numbers:
        fail(f"{USAGE.removesuffix('...')} is incomplete: {SCRIPT} {USAGE}")
    count = process_count(rest[0], dry_run=dry_run)
    devices = 0 if ON_GPUS else positive("K (devices per process)", rest[1])
    return dry_run, logs, count, devices, rest[numbers:]


def grace_seconds() -> float:
    text = os.environ.get("SR3_GRACE", "30")
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", text, re.ASCII):
        fail(f"SR3_GRACE must be a number of seconds, got '{text}'.")
    return float(text)


def free_port() -> int:
    """An unused port, below the range that the system assigns to outgoing connections."""
    for port in random.sample(range(20000, 30000), 200):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    fail("no free port between 20000 and 30000.")


def environments(count: int, devices: int, port: int) -> list[dict[str, str]]:
    """The environment variables of each process, in addition to the inherited ones. 0 devices: one GPU."""
    groups = [
        {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        for index in range(count)
    ]
    if not devices:
        # The first is read by jax.distributed, which a single process does not start.
        names = ("JAX_LOCAL_DEVICE_IDS", "JAX_CUDA_VISIBLE_DEVICES")
        return [group | dict.fromkeys(names, str(index)) for index, group in enumerate(groups)]
    flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
    simulated = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags.split(), f"--xla_force_host_platform_device_count={devices}"]),
    }
    return [group | simulated for group in groups]


def descendants() -> dict[int, int]:
    """{pid: process group} of all descendants of this process; empty without /proc."""
    found: dict[int, tuple[int, int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                parent, group = (
                    file.read().rpartition(")")[2].split()[1:3]
                )  # the name in () may contain anything
                found[int(name)] = int(parent), int(group)
    below: dict[int, int] = {}
    new = {os.getpid()}
    while new:
        new = {pid for pid, (parent, _) in found.items() if parent in new}
        below |= {pid: found[pid][1] for pid in new}
    return below


class Supervisor:
    """Starts the processes, each in its own session, and waits until they and their descendants have ended."""

    def __init__(self, command: list[str], *, logs: str | None, grace: float, mask: set[signal.Signals]):
        self.command, self.logs, self.grace, self.mask = command, logs, grace, mask
        self.running: dict[int, int] = {}  # pid, which is also the process group -> index
        self.signaled: set[int] = set()  # process groups that were sent SIGTERM or SIGINT
        self.pipes = selectors.DefaultSelector()
        self.code = 0  # of the first that failed
        self.terminate_at = self.kill_at = NEVER

    def run(self, settings: list[dict[str, str]]) -> int:
        if _LIBC is not None:
            _LIBC.prctl(_SUBREAPER, 1, 0, 0, 0)
        wake, waker = os.pipe()  # a signal interrupts the wait for output
        for end in (wake, waker):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self.pipes.register(wake, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: self.forward(number))
        for index, extra in enumerate(settings):
            try:
                self.start(index, extra)
            except OSError as error:
                log(f"{error.filename or self.command[0]}: {error.strerror}.")
                self.code, self.terminate_at = 2, 0.0
                break
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)  # pending signals are forwarded now
        while self.reap():
            now = time.monotonic()
            if now >= self.terminate_at:
                self.terminate_at = NEVER
                self.forward(signal.SIGTERM)
            if now >= self.kill_at:
                self.kill()
            self.relay(min(max(min(self.kill_at, self.terminate_at) - now, 0.0), 60.0))
        while self.relay(0):
            pass  # the last lines
        return self.code

    def start(self, index: int, extra: dict[str, str]) -> None:
        supervisor = os.getpid()

        def settle() -> None:
            """In the new process: default signal handlers, and SIGKILL if the supervisor dies."""
            for number in FORWARDED:
                signal.signal(number, signal.SIG_DFL)
            if _LIBC is not None:
                _LIBC.prctl(_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
                if os.getppid() != supervisor:
                    os._exit(137)
            signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

        with contextlib.ExitStack() as stack:
            output = error = None
            if index and self.logs is not None:
                output = stack.enter_context(open(os.path.join(self.logs, f"{index}.log"), "ab"))
                error = subprocess.STDOUT
            elif index:
                output = error = subprocess.PIPE
            process = subprocess.Popen(
                self.command,
                # The lines of the others appear at once; process 0 is buffered, so that its lines are written whole.
                env=os.environ | extra | ({"PYTHONUNBUFFERED": "1"} if index else {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=error,
                start_new_session=True,  # Ctrl-C reaches it only through the supervisor
                preexec_fn=settle,
            )
        process.returncode = 0  # waited for in `reap`, not by this object
        self.running[process.pid] = index
        for pipe, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if pipe is not None:
                line_of = (f"[{index}] ".encode(), target.buffer, bytearray())
                self.pipes.register(pipe, selectors.EVENT_READ, line_of)

    def forward(self, number: int) -> None:
        """Send a signal to every process and its children. Also a signal handler: may be called at any time."""
        self.kill_at = min(self.kill_at, time.monotonic() + self.grace)
        for pid in list(self.running):
            self.signaled.add(pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number)

    def kill(self) -> None:
        if self.running:
            names = ", ".join(str(index) for index in sorted(self.running.values()))
            log(f"process {names} was still running {self.grace:g} s after its signal: killed.")
        for pid in list(self.running):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self.kill_at = time.monotonic() + 0.1  # again, for processes that were just being started

    def reap(self) -> bool:
        """Wait for ended processes; False when no process and no descendant is left."""
        had = bool(self.running)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                break
            index = self.running.pop(pid, None)
            if index is not None:
                self.ended(index, os.waitstatus_to_exitcode(status))
        if had and not self.running:
            # Only descendants are left. Those in a signaled group are stopping; the others are signaled now.
            self.kill_at = min(self.kill_at, time.monotonic() + self.grace)
            for pid, group in descendants().items():
                if group not in self.signaled:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGTERM)
        return True

    def ended(self, index: int, code: int) -> None:
        code = 128 - code if code < 0 else code
        if code == 0 or self.code:
            return
        self.code = code
        # A second signal makes sr3 stop without saving, so each process gets only one. The others get theirs after
        # a moment in which processes that fail for the same reason can report it.
        if self.running and not self.signaled:
            log(f"process {index} ended with exit code {code}: stopping the others.")
            self.terminate_at = time.monotonic() + min(2.0, self.grace)

    def relay(self, seconds: float) -> bool:
        """Wait for output or a signal; print lines with the index of their process. False if there was none."""
        moved = False
        for key, _ in self.pipes.select(seconds):
            with contextlib.suppress(BlockingIOError):
                data = os.read(key.fd, 65536)
                if key.data is None:  # the wake-up pipe of signals
                    continue
                moved = True
                prefix, target, rest = key.data
                lines = (rest + data).split(b"\n")
                rest[:] = lines.pop()
                if not data:
                    self.pipes.unregister(key.fileobj)
                    lines += [bytes(rest)] if rest else []
                with contextlib.suppress(BrokenPipeError, ValueError):  # the reader is gone: continue
                    target.write(b"".join(prefix + line + b"\n" for line in lines))
                    target.flush()
        return moved


def main() -> int:
    dry_run, logs, count, devices, command = parse(sys.argv[2:] if ON_GPUS else sys.argv[1:])
    grace, settings = grace_seconds(), environments(count, devices, free_port())
    if dry_run:
        for index, extra in enumerate(settings):
            line = shlex.join(["env", *(f"{name}={value}" for name, value in extra.items()), *command])
            print(
                line
                + (f" >>{shlex.quote(os.path.join(logs, f'{index}.log'))} 2>&1" if index and logs else "")
            )
        return 0
    if shutil.which(command[0]) is None:
        fail(f"program '{command[0]}' was not found: activate its environment, or give its path.")
    if logs is not None:
        try:
            os.makedirs(logs, exist_ok=True)
        except OSError as error:
            fail(f"--logs {logs}: {error.strerror}.")
    if not ON_GPUS:
        os.environ.pop("JAX_NUM_CPU_DEVICES", None)  # would override the number of devices

    # The launcher handles signals between waits, the supervisor as soon as it is ready.
    mine = {*FORWARDED, signal.SIGCHLD, signal.SIGHUP}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        mine.remove(signal.SIGHUP)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, mine)
    signal.signal(
        signal.SIGCHLD, lambda number, frame: None
    )  # an ignored SIGCHLD could be discarded instead of pending
    launcher = os.getpid()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            if _LIBC is not None:
                _LIBC.prctl(_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() == launcher:
                code = Supervisor(command, logs=logs, grace=grace, mask=mask).run(settings)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        number = signal.sigwait(mine)
        if number != signal.SIGCHLD:
            os.kill(child, signal.SIGTERM if number == signal.SIGHUP else number)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
