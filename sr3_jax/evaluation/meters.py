"""What an evaluation measures with networks, opened by the names that a user gives, and said in its protocol.

Shape legend: B batch, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.evaluation import measures
from sr3_jax.evaluation.bench import Meters
from sr3_jax.evaluation.measures import Columns, Measure
from sr3_jax.evaluation.parts import Evaluation
from sr3_jax.features import set_metrics
from sr3_jax.features.classifiers import Classifier, correct, load_classifier
from sr3_jax.features.lpips import LEAST_SIDE, Lpips, load_lpips
from sr3_jax.features.networks import Network, open_network
from sr3_jax.features.statistics import Statistics, load_statistics

TOP_FIVE = 10  # classes from which on the five best guesses count too: of fewer, five are no feat
_NAMES = {"lpips": "LPIPS", "diversity_lpips": "LPIPS of pairs"}


@dataclass(frozen=True, eq=False)
class Setup:
    """The networks of an evaluation.

    Attributes:
        meters: what is measured.
        lpips, classifier, reference: None where there is none.
        reference_name: what the user called it.
        absent: sentences, why a column is not there.
    """

    meters: Meters
    lpips: Lpips | None
    classifier: Classifier | None
    reference: Statistics | None
    reference_name: str
    absent: tuple[str, ...]

    @property
    def of_originals(self) -> bool:
        """Whether something can be measured of the originals themselves."""
        return self.meters.network is not None or any(one.of_originals for one in self.meters.each)


def open_setup(
    *,
    features: str | None,
    classifier: str | None,
    labelled: bool,
    patch: int = 0,
    reference: Path | None = None,
    batch: int = 1,
) -> Setup:
    """What `sr3 evaluate` measures.

    Args:
        features: the network of the set's figures, as `open_network` takes it.
        classifier: as `load_classifier` takes it.
        labelled: whether the images have labels.
        patch: side in pixels of the squares in which larger images are compared; 0: as a whole.
        reference: statistics to compare with, instead of those of the originals.

    Raises:
        UserError: a network that is asked for cannot be had, or the reference is of another one.
    """
    absent = []
    lpips = None
    try:
        lpips = load_lpips()
    except UserError as error:
        absent.append(f"LPIPS is left out: {error}.")
    recogniser = load_classifier(classifier) if classifier else None
    network = open_network(features, lpips=lpips, classifier=recogniser)
    if patch and network is not None:
        network = network.in_patches(patch)
    if recogniser is not None and not labelled:
        absent.append(f"Recognition accuracy is left out: the images have no labels for {recogniser.name}.")
    each = [measures.plain()]
    each += [measures.perceptual(lpips)] if lpips else []
    each += [recognition(recogniser)] if recogniser is not None and labelled else []
    spread = [measures.pixel_spread()]
    spread += [measures.perceptual_spread(lpips, batch=batch)] if lpips else []
    known = _reference(reference, network) if reference else None
    return Setup(
        Meters(tuple(each), tuple(spread), network),
        lpips,
        recogniser,
        known,
        str(reference or ""),
        tuple(absent),
    )


def recognition(classifier: Classifier) -> Measure:
    """100 where the classifier's best guess, or one of its five best, is the image's label, else 0."""

    def run(outputs: np.ndarray, originals: np.ndarray, low_res: np.ndarray, labels: np.ndarray) -> Columns:
        logits = classifier.logits(outputs)
        tops = {"top1": 1, "top5": 5} if logits.shape[1] >= TOP_FIVE else {"top1": 1}
        return {name: 100.0 * correct(logits, labels, top=top) for name, top in tops.items()}

    return Measure(
        f"recognition {classifier.sha256}",
        run,
        least_side=getattr(classifier, "least_side", 0),
        labelled=True,
        of_originals=True,
    )


def describe(setup: Setup, evaluation: Evaluation) -> dict[str, Any]:
    """The networks' part of the protocol in evaluation.json, as plain values."""
    count = len(evaluation.items)
    absent = [*setup.absent]
    lacking = dict(evaluation.left_out)
    if setup.lpips is not None and not any("lpips" in scores for scores in evaluation.scores):
        lacking.setdefault("lpips", count)  # not one of them is large enough
    for name, number in lacking.items():
        absent.append(
            f"{_NAMES.get(name, name)} is left out: {number} of {count} images have a side under "
            f"{LEAST_SIDE} pixels."
        )
    about: dict[str, Any] = {}
    if setup.lpips is not None:
        about["lpips"] = {"network": setup.lpips.name, "sha256": setup.lpips.sha256}
    if setup.classifier is not None:
        about["classifier"] = {
            "network": setup.classifier.name,
            "sha256": setup.classifier.sha256,
            "classes": setup.classifier.num_classes,
            "kind": getattr(setup.classifier, "kind", ""),
        }
    if setup.meters.network is not None:
        about["features"] = _of_network(setup, evaluation)
        if not any(evaluation.sets):
            why = (
                f"{count} of a kind is too few"
                if count < 2
                else f"some have a side under {LEAST_SIDE} pixels"
            )
            absent.append(
                f"Figures of the set ({setup.meters.network.protocol.network}) are left out: {why}."
            )
    return about | {"absent": absent}


def _of_network(setup: Setup, evaluation: Evaluation) -> Mapping[str, Any]:
    assert setup.meters.network is not None
    protocol = setup.meters.network.protocol
    own = "their own originals"
    other = ""
    if setup.reference is not None:
        own = f"{setup.reference_name} ({setup.reference.count} images)"
        other = f"the originals beside {own}"
    return {
        "network": protocol.network,
        "sha256": protocol.weights_sha256,
        "preprocessing": protocol.preprocessing,
        "distance": protocol.distance,
        "count": evaluation.count,
        "images": len(evaluation.items),
        "patch": setup.meters.network.patch,
        "reference": own,
        "original": other,
        "subset": set_metrics.SUBSET,
        "splits": set_metrics.SPLITS,
        "resamples": set_metrics.RESAMPLES,
    }


def _reference(path: Path, network: Network | None) -> Statistics:
    if network is None:
        raise UserError(f"--reference={path} needs the network it was made with: name it with --features")
    statistics = load_statistics(path)
    if statistics.protocol != network.protocol:
        raise UserError(
            f"--reference={path} is of {statistics.protocol.network}, weights "
            f"{statistics.protocol.weights_sha256[:12]}, not of {network.protocol.network}, "
            f"{network.protocol.weights_sha256[:12]}: give the --features it was made with"
        )
    return statistics
