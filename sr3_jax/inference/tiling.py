"""Divide large images into overlapping tiles that are sampled one by one.

Every pixel gets the noise of its position in the image (`position_noise`), whatever tile it is in. Neighboring tiles
therefore agree wherever the network sees the same pixels, that is, away from their borders; a tile contributes only
pixels that are at least a halo away from them. So no seams form, and memory depends on the tile, not on the image.

Lengths are in low-res pixels, unless a docstring says otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.types import Key

DEFAULT_TILE = 1024  # high-res pixels; about 1 GB of activations for the shipped model
HALO = 16  # on each side; the few steps that matter at low noise see less of an image than the network could
_LEAST_CELL = 16


@dataclass(frozen=True)
class Axis:
    """The tiles along one side of an image.

    Attributes:
        size: length of every tile; a single tile may be longer than the image.
        starts: first pixel of each tile; the last tile may end behind the image.
        edges: tile i contributes the pixels from edges[i] to edges[i+1].
    """

    size: int
    starts: tuple[int, ...]
    edges: tuple[int, ...]


def cell_size(*, stride: int, scale: int) -> int:
    """Tiles start at multiples of this many low-res pixels, where the network's downsampling groups the same pixels."""
    unit = stride // math.gcd(stride, scale)
    return math.ceil(_LEAST_CELL / unit) * unit


@dataclass(frozen=True)
class Tile:
    """A tile by its place in a `Tiling`.

    Attributes:
        row, column: index in the rows and columns of tiles.
        origin: of its first pixel, in cells.
    """

    row: int
    column: int
    origin: tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """An image divided into equal tiles.

    Attributes:
        rows, columns: the tiles along the height and along the width.
        cell: side of a cell.
    """

    rows: Axis
    columns: Axis
    cell: int

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.rows.starts) * len(self.columns.starts)

    def bands(self) -> Iterator[list[Tile]]:
        """The tiles of each row, from top to bottom."""
        for row, top in enumerate(self.rows.starts):
            yield [
                Tile(row, column, (top // self.cell, left // self.cell))
                for column, left in enumerate(self.columns.starts)
            ]

    def crop(self, image: np.ndarray, tile: Tile) -> np.ndarray:
        """The pixels [size,size,C] of a tile; behind the image its last row and column are repeated."""
        sides = ((self.rows, tile.row, image.shape[0]), (self.columns, tile.column, image.shape[1]))
        rows, columns = (
            np.minimum(np.arange(axis.starts[index], axis.starts[index] + axis.size), length - 1)
            for axis, index, length in sides
        )
        return image[rows[:, None], columns[None, :]]

    def inner(self, output: np.ndarray, tile: Tile, scale: int) -> np.ndarray:
        """The pixels that a tile contributes, from its output [scale*size,scale*size,C]."""
        rows, columns = (
            slice(
                scale * (axis.edges[index] - axis.starts[index]),
                scale * (axis.edges[index + 1] - axis.starts[index]),
            )
            for axis, index in ((self.rows, tile.row), (self.columns, tile.column))
        )
        return output[rows, columns]


def tile_image(height: int, width: int, *, most: int, stride: int, scale: int, exact: int) -> Tiling:
    """Divide an image of this size.

    Args:
        most: maximum side of a tile; an image up to an eighth larger is one tile.
        stride: of the network, in high-res pixels.
        scale: the super-resolution factor.
        exact: as for `bucket`.

    Raises:
        UserError: the tiles have no room for their halos.
    """
    unit, cell = stride // math.gcd(stride, scale), cell_size(stride=stride, scale=scale)
    least = 2 * HALO + 2 * cell
    if most < least:
        raise UserError(f"tile must be at least {least} pixels for this model, got {most}")

    def axis(length: int) -> Axis:
        size = bucket(length, unit, exact=exact)
        if size <= most + most // 8:
            return Axis(size, (0,), (0, length))
        return divide(length, padded=size, most=most + most // 8, align=cell)

    return Tiling(axis(height), axis(width), cell)


def bucket(side: int, unit: int, *, exact: int = 0) -> int:
    """The low-res side to pad to, a multiple of `unit`, so that images of many sizes need few compilations.

    Args:
        exact: up to this side, pad to a multiple of `unit` only; above it also to one of 8 or a sixteenth of the side.
    """
    # A network trained on whole small images depends on where they end: padding costs 3 dB on Fashion-MNIST.
    step = 1 if side <= exact else max(8, 1 << max(0, side.bit_length() - 5))
    step = -(-step // unit) * unit
    return -(-side // step) * step


def divide(length: int, *, padded: int, most: int, align: int, halo: int = HALO) -> Axis:
    """The smallest tiles of equal length that cover a side of an image, with as few of them as possible.

    The last tile ends where the padded image ends: what the network sees beyond the border of the image, and so the
    output there, must not depend on the tiles.

    Args:
        length: of the image.
        padded: of the image after padding.
        most: maximum length of a tile.
        align: tiles start at multiples of this.
        halo: tiles overlap by at least twice this.

    Raises:
        ValueError: a tile has no room for its halo.
    """
    if most < 2 * (halo + align):
        raise ValueError(f"tile must be at least {2 * (halo + align)}, got {most}")
    for count in itertools.count(2):
        least = max(2 * halo + 1, math.ceil((padded + 2 * halo * (count - 1)) / count))
        for size in range(least + (padded - least) % align, most + 1, align):
            last = (padded - size) // align
            starts = [round(index * last / (count - 1)) * align for index in range(count)]
            pairs = list(itertools.pairwise(starts))
            if all(second - first <= size - 2 * halo for first, second in pairs):
                inner = [min((first + size + second) // 2, length) for first, second in pairs]
                return Axis(size, tuple(starts), (0, *inner, length))
    raise AssertionError


def position_noise(key: Key, origin: jax.Array, *, shape: tuple[int, ...], cell: int) -> jax.Array:
    """Standard normal noise that depends on the key and the position of a pixel in the image only.

    Args:
        key: one key.
        origin: [2] row and column of the first pixel of the result, in cells.
        shape: (H,W,C) of the result.
        cell: side of a cell in pixels of the result.
    """
    height, width, channels = shape
    rows, columns = (jnp.arange(-(-side // cell)) for side in (height, width))

    def one(row: jax.Array, column: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, row), column)
        return jax.random.normal(own, (cell, cell, channels))

    cells = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(rows + origin[0], columns + origin[1])
    whole = cells.swapaxes(1, 2).reshape(rows.shape[0] * cell, columns.shape[0] * cell, channels)
    return whole[:height, :width]
