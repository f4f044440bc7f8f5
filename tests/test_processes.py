"""Who belongs to a job, and the roll call: all come, or one sentence says who did not. In threads, which suffice."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from sr3_jax.distributed import processes
from sr3_jax.distributed.processes import Group, find_group
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
        ),  # a batch script without srun looks like that too
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (EXPLICIT, Group("h:8", 4, 2)),
        (EXPLICIT | {"SLURM_NTASKS": "16", "SLURM_PROCID": "9"} | TPU, Group("h:8", 4, 2)),
        (SLURM, Group("h:8", 16, 9)),
        (TPU, Group("a:8482", 4, 3)),
        (SLICES, Group("m:8482", 8, 7)),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "[::1]:80"}, Group("[::1]:80", 4, 2)),
    ],
)
def test_the_group_is_what_the_environment_says(environment, group):
    assert find_group(environment) == group


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, r"JAX_NUM_PROCESSES is set, but .* set all three"),
        ({"JAX_COORDINATOR_ADDRESS": "h:8", "JAX_PROCESS_ID": "0"}, r"JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is set"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "h"}, "JAX_COORDINATOR_ADDRESS='h' must be HOST:PORT"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "h:99999"}, "must be HOST:PORT"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID='4' must be a whole number under JAX_NUM_PROCESSES='4'"),
        (EXPLICIT | {"JAX_PROCESS_ID": "-1"}, "must be a whole number under"),
        (TPU | {"TPU_WORKER_ID": "x"}, "TPU_WORKER_ID='x'"),
    ],
)  # fmt: skip
def test_half_a_group_is_refused(environment, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        find_group(environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("timeout", ["soon", "0", "-3", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(timeout):
    with pytest.raises(UserError, match=f"SR3_START_TIMEOUT='{timeout}' must be a number of seconds above 0"):
        processes.start_processes(EXPLICIT | {"SR3_START_TIMEOUT": timeout})


def test_a_process_on_its_own_starts_nothing():
    alone = EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    assert processes.start_processes({}) == processes.start_processes(alone) == (0, 1)


# ---- The roll call


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def call(*members: tuple[int, int], timeout: float = 20.0, late: float = 0.0) -> list[str]:
    """What each of (index, count) hears, '' to go on; the first of them comes `late` seconds after the others."""
    port, heard = free_port(), [""] * len(members)

    def come(place: int, index: int, count: int) -> None:
        try:
            time.sleep(late if place == 0 else 0)
            processes.roll_call(Group(f"127.0.0.1:{port}", count, index), timeout=timeout)
        except UserError as error:
            heard[place] = str(error)

    threads = [threading.Thread(target=come, args=(place, *member)) for place, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return heard


@pytest.mark.parametrize("late", [0.0, 1.0])
def test_all_come_whichever_is_first(late):
    assert call(*((index, 5) for index in range(5)), late=late) == [""] * 5


def test_those_that_came_say_who_did_not():
    missing = (
        "waited 0.5 s for 4 processes, without 1, 3: start the same command for each of them, or set "
        "SR3_START_TIMEOUT to wait longer"
    )
    assert call((0, 4), (2, 4), timeout=0.5) == [missing] * 2
    with pytest.raises(processes.MissingProcesses):  # which launchers try again
        processes.roll_call(Group(f"127.0.0.1:{free_port()}", 2, 0), timeout=0.2)
    [many] = call((0, 40), timeout=0.2)
    assert "without 1, 2, 3, 4, 5, 6, 7, 8 and 31 more: " in many


def test_without_the_first_the_others_say_so():
    [heard] = call((1, 2), timeout=0.3)
    assert heard.startswith("process 1 waited 0.3 s for process 0 at 127.0.0.1:")
    assert heard.endswith("(Connection refused): start it, or mend JAX_COORDINATOR_ADDRESS")


def test_two_of_one_number_are_refused():
    heard = call((0, 3), (2, 3), (2, 3), timeout=5)
    assert heard == ["two processes came as number 2 of 3: give each its own JAX_PROCESS_ID"] * 3


def test_counts_that_differ_are_refused():
    first, second = call((0, 3), (1, 2), timeout=5)
    assert first == second
    assert first.startswith("process 1 was started as one of 2 and process 0 as one of 3: ")


def test_strangers_and_those_that_left_are_not_counted():
    """A port scanner, noise, and a process that died while it waited and was started again."""
    port = free_port()
    heard = {}

    def come(index: int) -> None:
        try:
            processes.roll_call(Group(f"127.0.0.1:{port}", 2, index), timeout=10)
            heard[index] = ""
        except UserError as error:
            heard[index] = str(error)

    first = threading.Thread(target=come, args=(0,))
    first.start()

    def visit(text: bytes) -> None:
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port)) as line:
                    line.sendall(text)
                return
            except ConnectionRefusedError:
                time.sleep(0.05)

    visit(b"")
    visit(b"GET / HTTP/1.0\n")
    visit(json.dumps({"process": 7, "of": "x"}).encode() + b"\n")
    time.sleep(0.2)
    assert first.is_alive()
    come(1)
    first.join(30)
    assert heard == {0: "", 1: ""}


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            UserError, match=f"port {port} cannot be listened on .*: give another in JAX_COORD"
        ):
            processes.roll_call(Group(f"127.0.0.1:{port}", 2, 0), timeout=1)
