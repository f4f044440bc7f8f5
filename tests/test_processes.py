"""The group of a job and the start-up check, with threads in place of processes."""

from __future__ import annotations

import json
import re
import socket
import threading
import time

import jax
import pytest

from sr3_jax.distributed import processes
from sr3_jax.distributed.processes import Group, find_group, share_compilation_cache
from sr3_jax.errors import UserError

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "h:8", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {"JAX_COORDINATOR_ADDRESS": "h:8", "SLURM_NTASKS": "16", "SLURM_PROCID": "9"}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "3"}
SLICES = TPU | {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "m:80",
}


@pytest.mark.parametrize(
    ("environment", "group"),
    [
        ({}, None),
        (
            {"SLURM_NTASKS": "16", "SLURM_PROCID": "9"},
            None,
        ),  # also set in a batch script without srun
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (EXPLICIT, Group("h:8", 4, 2)),
        (EXPLICIT | {"SLURM_NTASKS": "16", "SLURM_PROCID": "9"} | TPU, Group("h:8", 4, 2)),
        (SLURM, Group("h:8", 16, 9)),
        (TPU, Group("a:8482", 4, 3)),
        (SLICES, Group("m:8482", 8, 7)),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "[::1]:80"}, Group("[::1]:80", 4, 2)),
    ],
)
def test_group_from_environment_variables(environment, group):
    assert find_group(environment) == group


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, r"JAX_NUM_PROCESSES is set .*JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "h:8", "JAX_PROCESS_ID": "0"}, r"JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is set"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "h"}, "JAX_COORDINATOR_ADDRESS='h' .*HOST:PORT"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "h:99999"}, "must be HOST:PORT"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID='4' .*JAX_NUM_PROCESSES='4'"),
        (EXPLICIT | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1'"),
        (TPU | {"TPU_WORKER_ID": "x"}, "TPU_WORKER_ID='x'"),
    ],
)  # fmt: skip
def test_inconsistent_environment_variables_fail(environment, text):
    with pytest.raises(UserError, match=text) as error:
        find_group(environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("timeout", ["soon", "0", "-3", "nan", "inf"])
def test_invalid_timeout_fails(timeout):
    with pytest.raises(UserError, match=f"SR3_START_TIMEOUT='{timeout}'"):
        processes.start_processes(EXPLICIT | {"SR3_START_TIMEOUT": timeout})


def test_single_process_needs_no_start():
    single = EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    assert processes.start_processes({}) == processes.start_processes(single) == (0, 1)


# ---- The start-up check


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def check(*members: tuple[int, int], timeout: float = 20.0, late: float = 0.0) -> list[UserError | None]:
    """The error, if any, of each member (index, count). The first member starts `late` seconds after the others."""
    port = free_port()
    errors: list[UserError | None] = [None] * len(members)

    def start(place: int, index: int, count: int) -> None:
        try:
            time.sleep(late if place == 0 else 0)
            processes.check_all_started(Group(f"127.0.0.1:{port}", count, index), timeout=timeout)
        except UserError as error:
            errors[place] = error

    threads = [threading.Thread(target=start, args=(place, *member)) for place, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return errors


@pytest.mark.parametrize("late", [0.0, 1.0])
def test_processes_may_start_in_any_order(late):
    assert check(*((index, 5) for index in range(5)), late=late) == [None] * 5


def test_error_names_the_missing_processes():
    first, second = check((0, 4), (2, 4), timeout=0.5)
    # Launchers restart a job after this exception, on every process.
    assert isinstance(first, processes.MissingProcesses) and isinstance(second, processes.MissingProcesses)
    assert str(first) == str(second) and "SR3_START_TIMEOUT" in str(first)
    assert re.findall(r"\b\d\b", str(first).partition(" s ")[2]) == [
        "4",
        "1",
        "3",
    ]  # of 4, 1 and 3 are missing
    [many] = check((0, 40), timeout=0.2)
    assert "1, 2, 3, 4, 5, 6, 7, 8 and 31 more" in str(many)


def test_missing_process_0_is_reported():
    [error] = check((1, 2), timeout=0.3)
    for text in (
        "process 1",
        "0.3 s",
        "process 0 at 127.0.0.1:",
        "Connection refused",
        "JAX_COORDINATOR_ADDRESS",
    ):
        assert text in str(error)
    assert isinstance(error, processes.MissingProcesses)


def test_duplicate_index_fails_on_all_processes():
    errors = check((0, 3), (2, 3), (2, 3), timeout=5)
    assert all("JAX_PROCESS_ID=2" in str(error) for error in errors)
    assert not any(isinstance(error, processes.MissingProcesses) for error in errors)


def test_different_counts_fail_on_all_processes():
    first, second = check((0, 3), (1, 2), timeout=5)
    assert str(first) == str(second)
    assert "JAX_NUM_PROCESSES is 2 on process 1 but 3 on process 0" in str(first)


def test_other_connections_and_restarted_processes_do_not_count():
    """A port scanner, invalid messages, and a process that died and was restarted."""
    port = free_port()
    errors = {}

    def start(index: int) -> None:
        try:
            processes.check_all_started(Group(f"127.0.0.1:{port}", 2, index), timeout=10)
            errors[index] = ""
        except UserError as error:
            errors[index] = str(error)

    first = threading.Thread(target=start, args=(0,))
    first.start()

    def connect(text: bytes) -> None:
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(text)
                return
            except ConnectionRefusedError:
                time.sleep(0.05)

    connect(b"")
    connect(b"GET / HTTP/1.0\n")
    connect(json.dumps({"process": 7, "of": "x"}).encode() + b"\n")
    time.sleep(0.2)
    assert first.is_alive()
    start(1)
    first.join(30)
    assert errors == {0: "", 1: ""}


def test_port_in_use_fails():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*JAX_COORDINATOR_ADDRESS"):
            processes.check_all_started(Group(f"127.0.0.1:{port}", 2, 0), timeout=1)


# ---- The compilation cache


@pytest.mark.parametrize(
    ("processes", "chosen", "shared"),
    [(2, "", True), (2, "own", False), (2, "default", True), (1, "", False)],
)
def test_the_processes_of_a_job_share_one_compilation_cache(processes, chosen, shared, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default = tmp_path / "sr3_jax" / "compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(default) if chosen == "default" else chosen)
    before = jax.config.jax_compilation_cache_dir
    try:
        share_compilation_cache(tmp_path / "run", processes=processes)
        wanted = str(tmp_path / "run") if shared else before
        assert jax.config.jax_compilation_cache_dir == wanted
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
