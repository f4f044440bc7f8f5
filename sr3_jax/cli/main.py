"""Entry point of the command line: runs `sr3 COMMAND` with the module of that name in this folder."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import importlib.util
import logging
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TextIO

import sr3_jax.cli
from sr3_jax import __version__
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.storage import is_disk_full

_STORE_PACKAGES = ("aiohttp", "gcsfs", "google")  # of buckets, whose errors are of many types
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # 128 + the signal's number, as in shells


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which names the nearest option of an unknown one."""

    def check_options(self, arguments: Sequence[str], *, extra: bool) -> None:
        """Exit with code 2 if a long option is unknown.

        argparse itself reports missing arguments first, which an unknown option often causes.

        Args:
            extra: whether the command also takes --config.SECTION.FIELD.
        """
        for argument in arguments:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            known = self._option_string_actions
            if not name.startswith("--") or " " in name or name in known:
                continue
            if extra and name.startswith("--config."):
                continue
            near = difflib.get_close_matches(name, [one for one in known if one.startswith("--")], n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {argument}{hint}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (see `{self.prog} --help`)\n")


class _Escaping:
    """A text stream on which no text from a file name or a model file can control the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not text.isprintable():
            # Progress bars return to the start of their line before or after their text, never inside it.
            first, last = text.startswith("\r"), len(text) > 1 and text.endswith("\r")
            inner = printable(text[first : len(text) - last], keep="\n\t")
            text = "\r" * first + inner + "\r" * last
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Plain(logging.Handler):
    """Prints log messages on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(record.getMessage(), file=sys.stderr)


def commands() -> dict[str, str]:
    """Name and one-line help of every command, read from the source files without importing them."""
    found = {}
    for module in pkgutil.iter_modules(sr3_jax.cli.__path__):
        if module.name != "main" and not module.name.startswith("_"):
            spec = importlib.util.find_spec(f"{sr3_jax.cli.__name__}.{module.name}")
            source = spec.loader.get_source(spec.name) if spec and spec.loader else ""  # type: ignore[attr-defined]
            lines = (ast.get_docstring(ast.parse(source or "")) or "").splitlines()
            found[module.name.replace("_", "-")] = lines[0] if lines else ""
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code.

    0: done. 1: done in part (3 with several processes, since launchers restart on 1). 2: invalid input, with one line
    on stderr. 130, 143, 129: stopped by SIGINT, SIGTERM or SIGHUP; the same command resumes.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names need not be valid text
            stream.reconfigure(errors="backslashreplace")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Escaping):
            setattr(sys, name, _Escaping(stream))
    try:
        code = _dispatch(arguments)
        return code if _flushed() else code or 2
    except SystemExit as stop:  # argparse: --help, and errors, which it has printed
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # `sr3 ... | head`
        _discard_stdout()
        return _BROKEN_PIPE


def _flushed() -> bool:
    """Flush stdout, if the process has one; say so if that fails, as on a full disk: the command itself is done."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        print(f"sr3: done, but stdout cannot be written ({reason(error)})", file=sys.stderr)
        return False
    return True


def _discard_stdout() -> None:
    """Send stdout nowhere, so that the flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):  # stdout may not be a real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    known = commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(known), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"sr3 {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`sr3 --help` lists the commands."
        kind = "option" if name.startswith("-") else "command"
        print(f"sr3: unknown {kind} '{printable(name)}': {hint}", file=sys.stderr)
        return 2
    _set_up()
    from sr3_jax.errors import UserError

    module = importlib.import_module(f"{sr3_jax.cli.__name__}.{name.replace('-', '_')}")
    parser = _Parser(prog=f"sr3 {name}", description=module.__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    takes_more = getattr(module, "PASS_UNKNOWN", False)
    parser.check_options(rest, extra=takes_more)
    if takes_more:
        parsed, unknown = parser.parse_known_args(rest)
        parsed.rest = unknown
    elif "--" in rest:  # parse_intermixed_args drops it
        parsed = parser.parse_args(rest)
    else:
        parsed = parser.parse_intermixed_args(rest)  # `sr3 upscale a.png -o out b.png`
    try:
        return module.run(parsed)
    except UserError as error:
        print(f"sr3 {name}: {error}", file=sys.stderr)
        _abandon(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        _abandon(_INTERRUPTED)
        raise
    except SystemExit as stop:  # stopped by a signal while others go on
        _abandon(stop.code if isinstance(stop.code, int) else 1)
        raise
    except Exception as error:
        if is_disk_full(error):
            where = getattr(error, "filename", None)
            disk = f"the disk of {printable(where)} is full" if where else "the disk is full"
            print(f"sr3 {name}: {disk}: make room and run the same command again", file=sys.stderr)
            _abandon(2)
            return 2
        if _lacks_device(error):
            asked = os.environ.get("JAX_PLATFORMS", "")
            fix = f"JAX_PLATFORMS={printable(asked)}" if asked else "--device"
            print(f"sr3 {name}: {fix} asks for a device that jax does not find: use cpu", file=sys.stderr)
            return 2
        if type(error).__module__.partition(".")[0] in _STORE_PACKAGES:
            text = printable(" ".join(str(error).split())[:200] or type(error).__name__)
            print(
                f"sr3 {name}: the bucket cannot be used ({text}): run the same command again", file=sys.stderr
            )
            _abandon(1)
            return 1
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            traceback.print_exc()
            _abandon(1)
        raise


def _lacks_device(error: Exception) -> bool:
    """Whether jax does not find the device that it was asked for, which it has no type of error for."""
    if (
        isinstance(error, AssertionError) and "jax" in sys.modules
    ):  # of a backend whose plugin is not installed
        try:
            sys.modules["jax"].local_devices()
        except Exception:
            return True
    return str(error).startswith("Unable to initialize backend")


def _abandon(code: int) -> None:
    """Leave a distributed run without waiting for its other processes. Without jax there is no distributed run."""
    if "jax" in sys.modules:
        from sr3_jax.distributed.processes import abandon

        abandon(code)


def _help(known: dict[str, str]) -> str:
    width = max((len(name) for name in known), default=0)
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in sorted(known.items()))
    return (
        "SR3 in JAX: image super-resolution by iterative refinement.\n\nusage: sr3 COMMAND ...\n\n"
        f"commands:\n{lines}\n\nRun `sr3 COMMAND --help` for the options of a command, `sr3 --version` for the version."
    )


def _set_up() -> None:
    """Set up logging (ours on stderr, other libraries only from errors on) and the persistent compilation cache."""
    from sr3_jax.storage import cache_folder

    variables = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "GRPC_VERBOSITY": "ERROR",
        "GLOG_minloglevel": "2",
    }
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (compiled := cache_folder("compiled")) is not None:
        variables["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
    for variable, value in variables.items():
        os.environ.setdefault(variable, value)
    try:
        from absl import logging as absl_logging

        absl_logging.set_verbosity(absl_logging.ERROR)
    except ImportError:
        pass
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where MODULE:FUNCTION is looked for too, as with `python -m sr3_jax`
    logger = logging.getLogger("sr3_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _Plain) for handler in logger.handlers):
        logger.addHandler(_Plain())


if __name__ == "__main__":
    sys.exit(main())
