"""Soak test: kills commands at random moments, and feeds them hostile images and model files.

    python benchmarks/soak.py -o docs/reliability/soak.json            # all of it: about 10 minutes on one core
    python benchmarks/soak.py --kills 6 --images 30 --models 20        # a short version

Kills: SIGKILL and SIGTERM in turn, at seeded random moments of `sr3 train`, `upscale`, `evaluate`, `prepare`, `cascade`
and `export`. After each kill, files under final names must be complete; the same command, started again until it is
done, must give the result of an uninterrupted run, keep what was finished, and leave no scratch files.

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
from benchmarks.kills import SR3, environment, make_cases, soak_case  # noqa: E402

SILENCE, MEMORY = 30.0, 3e9  # limits: seconds, bytes
_ENOUGH = 2 * MEMORY  # a process above it is ended, so that the machine survives
_PER_PROCESS = 25  # model files
_DONE = re.compile(r"(\d+) done, (\d+) skipped \(output exists\), (\d+) failed")


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
        time.sleep(0.02)


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
