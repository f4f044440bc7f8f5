"""The evaluations of an experiment in parts: one that its findings are judged on, and others beside it.

Pure: results are plain values as docs/results/NAME.json holds them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from results_findings import DISTANCES, Finding, findings, search_finding, searched_finding

TITLES = {
    "photos": "Photographs at 4x",
    "fashion": "Fashion-MNIST at 4x, 7x7 to 28x28",
    "orl": "The ORL faces",
}
MAIN = "evaluation"
BY_ALEXNET = {
    "recognition": "A linear layer on AlexNet recognises SR3's outputs better than the regression's (differences of "
    "top-1 %: SR3 - regression; above 0 as in the paper)",
    "recognition_bicubic": "A linear layer on AlexNet recognises SR3's outputs better than bicubic's (differences of "
    "top-1 %: SR3 - bicubic; above 0 as in the paper)",
}


@dataclass(frozen=True)
class Part:
    """One part of an experiment.

    Attributes:
        name: '' where the experiment has one part, else as its folder: '8x'.
        title: of the page.
        runs: {kind: evaluation}: 'evaluation', and those that answer one question each: 'patches', 'recognition',
            'diversity', 'searched', 'sweep'.
        searches: of schedules.
        findings: of the paper.
    """

    name: str
    title: str
    runs: Mapping[str, Mapping[str, Any]]
    searches: Sequence[Mapping[str, Any]]
    findings: Sequence[Finding]


def parts(result: Mapping[str, Any]) -> list[Part]:
    """Those whose main evaluation is there; schedule searches belong to the first."""
    runs: dict[str, dict[str, Mapping[str, Any]]] = {}
    for run, found in result["runs"].items():
        name, _, kind = run.rpartition("/")
        runs.setdefault(name, {})[kind] = found
    made: list[Part] = []
    for name, of in runs.items():
        if MAIN not in of:
            continue
        searches = [] if made else result["searches"]
        judged = [one for kind, found in of.items() for one in _judged(kind, found)]
        gained = search_finding(searches)
        title = f"{TITLES[result['name']]}{', ' * bool(name)}{name}"
        made.append(Part(name, title, of, searches, judged + ([gained] if gained else [])))
    return made


def _judged(kind: str, found: Mapping[str, Any]) -> list[Finding]:
    """The findings that a run of that kind is there for."""
    if kind == MAIN:
        return findings(found)
    all_of = [] if kind == "sweep" else findings(found)
    if kind == "diversity":  # its other columns are of fewer images
        return [one for one in all_of if one.key == "diversity"]
    if kind == "recognition":
        return [
            dataclasses.replace(one, key=f"{one.key}_alexnet", title=BY_ALEXNET[one.key])
            for one in all_of
            if one.key in BY_ALEXNET
        ]
    perception = [one for one in all_of if one.key == "perception"]
    if kind == "patches":
        side = found["protocol"]["features"]["patch"]
        title = f"The same in the features of patches of {side}x{side} pixels (regression - SR3)"
        return [
            Finding("patches", title, {key: one.wanted[key] for key in DISTANCES}, one.lines)
            for one in perception
        ]
    if kind == "searched":
        gained = searched_finding(found)
        return ([gained] if gained else []) + [
            dataclasses.replace(
                one,
                key="perception_searched",
                lines=[dataclasses.replace(line, decides="(searched)" in line.title) for line in one.lines],
            )
            for one in perception
        ]
    return []
