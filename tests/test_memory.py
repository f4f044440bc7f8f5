"""Free memory of machines, control groups and accelerators; programs that need more fail."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sr3_jax import memory
from sr3_jax.cli import main
from sr3_jax.errors import UserError
from sr3_jax.planning.topologies import CHIPS

MIB = 2**20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, used: int, *, cache: int = 0) -> dict[str, str]:
    names = ("memory.max", "memory.current") if "memory/" not in folder else (
        "memory.limit_in_bytes", "memory.usage_in_bytes"
    )  # fmt: skip
    stat = f"anon 1\ninactive_file {cache}\nactive_file 0\n"
    files = {names[0]: f"{limit}\n", names[1]: f"{used}\n", "memory.stat": stat}
    return {f"{folder}{name}": text for name, text in files.items()}


MEMINFO = {"proc/meminfo": f"MemTotal: {9 * MIB} kB\nMemAvailable:   {4 * 1024} kB\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MEMINFO, 4 * MIB),
        ({**MEMINFO, "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup/", "max", MIB)}, 4 * MIB),
        ({**MEMINFO, "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup/", str(3 * MIB), MIB)}, 2 * MIB),
        (  # a group inside another: the smaller limit holds; caches are free
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/job/step\n",
                **group("sys/fs/cgroup/job/step/", "max", MIB),
                **group("sys/fs/cgroup/job/", str(5 * MIB), 4 * MIB, cache=2 * MIB),
            },
            3 * MIB,
        ),
        (  # version 1, in a container that sees its own group as the root
            {
                **MEMINFO,
                "proc/self/cgroup": "9:cpu:/\n8:memory:/docker/1\n",
                **group("sys/fs/cgroup/memory/", str(2 * MIB), MIB),
            },
            MIB,
        ),
        ({**MEMINFO, "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup/", "1", MIB)}, 0),
    ],
)
def test_free_memory_is_the_least_of_all_limits(tmp_path, files, free):
    assert memory.free_host_bytes(tree(tmp_path, files)) == free


def test_training_and_plans_use_the_same_share_of_a_gpu():
    environment = {}
    memory.use_most_gpu_memory(environment)
    (share,) = environment.values()
    data_sheet = {"a100": 80e9, "h100": 80e9, "h200": 141e9}
    for name, size in data_sheet.items():
        assert CHIPS[name].memory <= float(share) * size
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):  # jax fails if both are set
        environment = {name: "0.5"}
        memory.use_most_gpu_memory(environment)
        assert environment == {name: "0.5"}


def test_the_training_command_uses_most_of_a_gpu(monkeypatch, tmp_path):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")  # restored after the test
    assert main.main(["train", "--config=no_such_config", f"--workdir={tmp_path}"]) == 2
    assert float(os.environ["XLA_CLIENT_MEM_FRACTION"]) == memory.GPU_MEMORY_FRACTION


def test_programs_that_do_not_fit_fail_with_both_numbers(monkeypatch):
    compiled = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T).lower(jnp.zeros((500, 500))).compile()
    needed = memory.needed_bytes(compiled)
    assert needed >= 4 * 500**2
    devices = jax.local_devices()[:2]
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 2 * needed)
    memory.require(
        needed, devices, what="it", remedy="buy more"
    )  # the devices share the memory of the machine
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 2 * needed - 1)
    with pytest.raises(UserError, match=r"it needs .* GB .* free: buy more") as caught:
        memory.require(needed, devices, what="it", remedy="buy more")
    assert isinstance(caught.value, MemoryError)
    assert (caught.value.needed, caught.value.free) == (2 * needed, 2 * needed - 1)


class Accelerator:
    platform = "tpu"

    def __init__(self, stats: dict[str, int] | None) -> None:
        self.memory_stats = lambda: stats


def test_the_fullest_accelerator_counts():
    devices = [Accelerator({"bytes_limit": 9, "bytes_in_use": used}) for used in (1, 5)]
    memory.require(4, devices, what="it", remedy="-")
    with pytest.raises(memory.OutOfMemory):
        memory.require(5, devices, what="it", remedy="-")
    memory.require(10**15, [Accelerator(None)], what="it", remedy="-")  # unknown
