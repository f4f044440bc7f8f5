"""Start a job of several processes: find the group, check that all of it has started, then start JAX's own runtime.

When a process is missing, JAX aborts the others with an error that does not say which. So the processes first connect
to process 0, over a socket at the address that JAX's coordinator uses next; if some are missing, all others name them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax

from sr3_jax.errors import UserError
from sr3_jax.files import parse_json
from sr3_jax.storage import cache_folder

DEFAULT_TIMEOUT = 300.0  # seconds
_TPU_PORT = 8482  # JAX's default on TPUs; 8476 is the TPU runtime's
_SHUTDOWN_TIMEOUT = (
    7 * 24 * 3600
)  # seconds: a process that has finished its part of a folder waits for the others
_MAX_LISTED = 8  # missing processes listed in an error
_REPLY_TIMEOUT = 5  # seconds for one message on an open connection
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUT = "SR3_START_TIMEOUT"
COMPILATION_CACHE = "JAX_COMPILATION_CACHE_DIR"


class MissingProcesses(UserError):
    """Some processes of a group did not start. On a cluster, trying again may help."""

    exit_code = 1  # launchers restart a job that exits with it


@dataclass(frozen=True)
class Group:
    """The processes of a job.

    Attributes:
        address: HOST:PORT of process 0.
        count: number of processes.
        index: of this process, from 0.
    """

    address: str
    count: int
    index: int


def find_group(environment: Mapping[str, str]) -> Group | None:
    """The group that the environment variables describe; None for a single process.

    Three forms: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; under Slurm the first of them only, as
    srun sets the rest; on GKE the variables of a TPU host (TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, MEGASCALE_*).

    Raises:
        UserError: some of the variables are missing, or their values are inconsistent.
    """
    address, count, index = (environment.get(name, "") for name in (ADDRESS, COUNT, INDEX))
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    if address and not count and not index and "SLURM_PROCID" in environment:
        count, index = environment.get("SLURM_NTASKS", ""), environment["SLURM_PROCID"]
    elif not address and not count and not index and (len(hosts) > 1 or slices != "1"):
        first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or hosts[0]
        worker, slice_id = environment.get("TPU_WORKER_ID", ""), environment.get("MEGASCALE_SLICE_ID", "0")
        if not all(text.isascii() and text.isdigit() for text in (slices, worker, slice_id)):
            raise UserError(
                f"TPU_WORKER_ID={worker!r}, MEGASCALE_NUM_SLICES={slices!r} and MEGASCALE_SLICE_ID={slice_id!r} "
                f"must be integers: correct them, or set {ADDRESS}, {COUNT} and {INDEX}"
            )
        address = f"{first}:{_TPU_PORT}"
        count, index = str(len(hosts) * int(slices)), str(int(slice_id) * len(hosts) + int(worker))
    if not address and not count and not index:
        return None
    if not (address and count and index):
        given = ", ".join(name for name, text in ((ADDRESS, address), (COUNT, count), (INDEX, index)) if text)
        raise UserError(f"{given} is set without the others: set all of {ADDRESS}, {COUNT} and {INDEX}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"{ADDRESS}={address!r} must be HOST:PORT, such as 10.0.0.1:8482")
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(f"{INDEX}={index!r} must be an integer from 0 to below {COUNT}={count!r}")
    return Group(address, int(count), int(index))


def start_processes(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Join this process to its group, if it has one. Call it before any other use of JAX.

    Returns:
        The index of this process and the number of processes; (0, 1) for a single process.

    Raises:
        MissingProcesses: some processes did not start within SR3_START_TIMEOUT seconds; the error lists them.
        UserError: the environment variables are inconsistent.
    """
    group = find_group(environment)
    if group is None or group.count == 1:
        return 0, 1
    timeout = environment.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    try:
        seconds = float(timeout)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise UserError(f"{TIMEOUT}={timeout!r} must be a number of seconds above 0")
    check_all_started(group, timeout=seconds)
    jax.distributed.initialize(
        group.address,
        group.count,
        group.index,
        initialization_timeout=max(60, int(seconds)),
        shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
    )
    return group.index, group.count


def share_compilation_cache(folder: Path, *, processes: int) -> None:
    """Have the processes of a job compile from one cache in `folder`, unless the user has chosen a cache.

    JAX writes its cache on process 0 only: with one cache per machine, all machines but the first would compile again
    at every restart.
    """
    default = cache_folder("compiled")
    if processes > 1 and os.environ.get(COMPILATION_CACHE, "") in ("", str(default)):
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))


def wait_for_all() -> None:
    """Wait until all processes of the group have called this. JAX's collectives cannot be used afterwards.

    JAX's shutdown is the barrier, because it also notices processes that have died.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def exit_now(code: int) -> None:
    """End this process without waiting for its devices, on which an abandoned computation may still run."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def abandon(code: int) -> None:
    """Exit immediately if this process has peers, which may wait for it in a step that it will never run.

    A normal exit would wait for them forever. The launcher stops the peers because of the exit code.
    """
    if jax.distributed.is_initialized():
        exit_now(code)


def check_all_started(group: Group, *, timeout: float) -> None:
    """Return, on every process, once all processes of the group have called this.

    Args:
        timeout: in seconds.

    Raises:
        MissingProcesses: some have not called it in time.
        UserError: two processes have the same index, or their counts differ.
    """
    run = _run_server if group.index == 0 else _run_client
    error = run(group, time.monotonic() + timeout, timeout)
    if error is not None:
        raise error


def _run_server(group: Group, deadline: float, timeout: float) -> UserError | None:
    """Process 0: wait for the others and send all of them the outcome, which is also returned; None for success."""
    started: dict[int, socket.socket] = {}
    clients: list[socket.socket] = []
    port = int(group.address.rpartition(":")[2])
    error: UserError | None = None
    with ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port, group.count))
        except OSError as failure:
            return UserError(
                f"port {port} is not available ({failure.strerror}): set another one in {ADDRESS}"
            )
        while len(started) < group.count - 1 and error is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                error = _missing(group, started, timeout)
                break
            server.settimeout(remaining)
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            stack.enter_context(client)
            index, count = _receive_hello(client)
            if index is None:
                continue  # not one of ours, such as a port scanner
            if count != group.count:
                error = UserError(
                    f"{COUNT} is {count} on process {index} but {group.count} on process 0: "
                    "set the same number on all"
                )
            elif (index in started and not _is_closed(started[index])) or not 0 < index < group.count:
                error = UserError(f"two processes have {INDEX}={index} (of {count}): give each its own")
            started[index] = client
            clients.append(client)
        outcome = {"error": str(error or ""), "missing": isinstance(error, MissingProcesses)}
        for client in clients:
            try:
                client.sendall(json.dumps(outcome).encode() + b"\n")
            except OSError:
                continue  # this client has exited, which jax.distributed will report
    return error


def _missing(group: Group, started: Mapping[int, socket.socket], timeout: float) -> MissingProcesses:
    missing = [index for index in range(1, group.count) if index not in started]
    names = ", ".join(map(str, missing[:_MAX_LISTED]))
    names += f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
    return MissingProcesses(
        f"waited {timeout:g} s for {group.count} processes, but {names} did not start: run the same command for each "
        f"of them, or set {TIMEOUT} to wait longer"
    )


def _run_client(group: Group, deadline: float, timeout: float) -> UserError | None:
    """The other processes: connect to process 0, send it this index, and return the outcome that it sends."""
    host, _, port = group.address.rpartition(":")
    while True:
        try:
            with socket.create_connection(
                (host.strip("[]"), int(port)), timeout=_REPLY_TIMEOUT
            ) as connection:
                # Process 0 may have started later than this one, and gives all the same time.
                connection.settimeout(timeout + 30)
                connection.sendall(json.dumps({"process": group.index, "of": group.count}).encode() + b"\n")
                outcome = parse_json(_receive_line(connection))
                kind = MissingProcesses if outcome["missing"] else UserError
                return kind(str(outcome["error"])) if outcome["error"] else None
        except (OSError, ValueError, LookupError, TypeError) as error:
            if time.monotonic() > deadline:
                return MissingProcesses(
                    f"process {group.index} waited {timeout:g} s for process 0 at {group.address} "
                    f"({getattr(error, 'strerror', None) or type(error).__name__}): start it, or correct {ADDRESS}"
                )
            time.sleep(min(1.0, timeout / 20))


def _listen(port: int, count: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count + 8
        )
    return socket.create_server(("", port), backlog=count + 8)


def _receive_hello(client: socket.socket) -> tuple[int | None, int]:
    """The index and the count that a client sends; (None, 0) if it sends anything else."""
    try:
        client.settimeout(_REPLY_TIMEOUT)
        message = parse_json(_receive_line(client))
        return int(message["process"]), int(message["of"])
    except (OSError, ValueError, LookupError, TypeError):
        return None, 0


def _receive_line(connection: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n") and len(text) < 4096:
        part = connection.recv(512)
        if not part:
            raise ConnectionResetError("connection closed by the peer")
        text += part
    return text


def _is_closed(connection: socket.socket) -> bool:
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


def hardware() -> str:
    """The devices of this process, in words."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind}, {jax.local_device_count()} of them"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_name()}, {cores} core{'s' * (cores != 1)}"


def _cpu_name() -> str:
    """The CPU's name, which the standard library does not know on Linux."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
