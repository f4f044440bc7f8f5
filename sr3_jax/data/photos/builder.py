"""TFDS builder of the default data set: the photographs next to this file, 32 for training and 8 for testing.

Importing this module imports TensorFlow Datasets, so import it where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

_HERE = Path(__file__).parent


class Sr3Photos(tfds.core.GeneratorBasedBuilder):
    """{'image': JPEG, 352 pixels on the short side, 'file_name': text}."""

    # Increase this when an image changes, so that old prepared copies are not read.
    VERSION = tfds.core.Version("1.0.0")
    # Without it TFDS 4.9.10 imports importlib_resources, which it does not depend on since Python 3.9.
    code_path = tfds.core.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Photographs under free licenses; authors and sources are in ATTRIBUTION.md.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "file_name": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,  # batches.py shuffles; the stored order is by name
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(_HERE / split) for split in ("train", "test")}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, path in enumerate(sorted(folder.glob("*.jpg"))):
            # Encoded bytes are stored unchanged: encoding an array would need TensorFlow.
            yield key, {"image": path.read_bytes(), "file_name": path.name}
