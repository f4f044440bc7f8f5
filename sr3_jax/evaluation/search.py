"""The schedule search: finds the best sampling settings of a model at a fixed NFE, and stores them with the model.

For each solver and budget, `candidates.minimize` optimizes one metric on crops of held-out images. The result
is then checked on crops of other images, and stored only if it beats the model's default there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax import __version__
from sr3_jax.data.crops import Crops, search_and_check
from sr3_jax.degradations import PRESETS
from sr3_jax.diffusion.solvers import solver_options
from sr3_jax.errors import UserError
from sr3_jax.evaluation.candidates import CropEvaluator, SearchSpace, cost, minimize, objective, steps_for
from sr3_jax.evaluation.results import LEVEL, bootstrap, reported_metrics, table
from sr3_jax.features.lpips import LEAST_SIDE
from sr3_jax.features.metric_suite import MetricSuite, least_side, open_suite
from sr3_jax.features.networks import open_network
from sr3_jax.files import make_folder, to_json, write_text
from sr3_jax.inference.loading import load
from sr3_jax.inference.model import Model
from sr3_jax.inference.program import OnStep
from sr3_jax.inference.sampling_file import sampling_path, store_sampling
from sr3_jax.metrics import SEARCH_METRICS, Metric, search_metric
from sr3_jax.sampling import SOLVERS, Sampling, count_steps
from sr3_jax.train.weights import locate_model

MAX_BATCH = 8
CROPS, CROPS_FRECHET = 32, 128  # by default
MIN_CROPS_FRECHET = 100  # with fewer, rank and bias of the covariance outweigh the images
_COLUMNS = ("psnr", "ssim", "consistency", "lpips", "frechet_alexnet")  # of search.md


@dataclass(frozen=True)
class Found:
    """The result for one solver and budget: the sampling found, selected on `images` crops, and the default."""

    nfe: int
    default: Sampling
    sampling: Sampling
    images: int


@dataclass(frozen=True)
class ScheduleSearch:
    """A finished search.

    Attributes:
        report: the content of search.json as plain values.
        files: the written files: search.md, search.json, and the file of cached metrics.
        stored: the file next to the model that now holds its default sampling; None if nothing was stored.
    """

    report: Mapping[str, Any]
    files: tuple[Path, ...]
    stored: Path | None

    def markdown(self) -> str:
        """The table and the choice, as in search.md."""
        return search_markdown(self.report)


def search_schedule(
    model: str | Path,
    data: str,
    output_dir: str | Path,
    *,
    eval_data: str | None = None,
    metric: str = "lpips",
    solvers: Sequence[str] = (),
    nfe: Sequence[int] = (),
    minutes: float | None = None,
    limit: int | None = None,
    crop: int | None = None,
    crops: int | None = None,
    degradation: str | None = None,
    label: int | None = None,
    candidates: int = 24,
    seed: int = 0,
    store: bool = True,
    guarded: bool = True,
    command: Sequence[str] = (),
    on_batch: Callable[[str], None] = lambda description: None,
    on_step: OnStep | None = None,
) -> ScheduleSearch:
    """Search the sampling schedule of a model and store it as the model's default.

    The same call continues an interrupted search.

    Args:
        model: a shipped name, a workdir or a .safetensors file.
        data, eval_data: names of sources for search and check; without the second, every other image of the first is
            used for the check.
        metric: one of SEARCH_METRICS.
        solvers: the solvers to search; empty for all.
        nfe: the budgets to search; the result for the first one is stored. Empty for that of the model's default.
        minutes: the search ends after this time.
        limit: only the first images of `data`.
        crop: side of a crop in pixels; None for that of training.
        crops: crops of each set; None for the metric's default.
        degradation: how low-res images are made: a name in `degradations.PRESETS`; None for that of the training.
        label: the class of all images, for a class-conditional model and images without labels.
        candidates: how many settings are evaluated in the first round.
        store: store the result if it beats the default on the check.
        guarded: exclude candidates that are much less consistent with the low-res image than the default; not with
            degraded low-res images, which the output should not reproduce.
        command: the command line, for search.json.
        on_batch: called after each batch with the name of the search in progress.
        on_step: called after each step of the samplers, see `Model.watched`.

    Raises:
        UserError: an argument is invalid, there are too few images, or a file cannot be written.
    """
    started = time.perf_counter()
    if metric not in SEARCH_METRICS:
        raise UserError(f"metric must be one of {', '.join(SEARCH_METRICS)}, got {metric!r}")
    loaded = replace(load(model), label=label).watched(on_step)
    if loaded.network.regression:
        raise UserError(
            f"model {loaded.name} is a regression model, which has no sampling schedule: use a diffusion model"
        )
    degradation = degradation or loaded.config["data"]["degradation"]
    if degradation not in PRESETS:
        raise UserError(f"degradation must be one of {', '.join(PRESETS)}, got {degradation!r}")
    guarded = guarded and degradation == "clean"
    own = Sampling(**loaded.config["sampling"])
    solvers = list(solvers) or [
        name
        for name, make in SOLVERS.items()
        if loaded.network.learned_variance or not make().compiled.learned
    ]
    budgets = list(nfe) or [own.nfe]
    defaults = {
        (solver, budget): own.override(solver=solver, steps=steps_for(solver, budget))
        for budget in budgets
        for solver in dict.fromkeys([own.solver, *solvers])
    }
    for sampling in defaults.values():
        sampling.grid(loaded.schedule)  # raises if the schedule has no grid of so many steps
    own_defaults = {budget: defaults[own.solver, budget] for budget in budgets}
    crop = crop or loaded.config["data"]["crop"] // loaded.config["data"]["shrink"]
    suite = open_search_suite(metric, crop)
    target = sampling_path(locate_model(model))
    if store:
        make_folder(target.parent)  # fails now rather than after an hour
    folder = make_folder(Path(output_dir))
    sets = _open_crops(loaded, data, eval_data, metric=metric, crop=crop, count=crops, limit=limit, seed=seed)
    if any(one.labels is None for one in sets) or not loaded.network.num_classes:
        loaded.label_array(None, 1)  # fails now if a label is missing or wrong
    elif label is not None:
        raise UserError(f"label={label} has no effect, since the images of {data} have labels: omit it")
    batch_size = min(MAX_BATCH, *(len(one.images) for one in sets))
    description = ""
    search, check = (
        CropEvaluator(
            loaded,
            one.whole_batches(batch_size),
            folder / "search.jsonl",
            suite=suite,
            batch_size=batch_size,
            seed=seed,
            degradation=degradation,
            on_batch=lambda: on_batch(description),
        )
        for one in sets
    )
    found = []
    jobs = [(solver, budget) for budget in budgets for solver in solvers]
    end = time.monotonic() + 60 * minutes if minutes else math.inf
    for number, (solver, budget) in enumerate(jobs):
        description = f"{solver}, NFE {budget}"
        now = time.monotonic()
        search.deadline = now + (end - now) / (len(jobs) - number)  # an equal share of the time left
        space = SearchSpace(
            loaded.schedule,
            defaults[solver, budget],
            augment=loaded.network.augment,
            guidance=bool(loaded.network.num_classes and loaded.config["data"]["label_dropout"]),
        )
        best, images = minimize(
            space,
            objective(search, metric, default=own_defaults[budget], guarded=guarded),
            candidates=candidates,
            rounds=_rounds(search.count, batch_size, least=MIN_CROPS_FRECHET if metric == "frechet" else 0),
            seed=seed,
        )
        found.append(Found(budget, space.default, best, images))
    search.deadline = math.inf
    searched = max(one.images for one in found)
    if own.solver not in solvers:
        found += [Found(budget, sampling, sampling, searched) for budget, sampling in own_defaults.items()]
    description = "check on other images"
    rows = result_rows(found, search=search, check=check, own_defaults=own_defaults, metric=metric)
    chosen, default = choose(rows, own=own_defaults[budgets[0]], nfe=budgets[0], metric=metric)
    report: dict[str, Any] = {
        "model": loaded.name,
        "metric": metric,
        "data": data,
        "eval_data": eval_data,
        "degradation": degradation,
        "crop": crop,
        "search_crops": search.count,
        "check_crops": check.count,
        "images": [one.source_images for one in sets],
        "seed": seed,
        "label": label,
        "guarded": guarded,
        "tried": len(search.tried),
        "version": __version__,
        "rows": rows,
        "chosen": chosen["sampling"] if chosen else None,
        "seconds": round(time.perf_counter() - started, 1),
        "command": list(command),
    }
    report["choice"] = describe_choice(report, chosen, default)
    write_text(folder / "search.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "search.md", search_markdown(report))
    if chosen is not None and store:
        store_sampling(
            target,
            Sampling(**chosen["sampling"]),
            params=loaded.params,
            config=loaded.config,
            name=loaded.name,
            found=provenance(report, chosen, default),
        )
    return ScheduleSearch(
        report,
        tuple(folder / f"search.{suffix}" for suffix in ("md", "json", "jsonl")),
        target if chosen is not None and store else None,
    )


def _open_crops(
    model: Model,
    data: str,
    eval_data: str | None,
    *,
    metric: str,
    crop: int,
    count: int | None,
    limit: int | None,
    seed: int,
) -> tuple[Crops, Crops]:
    """The crops to search on and those to check the result on. UserError if they do not fit model and metric."""
    least, section = least_side([model.scale]), model.config["data"]
    if crop % model.scale or crop < least:
        raise UserError(f"crop={crop} must be a multiple of the scale, {model.scale}, and at least {least}")
    sets = search_and_check(
        data,
        eval_data,
        crop=crop,
        count=count or (CROPS_FRECHET if metric == "frechet" else CROPS),
        square=section["framing"] == "square",
        shrink=section["shrink"],
        scale=model.scale,
        limit=limit,
        seed=seed,
    )
    fewest = min(len(one.images) for one in sets)
    if metric == "frechet" and fewest < MIN_CROPS_FRECHET:
        raise UserError(
            f"metric=frechet needs {MIN_CROPS_FRECHET} crops to search on and as many to check on, got {fewest}: use "
            "smaller crops, more crops or more images"
        )
    return sets


def open_search_suite(metric: str, crop: int) -> MetricSuite:
    """The metrics to compute for a search by `metric`, with AlexNet's features if it needs them.

    Raises:
        UserError: the metric needs larger crops, or weights that are not installed.
    """
    if metric == "lpips" and crop < LEAST_SIDE:
        raise UserError(
            f"metric=lpips needs crop={LEAST_SIDE} or more pixels, got {crop}: use another metric or larger crops"
        )
    suite = open_suite(features="none")
    if metric in ("lpips", "frechet") and suite.lpips is None:
        raise UserError(f"metric={metric} is not available, use another one. {suite.omitted[0]}")
    return (
        replace(suite, network=open_network("alexnet", lpips=suite.lpips)) if metric == "frechet" else suite
    )


def _rounds(count: int, batch_size: int, *, least: int) -> list[int]:
    """The images of each round: batch_size, twice as many, ..., count."""
    rounds = [batch_size * 2**power for power in range(math.ceil(math.log2(count / batch_size)))] + [count]
    return [images for images in rounds if images >= least]


def result_rows(
    found: Sequence[Found],
    *,
    search: CropEvaluator,
    check: CropEvaluator,
    own_defaults: Mapping[int, Sampling],
    metric: str,
) -> list[dict[str, Any]]:
    """The rows of search.json: 'default' and 'best' of each solver and budget, one if they are the same.

    Each row has the metrics on the crops of the search ('search', and 'own' for the model's default), those on the
    crops of the check ('check'), and how much better it is there than the solver's default ('gain') and than the
    model's ('over_own').

    Args:
        own_defaults: the model's default sampling at each budget.
    """

    def searched(sampling: Sampling, images: int) -> dict[str, float | None]:
        return to_json(search.means(sampling, images)) if images else {}

    return [
        {
            "which": which,
            "nfe": one.nfe,
            "sampling": dataclasses.asdict(sampling),
            "images": one.images,
            "search": searched(sampling, one.images),
            "own": searched(own_defaults[one.nfe], one.images),
            "check": to_json(check.means(sampling, check.count)),
            "gain": _gain(check, sampling, one.default, metric),
            "over_own": _gain(check, sampling, own_defaults[one.nfe], metric),
        }
        for one in found
        for which, sampling in (("default", one.default), ("best", one.sampling))
        if which == "default" or sampling != one.default
    ]


def _gain(
    evaluator: CropEvaluator, sampling: Sampling, default: Sampling, metric: str
) -> dict[str, float] | None:
    """How much better than the default, with an interval over crops; None for a metric of a whole set."""
    columns, usual = (evaluator.per_crop(one, evaluator.count) for one in (sampling, default))
    if metric not in columns or metric not in usual:
        return None
    difference = columns[metric] - usual[metric]
    if not np.all(np.isfinite(difference)):
        return None
    return bootstrap(difference if search_metric(metric).higher_is_better else -difference)


def choose(
    rows: Sequence[Mapping[str, Any]], *, own: Sampling, nfe: int, metric: str
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The row to store, of those with this NFE, and the row of the model's default.

    The choice is made on the crops of the search. It is dropped (None) unless it is better on the crops of the check
    too, by more than chance if there is an interval.

    Args:
        own: the model's default sampling at this NFE, which has a row.
    """
    rows = [row for row in rows if row["nfe"] == nfe]
    default = next((row for row in rows if row["sampling"] == dataclasses.asdict(own)), None)
    complete = [row for row in rows if row["search"] and row["check"]]
    if not complete or default is None:
        return None, default

    def relative(row: Mapping[str, Any]) -> float:  # to the default on the same crops, fewer if time ran out
        return cost(row["search"], metric) - (cost(row["own"], metric) if row["own"] else 0.0)

    best = min(complete, key=lambda row: (relative(row), row["which"] != "default"))
    if best is default or cost(best["check"], metric) >= cost(default["check"], metric):
        return None, default
    if best["over_own"] is not None and best["over_own"]["low"] <= 0:
        return None, default
    return best, default


def provenance(
    report: Mapping[str, Any], best: Mapping[str, Any], default: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How the sampling settings were found, for the file next to the model."""
    names = (
        "metric",
        "data",
        "eval_data",
        "crop",
        "search_crops",
        "check_crops",
        "seed",
        "guarded",
        "version",
    )
    key = search_metric(report["metric"]).key
    found = {name: report[name] for name in names}
    found |= {"value": best["check"][key], "metrics": best["check"]}
    if default is not None and default["check"]:
        found["default"] = {"sampling": default["sampling"], "value": default["check"][key]}
    return found


def describe_choice(
    report: Mapping[str, Any], chosen: Mapping[str, Any] | None, default: Mapping[str, Any] | None
) -> str:
    """The choice as a sentence."""
    if chosen is None:
        return (
            "The model's default is kept: on crops that the search did not use, no candidate is better by more than "
            "chance."
        )
    metric, sampling = search_metric(report["metric"]), Sampling(**chosen["sampling"])
    value = metric.format(chosen["check"][metric.key])
    usual = metric.format(default["check"][metric.key]) if default and default["check"] else "no finite value"
    return (
        f"Chosen: {sampling.solver} in {count_steps(sampling.steps)} (NFE {chosen['nfe']}), {metric.heading} {value}; "
        f"the model's default has {usual}, on crops that the search did not use."
    )


# ---- The page


def search_markdown(report: Mapping[str, Any]) -> str:
    """search.md: the protocol of the search, its table, and the choice."""
    metric = search_metric(report["metric"])
    shown = reported_metrics([{"summary": row["check"]} for row in report["rows"]])
    shown = [other for other in shown if other.key in {*_COLUMNS, metric.key}]
    headings = ["solver", "NFE", "steps", "which", "spacing", "log-SNR", "noise", "other"]
    headings += [f"{metric.heading}, searched", *(other.heading for other in shown), "gain"]
    body = [_search_cells(row, metric, shown) for row in report["rows"]]
    where = report["eval_data"] or "the other images of the same data"
    lines = [
        f"# Schedule search: {report['model']}",
        "",
        f"By {metric.heading} on {report['search_crops']} crops of {report['crop']} pixels of {report['data']}, "
        f"low-res images: {report['degradation']}, "
        f"{report['tried']} candidates, seed {report['seed']}. The columns after the searched one are computed on "
        f"{report['check_crops']} crops of {where}, which the search did not use. Gain: how much better than the "
        f"solver's default there, with a {LEVEL:.0%} interval over the crops.",
        "",
        table(headings, body),
        "",
        report["choice"],
        "",
    ]
    return "\n".join(lines)


def _search_cells(row: Mapping[str, Any], metric: Metric, shown: Sequence[Metric]) -> list[str]:
    sampling = Sampling(**row["sampling"])
    ends = ["-" if end is None else f"{end:.1f}" for end in (sampling.log_snr_min, sampling.log_snr_max)]
    noise = [f"{name}={getattr(sampling, name):g}" for name in solver_options(sampling.solver)]
    default = Sampling()
    other = [
        f"{name}={getattr(sampling, name):g}"
        for name in ("guidance", "augment", "back_projection")
        if getattr(sampling, name) != getattr(default, name)
    ]
    gain = row["gain"]
    return [
        sampling.solver,
        str(row["nfe"]),
        str(sampling.steps),
        row["which"],
        sampling.spacing or "default",
        "-" if ends == ["-", "-"] else f"{ends[0]} to {ends[1]}",
        ", ".join(noise) or "-",
        ", ".join(other) or "-",
        _value(row["search"], metric),
        *(_value(row["check"], one) for one in shown),
        f"{gain['mean']:.4f} ({gain['low']:.4f} to {gain['high']:.4f})"
        if gain and row["which"] == "best"
        else "-",
    ]


def _value(values: Mapping[str, float | None], metric: Metric) -> str:
    return metric.format(values[metric.key]) if metric.key in values else "-"
