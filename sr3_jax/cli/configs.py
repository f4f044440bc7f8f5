"""List the presets, or print all fields of one config: sr3 configs [NAME_OR_FILE].

With a name, `--config.SECTION.FIELD=VALUE` overrides fields as in `sr3 train`, and * marks values that differ from
the defaults.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping
from typing import Any

PASS_UNKNOWN = True  # --config.SECTION.FIELD=VALUE goes to load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config to print."""
    parser.add_argument("config", nargs="?", metavar="NAME_OR_FILE", help="print all fields of this config")
    parser.add_argument(
        "--json", action="store_true", help="print the config as JSON, as a workdir stores it"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0."""
    from sr3_jax.errors import UserError

    if args.config is None:
        if args.rest or args.json:
            raise UserError(f"{[*args.rest, '--json'][0]} needs a config: write sr3 configs NAME_OR_FILE")
        print(_listing())
        return 0
    from sr3_jax.config.build import check_config
    from sr3_jax.config.load import load_cascade, load_config

    cascade = load_cascade(args.config, args.rest)
    configs = cascade or [load_config(args.config, args.rest)]
    for config in configs:
        check_config(config)
    if args.json:
        print(json.dumps(cascade or configs[0], indent=2))
    else:
        print("\n\n".join(map(_fields, configs)))
    return 0


def _listing() -> str:
    """Name, size and task of each preset, with its command."""
    from sr3_jax.config.load import PRESETS, preset_names

    blocks = []
    for name in preset_names():
        preset = importlib.import_module(f"{PRESETS}.{name}")
        task, _, rest = (preset.__doc__ or "").partition("\n")
        size = f"{preset.PARAMETERS / 1e6:.1f} M parameters" if hasattr(preset, "PARAMETERS") else "cascade"
        command = rest.strip().split("\n\n")[0].splitlines()
        blocks.append("\n".join([f"{name} ({size})", f"  {task}", *(f"    {line}" for line in command)]))
    notes = (
        "`sr3 configs NAME` prints all fields of a preset, and `sr3 train --help` describes them.\n"
        "Add --config.model.regression to a command for the paper's regression baseline."
    )
    return "\n\n".join([*blocks, notes])


def _fields(config: Mapping[str, Mapping[str, Any]]) -> str:
    """A config by sections, one field per line."""
    from sr3_jax.config.fields import SECTIONS

    lines = []
    for section, values in config.items():
        lines.append(f"{section}:")
        for name, value in values.items():
            mark = " " if value == SECTIONS[section].fields[name].default else "*"
            lines.append(f"{mark} {name:<18}{value!r}")
    return "\n".join(lines)
