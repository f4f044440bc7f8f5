"""Which images to work on, and where each result goes: nothing is read but folders and first bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.image_io.image_file import IMAGE_SUFFIXES, SCRATCH_PREFIX, WRITABLE_SUFFIXES, sniff_file

_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_SUFFIX_OF = {"JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif"}  # .png for all others
_MAX_NAME = 255  # bytes, on every file system in common use


@dataclass(frozen=True)
class Job:
    """One image file and the file that its result goes to."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Found:
    """Jobs in the order of names; how many files of folders are no images; unreadable folders, and why."""

    jobs: tuple[Job, ...]
    ignored: int = 0
    failed: tuple[tuple[Path, str], ...] = ()


@dataclass
class _Search:
    output: str  # real path
    ignored: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)


def find_images(inputs: Iterable[Path], output: Path) -> Found:
    """The jobs of upscaling `inputs` into `output`.

    Folders are searched to the bottom and mirrored under `output`; of their files those count that have a
    image's suffix or first bytes. A file named in `inputs` counts whatever it is. With a single file,
    `output` may be the name of an image. Raises UserError for a missing input, an output that cannot be, an
    output that is an input, and two images that would share one.
    """
    inputs, output = [Path(path) for path in inputs], Path(output)
    for path in inputs:
        if not os.path.lexists(path):
            raise UserError(f"input '{printable(path)}' does not exist: check the path")
    if not inputs:
        raise UserError("no input was named: give at least one image or folder")
    to_file = output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir()
    _check_output(output, inputs, to_file)
    search = _Search(os.path.realpath(output))
    jobs: dict[str, Job] = {}  # by the target's absolute path
    for path in inputs:
        sources: Iterable[tuple[Path, Path]] = [(path, output)]
        if path.is_dir():
            sources = ((file, output / file.relative_to(path).parent) for file in _walk(path, search))
        for source, folder in sources:
            job = Job(source, output if to_file else folder / _target_name(source))
            other = jobs.setdefault(os.path.abspath(job.target), job)
            if os.path.abspath(other.source) != os.path.abspath(source):
                raise UserError(
                    f"'{printable(other.source)}' and '{printable(source)}' would both become "
                    f"'{printable(job.target)}': upscale them into different folders"
                )
    real_sources = {os.path.realpath(job.source) for job in jobs.values()}
    for job in jobs.values():
        if os.path.realpath(job.target) in real_sources:
            raise UserError(f"output '{printable(job.target)}' is an input too: choose another output folder")
    return Found(tuple(jobs.values()), search.ignored, tuple(search.failed))


def split_finished(jobs: Iterable[Job], *, overwrite: bool = False) -> tuple[list[Job], list[Job]]:
    """(to do, finished): a target that exists is finished, since targets are written whole or not at all."""
    to_do: list[Job] = []
    finished: list[Job] = []
    for job in jobs:
        (finished if job.target.is_file() and not overwrite else to_do).append(job)
    return to_do, finished


def _check_output(output: Path, inputs: list[Path], to_file: bool) -> None:
    if to_file and (len(inputs) > 1 or inputs[0].is_dir()):
        raise UserError(
            f"output '{printable(output)}' names one image, but the input is more than one: name a folder"
        )
    if to_file and output.suffix.lower() not in WRITABLE_SUFFIXES:
        raise UserError(
            f"output '{printable(output)}' cannot be written as {output.suffix}: "
            "use .png, .jpg, .webp or .tif"
        )
    if not to_file and output.exists() and not output.is_dir():
        raise UserError(f"output '{printable(output)}' is a file: name a folder that is or can be made")
    nearest = output.parent if to_file else output
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"output '{printable(output)}' cannot be made, for '{printable(nearest)}' is not a folder "
            "that you may write to: choose another"
        )


def _walk(top: Path, search: _Search) -> Iterator[Path]:
    """Image files under `top`, sorted; each real folder once, never the output folder."""

    def refused(error: OSError) -> None:
        search.failed.append((Path(error.filename), reason(error)))

    root = os.path.realpath(top)
    linked: set[str] = set()
    for folder, folders, files in os.walk(top, onerror=refused, followlinks=True):
        here = Path(folder)
        folders[:] = sorted(
            (name for name in folders if _descend(here / name, root, linked, search.output)), key=os.fsencode
        )
        for name in sorted(files, key=os.fsencode):
            if _is_image(here / name):
                yield here / name
            else:
                search.ignored += 1


def _descend(folder: Path, root: str, linked: set[str], output: str) -> bool:
    real = os.path.realpath(folder)
    if real == output:
        return False
    if not folder.is_symlink():
        return True
    # A link into the tree, or to a folder above it, would show the same images again, perhaps for ever.
    if real in linked or os.path.commonpath([real, root]) in (real, root):
        return False
    linked.add(real)
    return True


def _is_image(path: Path) -> bool:
    if path.name.startswith(("._", SCRATCH_PREFIX)):  # macOS's notes beside a file; half-written files
        return False
    return path.suffix.lower() in IMAGE_SUFFIXES or sniff_file(path) is not None


def _target_name(source: Path) -> str:
    """The source's name; with a second suffix where its own cannot be written or would lose transparency.

    Appended, since 'a.gif' and 'a.png' may lie side by side.
    """
    suffix = source.suffix.lower()
    if suffix in WRITABLE_SUFFIXES:
        if suffix not in _JPEG_SUFFIXES:
            return source.name
        kind = sniff_file(source)
        if kind in (None, "JPEG"):
            return source.name
    else:
        kind = sniff_file(source)
    name = source.name + _SUFFIX_OF.get(kind or "", ".png")
    return name if len(os.fsencode(name)) <= _MAX_NAME else source.stem + _SUFFIX_OF.get(kind or "", ".png")
