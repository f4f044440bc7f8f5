"""Kills `sr3` commands at seeded random moments and compares what they leave with an uninterrupted run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import soak_resume, tiny

ROOT = Path(__file__).resolve().parent.parent
SR3 = [sys.executable, "-m", "sr3_jax"]
_PATIENCE = 300.0  # seconds for one command
_SCRATCH = (".sr3-*.tmp", ".incomplete-*", "*.orbax-checkpoint-tmp*", "*.partial")


@dataclass(frozen=True)
class Case:
    """A command to kill.

    Attributes:
        arguments: of `sr3`, with OUT for the place that it writes to.
        final: from that place, the bytes by name of what must equal an uninterrupted run once the command is done.
        complete: a glob of files that must have their final bytes as soon as they exist.
        compared: the former in words, for the page.
        work: how much of the work is done at a place, in any unit; None for a command that does all of it at once.
        keeps: whether a start after a kill keeps every finished file.
        repeatable: whether the command may be run again once it is done.
    """

    name: str
    arguments: tuple[str, ...]
    final: Callable[[Path], dict[str, bytes]]
    complete: str
    compared: str
    work: Callable[[Path], int] | None = None
    keeps: bool = True
    repeatable: bool = True

    def command(self, out: Path) -> list[str]:
        return [*SR3, *(argument.replace("OUT", str(out)) for argument in self.arguments)]


def files(pattern: str) -> Callable[[Path], dict[str, bytes]]:
    """A function that reads the files of a pattern below a place."""

    def read(out: Path) -> dict[str, bytes]:
        return {str(path.relative_to(out)): _content(path) for path in sorted(out.glob(pattern))}

    return read


def _content(path: Path) -> bytes:
    """The bytes of a file; the header of a model file in sorted order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    size = int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode() + data[8 + size :]


def number_of(pattern: str) -> Callable[[Path], int]:
    """A function that counts the files of a pattern below a place."""
    return lambda out: sum(1 for _ in out.glob(pattern))


def logged(out: Path) -> int:
    """The number of lines in the log of a run."""
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def trained(out: Path) -> dict[str, bytes]:
    """Arrays of the last checkpoint, logged values, samples and the best weights of a run."""
    arrays, rows = soak_resume.result(out)
    return {
        **arrays,
        "log": json.dumps(rows).encode(),
        **files("*/*.png")(out),
        **files("*.safetensors")(out),
    }


def prepared(out: Path) -> dict[str, bytes]:
    """The images and file names of a data set; the order of the fields in a record is not fixed."""
    import tensorflow_datasets as tfds

    folder = out / "mine" / "1.0.0"
    if not folder.is_dir():
        return {}
    records = tfds.builder_from_directory(str(folder)).as_data_source(split="train")
    return {record["file_name"].decode(): record["image"].tobytes() for record in records}


def evaluated(out: Path) -> dict[str, bytes]:
    """Output images, and the table without times."""
    table = (out / "evaluation.csv").read_text().splitlines()
    timed = [index for index, name in enumerate(table[0].split(",")) if "second" in name]
    rows = [[cell for index, cell in enumerate(line.split(",")) if index not in timed] for line in table]
    return {"table": json.dumps(rows).encode(), **files("outputs/**/*.png")(out)}


def make_cases(folder: Path) -> tuple[dict[str, Case], Path]:
    """The commands by name, and the model that they use, which is trained here."""
    images = tiny.images(folder / "images", count=60, side=24)
    some = tiny.images(folder / "some", count=12, side=24)
    small = tiny.images(folder / "small", count=12, side=6)
    sections = {
        "train": {"num_steps": 150, "log_every": 1},
        "checkpoint": {"every": 10, "keep": 2, "best": True},
    }
    config = folder / "config.py"
    values = tiny.config(images, **sections, eval={"every": 50, "num_images": 8})
    config.write_text(f"def get_config():\n    return {values!r}\n")
    run, model = folder / "run", folder / "model.safetensors"
    for arguments in (
        ("train", f"--config={config}", f"--workdir={run}", "--config.train.num_steps=20"),
        ("export", str(run), "-o", str(model)),
    ):
        subprocess.run([*SR3, *arguments], cwd=ROOT, env=environment(), check=True, capture_output=True)
    steps, stages = ("--steps", "40"), (str(model), str(model))
    cases = (
        Case(
            "train", ("train", f"--config={config}", "--workdir=OUT"), trained, "*/*.png",
            "all arrays of the last checkpoint, all logged values, samples and best weights", logged,
        ),
        Case(
            "upscale", ("upscale", str(images), "--model", str(model), "-o", "OUT", *steps),
            files("*.png"), "*.png", "60 images", number_of("*.png"),
        ),
        Case(
            "evaluate",
            ("evaluate", "--data", f"folder:{some}", "--model", str(model), "-o", "OUT", *steps, "--features", "none"),
            evaluated, "outputs/**/*.png", "12 outputs and the table of metrics, without times",
            number_of("outputs/**/*.png"),
        ),
        Case(
            "prepare", ("prepare", str(images), "--name", "mine", "--data-dir", "OUT"),
            prepared, "mine/*/*.json", "60 images and their names", repeatable=False,
        ),
        Case(
            "cascade",
            ("cascade", "--stages", *stages, "--low-res", str(small), "-o", "OUT", *steps, "--batch-size", "1"),
            files("0*.png"), "0*.png", "12 images of 2 stages", number_of("**/0*.png"), keeps=False,
        ),
        Case(
            "export", ("export", str(run), "-o", "OUT/model.safetensors"),
            files("*.safetensors"), "*.safetensors", "the file",
        ),
    )  # fmt: skip
    return {case.name: case for case in cases}, model


def environment() -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def run(
    case: Case, out: Path, *, number: int = 0, ready: Callable[[], bool] = lambda: False, delay: float = 0.0
) -> tuple[int, str, float]:
    """Run a command, and send it a signal `delay` seconds after `ready`; (exit code, stderr, seconds)."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            case.command(out), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=err
        )
        while process.poll() is None and not (number and ready()):
            if time.monotonic() - started > _PATIENCE:
                process.kill()
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        if process.poll() is None:
            process.send_signal(number)
            process.wait(_PATIENCE)
        err.seek(0)
        return process.returncode, err.read(), time.monotonic() - started


def moment(
    case: Case, out: Path, *, length: float, total: int, chance: random.Random
) -> tuple[Callable[[], bool], float]:
    """When to kill: during the start, or once a random share of the work is done, and a random time after that."""
    if case.work is None or chance.random() < 0.2:
        return lambda: True, chance.uniform(0.3, 1.0) * length
    share = chance.randrange(total)
    return lambda: case.work(out) >= share, chance.uniform(0.0, 0.3)


def soak_case(case: Case, folder: Path, *, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill, check and restart a command until it was killed `kills` times."""
    reference = folder / f"{case.name}_reference"
    run(case, reference)  # compiles
    shutil.rmtree(reference)
    code, err, length = run(case, reference)
    if code:
        raise SystemExit(f"sr3 {case.name} failed with exit code {code}: {err[-2000:]}")
    wanted, whole = case.final(reference), files(case.complete)(reference)
    total = case.work(reference) if case.work else 0
    result = {"kills": 0, "sigkill": 0, "sigterm": 0, "runs": 0, "seconds": length, "failures": []}
    result["compared"], failures = case.compared, result["failures"]

    def check(what: str, bad: Any) -> None:
        if bad:
            failures.append(f"run {result['runs']}, kill {result['kills']}: {what}: {str(bad)[:300]}")

    while result["kills"] < kills:
        out = folder / f"{case.name}_{result['runs']}"
        for _ in range(min(4, kills - result["kills"])):
            number = (signal.SIGKILL, signal.SIGTERM)[result["kills"] % 2]
            before = {path: path.stat().st_ino for path in out.glob(case.complete)}
            ready, delay = moment(case, out, length=length, total=total, chance=chance)
            code, err, seconds = run(case, out, number=number, ready=ready, delay=delay)
            if code == 0:  # it was faster than before
                length = min(length, seconds)
                break
            result["kills"] += 1
            result[number.name.lower()] += 1
            check("exit code", code not in (-number, 128 + number) and code)
            check("traceback", "Traceback" in err and err)
            found = files(case.complete)(out)
            check("half-written", [name for name, data in found.items() if data != whole.get(name)])
            lost = [
                path.name
                for path, inode in before.items()
                if not path.exists() or path.stat().st_ino != inode
            ]
            check("finished but written again", case.keeps and lost)
            if not case.repeatable and case.final(out):
                break
        code, err = 0, ""
        if case.repeatable or not case.final(out):
            code, err, _ = run(case, out)
        check("last start", code and f"{code}: {err}")
        if not code:
            found = case.final(out)
            check(
                "other result",
                sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)),
            )
        check("leftovers", [path.name for pattern in _SCRATCH for path in out.rglob(pattern)])
        result["runs"] += 1
        shutil.rmtree(out)
    return result
