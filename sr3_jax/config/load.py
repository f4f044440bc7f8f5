"""Loads a preset, a config file or a stored config as complete, checked, plain values.

A config is a nested dict, {section: {field: value}}, with every field of `fields.SECTIONS`, as in `config.json`. Checks
that need the network, or several fields at once, are in `build.check_config`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from sr3_jax.config.fields import REGRESSION, RENAMED
from sr3_jax.config.schema import (
    check_ranges,
    check_section,
    check_type,
    defaults,
    lookup,
    parse,
    quoted,
)
from sr3_jax.errors import UserError

_log = logging.getLogger("sr3_jax")
# Near pure noise, eps prediction determines the image poorly. Deterministic solvers keep that first error; an ancestral
# one forgets it (docs/results.md, "Solver by prediction").
_EPS_SOLVER = "ancestral"
PRESETS = "sr3_jax.configs"  # the package of presets
# Fields that a stored config of any version has; with a default in their place the model would silently sample noise.
_ALWAYS_STORED = (("model", "channels"), ("diffusion", "prediction"), ("data", "scale"))
# Paper section 4: 1e-4 for SR3, 1e-5 for the regression. A config that sets its own rate keeps it.
_REGRESSION_RATE = 1e-5


def preset_names() -> list[str]:
    """The names of the presets, sorted."""
    package = importlib.import_module(PRESETS)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_")


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The complete config of a preset or a config file.

    Args:
        source: the name of a preset, or the path of a Python file that defines `get_config()`; either may be followed
            by ':ARGUMENT', which is passed to `get_config`. Or the config itself, as a model stores it.
        overrides: command-line options: '--config.SECTION.FIELD=VALUE', or the same with VALUE as the next item, or
            '--config.SECTION.FIELD' for true.

    Raises:
        UserError: no such preset or file, it does not load, an unknown field, a value of the wrong type or range.
    """
    given = _plain(source) if isinstance(source, Mapping) else _get_config(str(source))[0]
    if "stages" in given:
        names = ", ".join(map(str, given["stages"]))
        raise UserError(f"--config={source} is a cascade; use the config of one of its stages: {names}")
    config = complete(given)
    explicit = _parse_overrides(overrides, config)
    for (section, name), value in explicit.items():
        config[section][name] = value
    chosen = _names(given) | set(explicit)
    if config["model"]["regression"]:
        _imply_regression(config, given=_names(given), explicit=set(explicit))
    if config["data"]["degradation"] != "clean":
        _imply_degradation(config, given=chosen)
    if ("sampling", "solver") not in chosen and config["diffusion"]["prediction"] == "eps":
        config["sampling"]["solver"] = _EPS_SOLVER
    check_ranges(config)
    return config


def load_cascade(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The configs of the stages of a cascade in order, each with the overrides; [] if `source` is a single config.

    A cascade's `get_config()` returns {'stages': (...)}: names of presets, or files next to it.

    Raises:
        UserError: as `load_config`; or the names of the stages are not distinct names of folders.
    """
    if isinstance(source, Mapping):
        return []
    given, folder = _get_config(str(source))
    stages = [str(stage) for stage in given.get("stages", ())]
    files = [str(folder / stage) if ".py" in stage else stage for stage in stages]
    configs = [load_config(file, overrides) for file in files]
    names = [config["stage"]["name"] for config in configs]
    for name, stage in zip(names, stages, strict=True):
        if names.count(name) > 1 or name in ("", "..") or Path(name).name != name:
            raise UserError(f"config.stage.name of {stage} must be a unique folder name, got {name!r}")
    return configs


def complete(given: ConfigDict | FrozenConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The defaults updated with the fields of `given`.

    Raises:
        UserError: an unknown field, or a value of the wrong type.
    """
    config = defaults()
    for section, values in _plain(given).items():
        check_section(section)
        if not isinstance(values, Mapping):
            raise UserError(f"config.{section} must be a dict of fields, got {quoted(values)}")
        for name, value in values.items():
            config[section][name] = check_type(section, name, value)
    return config


def complete_stored(given: Any, owner: str) -> dict[str, Any]:
    """The complete config of a trained model, whose file may be older than some fields and names.

    Fields that are newer than the file take their defaults; renamed fields are migrated, and a log line says so.

    Args:
        given: the content of `config.json` or of the metadata of an exported file.
        owner: the model or workdir, for messages.

    Raises:
        UserError: it is not a config of this version or an older one.
    """
    problem = f"the config of {owner} does not fit this version of sr3_jax"
    if not isinstance(given, Mapping) or not all(isinstance(values, Mapping) for values in given.values()):
        raise UserError(f"{problem} (it is not a dict of sections); train or export the model again")
    if any(not text.isprintable() for text in _texts(given)):
        raise UserError(f"{problem} (it has a text with control characters); do not use it")
    values, migrated = migrate(given)
    if migrated:
        _log.info("migrated the config of %s: %s", owner, ", ".join(migrated))
    try:
        for section, name in _ALWAYS_STORED:
            if name not in values.get(section, {}):
                raise UserError(f"config.{section}.{name} is missing")
        config = complete(values)
        check_ranges(config)
    except UserError as error:
        raise UserError(f"{problem} ({error}); use the version that wrote it") from None
    return config


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included: those of a model file may be printed later."""
    waiting = [value]  # not recursive: a hostile file may be deeply nested
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one


def migrate(given: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """A stored config with the renamed fields under their new names, and a phrase for each of them."""
    values: dict[str, dict[str, Any]] = {section: dict(fields) for section, fields in given.items()}
    migrated = []
    for (section, name), (new_section, new_name) in RENAMED.items():
        if name in values.get(section, {}):
            values.setdefault(new_section, {}).setdefault(new_name, values[section].pop(name))
            migrated.append(f"{section}.{name} is now {new_section}.{new_name}")
    return values, migrated


def _get_config(source: str) -> tuple[dict[str, Any], Path]:
    """The result of a preset's or file's `get_config()` as plain values, and the folder of that file."""
    text, argument = _split_argument(source)
    is_path = text.endswith(".py") or Path(text).name != text or Path(text).suffix != ""
    if not is_path and text not in preset_names():
        raise UserError(_no_such_preset(text))
    if is_path and not Path(text).is_file():
        raise UserError(
            f"--config={text}: no such file; give a Python file, or a preset that `sr3 configs` lists"
        )
    if is_path and not text.endswith(".py"):
        raise UserError(f"--config={text} is not a Python file; give one that defines get_config()")
    try:
        module = _run_file(Path(text)) if is_path else importlib.import_module(f"{PRESETS}.{text}")
        given = module.get_config(*argument)
    except Exception as error:  # a user's file may raise anything
        raise UserError(f"--config={source} does not load ({type(error).__name__}: {error})") from error
    if not isinstance(given, ConfigDict | FrozenConfigDict | Mapping):
        raise UserError(
            f"--config={source}: get_config() must return a ConfigDict, got {type(given).__name__}"
        )
    return _plain(given), Path(text).parent


def _split_argument(source: str) -> tuple[str, tuple[str, ...]]:
    """'FILE.py:ARGUMENT' or 'NAME:ARGUMENT' in its two parts; the second is empty without a colon."""
    if Path(source).is_file():
        return source, ()
    file, py_colon, argument = source.partition(".py:")
    if py_colon:
        return f"{file}.py", (argument,)
    name, colon, argument = source.partition(":")
    return name, (argument,) if colon else ()


def _no_such_preset(name: str) -> str:
    names = preset_names()
    base = name.removesuffix("_regression")
    if base != name and base in names:
        return f"--config={name} is not a preset; use --config={base} --config.model.regression"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"--config={name} is not a preset; {hint}`sr3 configs` lists the presets, and a path must end in .py"
    )


def _run_file(path: Path) -> Any:
    """The module of a Python file; files next to it can be imported by their names."""
    spec = importlib.util.spec_from_file_location("sr3_config", path)
    assert spec is not None and spec.loader is not None  # for any path that ends in .py
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.absolute())
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def _plain(given: ConfigDict | FrozenConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts; references between fields are resolved."""
    values = given.to_dict() if isinstance(given, ConfigDict | FrozenConfigDict) else dict(given)
    return {
        name: part.to_dict() if isinstance(part, ConfigDict | FrozenConfigDict) else part
        for name, part in values.items()
    }


def _names(given: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {(section, name) for section, values in given.items() for name in values}


def _parse_overrides(arguments: Sequence[str], config: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """{(section, field): value} of command-line options; `config` has the defaults that errors quote."""
    found: dict[tuple[str, str], Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option, equals, text = argument.partition("=")
        section, dot, name = option.removeprefix("--config.").partition(".")
        if not option.startswith("--config.") or not section or not dot or not name:
            raise UserError(
                f"unknown argument {argument!r}: override a field with --config.SECTION.FIELD=VALUE"
            )
        field = lookup(section, name)
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        elif not equals and isinstance(field.default, bool):
            text = "true"
        elif not equals:
            raise UserError(f"config.{section}.{name} needs a value: write --config.{section}.{name}=VALUE")
        found[section, name] = parse(section, name, text, default=config[section][name])
    return found


def _imply_regression(
    config: dict[str, Any], *, given: set[tuple[str, str]], explicit: set[tuple[str, str]]
) -> None:
    """Set what `model.regression` implies, in place.

    A file's diffusion settings are replaced, since a preset has them for its diffusion model. Command-line options are
    not replaced, and fail later if a regression does not allow them.
    """
    for (section, name), value in REGRESSION.items():
        if (section, name) not in explicit:
            config[section][name] = value
    for (section, name), value in {
        ("checkpoint", "best"): True,  # the paper selects the regression by its highest held-out PSNR
        ("optim", "learning_rate"): _REGRESSION_RATE,
    }.items():
        if (section, name) not in given | explicit:
            config[section][name] = value


def _imply_degradation(config: dict[str, Any], *, given: set[tuple[str, str]]) -> None:
    """Set the fields of the preset `data.degradation`, except for those that the config or an option gives."""
    from sr3_jax.degradations import PRESETS as DEGRADATIONS  # imports jax, which most uses do not need

    preset = DEGRADATIONS.get(config["data"]["degradation"])
    if preset is None:  # `check_ranges` reports it
        return
    for section, settings in (("degradation", preset.first), ("second_degradation", preset.second)):
        for name, value in asdict(settings).items():
            if name in config[section] and (section, name) not in given:
                config[section][name] = value
