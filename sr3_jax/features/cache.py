"""Network features of images in files, so that none is computed twice and processes can share them.

Features are found by the hash of an image's pixels, whatever method and run the image came from. Shape legend:
N images, F features of an image.
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
from sr3_jax.files import sha256_hex


class FeatureCache:
    """Features by one protocol in files of `folder`/features; each process appends to its own file."""

    def __init__(self, folder: Path, protocol: FeatureProtocol, *, process: int = 0) -> None:
        text = json.dumps(asdict(protocol), sort_keys=True).encode()
        self._folder, self._process = folder / "features", process
        self._name = f"{protocol.distance}-{hashlib.sha256(text).hexdigest()[:12]}"
        self._places: dict[bytes, tuple[np.ndarray, int]] = {}
        for path in sorted(self._folder.glob(f"{self._name}.*.*.features")):
            self._read(path)

    def missing(self, hashes: Iterable[str]) -> list[int]:
        """The indices of the hashes (in hex) whose features are not in the cache."""
        return [index for index, text in enumerate(hashes) if bytes.fromhex(text) not in self._places]

    def get(self, hashes: Sequence[str]) -> np.ndarray:
        """Features float32 [N,F] of images by their hashes. KeyError if one is not in the cache."""
        places = [self._places[bytes.fromhex(text)] for text in hashes]
        return np.stack([rows[index] for rows, index in places])

    def add(self, hashes: Sequence[str], features: np.ndarray) -> None:
        """Write features float32 [N,F]. UserError if they cannot be written."""
        rows = np.empty(len(hashes), _row_type(features.shape[1]))
        rows["image"] = [np.void(bytes.fromhex(text)) for text in hashes]
        rows["features"] = features
        path = self._folder / f"{self._name}.{features.shape[1]}.{self._process}.features"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                # A killed run may have left part of a row.
                file.truncate(file.tell() // rows.itemsize * rows.itemsize)
                file.write(rows.tobytes())
        except OSError as error:
            raise UserError(
                f"features cannot be written to {path} ({error.strerror}): choose another folder with -o"
            ) from error
        for index, text in enumerate(hashes):
            self._places[bytes.fromhex(text)] = (rows["features"], index)

    def _read(self, path: Path) -> None:
        width = path.name.split(".")[-3]
        try:
            row_type = _row_type(int(width))
            count = path.stat().st_size // row_type.itemsize
            rows = np.memmap(path, row_type, mode="r", shape=(count,)) if count else np.empty(0, row_type)
        except (OSError, ValueError):
            return
        images = rows["image"].tobytes()
        self._places |= {images[32 * i : 32 * i + 32]: (rows["features"], i) for i in range(count)}


def feature_keys(pixels: str, patches: int) -> list[str]:
    """The keys of an image's features: the hash of its pixels, or one key for each of several patches."""
    return [pixels] if patches == 1 else [sha256_hex({pixels: patch}) for patch in range(patches)]


def _row_type(width: int) -> np.dtype:
    return np.dtype([("image", "V32"), ("features", "<f4", (width,))])
