"""Strict JAX checks, 8 simulated CPU devices and one compilation cache for all tests."""

import os
import tempfile

# Set before jax is imported: the device count is read once.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")
jax.config.update("jax_debug_key_reuse", True)
_cache = os.environ.get("SR3_TEST_CACHE", os.path.join(tempfile.gettempdir(), "sr3_jax_test_cache"))
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
