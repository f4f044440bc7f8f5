"""Configs: nested sections of fields, from a preset's name or a Python file.

`load_config(name_or_path, overrides)` gives a complete, checked config as a plain nested dict, and
`count_parameters(config)` the size of its network. The fields are listed in `sr3_jax.config.fields.SECTIONS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sr3_jax.config.build import count_parameters
    from sr3_jax.config.load import load_config

__all__ = ["count_parameters", "load_config"]


def __getattr__(name: str) -> Any:
    """Import on first use: `build` needs jax and the network, and `sr3 configs` does not."""
    if name == "load_config":
        from sr3_jax.config.load import load_config

        return load_config
    if name == "count_parameters":
        from sr3_jax.config.build import count_parameters

        return count_parameters
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
