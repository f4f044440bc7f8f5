"""The diffusion core of SR3: pure functions on arrays, importing only jax and numpy.

Any callable `(y_t, gamma, cond) -> prediction` can be trained with `denoising_loss` and sampled with `sample`:

    schedule = linear(2000)                                                   # or quadratic, cosine
    loss = denoising_loss(denoiser, key, y0, cond, schedule=schedule)         # [B], paper Eq. 6
    samples = sample(denoiser, key, cond, shape=y0.shape, schedule=respace(schedule, 25), solver=dpmpp_2m())

Modules: `schedule` (noise levels gamma), `process` (forward process and posterior), `space` (the diffused variable),
`loss`, `solvers`, `sampler`, `guidance`.
"""

from sr3_jax.diffusion.guidance import guided
from sr3_jax.diffusion.loss import denoising_loss, min_snr
from sr3_jax.diffusion.process import PREDICTIONS, Prediction, diffuse, posterior, target, to_eps, to_y0
from sr3_jax.diffusion.sampler import Samples, sample, sample_with_coefficients
from sr3_jax.diffusion.schedule import (
    NoiseSchedule,
    cosine,
    from_beta,
    from_gamma,
    linear,
    quadratic,
    respace,
    sample_gamma,
)
from sr3_jax.diffusion.solvers import (
    SOLVERS,
    Solver,
    SolverStep,
    ancestral,
    ancestral_learned,
    ddim,
    ddpm,
    dpmpp_2m,
    heun,
    make_solver,
)
from sr3_jax.diffusion.space import Space, image, residual

__all__ = [
    "PREDICTIONS",
    "SOLVERS",
    "NoiseSchedule",
    "Prediction",
    "Samples",
    "Solver",
    "SolverStep",
    "Space",
    "ancestral",
    "ancestral_learned",
    "cosine",
    "ddim",
    "ddpm",
    "denoising_loss",
    "diffuse",
    "dpmpp_2m",
    "from_beta",
    "from_gamma",
    "guided",
    "heun",
    "image",
    "linear",
    "make_solver",
    "min_snr",
    "posterior",
    "quadratic",
    "residual",
    "respace",
    "sample",
    "sample_gamma",
    "sample_with_coefficients",
    "target",
    "to_eps",
    "to_y0",
]
