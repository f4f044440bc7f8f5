"""JAX's global numeric settings, fixed where results must be the same bytes everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def fixed_numerics() -> Iterator[None]:
    """float32 as the default type, and the default random bits, whatever JAX_ENABLE_X64, JAX_DEFAULT_PRNG_IMPL and
    JAX_THREEFRY_PARTITIONABLE say.

    Also a decorator of functions; not for generators, which would leave the settings changed between their values.
    """
    with jax.enable_x64(False), jax.default_prng_impl("threefry2x32"), jax.threefry_partitionable(True):
        yield
