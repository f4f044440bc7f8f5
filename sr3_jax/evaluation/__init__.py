"""Evaluation on held-out images, and the search for a model's sampling schedule.

Public functions and types, loaded on first use:
  evaluate(models, data, output_dir, *, steps, solvers, samples, seed, ...) -> Evaluation
  search_schedule(model, data, output_dir, *, metric, solvers, nfe, ...) -> ScheduleSearch

The modules behind them: `runner` (the evaluation), `methods` (what is compared), `metric_suite` (what is computed),
`outputs` (sampled once, with their metrics), `results` (rows and evaluation.json), `tables` (Markdown and CSV), `grids`
(images); `search`, `crop_evaluator` and `successive_halving` (the schedule search). The
metrics themselves and their registry are in `sr3_jax.metrics`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sr3_jax.evaluation.runner import Evaluation as Evaluation
    from sr3_jax.evaluation.runner import evaluate as evaluate
    from sr3_jax.evaluation.search import ScheduleSearch as ScheduleSearch
    from sr3_jax.evaluation.search import search_schedule as search_schedule

_MODULES = {
    "Evaluation": "runner",
    "ScheduleSearch": "search",
    "evaluate": "runner",
    "search_schedule": "search",
}
__all__ = ["Evaluation", "ScheduleSearch", "evaluate", "search_schedule"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
