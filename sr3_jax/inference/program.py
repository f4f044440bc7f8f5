"""The one compiled program that draws images: condition, guidance, tiles and the reverse loop, over a mesh.

Shape legend: B batch, H x W the images, h x w their low-res images, C channels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sr3_jax.degradations import ConditioningAugmentation
from sr3_jax.diffusion.guidance import guided
from sr3_jax.diffusion.process import Prediction
from sr3_jax.diffusion.sampler import sample_with_coefficients, split
from sr3_jax.diffusion.solvers import SolverStep
from sr3_jax.diffusion.space import Space
from sr3_jax.distributed import sharding
from sr3_jax.image_ops import to_uint8, to_unit
from sr3_jax.inference.tiling import tiled
from sr3_jax.nn.unet import UNet
from sr3_jax.train.examples import Batch, condition
from sr3_jax.types import Conditioning, Denoiser, Key, Params

TILE, OVERLAP = 1024, 64  # high-res pixels; about 1 GB of activations at the shipped model's width


def apply(network: UNet, params: Params, y_t: jax.Array, gamma: jax.Array, cond: Conditioning) -> jax.Array:
    """The network with weights, as a denoiser once these two are bound."""
    return network.apply({"params": params}, y_t, gamma, cond)


_STATIC = ("shape", "mesh", "network", "step", "prediction", "space", "scale", "augmentation")


@functools.partial(jax.jit, static_argnames=_STATIC)
def generate_jit(
    params: Params,
    batch: Batch,
    key: Key,
    coefficients: Any,
    guidance: jax.Array | None,
    strength: jax.Array | None,
    *,
    shape: tuple[int, int, int, int],
    mesh: Mesh,
    network: UNet,
    step: SolverStep,
    prediction: Prediction,
    space: Space,
    scale: int,
    augmentation: ConditioningAugmentation | None,
) -> tuple[jax.Array, jax.Array]:
    """Images uint8 of `shape` [B,H,W,C], and whether all values before rounding were finite.

    Args:
        batch: 'image', the low-res images uint8 [B,h,w,C], unless it is a base stage; 'label' [B] if it has labels.
        key: one key, or [B].
        coefficients: the table of `Sampling.coefficients`.
        guidance: None for none.
        strength: of the condition's augmentation; None for none.
        mesh: the rows of the batch lie over all of it.
        step: the compiled part of the solver, `Solver.compiled`.
    """
    low_res = to_unit(batch["image"]) if "image" in batch else None
    levels = None
    if low_res is not None and augmentation is not None and strength is not None:
        levels = jnp.full(shape[:1], strength)
        key, augment_key = split(key)
        low_res = augmentation.apply(augment_key, low_res, levels)
    cond = condition(low_res, scale, batch.get("label"), levels)
    denoiser: Denoiser = functools.partial(apply, network, params)
    if guidance is not None:
        denoiser = guided(denoiser, guidance=guidance, no_label=network.num_classes)
    denoiser = tiled(denoiser, tile=TILE, overlap=OVERLAP, stride=network.stride)
    samples = sample_with_coefficients(
        denoiser,
        key,
        cond,
        shape=shape,
        coefficients=coefficients,
        step=step,
        prediction=prediction,
        space=space,
    )
    # Each device works on its own rows: said of what comes out too, so that XLA cannot choose otherwise.
    output = jax.lax.with_sharding_constraint(to_uint8(samples.image), sharding.batch_sharding(mesh))
    return output, jnp.all(jnp.isfinite(samples.image))


def bucket(side: int, unit: int, *, exact: int = 0) -> int:
    """The low-res side to pad to: a multiple of `unit`; above `exact` in steps of 8 or of an eighth of the side."""
    # A network of whole small images knows where they end: padded, those of Fashion-MNIST lose 3 dB.
    step = 1 if side <= exact else max(8, 1 << max(0, side.bit_length() - 4))
    step = -(-step // unit) * unit
    return -(-side // step) * step
