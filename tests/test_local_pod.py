"""launch/local_pod.sh and local_gpus.sh: environments, exit codes, signals, and no process left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "launch/local_pod.sh")
FLAG = "--xla_force_host_platform_device_count"
SLEEPER = "echo ready; exec sleep 60"
WAIT = "while :; do sleep 0.05; done"
STUBBORN = "trap '' TERM INT; echo ready; sleep 60; sleep 60"


class Pod:
    """A running launcher, whose descendants are identified by a mark in their environment."""

    def __init__(self, *arguments: str, script: str = SCRIPT, **environment: str):
        self.mark = f"SR3_TEST_MARK={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        self.process = subprocess.Popen(
            ["bash", script, *arguments],
            env=os.environ | {name: value, "SR3_GRACE": "0.5", "PYTHONUNBUFFERED": ""} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def left(self) -> list[str]:
        """The command lines of the running processes with the mark."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and self.mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def wait_for(self, word: str, count: int) -> None:
        """Read the output until the word has appeared that many times."""
        while count:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()
            count -= line.count(word)

    def wait_until_all_have_ended(self) -> None:
        end = time.monotonic() + 20
        while left := self.left():
            assert time.monotonic() < end, left
            time.sleep(0.05)

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def pod() -> Iterator[type[Pod]]:
    """Starts launchers; fails a test that leaves one of their processes running."""
    started = []

    def start(*arguments: str, **options: str) -> Pod:
        started.append(Pod(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        left = one.left()
        if one.process.poll() is None:
            one.process.terminate()
        one.process.communicate(timeout=30)
        assert not left


# --- Environment and output


def test_the_environment_of_each_process(pod):
    names = "JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID JAX_PLATFORMS XLA_FLAGS MINE PYTHONUNBUFFERED"
    show = "echo " + ",".join(f"${name}" for name in names.split())
    flags = f"--mine=1 {FLAG}=8 {FLAG}=7 --other"
    code, out, err = pod("3", "4", "sh", "-c", show, XLA_FLAGS=flags, MINE="kept").finish()
    assert (code, err) == (0, "")
    lines = sorted(out.splitlines(), key=lambda line: line.split(",")[2])
    address = lines[0].split(",")[0]
    assert re.fullmatch(r"127\.0\.0\.1:\d{4,5}", address)
    rest = f"cpu,--mine=1 --other {FLAG}=4,kept,"
    assert lines == [f"{address},3,0,{rest}"] + [f"[{i}] {address},3,{i},{rest}1" for i in (1, 2)]


def test_lines_are_prefixed_with_their_process_on_both_streams(pod):
    halves = "printf 'one\\ntw'; sleep 0.1; printf 'o\\nend'; echo wrong >&2"
    script = f"[ $JAX_PROCESS_ID != 0 ] || exec echo mine; {halves}"
    code, out, err = pod("3", "1", "sh", "-c", script).finish()
    assert (code, sorted(err.splitlines())) == (0, ["[1] wrong", "[2] wrong"])
    lines = [
        [line for line in out.splitlines() if line.startswith(start)] for start in ("[1] ", "[2] ", "mine")
    ]
    assert lines == [["[1] one", "[1] two", "[1] end"], ["[2] one", "[2] two", "[2] end"], ["mine"]]


def test_logs_are_appended_to_files(pod, tmp_path: Path):
    script = "echo $JAX_PROCESS_ID; echo wrong >&2"
    for _ in range(2):
        code, out, err = pod("--logs", str(tmp_path / "a b"), "3", "1", "sh", "-c", script).finish()
        assert (code, out, err) == (0, "0\n", "wrong\n")
    assert {path.name: path.read_text() for path in (tmp_path / "a b").iterdir()} == {
        "1.log": "1\nwrong\n" * 2,
        "2.log": "2\nwrong\n" * 2,
    }


def test_the_command_is_passed_unchanged(pod):
    arguments = ["a b", "", "'", '"$HOME"', "*", "--dry-run"]
    code, out, _ = pod("1", "1", sys.executable, "-c", "import sys; print(sys.argv[1:])", *arguments).finish()
    assert (code, out) == (0, f"{arguments}\n")


def test_a_dry_run_prints_runnable_lines(pod, tmp_path: Path):
    command = ["sh", "-c", "echo $JAX_PROCESS_ID $XLA_FLAGS 'a  b'"]
    options = ["--dry-run", "--logs", str(tmp_path / "no where")]
    code, out, err = pod(*options, "2", "8", *command, XLA_FLAGS="--mine=1").finish()
    assert (code, err) == (0, "")
    port = re.search(r"127\.0\.0\.1:(\d+)", out).group(1)
    line = (
        f"env JAX_COORDINATOR_ADDRESS=127.0.0.1:{port} JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=%d JAX_PLATFORMS=cpu "
        f"'XLA_FLAGS=--mine=1 {FLAG}=8' sh -c 'echo $JAX_PROCESS_ID $XLA_FLAGS '\"'\"'a  b'\"'\"''"
    )
    first, second = line % 0, f"{line % 1} >>'{tmp_path}/no where/1.log' 2>&1"
    assert out.replace("XLA_FLAGS='", "'XLA_FLAGS=").splitlines() == [first, second]
    assert not (tmp_path / "no where").exists()
    ran = subprocess.run(first, shell=True, capture_output=True, text=True, check=True)
    assert ran.stdout == f"0 --mine=1 {FLAG}=8 a  b\n"


# --- One process for each GPU

GPUS = str(ROOT / "launch/local_gpus.sh")


@pytest.mark.parametrize(("count", "visible"), [("2", "4,6,7"), ("all", "4,6")])
def test_each_process_gets_its_own_gpu(pod, count: str, visible: str):
    names = (
        "JAX_NUM_PROCESSES JAX_PROCESS_ID JAX_LOCAL_DEVICE_IDS JAX_CUDA_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES"
    )
    show = "echo " + ";".join(f"${name}" for name in names.split()) + ";$JAX_PLATFORMS;$XLA_FLAGS"
    show = show.replace(";", "/")
    given = {"CUDA_VISIBLE_DEVICES": visible, "JAX_PLATFORMS": "", "XLA_FLAGS": "--mine=1"}
    code, out, err = pod(count, "sh", "-c", show, script=GPUS, **given).finish()
    assert (code, err) == (0, "")
    lines = [f"2/{i}/{i}/{i}/{visible}//--mine=1" for i in (0, 1)]
    assert sorted(out.splitlines()) == [lines[0], f"[1] {lines[1]}"]


def test_the_gpus_are_counted(pod, tmp_path: Path):
    listed = "GPU 0: H100 (UUID: x)\n  MIG 1g\nGPU 1: H100 (UUID: y)\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s' '{listed}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "script": GPUS}
    code, out, _ = pod("all", "sh", "-c", "echo $JAX_NUM_PROCESSES", **path).finish()
    assert code == 0 and out.splitlines()[0].endswith("2")
    code, _, err = pod("3", "true", **path).finish()
    assert code == 2 and err.startswith("local_gpus.sh: ") and "3" in err and "2 GPUs" in err
    code, _, err = pod("all", "true", **path | {"CUDA_VISIBLE_DEVICES": ""}).finish()
    assert code == 2 and "no GPU" in err and len(err.splitlines()) == 1


# --- Exit codes


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 2", 2),
        ("[ $JAX_PROCESS_ID != 2 ] || exit 143", 143),
        ("[ $JAX_PROCESS_ID != 1 ] || kill -9 $$", 137),
        # The exit codes of processes that were stopped after the first failure do not count.
        ("trap 'exit 5' TERM; [ $JAX_PROCESS_ID != 1 ] || exit 3; while :; do sleep 0.05; done", 3),
        ("[ $JAX_PROCESS_ID = 1 ] || exit 0; sleep 0.3; exit 4", 4),
    ],
)
def test_the_exit_code_is_that_of_the_first_failed_process(pod, script: str, code: int):
    assert pod("3", "1", "sh", "-c", script).finish()[0] == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["N K COMMAND"]),
        (["2", "4"], ["N K COMMAND"]),
        (["0", "4", "true"], ["'0'", "N"]),
        (["2", "4.5", "true"], ["'4.5'", "K"]),
        (["two", "4", "true"], ["'two'"]),
        (["2", "1", "no-such-program"], ["'no-such-program'"]),
        (["--log", "x", "2", "1", "true"], ["'--log'"]),
        (["--logs"], ["--logs"]),
        (["--logs", "/dev/null/x", "1", "1", "true"], ["/dev/null/x"]),
    ],
)
def test_wrong_arguments_fail_with_one_sentence(pod, arguments: list[str], words: list[str]):
    code, out, err = pod(*arguments).finish()
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("local_pod.sh: ")
    assert all(word in err for word in words), err


def test_an_invalid_grace_period_fails_with_one_sentence(pod):
    code, _, err = pod("1", "1", "true", SR3_GRACE="soon").finish()
    assert code == 2 and "'soon'" in err and len(err.splitlines()) == 1


def test_a_program_that_cannot_start_fails_with_one_sentence(pod, tmp_path: Path):
    (tmp_path / "run").write_bytes(b"#!/no/such/interpreter\n")
    (tmp_path / "run").chmod(0o755)
    code, _, err = pod("2", "1", str(tmp_path / "run")).finish()
    assert code == 2 and len(err.splitlines()) == 1 and "/run" in err


# --- Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_go_to_every_process_once(pod, number: int, code: int):
    counting = """
import os, signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: got.append(number))
print("ready", flush=True)
while not got:
    time.sleep(0.01)
time.sleep(float(os.environ["JAX_PROCESS_ID"]) / 2)  # the last one ends after the first has failed
print(got)
sys.exit(128 + got[0])
"""
    running = pod("2", "1", sys.executable, "-c", counting, SR3_GRACE="20")
    running.wait_for("ready", 2)
    running.process.send_signal(number)
    got, out, err = running.finish()
    assert got == code
    assert sorted(out.splitlines()) == sorted([f"[{int(number)}]", f"[1] [{int(number)}]"])
    assert err == ""


def test_the_children_of_a_process_get_its_signal(pod):
    running = pod("2", "1", "sh", "-c", f"sh -c '{SLEEPER}'; echo not reached")
    running.wait_for("ready", 2)
    running.process.terminate()
    assert running.finish()[:2] == (143, "")
    assert not running.left()


def test_a_failing_process_stops_the_others(pod):
    script = (
        "trap 'echo stopped; exit 0' TERM; [ $JAX_PROCESS_ID != 1 ] || exit 6; while :; do sleep 0.05; done"
    )
    code, out, err = pod("3", "1", "sh", "-c", script, SR3_GRACE="20").finish()
    assert (code, sorted(out.splitlines())) == (6, ["[2] stopped", "stopped"])
    assert "process 1 ended with exit code 6" in err


def test_processes_that_do_not_stop_are_killed_after_the_grace(pod):
    started = time.monotonic()
    code, _, err = pod("3", "1", "sh", "-c", f"[ $JAX_PROCESS_ID != 1 ] || exit 6; {STUBBORN}").finish()
    assert code == 6 and "process 0, 2 " in err
    assert 1.0 < time.monotonic() - started < 20


def test_the_launcher_ends_when_its_processes_ignore_the_signal(pod):
    running = pod("2", "1", "sh", "-c", STUBBORN)
    running.wait_for("ready", 2)
    running.process.terminate()
    code, _, err = running.finish()
    assert code == 137 and "process 0, 1 " in err


# --- No process is left


def test_orphans_of_the_processes_are_stopped(pod):
    running = pod(
        "2", "1", "sh", "-c", "sleep 60 & setsid sleep 60 & (trap '' TERM; exec setsid sleep 60) & exit 0"
    )
    assert running.finish()[0] == 0
    assert not running.left()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux notifies a child that its parent has died")
def test_a_killed_launcher_leaves_no_process(pod):
    running = pod("2", "1", "sh", "-c", f"trap '' TERM; setsid sleep 60 & sleep 60 & {STUBBORN}")
    running.wait_for("ready", 2)
    assert len(running.left()) >= 8  # the launcher and its supervisor, and six descendants
    running.process.kill()
    running.wait_until_all_have_ended()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux notifies a child that its parent has died")
def test_a_killed_launcher_lets_its_processes_save(pod, tmp_path: Path):
    saving = f"trap 'sleep 0.2; touch {tmp_path}/saved$JAX_PROCESS_ID; exit 143' TERM; echo ready; {WAIT}"
    running = pod("2", "1", "sh", "-c", saving, SR3_GRACE="20")
    running.wait_for("ready", 2)
    running.process.kill()
    running.wait_until_all_have_ended()
    assert {path.name for path in tmp_path.iterdir()} == {"saved0", "saved1"}


def test_a_closed_output_does_not_stop_the_run(pod, tmp_path: Path):
    script = f"[ $JAX_PROCESS_ID = 0 ] || {{ echo ready; sleep 0.5; seq 100000; touch {tmp_path}/done; }}"
    running = pod("2", "1", "sh", "-c", script)
    running.wait_for("ready", 1)
    running.process.stdout.close()
    assert running.process.wait(timeout=30) == 0
    assert (tmp_path / "done").exists()


# --- With JAX


def test_jax_joins_the_processes(pod):
    program = """
import os, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
address, count, index = (os.environ["JAX_" + x] for x in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"))
jax.distributed.initialize(address, int(count), int(index))
mesh = jax.make_mesh((4,), ("data",))
rows = np.arange(2, dtype=np.float32) + 2 * jax.process_index()
x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), rows)
total = jax.jit(lambda x: (x * x).sum(), out_shardings=NamedSharding(mesh, P()))(x)
print("total", float(total), jax.process_count(), jax.local_device_count(), jax.device_count(), flush=True)
"""
    code, out, err = pod("2", "2", sys.executable, "-c", program, SR3_GRACE="20").finish()
    assert code == 0, err
    assert [line for line in out.splitlines() if "total" in line and "[1]" not in line] == [
        "total 14.0 2 2 4"
    ]
    assert "[1] total 14.0 2 2 4" in out.splitlines()
