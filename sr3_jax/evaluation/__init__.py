"""Evaluation on held-out images, and the search for a model's sampling schedule.

Public functions and types, loaded on first use:
  evaluate(models, data, output_dir, *, steps, solvers, samples, seed, ...) -> Evaluation
  evaluate_sets(outputs, reference, output_dir, ...) -> (report, files)
  search_schedule(model, data, output_dir, *, metric, solvers, nfe, ...) -> ScheduleSearch

How the data flows:

  models x solvers x steps   `outputs`      one Method, i.e. row of the tables, for each; bicubic next to them, and
                                            the folders of other programs' outputs
  images and low-res images  `inputs`       from the data set; low-res images are made, or given as pairs
  images of one size         `runner`       in batches, each through all methods; processes divide the images
  outputs and their metrics  `outputs`      from the cache (`cache`), or sampled and computed
  metrics of the set         `results`      from cached features; rows, intervals, evaluation.json
  text and images            `results` has the tables and the protocol, `runner` the image grids

Sets of images without pairs have a shorter way: `sets` compares them with a reference by their features alone.
The schedule search has a shorter way: `candidates` upscales crops, caches their metrics but no images, and finds the
best candidate by successive halving; `search` checks it on other images and stores it. Which metrics there are, and
the networks that they need, is in `sr3_jax.metrics` and `sr3_jax.features.metric_suite`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sr3_jax.evaluation.runner import Evaluation as Evaluation
    from sr3_jax.evaluation.runner import evaluate as evaluate
    from sr3_jax.evaluation.search import ScheduleSearch as ScheduleSearch
    from sr3_jax.evaluation.search import search_schedule as search_schedule
    from sr3_jax.evaluation.sets import evaluate_sets as evaluate_sets

_MODULES = {
    "Evaluation": "runner",
    "ScheduleSearch": "search",
    "evaluate": "runner",
    "evaluate_sets": "sets",
    "search_schedule": "search",
}
__all__ = ["Evaluation", "ScheduleSearch", "evaluate", "evaluate_sets", "search_schedule"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
