"""SR3 in JAX: image super-resolution via iterative refinement (Saharia et al. 2021)."""

__version__ = "0.1.0"
