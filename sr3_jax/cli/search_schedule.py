"""Find the best sampling schedule of a model at a fixed NFE, and store it as the model's default.

For each solver, the grid of noise levels (spacing and end points) and the noise of each step are searched on crops of
held-out images, as in the paper. Half of the images (or --eval-data) is left out of the search: the result is stored
next to the model only if it beats the model's default on them. The same command continues an interrupted search.
"""

from __future__ import annotations

import argparse
import sys

from sr3_jax.cli._options import class_label, count, counts, local_path, names, positive, seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sr3_jax.metrics import SEARCH_METRICS

    parser.add_argument(
        "--model", required=True, metavar="PATH_OR_NAME",
        help="workdir, exported .safetensors file or shipped model",
    )  # fmt: skip
    parser.add_argument(
        "--data", required=True, metavar="SOURCE",
        help="photos:test, tfds:NAME[/CONFIG]:SPLIT, folder:PATH or pairs:LR_DIR:HR_DIR, not used in training",
    )  # fmt: skip
    parser.add_argument(
        "--eval-data", metavar="SOURCE",
        help="images to check the result on (default: every other image of --data)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, type=local_path, metavar="DIR",
        help="folder for search.md, search.json and search.jsonl, the cache of metrics",
    )  # fmt: skip
    parser.add_argument(
        "--metric", default="lpips", metavar="NAME",
        help=f"one of {', '.join(SEARCH_METRICS)} (default: %(default)s; frechet is the Frechet distance of AlexNet "
        "features and needs 100 crops)",
    )  # fmt: skip
    parser.add_argument(
        "--solver", type=names, default=[], metavar="NAME,NAME", help="solvers (default: all)"
    )
    parser.add_argument(
        "--steps", type=counts, default=[], metavar="N,N",
        help="budgets in NFE, of which Heun's method takes two per step; the result for the first is stored "
        "(default: the model's)",
    )  # fmt: skip
    parser.add_argument("--minutes", type=positive, metavar="T", help="end the search after this time")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N images")
    parser.add_argument(
        "--crop", type=count, metavar="C", help="side of a crop in pixels (default: as in training)"
    )
    parser.add_argument(
        "--crops", type=count, metavar="N",
        help="crops to search on, and as many to check on (default: 32; frechet: 128)",
    )  # fmt: skip
    parser.add_argument(
        "--degradation", metavar="NAME",
        help="how low-res images are made: clean (bicubic), photo (blur, noise, JPEG) or wild (default: as trained)",
    )  # fmt: skip
    parser.add_argument(
        "--label", type=class_label, metavar="N",
        help="class of the images, for class-conditional models and images without labels",
    )  # fmt: skip
    parser.add_argument(
        "--candidates", type=count, default=24, metavar="N", help="number of candidates (default: 24)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="random seed (default: 0)")
    parser.add_argument("--no-store", action="store_true", help="do not change the model's default")
    parser.add_argument(
        "--no-guard", action="store_true",
        help="also accept candidates that are much less consistent with the low-res images than the default",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit code 0, also if the model's default is kept."""
    from sr3_jax.cli._progress import progress_bar, step_reports
    from sr3_jax.distributed.signals import exit_if_stopped, stop_signals
    from sr3_jax.evaluation import search_schedule

    with progress_bar(unit="batch") as bar, stop_signals("this batch") as stopped:

        def progress(description: str) -> None:
            bar.set_description(description, refresh=False)
            bar.update()
            exit_if_stopped(stopped())

        done = search_schedule(
            args.model,
            args.data,
            args.output,
            eval_data=args.eval_data,
            metric=args.metric,
            solvers=args.solver,
            nfe=args.steps,
            minutes=args.minutes,
            limit=args.limit,
            crop=args.crop,
            crops=args.crops,
            degradation=args.degradation,
            label=args.label,
            candidates=args.candidates,
            seed=args.seed,
            store=not args.no_store,
            guarded=not args.no_guard,
            command=["sr3", *sys.argv[1:]],
            on_batch=progress,
            on_step=step_reports(bar),
        )
    print(f"\n{done.markdown()}")
    if done.stored:
        print(f"stored in {done.stored} as the model's default sampling; delete the file to undo this")
    print(f"wrote {', '.join(path.name for path in done.files)} in {args.output}")
    return 0
