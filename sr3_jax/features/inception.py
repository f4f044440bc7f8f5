"""The Inception network of FID: TensorFlow's version of 2015-12-05 (Szegedy et al. 2015) with 1008 classes.

FID, KID and IS are defined by these weights, and by details in which the network differs from the Inception v3 of model
zoos: average pooling excludes the padding, and the last block has a max pool. The weights are read from a file of the
user in PyTorch's layout (pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or the same arrays as safetensors).
Distances in the features of other weights are not FID.

Shape legend: B batch, H height, W width. Batch norms are folded into the convolutions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.features.inception_layers import CLASSES, SIDE, WIDTH, convolve, kernel_shapes, layers
from sr3_jax.features.statistics import FeatureProtocol
from sr3_jax.features.weights import read_arrays, read_file

# Of the file of pytorch-fid and torch-fidelity; its first digits are in the file's name.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
EPSILON = 1e-3  # of the batch norms
PREPROCESSING = {
    "tf1": "levels 0..255, TF1 bilinear to 299x299 (corner-aligned grid, no anti-aliasing), (x - 128) / 128",
    "pytorch_fid": "levels 0..255, bilinear to 299x299 (half-pixel centres, no anti-aliasing), x / 127.5 - 1",
}
Preprocessing = Literal["tf1", "pytorch_fid"]
Weights = Mapping[str, Mapping[str, jax.Array]]


class Outputs(NamedTuple):
    """The network's outputs that metrics use, float32."""

    pool3: jax.Array  # [B,2048] for FID and KID
    logits: jax.Array  # [B,1008] for IS, without the bias, as in the code of Salimans et al.


@dataclass(frozen=True)
class Inception:
    """The network with its weights and preprocessing.

    `verified`: the weights are the published file, so the Frechet distance of its features is FID.
    """

    weights: Weights
    sha256: str
    preprocessing: Preprocessing

    @property
    def verified(self) -> bool:
        return self.sha256 == INCEPTION_SHA256

    @property
    def protocol(self) -> FeatureProtocol:
        network = "inception-2015-12-05" if self.verified else "inception-of-unknown-weights"
        return FeatureProtocol(
            network=network,
            distance="fid" if self.verified else "frechet_inception_unknown",
            weights_sha256=self.sha256,
            preprocessing=PREPROCESSING[self.preprocessing],
        )

    def outputs(self, images: jax.Array | np.ndarray) -> Outputs:
        """uint8 [B,H,W,3] of any size -> features and logits. The network is compiled for each B."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"Inception takes uint8 images [B,H,W,3], got {images.dtype} {images.shape}")
        return _outputs(self.weights, resized(jnp.asarray(images), preprocessing=self.preprocessing))

    def features(self, images: jax.Array | np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,3] -> pool3, float32 [B,2048]."""
        return np.asarray(self.outputs(images).pool3)


def load_inception(path: Path, *, preprocessing: Preprocessing = "tf1") -> Inception:
    """The network with the weights in a .pth or .safetensors file, whose code is not run.

    Args:
        preprocessing: 'tf1' as in the original FID code and torch-fidelity, or 'pytorch_fid' as in pytorch-fid. The
            resulting values differ slightly, so the protocol records it.

    Raises:
        UserError: the file cannot be read or contains another network.
    """
    if preprocessing not in PREPROCESSING:
        raise UserError(f"preprocessing {preprocessing!r} is unknown: use one of {', '.join(PREPROCESSING)}")
    content, sha256 = read_file(path)
    weights = folded(read_arrays(content, str(path)), str(path))
    return Inception(weights=weights, sha256=sha256, preprocessing=preprocessing)


def folded(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, dict[str, jax.Array]]:
    """PyTorch arrays -> kernel [h,w,in,out] and bias [out] of each convolution and of 'fc', float32."""
    weights = {}
    for layer, (height, width, into, out) in kernel_shapes().items():
        kernel = _array(arrays, f"{layer}.conv.weight", (out, into, height, width), name)
        gain, offset, mean, variance = (
            _array(arrays, f"{layer}.bn.{part}", (out,), name).astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = gain / np.sqrt(variance + EPSILON)
        kernel = kernel * gain.astype(np.float32).reshape(-1, 1, 1, 1)
        weights[layer] = {
            "kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0), jnp.float32),
            "bias": jnp.asarray(offset - mean * gain, jnp.float32),
        }
    head = _array(arrays, "fc.weight", (CLASSES, WIDTH), name)
    bias = _array(arrays, "fc.bias", (CLASSES,), name)
    weights["fc"] = {"kernel": jnp.asarray(head.T, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    return weights


def _array(arrays: Mapping[str, np.ndarray], key: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    if key not in arrays or arrays[key].shape != shape:
        got = arrays[key].shape if key in arrays else "none"
        raise UserError(
            f"{name} is not the Inception network of FID: {key} must have the shape {shape}, got {got}; use "
            "pt_inception-2015-12-05-6726825d.pth"
        )
    return arrays[key]


def network(weights: Weights, x: jax.Array) -> dict[str, jax.Array]:
    """[B,299,299,3] in [-1,1] -> the outputs of all blocks by name, 'pool3' [B,2048] and 'logits' [B,1008]."""

    def convolution(
        x: jax.Array, layer: str, out: int, size: tuple[int, int], stride: int, padding: str
    ) -> jax.Array:
        bias = weights[layer]["bias"].reshape(1, 1, 1, -1)
        return jax.nn.relu(convolve(x, weights[layer]["kernel"], stride, padding) + bias)

    found = layers(x, convolution)
    product = jnp.matmul(found["pool3"], weights["fc"]["kernel"], precision=jax.lax.Precision.HIGHEST)
    return found | {"logits": product + weights["fc"]["bias"].reshape(1, -1)}


@jax.jit
def _outputs(weights: Weights, x: jax.Array) -> Outputs:
    found = network(weights, x)
    return Outputs(pool3=found["pool3"], logits=found["logits"] - weights["fc"]["bias"].reshape(1, -1))


@functools.partial(jax.jit, static_argnames="preprocessing")
def resized(images: jax.Array, *, preprocessing: Preprocessing) -> jax.Array:
    """uint8 [B,H,W,3] -> float32 [B,299,299,3] in [-1,1], as described in PREPROCESSING."""
    half_pixel = preprocessing == "pytorch_fid"
    rows, columns = (_bilinear(side, half_pixel) for side in images.shape[1:3])
    x = jnp.einsum(
        "ih,bhwc,jw->bijc", rows, images.astype(jnp.float32), columns, precision=jax.lax.Precision.HIGHEST
    )
    return x / 127.5 - 1.0 if half_pixel else (x - 128.0) / 128.0


def _bilinear(side: int, half_pixel: bool) -> np.ndarray:
    """The resampling matrix [299,side]: each row has the weights of one output pixel."""
    step = np.float32(side) / np.float32(SIDE)  # positions in float32, as in both libraries
    at = np.arange(SIDE, dtype=np.float32)
    at = np.maximum((at + np.float32(0.5)) * step - np.float32(0.5), 0) if half_pixel else at * step
    low = np.minimum(np.floor(at).astype(int), side - 1)
    share = at - low
    matrix = np.zeros((SIDE, side), np.float32)
    matrix[np.arange(SIDE), low] += 1.0 - share
    matrix[np.arange(SIDE), np.minimum(low + 1, side - 1)] += share
    return matrix
