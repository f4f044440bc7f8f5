"""Guidance: its formula, and its cost by counting calls."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.diffusion.guidance import guided

NONE = 4


def setup() -> tuple:
    calls = []

    def denoiser(y_t, gamma, cond):
        calls.append(y_t.shape[0])
        shift = (cond["label"] + 1.0)[:, None, None, None] * cond["upsampled"]
        return y_t * gamma[:, None, None, None] + shift

    rng = np.random.default_rng(0)
    y_t, up = (jnp.asarray(rng.standard_normal((3, 2, 2, 1)), jnp.float32) for _ in range(2))
    cond = {"label": jnp.array([0, 1, 3]), "upsampled": up}
    return denoiser, calls, y_t, jnp.array([0.2, 0.5, 0.9]), cond


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guidance_extrapolates_from_no_label_in_one_call(guidance):
    denoiser, calls, y_t, gamma, cond = setup()
    found = guided(denoiser, guidance=guidance, no_label=NONE)(y_t, gamma, cond)
    assert calls == [6]
    with_label = denoiser(y_t, gamma, cond)
    without_label = denoiser(y_t, gamma, cond | {"label": jnp.full(3, NONE)})
    np.testing.assert_allclose(found, without_label + guidance * (with_label - without_label), rtol=1e-5)


def test_guidance_of_1_is_the_denoiser_itself():
    denoiser, *_ = setup()
    assert guided(denoiser, guidance=1.0, no_label=NONE) is denoiser
