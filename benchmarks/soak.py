"""Soak test: kills commands at random moments, and feeds them hostile images and model files.

    python benchmarks/soak.py -o docs/reliability/soak.json            # all of it: about 20 minutes on one core
    python benchmarks/soak.py --kills 6 --images 30 --models 20        # a short version

Kills: SIGKILL and SIGTERM in turn, at seeded random moments of `sr3 train`, `upscale`, `evaluate`, `prepare`, `cascade`
and `export`. After each kill, files under final names must be complete; the same command, started again until it is
done, must give the bytes of an uninterrupted run, keep what was finished, and leave no scratch files.

Hostile files: no traceback, no silence of over 30 s, a peak memory under 3 GB, each image either upscaled or named as
failed, and no code of a pickle run. The exit code is 1 if any of this does not hold; the JSON file says what failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import hostile_files  # noqa: E402
from tests import soak_resume, tiny  # noqa: E402

SILENCE, MEMORY = 30.0, 3e9  # limits: seconds, bytes
_ENOUGH = 2 * MEMORY  # a process above it is ended, so that the machine survives
_PATIENCE = 300.0  # seconds for one command
_PER_PROCESS = 25  # model files
_SCRATCH = (".sr3-*.tmp", ".incomplete-*", "*.orbax-checkpoint-tmp*", "*.partial")
_DONE = re.compile(r"(\d+) done, (\d+) skipped \(output exists\), (\d+) failed")
SR3 = [sys.executable, "-m", "sr3_jax"]


# ---- Kills


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


# ---- Hostile files


@dataclass
class Watched:
    """A process whose progress and memory are watched from outside."""

    code: int
    peak: float  # bytes
    silence: float  # seconds, the longest one
    ended: str  # why it was ended: 'silence', 'memory' or ''


def watch(command: list[str], log: Path, progress: Callable[[], Any]) -> Watched:
    """Run a command with its output in a file; end it if `progress` stands still or if it takes too much memory."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)
    last, since, longest, peak, ended = progress(), time.monotonic(), 0.0, 0.0, ""
    while True:
        code = process.poll()
        now, found, peak = time.monotonic(), progress(), max(peak, _peak(process.pid))
        longest = max(longest, now - since)  # with the start, which is the longest one as a rule
        if code is not None:
            return Watched(code, peak, longest, ended)
        if found != last:
            last, since = found, now
        if not ended and (now - since > 2 * SILENCE or peak > _ENOUGH):
            ended = "memory" if peak > _ENOUGH else "silence"
            process.kill()
        time.sleep(0.1)


def _peak(pid: int | str = "self") -> float:
    """The largest resident memory of a process in bytes; not getrusage's, which starts at that of the parent."""
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            return float(found[1]) * 1024
    return 0.0


def soak_images(folder: Path, model: Path, *, count: int, seed: int) -> dict[str, Any]:
    """Hostile images through `sr3 upscale` and `sr3 prepare`, a folder at once."""
    inputs, outputs, failures = folder / "hostile", folder / "hostile_out", []
    hostile_files.write_images(inputs, count=count, seed=seed)
    result: dict[str, Any] = {"count": count, "failures": failures}
    commands = {
        "upscale": ["upscale", str(inputs), "--model", str(model), "-o", str(outputs)],
        "prepare": ["prepare", str(inputs), "--name", "hostile", "--data-dir", str(folder / "hostile_data")],
    }
    for name, arguments in commands.items():
        log = folder / f"hostile_{name}.log"

        def progress(log: Path = log) -> Any:
            return log.stat().st_size, len(os.listdir(outputs)) if outputs.is_dir() else 0

        watched = watch([*SR3, *arguments], log, progress)
        text = log.read_text(errors="replace")
        failures += _faults(f"sr3 {name}", watched, text, codes=(0, 1))
        result[name] = {"peak_gb": watched.peak / 1e9, "silence": watched.silence, "exit_code": watched.code}
        if name == "upscale" and (found := _DONE.search(text)):
            result["upscaled"], _, result["reported"] = map(int, found.groups())
            if result["upscaled"] + result["reported"] != count:
                failures.append(f"sr3 upscale: {found[0]}, which are not all {count} images")
        if name == "prepare" and (found := re.search(r"hostile:train +(\d+) images", text)):
            result["prepared"] = int(found[1])
    return result


def _faults(what: str, watched: Watched, text: str, *, codes: tuple[int, ...]) -> list[str]:
    found = {
        "ended because of its " + watched.ended: watched.ended,
        "traceback": "Traceback (most recent" in text and text[text.index("Traceback") :][-600:],
        f"silent for {watched.silence:.0f} s": watched.silence > SILENCE,
        f"peak memory {watched.peak / 1e9:.1f} GB": watched.peak > MEMORY,
        f"exit code {watched.code}": watched.code not in codes,
    }
    return [
        f"{what}: {name}{f': {value}' if isinstance(value, str) else ''}"
        for name, value in found.items()
        if value
    ]


def soak_models(folder: Path, model: Path, *, count: int, seed: int) -> dict[str, Any]:
    """Hostile model files through `sr3 upscale --model`, several in one process."""
    trap, image = folder / "trap", next((folder / "some").iterdir())
    paths = hostile_files.write_models(
        folder / "models", model.read_bytes(), count=count, seed=seed, trap=trap
    )
    failures: list[str] = []
    result: dict[str, Any] = {"count": count, "peak_gb": 0.0, "silence": 0.0, "loaded": 0, "refused": 0}
    left, rows = list(paths), []
    while left:
        log, report = folder / "models.log", folder / "models.jsonl"
        report.unlink(missing_ok=True)
        command = [
            sys.executable,
            __file__,
            "--try-models",
            str(image),
            str(report),
            *map(str, left[:_PER_PROCESS]),
        ]
        watched = watch(command, log, lambda report=report: report.stat().st_size if report.exists() else 0)
        tried = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        rows += tried
        result["peak_gb"] = max(result["peak_gb"], watched.peak / 1e9)
        if len(tried) < len(left[:_PER_PROCESS]):  # the process ended in the middle of a file
            name = left[len(tried)].name
            failures += _faults(name, watched, log.read_text(errors="replace"), codes=(0,))
            del left[: len(tried) + 1]
        else:
            del left[:_PER_PROCESS]
    for row in rows:
        watched = Watched(row["code"], row["peak"], row["seconds"], "")
        failures += _faults(row["name"], watched, row["err"], codes=(0, 1, 2))
        result["loaded" if row["code"] == 0 else "refused"] += 1
        result["silence"] = max(result["silence"], row["seconds"])
    if trap.exists():
        failures.append("code of a pickle was run")
    return result | {"failures": failures}


def try_models(image: str, report: str, paths: list[str]) -> None:
    """In a process of its own: upscale an image with each file and write a line about each."""
    from sr3_jax.cli.main import main as sr3

    for path in paths:
        started, err, before = time.monotonic(), io.StringIO(), _peak()
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(err):
            try:
                code = sr3(["upscale", image, "--model", path, "-o", out, "--steps", "2"])
            except BaseException:  # what a user would see as a traceback
                import traceback

                traceback.print_exc()
                code = -1
        # The peak of a process only grows; a file is charged if it raised it.
        peak = _peak() if _peak() > before else 0.0
        row = {"name": Path(path).name, "code": code, "seconds": time.monotonic() - started, "peak": peak}
        with open(report, "a") as file:
            file.write(json.dumps(row | {"err": err.getvalue()[-20_000:]}) + "\n")


# ---- All of it


def hardware() -> str:
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    return f"{cpu}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"


def main() -> int:
    if sys.argv[1:2] == ["--try-models"]:
        try_models(sys.argv[2], sys.argv[3], sys.argv[4:])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=54, help="in total, divided among the commands (default: 54)"
    )
    parser.add_argument("--commands", default="", help="kill only these, separated by commas (default: all)")
    parser.add_argument("--images", type=int, default=300, help="hostile images (default: 300)")
    parser.add_argument("--models", type=int, default=150, help="hostile model files (default: 150)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "sr3_jax_test_cache")
    )
    started = time.monotonic()
    report: dict[str, Any] = {
        "command": ["python", "benchmarks/soak.py", *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {
            name: version(name) for name in ("sr3_jax", "jax", "orbax-checkpoint", "pillow", "safetensors")
        },
        "limits": {"silence": SILENCE, "memory_gb": MEMORY / 1e9},
        "kills": {},
    }
    with tempfile.TemporaryDirectory(prefix="sr3_soak") as name:
        folder = Path(name)
        cases, model = make_cases(folder)
        chosen = [cases[key] for key in args.commands.split(",") if key] or list(cases.values())
        for index, case in enumerate(chosen if args.kills else ()):
            kills = args.kills // len(chosen) + (index < args.kills % len(chosen))
            chance = random.Random(f"{case.name} {args.seed}")
            report["kills"][case.name] = soak_case(case, folder, kills=kills, chance=chance)
            say(case.name, report["kills"][case.name])
        for key, count, soak in (("images", args.images, soak_images), ("models", args.models, soak_models)):
            if count:
                report[key] = soak(folder, model, count=count, seed=args.seed)
                say(key, report[key])
    report["seconds"] = time.monotonic() - started
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    parts: list[Mapping[str, Any]] = [
        *report["kills"].values(),
        *(report.get(key, {}) for key in ("images", "models")),
    ]
    return int(any(part.get("failures") for part in parts))


def say(name: str, result: Mapping[str, Any]) -> None:
    facts = {key: round(value, 2) if isinstance(value, float) else value for key, value in result.items()}
    failures = facts.pop("failures")
    print(name, json.dumps(facts), *(f"FAILED: {failure}" for failure in failures), sep="\n  ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
