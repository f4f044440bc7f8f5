"""Guidance without a classifier (Ho and Salimans 2021): push a sample towards its label."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sr3_jax.types import Conditioning, Denoiser, Image, NoiseLevel


def guided(denoiser: Denoiser, *, guidance: float | jax.Array, no_label: int) -> Denoiser:
    """The denoiser whose prediction is `without + guidance * (with - without)` the label.

    One call of twice the batch. At guidance 1 it is the denoiser itself and costs nothing; 0 ignores the label.
    Predictions of eps, v and y0 are affine in one another at a given y_t, so all three are guided alike.

    Args:
        denoiser: trained with label dropout, else what it says of `no_label` means nothing.
        guidance: 0 or more; as an array it may change without a new compilation, and always costs twice.
        no_label: the label that means none.
    """
    if isinstance(guidance, int | float) and guidance == 1:
        return denoiser

    def call(y_t: Image, gamma: NoiseLevel, cond: Conditioning) -> jax.Array:
        twice = {name: jnp.concatenate([value, value]) for name, value in cond.items()}
        twice["label"] = jnp.concatenate([cond["label"], jnp.full_like(cond["label"], no_label)])
        both = denoiser(jnp.concatenate([y_t, y_t]), jnp.concatenate([gamma, gamma]), twice)
        labelled, unlabelled = jnp.split(both, 2)
        return unlabelled + guidance * (labelled - unlabelled)

    return call
