"""Soak test: a training run that is repeatedly killed with `kill -9` and restarted gives the same bits.

    python tests/soak_resume.py --kills 25 [--processes 2] [--devices 4] [--steps 300] [--seed 0] [--doc docs/pods.md]

An uninterrupted run is the reference. Other runs are started, killed after a random time (during imports, compilation,
a step or a save) and restarted with the same command until they are complete. All arrays of their last checkpoint and
all losses in their log must then equal the reference bit for bit. With several processes (launch/local_pod.sh) a
random one is killed, and the launcher ends the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PATIENCE = 600  # seconds, for one start
BEGIN, END = "<!-- soak:begin -->", "<!-- soak:end -->"


@dataclass(frozen=True)
class Job:
    """How to start the training run."""

    config: Path
    processes: int
    devices: int

    def start(self, workdir: Path) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "sr3_jax",
            "train",
            f"--config={self.config}",
            f"--workdir={workdir}",
        ]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            "SR3_GRACE": "1",
        }
        if self.processes > 1:
            shape = [str(self.processes), str(self.devices)]
            command = ["bash", str(ROOT / "launch" / "local_pod.sh"), *shape, *command]
        else:
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={self.devices}"
        with (workdir.parent / f"{workdir.name}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )


def make_job(folder: Path, *, processes: int, devices: int, steps: int, every: int = 5) -> Job:
    """A tiny run with its own images that saves so often that many kills happen during a save."""
    from tests import tiny

    sections = {
        "train": {"num_steps": steps, "log_every": 1, "batch_size": 8},
        "eval": {"every": steps},
        "checkpoint": {"every": every, "keep": 2},
    }
    config = tiny.config(tiny.images(folder / "images"), **sections)
    (folder / "config.py").write_text(f"def get_config():\n    return {config!r}\n")
    return Job(folder / "config.py", processes, devices)


def complete(job: Job, workdir: Path) -> float:
    """Run to the end without interruption; returns the duration in seconds."""
    started = time.monotonic()
    process = job.start(workdir)
    code = process.wait(PATIENCE)
    if code:
        raise SystemExit(f"the run failed with exit code {code}:\n{log_of(workdir)}")
    return time.monotonic() - started


def interrupt(job: Job, workdir: Path, delay: float, chance: random.Random) -> float:
    """Start the run and kill it after `delay` seconds; returns 0, or the duration if it finished before that."""
    started = time.monotonic()
    process = job.start(workdir)
    try:
        code = process.wait(delay)
        if code:
            raise SystemExit(f"the run failed with exit code {code} before it was killed:\n{log_of(workdir)}")
        return time.monotonic() - started
    except subprocess.TimeoutExpired:
        victims = members(process.pid, chance.randrange(job.processes)) if job.processes > 1 else []
        os.kill(victims[0] if victims else process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
        return 0.0


def members(launcher: int, index: int) -> list[int]:
    """The PIDs of process `index` of a launcher; [] if it has not started."""
    parents = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
    below, added = {launcher}, True
    while added:
        added = {child for child, parent in parents.items() if parent in below} - below
        below |= added
    return [pid for pid in below - {launcher} if f"JAX_PROCESS_ID={index}\0".encode() in environment_of(pid)]


def environment_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def log_of(workdir: Path) -> str:
    return (workdir.parent / f"{workdir.name}.log").read_text(errors="replace")[-3000:]


def result(workdir: Path) -> tuple[dict[str, bytes], list[tuple]]:
    """The arrays of the last checkpoint and the rows of the log."""
    import jax
    from orbax.checkpoint import v1 as ocp

    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    folder = workdir / "checkpoints" / str(max(steps))
    items = {}
    for name, tree in ocp.checkpointables_metadata(folder).metadata.items():
        if name in ("ema", "train"):
            items[name] = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), tree
            )
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(folder, items))
    arrays = {jax.tree_util.keystr(path): bytes(jax.device_get(leaf).tobytes()) for path, leaf in leaves}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return arrays, [
        (line["step"], line.get("loss"), line.get("grad_norm"), line.get("eval_loss"), line.get("eval_psnr"))
        for line in lines
    ]


def half_written(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    return sum(not path.name.isdigit() for path in folder.iterdir()) if folder.is_dir() else 0


def soak(job: Job, folder: Path, *, kills: int, seed: int, say=print) -> dict:
    """Kill, restart and compare runs until the number of kills is reached.

    Raises:
        SystemExit: a run failed, or its result differs from the reference.
    """
    chance = random.Random(seed)
    complete(job, folder / "reference")  # compiles
    shutil.rmtree(folder / "reference")
    seconds = complete(job, folder / "reference")
    wanted = result(folder / "reference")
    say(f"uninterrupted run: {wanted[1][-1][0]} steps, {len(wanted[0])} arrays, {seconds:.1f} s")
    length = seconds
    done, rounds, halves, arrays = 0, 0, 0, len(wanted[0])
    while done < kills:
        workdir = folder / f"run{rounds}"
        here, took = 0, 0.0
        # At most eight kills per run, since each start must make progress.
        while done < kills and here < 8 and not took:
            took = interrupt(job, workdir, chance.uniform(0.1, 1.0) * length, chance)
            if took and here == 0:
                length = took  # the machine became faster, so the kill was too late
            done, here = done + (not took), here + (not took)
            halves += half_written(workdir) > 0
        if not took:
            complete(job, workdir)
        found = result(workdir)
        different = [name for name in wanted[0] if found[0].get(name) != wanted[0][name]]
        if different or found[1] != wanted[1]:
            raise SystemExit(
                f"run {rounds} differs after {here} kills: {len(different)} arrays, such as {different[:3]}; "
                f"logs {'equal' if found[1] == wanted[1] else 'differ'}; see {workdir}"
            )
        rounds += 1
        say(f"run {rounds}: killed {here} times, bit-identical ({done} of {kills} kills)")
        shutil.rmtree(workdir)
    return {"kills": done, "runs": rounds, "half_written": halves, "arrays": arrays, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=4, help="simulated devices per process")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--doc", type=Path, help="a Markdown file; the output is written into its soak block")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "sr3_jax_test_cache")
    )
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sr3_soak") as folder:
        shape = {"processes": arguments.processes, "devices": arguments.devices, "steps": arguments.steps}
        job = make_job(Path(folder), **shape)
        done = soak(job, Path(folder), kills=arguments.kills, seed=arguments.seed, say=say)
    say(
        f"{done['kills']} kills in {done['runs']} runs, {done['half_written']} of them with an incomplete checkpoint: "
        f"all {done['arrays']} arrays and all losses are bit-identical, in "
        f"{(time.monotonic() - started) / 60:.0f} minutes on {platform.machine()}, {os.cpu_count()} cores"
    )
    if arguments.doc:
        write(arguments.doc, ["$ python tests/soak_resume.py " + " ".join(sys.argv[1:]), *lines])


def write(path: Path, lines: list[str]) -> None:
    """Write the output into the soak block of a Markdown file, in place of the output of the same command line."""
    text = path.read_text(encoding="utf-8")
    block = re.search(f"{BEGIN}(.*?){END}", text, re.DOTALL)
    if block is None:
        raise SystemExit(f"{path} has no {BEGIN} ... {END}")
    parts = [part for part in re.findall(r"```\n(.*?)```\n", block[1], re.DOTALL)]
    parts = [part for part in parts if part.splitlines()[0] != lines[0]] + ["\n".join(lines) + "\n"]
    body = "\n".join(f"```\n{part}```\n" for part in parts)
    path.write_text(text[: block.start()] + f"{BEGIN}\n{body}{END}" + text[block.end() :], encoding="utf-8")


if __name__ == "__main__":
    main()
