"""The architecture of FID's Inception network, independent of its weights.

Shape legend: B batch, H height, W width, C channels. Blocks and convolutions have their names in PyTorch's files. The
convolution is an argument, so that the same function computes the network and lists the shapes of its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

SIDE = 299  # pixels of the input; the minimum for a non-empty output is 75
CLASSES = 1008  # ImageNet's 1000 and 8 unused ones
WIDTH = 2048


class Convolution(Protocol):
    """A convolution with batch norm and ReLU, by name."""

    def __call__(
        self, x: jax.Array, layer: str, out: int, size: tuple[int, int], stride: int, padding: str
    ) -> jax.Array:
        """[B,H,W,C] -> [B,h,w,out]. padding: 'SAME' or 'VALID'."""
        ...


def layers(image: jax.Array, convolution: Convolution) -> dict[str, jax.Array]:
    """[B,299,299,3] in [-1,1] -> the outputs of all blocks by name, in order; 'pool3' [B,2048] is the last."""

    def tower(x: jax.Array, prefix: str, *steps: Sequence) -> jax.Array:
        """A sequence of convolutions, each (name after the prefix, channels, (height, width), stride)."""
        for name, out, size, *rest in steps:
            stride = rest[0] if rest else 1
            x = convolution(x, prefix + name, out, size, stride, "SAME" if stride == 1 else "VALID")
        return x

    one, three, five = (1, 1), (3, 3), (5, 5)
    wide, high = (1, 7), (7, 1)
    found: dict[str, jax.Array] = {}

    x = convolution(image, "Conv2d_1a_3x3", 32, three, 2, "VALID")
    found["Conv2d_1a_3x3"] = x
    x = found["Conv2d_2a_3x3"] = convolution(x, "Conv2d_2a_3x3", 32, three, 1, "VALID")
    x = found["Conv2d_2b_3x3"] = convolution(x, "Conv2d_2b_3x3", 64, three, 1, "SAME")
    x = found["pool1"] = _max_pool(x, stride=2)
    x = found["Conv2d_3b_1x1"] = convolution(x, "Conv2d_3b_1x1", 80, one, 1, "VALID")
    x = found["Conv2d_4a_3x3"] = convolution(x, "Conv2d_4a_3x3", 192, three, 1, "VALID")
    x = found["pool2"] = _max_pool(x, stride=2)

    for block, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):  # 35x35
        branches = [
            tower(x, f"{block}.branch1x1", ("", 64, one)),
            tower(x, f"{block}.branch5x5", ("_1", 48, one), ("_2", 64, five)),
            tower(x, f"{block}.branch3x3dbl", ("_1", 64, one), ("_2", 96, three), ("_3", 96, three)),
            tower(_mean_pool(x), f"{block}.branch_pool", ("", pooled, one)),
        ]
        x = found[block] = jnp.concatenate(branches, axis=-1)

    branches = [
        tower(x, "Mixed_6a.branch3x3", ("", 384, three, 2)),
        tower(x, "Mixed_6a.branch3x3dbl", ("_1", 64, one), ("_2", 96, three), ("_3", 96, three, 2)),
        _max_pool(x, stride=2),
    ]
    x = found["Mixed_6a"] = jnp.concatenate(branches, axis=-1)  # [B,17,17,768]

    for block, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        crossed = (("_1", c, one), ("_2", c, high), ("_3", c, wide), ("_4", c, high), ("_5", 192, wide))
        branches = [
            tower(x, f"{block}.branch1x1", ("", 192, one)),
            tower(x, f"{block}.branch7x7", ("_1", c, one), ("_2", c, wide), ("_3", 192, high)),
            tower(x, f"{block}.branch7x7dbl", *crossed),
            tower(_mean_pool(x), f"{block}.branch_pool", ("", 192, one)),
        ]
        x = found[block] = jnp.concatenate(branches, axis=-1)

    reducing = (("_1", 192, one), ("_2", 192, wide), ("_3", 192, high), ("_4", 192, three, 2))
    branches = [
        tower(x, "Mixed_7a.branch3x3", ("_1", 192, one), ("_2", 320, three, 2)),
        tower(x, "Mixed_7a.branch7x7x3", *reducing),
        _max_pool(x, stride=2),
    ]
    x = found["Mixed_7a"] = jnp.concatenate(branches, axis=-1)  # [B,8,8,1280]

    # The last block uses a max pool where all others use an average pool: a quirk of 2015 that is part of FID.
    for block, pool in (("Mixed_7b", _mean_pool), ("Mixed_7c", functools.partial(_max_pool, stride=1))):
        single = tower(x, f"{block}.branch3x3", ("_1", 384, one))
        double = tower(x, f"{block}.branch3x3dbl", ("_1", 448, one), ("_2", 384, three))
        branches = [
            tower(x, f"{block}.branch1x1", ("", 320, one)),
            tower(single, f"{block}.branch3x3", ("_2a", 384, (1, 3))),
            tower(single, f"{block}.branch3x3", ("_2b", 384, (3, 1))),
            tower(double, f"{block}.branch3x3dbl", ("_3a", 384, (1, 3))),
            tower(double, f"{block}.branch3x3dbl", ("_3b", 384, (3, 1))),
            tower(pool(x), f"{block}.branch_pool", ("", 192, one)),
        ]
        x = found[block] = jnp.concatenate(branches, axis=-1)

    found["pool3"] = jnp.mean(x, axis=(1, 2))
    return found


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """Convolve [B,H,W,C] with a kernel [h,w,C,D], in full float32 on every device (FID is sensitive to TF32)."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


def kernel_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Shapes [height, width, in, out] of the kernels of the 94 convolutions, by name."""
    shapes: dict[str, tuple[int, int, int, int]] = {}

    def note(
        x: jax.Array, layer: str, out: int, size: tuple[int, int], stride: int, padding: str
    ) -> jax.Array:
        shapes[layer] = (*size, x.shape[-1], out)
        return convolve(x, jnp.zeros(shapes[layer]), stride, padding)

    jax.eval_shape(lambda x: layers(x, note), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))
    return shapes


def _max_pool(x: jax.Array, *, stride: int) -> jax.Array:
    """3x3 max pool; with stride 1 the output has the size of the input."""
    padding = "SAME" if stride == 1 else "VALID"
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _mean_pool(x: jax.Array) -> jax.Array:
    """3x3 average pool that excludes the padding, as in TensorFlow; the output has the size of the input."""
    sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    inside = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    counts = jax.lax.reduce_window(inside, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return sums / counts
