"""SR3 in JAX: image super-resolution via iterative refinement (Saharia et al. 2021).

    import sr3_jax
    model = sr3_jax.load("photo_4x")      # a shipped model's name, a workdir or a .safetensors file
    large = model.upscale(image, seed=0)  # a PIL image, a path, or uint8 [h,w,3] or [B,h,w,3]

Public names:

- `load`, `Model`, `Sampling`: trained models and how they are sampled
- `sr3_jax.diffusion`: the diffusion core: schedules, loss, solvers, sampler
- `sr3_jax.image_ops`: conversions, the bicubic resize
- `sr3_jax.metrics`: PSNR, SSIM, consistency
- `sr3_jax.config`: presets and config files
- `sr3_jax.evaluation`: metrics of models on held-out images

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sr3_jax.inference.loading import load
    from sr3_jax.inference.model import Model
    from sr3_jax.sampling import Sampling

__version__ = "0.1.0"
__all__ = ["Model", "Sampling", "__version__", "load"]

_LAZY = {
    "load": "sr3_jax.inference.loading",
    "Model": "sr3_jax.inference.model",
    "Sampling": "sr3_jax.sampling",
}
_SUBPACKAGES = ("config", "diffusion", "evaluation", "image_ops", "metrics")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_SUBPACKAGES])
