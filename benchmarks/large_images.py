"""Memory and time of `sr3 upscale` on large images, and throughput on a folder of mixed sizes.

    python benchmarks/large_images.py -o docs/large_images.json && python -m experiments.pages large_images
    python benchmarks/large_images.py --only memory --tiles 8         # some of it

Every run is a process of its own, with an empty compilation cache. Its memory is the peak of the resident set (VmHWM of
/proc), which includes the interpreter, the libraries, compilation and the pages of the files that it maps.

A shipped model takes hours for a whole image of this size on one core. It is therefore stopped after some tiles of the
full-size input (only here: the command has no such option): one row of tiles and two more by default, so that the first
rows of the output are written. Memory does not depend on how many tiles are computed, which is measured too: as the
growth of the peak over the second half of the tiles. The run to the end of an image has a network of a few hundred
weights in place of the shipped model. With `--only limited`, the address space is limited to 4 GB (`ulimit -v`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {"12 MP": (4000, 3000), "100 MP": (11600, 8700)}  # width, height
LIMITS_GB = {"12 MP": 3.0, "100 MP": 4.0}
FORMATS = ("png", "tif", "jpg")
_DEVICES = (1, 4)


# ---- Processes


def peak_gb(pid: int | str = "self") -> float:
    """The largest resident memory of a process so far."""
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            return float(found[1]) * 1024 / 1e9
    return 0.0


def run(
    arguments: Sequence[str], folder: Path, *, limit_gb: float | None = None, devices: int = 1
) -> dict[str, Any]:
    """Run a command; its exit code, seconds, peak memory, and what it printed.

    Args:
        limit_gb: of the address space (RLIMIT_AS), which fails allocations above it.
        devices: number of simulated devices.
    """
    command = [sys.executable, *arguments]
    if limit_gb is not None:
        command = ["bash", "-c", f'ulimit -v {int(limit_gb * 1e9 / 1024)}; exec "$@"', "bash", *command]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "XDG_CACHE_HOME": tempfile.mkdtemp(dir=folder),
        "PYTHONPATH": str(ROOT),
    }
    log, started, peak = folder / "log", time.monotonic(), 0.0
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        while process.poll() is None:
            peak = max(peak, peak_gb(process.pid))
            time.sleep(0.01)
    return {
        "code": process.returncode,
        "seconds": time.monotonic() - started,
        "peak_gb": peak,
        "log": log.read_text(errors="replace"),
    }


def photograph(path: Path, size: tuple[int, int], **options: Any) -> Path:
    """A JPEG of this (width, height): a bundled photograph, mirrored until it covers the size."""
    from sr3_jax.data.sources import open_source

    tile = open_source("photos:test")[0]["image"]
    repeats = [-(-side // length) for side, length in zip(size[::-1], tile.shape, strict=False)]
    rows = np.concatenate([tile, tile[::-1]] * (repeats[0] // 2 + 1))[: size[1]]
    pixels = np.concatenate([rows, rows[:, ::-1]] * (repeats[1] // 2 + 1), axis=1)[:, : size[0]]
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, **({"quality": 90} | options))
    return path


def tiny_model(path: Path) -> Path:
    """An exported 4x model of a few hundred weights, whose outputs are close to bicubic."""
    import jax

    from sr3_jax.config import build
    from sr3_jax.config.load import complete
    from sr3_jax.train.weights import export
    from tests import tiny

    config = complete(tiny.config())
    shapes = jax.eval_shape(
        lambda key: build.init_params(build.build_network(config["model"]), key), jax.random.key(0)
    )
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    export(path, tiny.perturbed(params, size=0.01), config)
    return path


# ---- Memory


def upscale_some(source: str, target: str, model: str, tiles: str) -> None:
    """In a process of its own: `upscale_files` with steps=1, ended after some tiles; prints the peaks on the way."""
    from sr3_jax.inference.loading import load
    from sr3_jax.inference.upscale_files import Job, upscale_files

    loaded, last, seen = load(model), int(tiles), []

    def stop(job: Job, done: int, of: int) -> None:
        seen.append(peak_gb())
        print(
            json.dumps({"done": done, "of": of, "peak_gb": peak_gb(), "time": time.monotonic()}), flush=True
        )
        if done >= last:
            sys.exit(0)

    outcome = upscale_files(
        loaded,
        [Job(Path(source), Path(target))],
        sampling=loaded.sampling.override(steps=1),
        max_megapixels=1000,
        on_tiles=stop,
    )
    sys.exit(f"ended before {tiles} tiles: {outcome.failed}")


def measure_some(
    name: str, suffix: str, model: str, tiles: int, folder: Path, *, limit_gb: float | None = None
) -> dict[str, Any]:
    """A model on the first tiles of a full-size input: one row of tiles and two more, or as many as given."""
    from sr3_jax.inference.loading import load

    source = photograph(folder / f"{name.replace(' ', '')}.jpg", SIZES[name])
    plan = load(model).tiling(*SIZES[name][::-1])
    tiles = min(tiles or len(plan.columns.starts) + 2, plan.count)
    command = [__file__, "--some", str(source), str(folder / f"out.{suffix}"), model, str(tiles)]
    found = run(command, folder, limit_gb=limit_gb)
    steps = [json.loads(line) for line in found["log"].splitlines() if line.startswith("{")]
    if found["code"] != 0 or not steps:
        raise SystemExit(f"{name} {suffix}: {found['log'][-2000:]}")
    half = steps[len(steps) // 2]
    return {
        "input": name,
        "format": suffix,
        "model": Path(model).stem,
        "address_space_gb": limit_gb,
        "tiles": steps[-1]["done"],
        "of": steps[-1]["of"],
        "peak_gb": found["peak_gb"],
        "growth_gb": steps[-1]["peak_gb"] - half["peak_gb"],
        "seconds_per_tile": (steps[-1]["time"] - half["time"]) / (steps[-1]["done"] - half["done"]),
        "limit_gb": LIMITS_GB[name],
    }


def measure_whole(name: str, suffix: str, folder: Path, *, outscale: float | None = None) -> dict[str, Any]:
    """`sr3 upscale` with the tiny network and one step, to the end of the image."""
    source, out = photograph(folder / "photo.jpg", SIZES[name]), folder / f"whole.{suffix}"
    options = ["--max-megapixels=1000", "--steps=1", *([f"--outscale={outscale}"] if outscale else [])]
    model = tiny_model(folder / "tiny.safetensors")
    command = ["-m", "sr3_jax", "upscale", str(source), "-o", str(out), "--model", str(model), *options]
    found = run(command, folder)
    row = {
        "input": name,
        "format": suffix,
        "outscale": outscale or 4.0,
        "seconds": found["seconds"],
        "peak_gb": found["peak_gb"],
        "limit_gb": LIMITS_GB[name],
        "code": found["code"],
        "message": found["log"].strip().splitlines()[-1] if found["code"] else "",
    }
    if found["code"] == 0:
        Image.MAX_IMAGE_PIXELS = None
        with Image.open(out) as image:
            row |= {"output": list(image.size), "output_mb": out.stat().st_size / 1e6}
        out.unlink()
    return row


# ---- Throughput


def mixes(generator: np.random.Generator) -> dict[str, list[tuple[int, int]]]:
    """Sizes (width, height) of 20 images, no two equal."""
    return {
        "one camera, cropped (225-248 x 177-184)": [(225 + index, 177 + index % 8) for index in range(20)],
        "thumbnails (100-280 on a side)": [tuple(generator.integers(100, 281, 2)) for _ in range(20)],
        "web images (300-900 on a side)": [tuple(generator.integers(300, 901, 2)) for _ in range(20)],
    }


def upscale_folder(folder: str, out: str, model: str) -> None:
    """In a process of its own: upscale a folder twice, and print the seconds of the second time and the slots used."""
    import jax

    from sr3_jax.inference.loading import load
    from sr3_jax.inference.upscale_files import find_images, upscale_files

    loaded, devices, slots = load(model), jax.local_device_count(), 0

    class Counting:
        """The model, with the images and tiles that its batches have room for counted."""

        scale, tiling = loaded.scale, staticmethod(loaded.tiling)

        def upscale(self, image: np.ndarray, *arguments: Any, **options: Any) -> np.ndarray:
            nonlocal slots
            slots += len(image)
            return loaded.upscale(image, *arguments, **options)

        def upscale_bands(self, image: np.ndarray, *arguments: Any, **options: Any) -> Any:
            nonlocal slots
            size = options["batch_size"]
            slots += -(-loaded.tiling(*image.shape[:2]).count // size) * size
            return loaded.upscale_bands(image, *arguments, **options)

    jobs = find_images([Path(folder)], Path(out)).jobs
    for _ in range(2):  # the first time compiles
        slots, started = 0, time.monotonic()
        result = upscale_files(
            Counting(), jobs, batch_size=devices, sampling=loaded.sampling.override(steps=1), overwrite=True
        )
        seconds = time.monotonic() - started
    assert not result.failed, result.failed
    pieces = 0
    for job in jobs:
        with Image.open(job.source) as image:
            pieces += loaded.tiling(*image.size[::-1]).count
    row = {"devices": devices, "images": len(jobs), "pieces": pieces, "slots": slots, "seconds": seconds}
    print(json.dumps(row))


def measure_throughput(folder: Path) -> list[dict[str, Any]]:
    """The tiny network with one step on folders of 20 sizes, on 1 and 4 simulated devices."""
    rows, model = [], tiny_model(folder / "tiny.safetensors")
    for index, (name, sizes) in enumerate(mixes(np.random.default_rng(0)).items()):
        inputs = folder / f"mix{index}"
        inputs.mkdir()
        for number, size in enumerate(sizes):
            photograph(inputs / f"{number:02}.jpg", size)
        for devices in _DEVICES:
            command = [__file__, "--folder", str(inputs), str(folder / f"mix{index}_out"), str(model)]
            found = run(command, folder, devices=devices)
            if found["code"]:
                raise SystemExit(found["log"][-2000:])
            rows.append({"mix": name, **json.loads(found["log"].splitlines()[-1])})
            print(json.dumps(rows[-1]), flush=True)
    return rows


# ---- All of it


def hardware() -> str:
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"


def main() -> int:
    children = {"--some": upscale_some, "--folder": upscale_folder}
    if sys.argv[1:] and sys.argv[1] in children:
        children[sys.argv[1]](*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("memory", "whole", "limited", "throughput")
    parser.add_argument("--only", default=",".join(parts), help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument(
        "--tiles", type=int, default=0, help="of the shipped model (default: two rows of tiles)"
    )
    parser.add_argument(
        "--model", default="photo_4x_robust", help="of memory and limited; or tiny (default: %(default)s)"
    )
    parser.add_argument("--outscale", type=float, help="of whole (default: 4, the scale of the network)")
    parser.add_argument("--inputs", default=",".join(SIZES), help="default: %(default)s")
    parser.add_argument("--formats", default=",".join(FORMATS), help="default: %(default)s")
    parser.add_argument(
        "-o", "--output", type=Path, help="JSON file; what is not measured now is kept from it"
    )
    args = parser.parse_args()
    report: dict[str, list[dict[str, Any]]] = {}
    measured: list[dict[str, Any]] = []
    if args.output and args.output.is_file():
        report = json.loads(args.output.read_text(encoding="utf-8"))
    cases = [(name, suffix) for name in args.inputs.split(",") for suffix in args.formats.split(",")]
    for part in args.only.split(","):
        with tempfile.TemporaryDirectory(prefix="sr3_large") as temporary:
            folder, rows = Path(temporary), []
            model = str(tiny_model(folder / "tiny.safetensors")) if args.model == "tiny" else args.model
            if part in ("memory", "limited"):
                limit = 4.0 if part == "limited" else None
                for name, suffix in cases:
                    rows.append(measure_some(name, suffix, model, args.tiles, folder, limit_gb=limit))
                    print(json.dumps(rows[-1]), flush=True)
            elif part == "whole":
                for name, suffix in cases:
                    rows.append(measure_whole(name, suffix, folder, outscale=args.outscale))
                    print(json.dumps(rows[-1]), flush=True)
            else:
                rows = measure_throughput(folder)
        provenance = {
            "command": shlex.join(["python", "benchmarks/large_images.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "versions": {name: version(name) for name in ("sr3_jax", "jax", "pillow")},
        }
        kept = [row for row in report.get(part, ()) if key(row) not in [key(new) for new in rows]]
        report[part] = kept + [row | provenance for row in rows]
        measured += rows
        if args.output:  # after each part, as they take long
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    high = [row for row in measured if row.get("peak_gb", 0) > row.get("limit_gb", 9e9)]
    return int(bool(high or [row for row in measured if row.get("code")]))


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What was measured; a later measurement of the same replaces it."""
    return tuple(row.get(name) for name in ("input", "format", "model", "outscale", "mix", "devices"))


if __name__ == "__main__":
    sys.exit(main())
