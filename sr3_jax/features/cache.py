"""Features that a network gave, kept in files: nothing is computed twice, and processes share what each computed.

Shape legend: N images, F numbers of an image. An image is known by the digest of its pixels, so that features are
those of an image, whatever method and run it came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.features.statistics import FeatureProtocol


class KeptFeatures:
    """Features of one network in the files of `folder` that begin with `name`, each written by one process alone."""

    def __init__(self, folder: Path, name: str, *, process: int = 0) -> None:
        self._folder, self._name, self._process = folder, name, process
        self._places: dict[bytes, tuple[np.ndarray, int]] = {}
        for path in sorted(folder.glob(f"{name}.*.*.features")):
            self._learn(path)

    @classmethod
    def of(cls, folder: Path, protocol: FeatureProtocol, *, process: int = 0) -> KeptFeatures:
        """Those of one protocol, in the folder `features` of `folder`."""
        text = json.dumps(asdict(protocol), sort_keys=True).encode()
        name = f"{protocol.distance}-{hashlib.sha256(text).hexdigest()[:12]}"
        return cls(folder / "features", name, process=process)

    def missing(self, digests: Iterable[str]) -> list[int]:
        """The places of digests, in hex, whose features are not known."""
        return [place for place, text in enumerate(digests) if bytes.fromhex(text) not in self._places]

    def find(self, digests: Sequence[str]) -> np.ndarray:
        """float32 [N,F] of images by their digests. KeyError for one that is not known."""
        places = [self._places[bytes.fromhex(text)] for text in digests]
        return np.stack([rows[at] for rows, at in places])

    def add(self, digests: Sequence[str], features: np.ndarray) -> None:
        """Keep float32 [N,F]. UserError if they can't be written."""
        rows = np.empty(len(digests), _layout(features.shape[1]))
        rows["image"] = [np.void(bytes.fromhex(text)) for text in digests]
        rows["features"] = features
        path = self._folder / f"{self._name}.{features.shape[1]}.{self._process}.features"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.truncate(file.tell() // rows.itemsize * rows.itemsize)  # half a row, of a killed run
                file.write(rows.tobytes())
        except OSError as error:
            raise UserError(
                f"features cannot be written to {path} ({error.strerror}): name another folder with -o"
            ) from error
        for at, text in enumerate(digests):
            self._places[bytes.fromhex(text)] = (rows["features"], at)

    def _learn(self, path: Path) -> None:
        width = path.name.split(".")[-3]
        try:
            layout = _layout(int(width))
            count = path.stat().st_size // layout.itemsize
            rows = np.memmap(path, layout, mode="r", shape=(count,)) if count else np.empty(0, layout)
        except (OSError, ValueError):
            return
        images = rows["image"].tobytes()
        self._places |= {images[32 * at : 32 * at + 32]: (rows["features"], at) for at in range(count)}


def _layout(width: int) -> np.dtype:
    return np.dtype([("image", "V32"), ("features", "<f4", (width,))])
