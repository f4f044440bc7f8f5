"""Option values of the commands: numbers with ranges, comma-separated lists, one value per stage.

`count`, `class_label`, `seed`, `percent`, `positive`, `counts` and `names` are argparse types; the others raise
`UserError`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def add_config_argument(parser: argparse.ArgumentParser, *, help_of: str = "") -> None:
    """`--config`; the command also takes `--config.SECTION.FIELD=VALUE`, which argparse leaves in `args.rest`.

    Args:
        help_of: the command whose --help lists the fields; '' for this one.
    """
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME_OR_FILE",
        help="a preset (`sr3 configs` lists them), a Python file with get_config(), which may end in :ARGUMENT, or a "
        ".safetensors model",
    )
    if help_of:
        parser.epilog = f"Override fields with --config.SECTION.FIELD=VALUE; `{help_of} --help` lists them."
        return
    from sr3_jax.config import schema

    parser.epilog = (
        "Override any field of the config: --config.SECTION.FIELD=VALUE, or with a space instead of '=', or just\n"
        "--config.SECTION.FIELD for true. The values below are the defaults; `sr3 configs NAME` prints those of a\n"
        f"preset.\n\n{schema.render_text()}"
    )


def config_source(text: str) -> Any:
    """What `load_config` takes for a value of --config: the config that a .safetensors model stores, else the text."""
    from sr3_jax.train.weights import locate_model, read_export_config

    return read_export_config(locate_model(text)) if text.endswith(".safetensors") else text


def count(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least 1")
    return value


def seed(text: str) -> int:
    """An integer that `jax.random.key` accepts."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is out of range: a seed is from 0 to {2**32 - 1}")
    return value


def class_label(text: str) -> int:
    """An integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is too small: labels start at 0")
    return value


def any_path(text: str) -> Path:
    """A path on this machine, or a URL of a bucket."""
    from sr3_jax.errors import UserError
    from sr3_jax.storage import as_path

    try:
        return as_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_path(text: str) -> Path:
    """A path on this machine; URLs such as gs://BUCKET would become a folder called 'gs:'."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is a URL, which this command does not support here: mount the bucket and give the local path"
        )
    return Path(text)


def percent(text: str) -> int:
    """An integer from 1 to 100."""
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{value} is out of range: it must be from 1 to 100")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is out of range: it must be above 0")
    return value


def counts(text: str) -> list[int]:
    """Comma-separated integers of at least 1, without repetitions."""
    return list(dict.fromkeys(count(part) for part in text.split(",")))


def names(text: str) -> list[str]:
    """Comma-separated names, without repetitions."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


# The names in error messages.
count.__name__ = class_label.__name__ = seed.__name__ = percent.__name__ = "integer"
positive.__name__ = "number"
counts.__name__, names.__name__ = "list of integers", "list of names"


def listed(option: str, text: str | None) -> list[str]:
    """The parts of a comma-separated list; [] if the option was not given."""
    from sr3_jax.errors import UserError

    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"{option}={text!r} has an empty part: write it as A,B,C")
    return parts


def whole(option: str, text: str, *, least: int = 1, most: int = 10**9) -> int:
    """An integer in a range."""
    from sr3_jax.errors import UserError

    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        above = f"{least} or more" if most == 10**9 else f"{least} to {most}"
        raise UserError(f"{option} must be an integer, {above}, got {text!r}")
    return int(text)


def number(option: str, text: str) -> float:
    """A number."""
    from sr3_jax.errors import UserError

    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} must be a number, got {text!r}") from None


def by_stage(
    option: str, text: str | None, *, stages: int, read: Callable[[str, str], T], takes: Sequence[bool]
) -> list[T | None]:
    """One value per stage: A,B,C as given ('-' for the stage's own), or one value for all stages that take it."""
    from sr3_jax.errors import UserError

    parts = listed(option, text)
    if not parts:
        return [None] * stages
    if len(parts) == 1:
        value = read(option, parts[0])
        if not any(takes):
            raise UserError(f"{option}={text} applies to no stage: omit it")
        return [value if taken else None for taken in takes]
    if len(parts) != stages:
        raise UserError(
            f"{option}={text} has {len(parts)} values for {stages} stages: give one value, or one per stage"
        )
    return [None if part == "-" else read(option, part) for part in parts]
