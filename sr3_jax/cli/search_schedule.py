"""Find how a model is best sampled, at a fixed number of network evaluations, and keep it as the model's default.

Spacing and ends of the grid of noise levels and the noise of each step are searched for each solver on crops of
held-out images, as the paper did. Half of the images (or --eval-data) is not searched on: what is found is stored
beside the model only if it beats the model's default there. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from sr3_jax.cli._options import count, positive, seed


def _counts(text: str) -> list[int]:
    return list(dict.fromkeys(count(part) for part in text.split(",")))


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


_counts.__name__ = "list of whole numbers"  # in errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="PATH_OR_NAME",
        help="a workdir, an exported .safetensors file or a shipped model's name",
    )  # fmt: skip
    parser.add_argument(
        "--data", required=True, metavar="SOURCE",
        help="photos:test, tfds:NAME[/CONFIG]:SPLIT or folder:PATH, which the model was not trained on",
    )  # fmt: skip
    parser.add_argument(
        "--eval-data", metavar="SOURCE",
        help="images to see on what the found sampling is worth (default: every second one of --data)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR",
        help="the folder for search.md, search.json and search.jsonl, in which every score is kept",
    )  # fmt: skip
    parser.add_argument(
        "--metric", default="lpips", metavar="NAME",
        help="lpips (default), frechet (of AlexNet's features, 100 crops at least), psnr, ssim, psnr_luma, ssim_luma, "
        "consistency or mean_colour_error",
    )  # fmt: skip
    parser.add_argument("--solver", type=_names, metavar="NAME,NAME", help="sampling methods (default: all)")
    parser.add_argument(
        "--steps", type=_counts, metavar="N,N",
        help="network evaluations, of which Heun's method takes two a step; what is stored is for the first "
        "(default: the model's)",
    )  # fmt: skip
    parser.add_argument("--minutes", type=positive, metavar="T", help="end the search after so long")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N images")
    parser.add_argument(
        "--crop", type=count, metavar="C", help="side of a crop in pixels (default: as in training)"
    )
    parser.add_argument(
        "--crops",
        type=count,
        metavar="N",
        help="crops to search on, and as many to see on (default: 32; frechet: 128)",
    )
    parser.add_argument(
        "--candidates", type=count, default=24, metavar="N", help="samplings to start with (default: 24)"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="S", help="same seed, same search (default: 0)"
    )
    parser.add_argument("--no-store", action="store_true", help="leave the model's default as it is")
    parser.add_argument(
        "--no-guard", action="store_true",
        help="let a sampling win that agrees much less with the low-res images than the default does",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit code 0, also where the model's default stands."""
    from tqdm import tqdm

    from sr3_jax import __version__, files
    from sr3_jax.distributed.signals import exit_if_stopped, stop_signals
    from sr3_jax.errors import UserError
    from sr3_jax.inference import model
    from sr3_jax.inference.sampling_file import (
        StoredSampling,
        config_fingerprint,
        params_fingerprint,
        sampling_path,
        write_sampling,
    )
    from sr3_jax.sampling import SOLVERS, Sampling
    from sr3_jax.search import inputs as search_inputs
    from sr3_jax.search import report as search_report
    from sr3_jax.search import scores as search_scores
    from sr3_jax.search import successive_halving
    from sr3_jax.train.weights import locate_model

    started = time.perf_counter()
    if args.metric not in search_scores.METRICS:
        raise UserError(f"--metric must be one of {', '.join(search_scores.METRICS)}, got {args.metric!r}")
    loaded = model.load(args.model)
    if loaded.network.regression:
        raise UserError(
            f"model {loaded.name} is a regression, of one pass without a schedule: name another model"
        )
    own = Sampling(loaded.config["sampling"]["solver"], loaded.config["sampling"]["steps"])
    solvers, budgets = args.solver or list(SOLVERS), args.steps or [own.nfe]
    plain = {
        (solver, budget): Sampling(solver, successive_halving.steps_for(solver, budget))
        for budget in budgets
        for solver in dict.fromkeys([own.solver, *solvers])
    }
    usual = {budget: plain[own.solver, budget] for budget in budgets}
    for sampling in plain.values():
        sampling.grid(loaded.schedule)  # which may say what is wrong with so many steps
    place = sampling_path(locate_model(args.model))
    if not args.no_store:
        files.make_folder(place.parent)  # now rather than after an hour
    folder = files.make_folder(args.output)
    crop = args.crop or loaded.config["data"]["crop"] // loaded.config["data"]["shrink"]
    measures, features = search_inputs.open_measures(args.metric, crop)
    crops, batch = search_inputs.open_crops(
        loaded, args.data, args.eval_data, metric=args.metric, crop=crop, count=args.crops, limit=args.limit,
        seed=args.seed,
    )  # fmt: skip
    ledger = search_scores.Ledger(folder / "search.jsonl")
    counts = [len(one.images) for one in crops]
    rounds = [batch * 2**power for power in range(math.ceil(math.log2(counts[0] / batch)))] + [counts[0]]
    if args.metric == "frechet":
        rounds = [count for count in rounds if count >= search_scores.LEAST_FRECHET]
    with tqdm(unit="batch", disable=None, file=sys.stderr) as bar, stop_signals() as stopped:

        def tell() -> None:
            bar.update()
            exit_if_stopped(stopped())

        judges = [
            search_scores.Judge(
                loaded,
                of,
                ledger,
                measures=measures,
                features=features,
                batch=batch,
                seed=args.seed,
                on_batch=tell,
            )
            for of in crops
        ]
        outcomes, tried = [], 0
        contests = [(solver, budget) for budget in budgets for solver in solvers]
        end = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
        for number, (solver, budget) in enumerate(contests):
            bar.set_description(f"{solver}, {budget} evaluations")
            now = time.monotonic()
            judges[0].deadline = now + (end - now) / (len(contests) - number)  # equal shares of what is left
            race = successive_halving.Race(
                loaded.schedule,
                plain[solver, budget],
                augment=loaded.network.augment,
                guidance=bool(loaded.network.num_classes and loaded.config["data"]["label_dropout"]),
            )
            score = search_scores.score_by(
                judges[0], args.metric, default=usual[budget], guarded=not args.no_guard
            )
            found = successive_halving.best(
                race, score, candidates=args.candidates, counts=rounds, seed=args.seed
            )
            outcomes.append(search_report.Outcome(budget, race.default, *found))
        judges[0].deadline = math.inf
        searched = max(outcome.images for outcome in outcomes)
        outcomes += [
            search_report.Outcome(budget, sampling, sampling, searched)
            for budget, sampling in usual.items()
            if own.solver not in solvers
        ]
        bar.set_description("on the other images")
        rows = search_report.rows_of(
            outcomes, search=judges[0], check=judges[1], count=counts[1], own=usual, metric=args.metric
        )
        tried = len(judges[0].tried)
    chosen, default = search_report.choose(
        rows, own=usual[budgets[0]], evaluations=budgets[0], metric=args.metric
    )
    report = {
        "model": loaded.name,
        "metric": args.metric,
        "data": args.data,
        "eval_data": args.eval_data,
        "crop": crop,
        "search_crops": counts[0],
        "check_crops": counts[1],
        "images": [one.images for one in crops],
        "seed": args.seed,
        "guarded": not args.no_guard,
        "tried": tried,
        "version": __version__,
        "rows": rows,
        "chosen": chosen["sampling"] if chosen else None,
        "seconds": round(time.perf_counter() - started, 1),
        "command": ["sr3", *sys.argv[1:]],
    }
    report["choice"] = search_report.in_words(report, chosen, default)
    search_report.write(folder, report)
    print(f"\n{search_report.markdown(report)}")
    if chosen is not None and not args.no_store:
        write_sampling(
            place,
            StoredSampling(
                Sampling(**chosen["sampling"]),
                params_fingerprint(loaded.params),
                config_fingerprint(loaded.config),
                loaded.name,
                search_report.provenance(report, chosen, default),
            ),
        )
        print(f"stored in {place}: the model is sampled so from now on; delete the file to go back")
    print(f"search.md, search.json and search.jsonl in {folder}")
    return 0
