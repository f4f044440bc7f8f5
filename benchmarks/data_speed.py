"""Images per second of the data pipeline, by source and number of threads.

    python benchmarks/data_speed.py -o docs/speed.json photos:train folder:PHOTOS tfds:NAME:SPLIT

Two sources are always measured: a temporary folder of large JPEGs, which take a core for decoding, and one whose reads
wait for 20 ms, as an object store does. The decoded images are not cached, as in the first epoch. For each source the
numbers of threads alternate, round after round, and the median is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from large_images import photograph
from speed import provenance

from sr3_jax.data.batches import batches
from sr3_jax.data.sources import Source, open_source

CROP, BATCH, LATENCY, JPEG = 64, 4, 0.02, (1500, 1000)


def slow_source() -> Source:
    """Reads that take time, but no core."""

    def load(index: int) -> dict[str, np.ndarray]:
        time.sleep(LATENCY)
        return {"image": np.zeros((CROP, CROP, 3), np.uint8)}

    return Source(f"reads of {1e3 * LATENCY:.0f} ms", load, 10_000, cache_mb=0)


def images_per_second(source: Source, threads: int, seconds: float) -> float:
    """After the batches that the threads begin with."""
    stream = batches(source, seed=0, batch_size=BATCH, crop=CROP, threads=threads)
    for _ in range(threads):
        next(stream)
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        next(stream)
        count += BATCH
    return count / passed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="JSON file; what else is in it is kept"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of each measurement (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(4):
            photograph(Path(folder) / f"{index}.jpg", JPEG)
        large = open_source(f"folder:{folder}", min_side=CROP, cache_mb=0)
        sources = {
            f"JPEGs of {JPEG[0]} x {JPEG[1]} pixels": large,
            slow_source().name: slow_source(),
            **{name: open_source(name, min_side=CROP, cache_mb=0) for name in args.sources},
        }
        rows: list[dict[str, Any]] = []
        for name, source in sources.items():
            found: dict[int, list[float]] = {threads: [] for threads in args.threads}
            for _ in range(args.rounds):
                for threads, values in found.items():
                    values.append(images_per_second(source, threads, args.seconds))
            rows.append(
                {
                    "source": name,
                    "images_per_second": {str(k): statistics.median(v) for k, v in found.items()},
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    content = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
    content["data"] = {"rows": rows, "crop": CROP, "batch_size": BATCH} | provenance(
        "wall", "benchmarks/data_speed.py"
    )
    args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
