"""Classifiers in ONNX files, run by onnxruntime on the CPU (extra `onnx`).

PATH.onnx?OPTIONS defines the preprocessing, as far as the file's input does not:

    resnet.onnx                                            [0,1], resized to the input size of the file
    resnet.onnx?resize=256&crop=224&normalize=imagenet     the usual protocol of ImageNet classifiers
    resnet.onnx?crop=224&normalize=imagenet                the same without resizing, for 256x256 outputs

resize=N resizes to N x N by anti-aliased bicubic, then crop=N takes the center of N x N. If the file has a fixed
input size, images of another size are then resized to it. normalize is unit for [0,1] (the default), signed for
[-1,1], levels for 0..255, or imagenet for ImageNet's mean and standard deviation per channel. Layout, channels (1 or
3) and type are read from the file.

Shape legend: B batch, H height, W width, C channels, K classes.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.features.classifier_file import check_images
from sr3_jax.features.weights import read_file
from sr3_jax.image_ops import pad_batch, resize_bicubic

NORMALIZE = ("unit", "signed", "levels", "imagenet")
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # BT.601, as in Pillow
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
BATCH = 64  # images per call, if the file does not fix it


@dataclass(frozen=True)
class Preprocessing:
    """The options of PATH.onnx?OPTIONS."""

    resize: int | None = None
    crop: int | None = None
    normalize: str = "unit"


def read_options(text: str) -> Preprocessing:
    """Parse `resize=256&crop=224&normalize=imagenet`, each optional. UserError for anything else."""
    try:
        pairs = urllib.parse.parse_qsl(text, strict_parsing=True, keep_blank_values=True) if text else []
    except ValueError:
        pairs = [(text, "")]
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name in ("resize", "crop") and value.isascii() and value.isdigit() and int(value) > 0:
            given[name] = int(value)
        elif name == "normalize" and value in NORMALIZE:
            given[name] = value
        else:
            raise UserError(
                f"option {name}={value} of an ONNX classifier is invalid: use resize=N, crop=N and "
                f"normalize={'|'.join(NORMALIZE)}"
            )
    return Preprocessing(**given)


@dataclass(frozen=True, eq=False)
class OnnxClassifier:
    """An onnxruntime session and its preprocessing.

    Attributes:
        layout: 'NCHW' or 'NHWC'.
        batch, height, width: of the file's input; None if not fixed.
        num_classes: 0 if the file does not declare it.
    """

    name: str
    sha256: str
    num_classes: int
    session: Any
    preprocessing: Preprocessing
    layout: str
    channels: int
    batch: int | None
    height: int | None
    width: int | None

    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,3] -> the file's first output, float32 [B,K], logits or probabilities."""
        images = check_images(images)
        batch = self.batch or BATCH
        parts = [self._run(images[first : first + batch]) for first in range(0, len(images), batch)]
        return np.concatenate(
            [np.zeros((0, parts[0].shape[1] if parts else self.num_classes), np.float32), *parts]
        )

    def _run(self, images: np.ndarray) -> np.ndarray:
        count = len(images)
        if self.batch is not None:
            images = pad_batch(images, self.batch)
        inputs = self.session.get_inputs()[0]
        x = self.prepared(images).astype(TYPES[inputs.type])
        try:
            found = np.asarray(self.session.run(None, {inputs.name: x})[0], np.float32)
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise UserError(f"{self.name} cannot be run on images {x.shape} ({_line(error)})") from error
        found = found.reshape(len(found), -1) if found.ndim else found
        if found.ndim != 2 or len(found) != len(images):
            raise UserError(
                f"{self.name} gives {found.shape} for {len(images)} images, not [B,K]: use a classifier"
            )
        return found[:count]

    def prepared(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,3] -> the file's input, float32."""
        options = self.preprocessing
        x: np.ndarray = images.astype(np.float32)
        if options.resize:
            x = _resized(x, options.resize, options.resize)
        if options.crop:
            x = self._cropped(x, options.crop)
        size = (self.height or x.shape[1], self.width or x.shape[2])
        if x.shape[1:3] != size:
            x = _resized(x, *size)
        if self.channels == 1:
            x = x @ np.array(LUMA, np.float32)[:, None]
        if TYPES[self.session.get_inputs()[0].type] == np.uint8:
            x = np.rint(x)
        elif options.normalize == "signed":
            x = x / 127.5 - 1.0
        elif options.normalize != "levels":
            x = x / 255.0
        if options.normalize == "imagenet":
            x = (x - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_DEVIATION, np.float32)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if self.layout == "NCHW" else x, np.float32)

    def _cropped(self, x: np.ndarray, side: int) -> np.ndarray:
        height, width = x.shape[1:3]
        if min(height, width) < side:
            raise UserError(
                f"crop={side} of {self.name} is larger than the images of {width}x{height}: add resize=N or use a "
                "smaller crop"
            )
        top, left = (height - side) // 2, (width - side) // 2
        return x[:, top : top + side, left : left + side]


def load(path: Path, options: str = "") -> OnnxClassifier:
    """The classifier in an ONNX file, with the options above. UserError if it cannot be used."""
    preprocessing = read_options(options)
    content, sha256 = read_file(path)
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"{path} needs onnxruntime, which is not installed: run pip install -e '.[onnx]'"
        ) from error
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(content, quiet, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise UserError(f"{path} is not a valid ONNX file ({_line(error)}): use another file") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = [side if isinstance(side, int) else None for side in inputs[0].shape]
    if len(inputs) != 1 or inputs[0].type not in TYPES or len(shape) != 4:
        raise UserError(
            f"{path} must have one input of images [B,C,H,W] or [B,H,W,C]: use an image classifier"
        )
    if shape[1] in (1, 3):
        layout, channels, size = "NCHW", shape[1], shape[2:]
    elif shape[3] in (1, 3):
        layout, channels, size = "NHWC", shape[3], shape[1:3]
    else:
        raise UserError(
            f"{path} has the input {inputs[0].shape} without 1 or 3 channels: use an image classifier"
        )
    if preprocessing.normalize == "imagenet" and channels != 3:
        raise UserError(f"{path} takes grayscale images: leave out normalize=imagenet")
    classes = outputs[0].shape[-1] if outputs[0].shape else 0
    return OnnxClassifier(
        name=path.name + (f"?{options}" if options else ""),
        sha256=sha256,
        num_classes=classes if isinstance(classes, int) else 0,
        session=session,
        preprocessing=preprocessing,
        layout=layout,
        channels=channels,
        batch=shape[0],
        height=size[0],
        width=size[1],
    )


def _resized(x: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(jnp.clip(resize_bicubic(x, height, width), 0.0, 255.0))


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
