"""Presets, each a module with `get_config()`: `sr3 train --config=NAME`, or a basis for your own config.

    # my_config.py, anywhere: sr3 train --config=my_config.py --workdir=out/mine
    from sr3_jax.configs import photos_4x

    def get_config():
        config = photos_4x.get_config()
        config.data.source = "folder:my_photos"
        config.optim.learning_rate = 2e-4
        return config

A preset gives only the fields that differ from the defaults; `sr3 configs NAME` prints all of them. Its docstring is
the task and the command, and PARAMETERS the size of its network, both of which `sr3 configs` lists.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from sr3_jax.config.fields import SECTIONS


def make_config(**sections: dict[str, Any]) -> ConfigDict:
    """A config with the given fields, and with every section, so that any field can be assigned later.

    Types are checked when the config is loaded, not here: `config.train.num_steps = 1e5` works.
    """
    return ConfigDict({**{name: {} for name in SECTIONS}, **sections}, type_safe=False)
