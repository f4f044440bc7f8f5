"""Where the wall time of a run goes: training, or something else.

Goodput is the share of the time in which training steps ran that are part of the run's result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from tqdm import tqdm

Loss = Literal["start", "data", "checkpoint", "evaluation", "restart"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
_WORDS: Mapping[Loss, str] = {
    "start": "starting and compiling",
    "data": "waiting for data",
    "checkpoint": "saving",
    "evaluation": "evaluating",
    "restart": "training again what was lost",
}


class Goodput:
    """Seconds of a run over all of its starts, and those of them that were lost.

    The time between two starts does not count. What a stopped run did after its last log line is not known and does not
    count either.

    Args:
        rows: of metrics.jsonl before this start, which have the seconds of earlier starts.
        first_step: that this start resumes from. Later rows are of training that is done again: a lost restart.
        started: `time.monotonic()` at this start.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]] = (), *, first_step: int = 0, started: float | None = None
    ) -> None:
        timed = [row for row in rows if isinstance(row.get("seconds_total"), int | float)]
        valid = [row for row in timed if row["step"] <= first_step]
        before = valid[-1] if valid else {}
        spent = max((row["seconds_total"] for row in timed), default=0.0)
        self._lost: dict[Loss, float] = {name: float(before.get(f"seconds_{name}") or 0) for name in LOSSES}
        self._lost["restart"] += spent - before.get("seconds_total", 0.0)
        self._started = (time.monotonic() if started is None else started) - spent

    def lose(self, what: Loss, seconds: float) -> None:
        """Count seconds in which no step ran."""
        self._lost[what] += seconds

    def metrics(self) -> dict[str, float]:
        """'goodput', 'seconds_total', and 'seconds_NAME' of each loss."""
        total = max(time.monotonic() - self._started, 1e-9)
        good = max(0.0, total - sum(self._lost.values()))
        lost = {f"seconds_{name}": seconds for name, seconds in self._lost.items()}
        return {"goodput": good / total, "seconds_total": total, **lost}

    def summary(self) -> str:
        """One line, with the losses of a second or more, the largest first."""
        found = self.metrics()
        total = found["seconds_total"]
        lost = sorted(self._lost.items(), key=lambda item: -item[1])
        parts = [f"{_WORDS[name]} {seconds / total:.1%}" for name, seconds in lost if seconds >= 1]
        return f"{tqdm.format_interval(round(total))} in all: " + ", ".join(
            [f"training {found['goodput']:.1%}", *parts]
        )
