"""The start of a job of several processes: who belongs to it, a roll call, then JAX's own runtime.

JAX ends a process whose peers do not come with an abort that names nobody. So the processes first report to the
first one over a socket at the address that JAX's service takes next; if some are missing, all that came say which.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import jax

from sr3_jax.errors import UserError

DEFAULT_TIMEOUT = 300.0  # seconds
_TPU_PORT = 8482  # what JAX itself takes; 8476 is the TPU runtime's
_LEAVE_TIMEOUT = 7 * 24 * 3600  # a process that is done with its part of a folder waits for the others
_NAMED = 8  # missing processes in a sentence
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUT = "SR3_START_TIMEOUT"


class MissingProcesses(UserError):
    """Some processes of a group are missing: on a cluster, trying again may help."""

    exit_code = 1  # which launchers try again


@dataclass(frozen=True)
class Group:
    """The processes of a job: the address of the first as host:port, how many, and which one this is (from 0)."""

    address: str
    count: int
    index: int


def find_group(environment: Mapping[str, str]) -> Group | None:
    """The group that the environment describes, None for a process on its own.

    Three ways: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; the first of them under Slurm, whose
    srun gives the rest; what GKE tells a TPU host (TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, MEGASCALE_*).

    Raises:
        UserError: only some of them are set, or their values do not fit together.
    """
    address, count, index = (environment.get(name, "") for name in (ADDRESS, COUNT, INDEX))
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    if address and not count and not index and "SLURM_PROCID" in environment:
        count, index = environment.get("SLURM_NTASKS", ""), environment["SLURM_PROCID"]
    elif not address and not count and not index and (len(hosts) > 1 or slices != "1"):
        first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or hosts[0]
        worker, its_slice = environment.get("TPU_WORKER_ID", ""), environment.get("MEGASCALE_SLICE_ID", "0")
        if not all(text.isascii() and text.isdigit() for text in (slices, worker, its_slice)):
            raise UserError(
                f"TPU_WORKER_ID={worker!r}, MEGASCALE_NUM_SLICES={slices!r} and MEGASCALE_SLICE_ID={its_slice!r} "
                f"must be whole numbers; or set {ADDRESS}, {COUNT} and {INDEX}"
            )
        address = f"{first}:{_TPU_PORT}"
        count, index = str(len(hosts) * int(slices)), str(int(its_slice) * len(hosts) + int(worker))
    if not address and not count and not index:
        return None
    if not (address and count and index):
        given = ", ".join(name for name, text in ((ADDRESS, address), (COUNT, count), (INDEX, index)) if text)
        raise UserError(
            f"{given} is set, but a group of processes needs {ADDRESS}, {COUNT} and {INDEX}: set all three"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"{ADDRESS}={address!r} must be HOST:PORT, such as 10.0.0.1:8482")
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(f"{INDEX}={index!r} must be a whole number under {COUNT}={count!r}")
    return Group(address, int(count), int(index))


def start_processes(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Join the group of this process, if it has one; before anything else of JAX.

    Returns:
        The number of this process and how many there are: (0, 1) for one on its own.

    Raises:
        MissingProcesses: some of its processes did not come within SR3_START_TIMEOUT seconds; the sentence says which.
        UserError: what the environment says does not fit together.
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
    roll_call(group, timeout=seconds)
    jax.distributed.initialize(
        group.address,
        group.count,
        group.index,
        initialization_timeout=max(60, int(seconds)),
        shutdown_timeout_seconds=_LEAVE_TIMEOUT,
    )
    return group.index, group.count


def wait_for_all() -> None:
    """Wait until all processes of the group have come here; each is on its own from then on.

    JAX's way out is what all of them go through whatever happens, so one that fails before is noticed here too.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def abandon(code: int) -> None:
    """End this process now if it has peers: they may wait for it in a step that it will never take.

    JAX's own way out waits for all of them, which here would be forever; the launcher ends them by this exit code.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def roll_call(group: Group, *, timeout: float) -> None:
    """Return on every process once all have come.

    Raises:
        MissingProcesses: some have not.
        UserError: two go by one number, or their counts differ.
    """
    verdict = (_take if group.index == 0 else _report)(group, time.monotonic() + timeout, timeout)
    if verdict:
        raise (MissingProcesses if "waited" in verdict else UserError)(verdict)


def _take(group: Group, deadline: float, timeout: float) -> str:
    """Process 0: hear the others until all are there, then tell them the verdict: '' to go on."""
    came: dict[int, socket.socket] = {}
    callers: list[socket.socket] = []
    verdict = ""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(int(group.address.rpartition(":")[2]), group.count))
        except OSError as error:
            return (
                f"port {group.address.rpartition(':')[2]} cannot be listened on ({error.strerror}): "
                f"give another in {ADDRESS}"
            )
        while len(came) < group.count - 1 and not verdict:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [index for index in range(1, group.count) if index not in came]
                names = ", ".join(map(str, missing[:_NAMED]))
                names += f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
                verdict = (
                    f"waited {timeout:g} s for {group.count} processes, without {names}: start the same command "
                    f"for each of them, or set {TIMEOUT} to wait longer"
                )
                break
            server.settimeout(left)
            try:
                caller, _ = server.accept()
            except TimeoutError:
                continue
            stack.enter_context(caller)
            index, count = _hear(caller)
            if index is None:
                continue  # a stranger: something that scans ports
            if count != group.count:
                verdict = (
                    f"process {index} was started as one of {count} and process 0 as one of {group.count}: "
                    f"give all the same {COUNT}"
                )
            elif (index in came and not _hung_up(came[index])) or not 0 < index < group.count:
                verdict = f"two processes came as number {index} of {count}: give each its own {INDEX}"
            came[index] = caller
            callers.append(caller)
        for caller in callers:
            try:
                caller.sendall(json.dumps({"verdict": verdict}).encode() + b"\n")
            except OSError:
                continue  # it has left; JAX's own start will say so
    return verdict


def _report(group: Group, deadline: float, timeout: float) -> str:
    """The other processes: find process 0, tell it who this is, and wait for its verdict."""
    host, _, port = group.address.rpartition(":")
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as line:
                # Process 0 may have come later than this one, and gives all the same time.
                line.settimeout(timeout + 30)
                line.sendall(json.dumps({"process": group.index, "of": group.count}).encode() + b"\n")
                verdict = json.loads(_line(line))["verdict"]
                return str(verdict)
        except (OSError, ValueError, LookupError, TypeError) as error:
            if time.monotonic() > deadline:
                return (
                    f"process {group.index} waited {timeout:g} s for process 0 at {group.address} "
                    f"({getattr(error, 'strerror', None) or type(error).__name__}): start it, or mend {ADDRESS}"
                )
            time.sleep(min(1.0, timeout / 20))


def _listen(port: int, count: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count + 8
        )
    return socket.create_server(("", port), backlog=count + 8)


def _hear(caller: socket.socket) -> tuple[int | None, int]:
    try:
        caller.settimeout(5)
        message = json.loads(_line(caller))
        return int(message["process"]), int(message["of"])
    except (OSError, ValueError, LookupError, TypeError):
        return None, 0


def _line(connection: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n") and len(text) < 4096:
        part = connection.recv(512)
        if not part:
            raise ConnectionResetError("the other side hung up")
        text += part
    return text


def _hung_up(connection: socket.socket) -> bool:
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)
