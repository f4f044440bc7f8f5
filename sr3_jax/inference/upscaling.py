"""How a `Model` upscales arrays of any size: passes of the network, tiles, and a Lanczos filter for other factors.

Shape legend: B batch, h x w the low-res image, s the model's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.image_io.bands import resize_bands
from sr3_jax.image_ops import count_passes, pad_image, resize_lanczos, scaled_size
from sr3_jax.inference.program import run_program
from sr3_jax.inference.tiling import Tiling
from sr3_jax.numerics import fixed_numerics
from sr3_jax.sampling import Sampling
from sr3_jax.types import Key

if TYPE_CHECKING:
    from sr3_jax.inference.model import Model

_MAX_OUTSCALE = 64


@fixed_numerics()
def seed_keys(seed: int | Key, count: int) -> Key:
    """[count] equal keys from an int, so that an image's output does not depend on its batch; a key as it is."""
    if not isinstance(seed, int | np.integer):
        return seed
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be from 0 to {2**32 - 1}, got {seed}")
    return jax.vmap(jax.random.key)(jnp.full([count], int(seed), jnp.uint32))


def pass_seed(seed: int | Key, index: int) -> int | Key:
    """The seed or key of a later pass of the model over its own output, which needs noise of its own."""
    if index == 0:
        return seed
    if isinstance(seed, int | np.integer):
        return (int(seed) + index) % 2**32
    return (
        jax.random.fold_in(seed, index)
        if seed.ndim == 0
        else jax.vmap(jax.random.fold_in, (0, None))(seed, index)
    )


def passes_for(outscale: float | None, scale: int) -> int:
    """How many times a model of this scale is applied; None for its own scale.

    Raises:
        UserError: `outscale` is not from 1 to 64.
    """
    if outscale is None:
        return 1
    if not 1 <= outscale <= _MAX_OUTSCALE:
        raise UserError(f"outscale must be from 1 to {_MAX_OUTSCALE}, got {outscale:g}")
    return count_passes(outscale, scale)


def collect_bands(bands: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """uint8 [height,width,3] from its rows in order, of which one band at a time is held next to it."""
    whole, top = np.empty((*size, 3), np.uint8), 0
    for band in bands:
        whole[top : top + len(band)] = band
        top += len(band)
    return whole


def upscale_batch(
    model: Model,
    images: np.ndarray,
    seed: int | Key,
    *,
    sampling: Sampling,
    labels: np.ndarray | None,
    tile: int | None,
    outscale: float | None,
) -> np.ndarray:
    """The output of `Model.upscale` for uint8 [B,h,w,3]."""
    passes = passes_for(outscale, model.scale)
    size = None if outscale is None else scaled_size(images.shape[1:3], outscale)
    for index in range(passes):
        keys = seed_keys(pass_seed(seed, index), len(images))
        keys = keys if keys.ndim else jax.random.split(keys, len(images))
        wanted = size if index == passes - 1 else None
        images = _one_pass(model, images, keys, sampling=sampling, labels=labels, tile=tile, size=wanted)
    return images


def _one_pass(
    model: Model,
    images: np.ndarray,
    keys: Key,
    *,
    sampling: Sampling,
    labels: np.ndarray | None,
    tile: int | None,
    size: tuple[int, int] | None,
) -> np.ndarray:
    """[B,h,w,3] enlarged by s, then resized to `size` if given."""
    plan = model.tiling(*images.shape[1:3], tile=tile)
    if plan.count == 1:
        output = _upscale_tiles(model, plan, images, keys, labels=labels, sampling=sampling)
        return output if size is None else np.stack([resize_lanczos(one, size) for one in output])
    full = (model.scale * images.shape[1], model.scale * images.shape[2])
    wanted = full if size is None else size
    output = np.empty((len(images), *wanted, 3), np.uint8)
    for index, image in enumerate(images):
        label = None if labels is None else labels[index]
        bands = upscale_bands(model, image, keys[index], sampling=sampling, label=label, tile=tile)
        output[index] = collect_bands(resize_bands(bands, full, wanted), wanted)
    return output


def upscale_bands(
    model: Model,
    image: np.ndarray,
    key: Key,
    *,
    sampling: Sampling,
    label: int | np.ndarray | None,
    tile: int | None,
    batch_size: int | None = None,
    on_tiles: Callable[[int], object] = lambda count: None,
) -> Iterator[np.ndarray]:
    """The output of `Model.upscale_bands` for uint8 [h,w,3] and one key."""
    plan = model.tiling(*image.shape[:2], tile=tile)
    size = (batch_size or jax.local_device_count()) if plan.count > 1 else 1
    tiles = [one for band in plan.bands() for one in band]
    columns, parts = len(plan.columns.starts), []
    for first in range(0, len(tiles), size):
        some = tiles[first : first + size]
        filled = some + some[-1:] * (size - len(some))  # one batch shape, one program
        output = _upscale_tiles(
            model,
            plan,
            np.stack([plan.crop(image, one) for one in filled]),
            jax.random.clone(jnp.broadcast_to(key, (size,))),
            labels=None if label is None else np.full(size, label),
            sampling=sampling,
            origins=np.array([one.origin for one in filled], np.int32),
        )
        parts += [plan.inner(pixels, one, model.scale) for pixels, one in zip(output, some, strict=False)]
        on_tiles(len(some))
        while len(parts) >= columns:  # a batch may end in the middle of a band
            band = np.concatenate(parts[:columns], axis=1)
            del parts[:columns]
            yield band


def output_shape(model: Model, plan: Tiling, count: int) -> tuple[int, int, int, int]:
    """[B,H,W,C] of the outputs of `count` tiles."""
    return count, plan.rows.size * model.scale, plan.columns.size * model.scale, model.network.out_channels


def _upscale_tiles(
    model: Model,
    plan: Tiling,
    images: np.ndarray,
    keys: Key,
    *,
    labels: np.ndarray | None,
    sampling: Sampling,
    origins: np.ndarray | None = None,
) -> np.ndarray:
    """uint8 [B,s*h,s*w,3] of tiles, or of images of one tile, [B,h,w,3]."""
    count, height, width, _ = images.shape
    model.check(sampling, labels=labels, count=count)
    output = run_program(
        model,
        output_shape(model, plan, count),
        images=pad_image(images, plan.rows.size, plan.columns.size),
        labels=model.label_array(labels, count),
        key=keys,
        sampling=sampling,
        origins=np.zeros((count, 2), np.int32) if origins is None else origins,
    )
    return output[:, : height * model.scale, : width * model.scale]
