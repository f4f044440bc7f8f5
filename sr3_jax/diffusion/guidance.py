"""Classifier-free guidance (Ho and Salimans 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sr3_jax.types import Conditioning, Denoiser, Image, NoiseLevel


def guided(denoiser: Denoiser, *, guidance: float | jax.Array, no_label: int) -> Denoiser:
    """A denoiser that predicts f(no_label) + guidance * (f(label) - f(no_label)).

    Each call evaluates `denoiser` once on a batch of twice the size. At a given y_t, the predictions eps, v and y0 are
    affine functions of each other, so guidance has the same effect on all three.

    Args:
        denoiser: trained with label dropout; otherwise its prediction for `no_label` is meaningless.
        guidance: at least 0; 0 ignores the label, and for the number 1 `denoiser` itself is returned. An array may
            change without recompilation, but always doubles the batch.
        no_label: the label that means "no label".
    """
    if isinstance(guidance, int | float) and guidance == 1:
        return denoiser

    def call(y_t: Image, gamma: NoiseLevel, cond: Conditioning) -> jax.Array:
        twice = {name: jnp.concatenate([value, value]) for name, value in cond.items()}
        twice["label"] = jnp.concatenate([cond["label"], jnp.full_like(cond["label"], no_label)])
        both = denoiser(jnp.concatenate([y_t, y_t]), jnp.concatenate([gamma, gamma]), twice)
        with_label, without_label = jnp.split(both, 2)
        return without_label + guidance * (with_label - without_label)

    return call
