"""Find the image files to process and name the output of each. Only folders and first bytes are read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.image_io.image_file import IMAGE_SUFFIXES, WRITABLE_SUFFIXES, WRITERS, sniff_file
from sr3_jax.storage import (
    SCRATCH_PREFIX,
    absolute,
    as_path,
    check_bucket,
    is_file,
    is_folder,
    is_url,
    objects,
)

_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_SUFFIX_OF = {"JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif"}  # all others become .png
_MAX_NAME = 255  # bytes, on all common file systems


@dataclass(frozen=True)
class Job:
    """An input image file and its output file."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Found:
    """The result of `find_images`.

    Attributes:
        jobs: sorted by name within each input.
        ignored: non-image files in folders.
        failed: folders that cannot be read, with the reason.
    """

    jobs: tuple[Job, ...]
    ignored: tuple[Path, ...] = ()
    failed: tuple[tuple[Path, str], ...] = ()


def find_images(
    inputs: Iterable[Path], output: Path, *, file_format: str | None = None, suffix: str = ""
) -> Found:
    """Pair input images with output files.

    Args:
        inputs: files, taken whatever they contain, and folders, searched recursively for files with the suffix or the
            first bytes of an image.
        output: a folder, in which the structure of input folders is repeated; for a single file also an image file.
        file_format: of all outputs, one of `OUTPUT_FORMATS`; None for that of each input where it can be written.
        suffix: appended to the name of each output, before its extension, such as '_4x'.

    Raises:
        UserError: an input is missing, the output cannot be written or is an input too, or two inputs have the same
            output.
    """
    inputs, output = [as_path(path) for path in inputs], as_path(output)
    if os.path.basename(suffix) != suffix or "\0" in suffix:
        raise UserError(f"suffix '{printable(suffix)}' must be part of a file name: use one such as _4x")
    for path in inputs:
        if not (path.exists() if is_url(path) else os.path.lexists(path)):
            raise UserError(f"input '{printable(path)}' does not exist: check the path")
    if not inputs:
        raise UserError("inputs must not be empty: give at least one image or folder")
    to_file = _names_a_file(output) and not is_folder(output)
    _check_output(output, inputs, to_file)
    if to_file and (suffix or file_format):
        raise UserError(
            f"output '{printable(output)}' is a file, which already has a name and a format: omit suffix and format, "
            "or give a folder"
        )
    ignored: list[Path] = []
    failed: list[tuple[Path, str]] = []
    jobs: dict[str, Job] = {}  # by the target's absolute path, or URL
    for path in inputs:
        sources: Iterable[tuple[Path, Path]] = [(path, output)]
        if is_folder(path):
            files, failures = walk(path, exclude=output, hidden=True)
            images = [file for file in files if _is_image(file)]
            ignored += sorted({*files} - {*images})
            failed += failures
            sources = ((file, output / file.relative_to(path).parent) for file in images)
        for source, folder in sources:
            job = Job(source, output if to_file else folder / _target_name(source, file_format, suffix))
            other = jobs.setdefault(_name(job.target), job)
            if _name(other.source) != _name(source):
                raise UserError(
                    f"'{printable(other.source)}' and '{printable(source)}' have the same output "
                    f"'{printable(job.target)}': use different output folders"
                )
    real_sources = {absolute(job.source) for job in jobs.values()}
    for job in jobs.values():
        if absolute(job.target) in real_sources:
            raise UserError(f"output '{printable(job.target)}' is also an input: use another output folder")
    return Found(tuple(jobs.values()), tuple(ignored), tuple(failed))


def split_finished(jobs: Iterable[Job], *, overwrite: bool = False) -> tuple[list[Job], list[Job]]:
    """(to do, finished): a job is finished if its target exists, since targets are written atomically."""
    to_do: list[Job] = []
    finished: list[Job] = []
    jobs = list(jobs)
    # One listing of each folder of a bucket, instead of a request for each target
    listed = {
        path
        for folder in {job.target.parent for job in jobs if is_url(job.target)}
        for path in objects(folder)
    }
    for job in jobs:
        exists = job.target in listed if is_url(job.target) else os.path.isfile(job.target)
        (finished if exists and not overwrite else to_do).append(job)
    return to_do, finished


def _name(path: Path) -> str:
    return os.fspath(path) if is_url(path) else os.path.abspath(path)


def _check_output(output: Path, inputs: list[Path], to_file: bool) -> None:
    if to_file and (len(inputs) > 1 or is_folder(inputs[0])):
        raise UserError(
            f"output '{printable(output)}' is an image file, but there is more than one input image: use a folder"
        )
    if to_file and output.suffix.lower() not in WRITABLE_SUFFIXES:
        raise UserError(
            f"output '{printable(output)}' cannot be written as {output.suffix}: "
            "use .png, .jpg, .webp or .tif"
        )
    if not to_file and is_file(output):
        raise UserError(f"output '{printable(output)}' is a file: use a folder")
    if is_url(output):
        check_bucket(output.parent if to_file else output)
        return
    try:
        os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        pass  # to be made, or explained below
    except OSError as error:
        raise UserError(f"output '{printable(output)}' {reason(error)}: use another") from error
    nearest = output.parent if to_file else output
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"output '{printable(output)}' cannot be created because '{printable(nearest)}' is not a writable "
            "folder: use another"
        )


def walk(
    root: Path, *, exclude: Path | None = None, hidden: bool = False
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Every file under `root`, folder by folder, sorted by the bytes of the names; each folder once.

    Links to folders are followed unless they point into the tree or to a folder above it.

    Args:
        exclude: a folder to leave out, such as that of the outputs.
        hidden: include files and folders whose names begin with a dot.

    Returns:
        The files, and (folder, reason) for each folder that cannot be listed, `root` included.
    """
    files: list[Path] = []
    failed: list[tuple[Path, str]] = []
    if is_url(root):
        return _walk_objects(root, exclude, hidden)
    top, excluded = os.path.realpath(root), None if exclude is None else absolute(exclude)
    seen: set[str] = set()

    def wanted(folder: Path) -> bool:
        real = os.path.realpath(folder)
        if real == excluded or (folder.name.startswith(".") and not hidden):
            return False
        # A link into the tree, or to a folder above it, would list the same files again.
        return not folder.is_symlink() or os.path.commonpath([real, top]) not in (real, top)

    def fail(error: OSError) -> None:
        failed.append((Path(error.filename), reason(error)))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        here, real = Path(folder), os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted((name for name in subfolders if wanted(here / name)), key=os.fsencode)
        files += [
            here / name for name in sorted(names, key=os.fsencode) if hidden or not name.startswith(".")
        ]
    return files, failed


def _walk_objects(
    root: Path, exclude: Path | None, hidden: bool
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """`walk` for the objects below a URL, with one listing."""
    try:
        found = objects(root)
    except OSError as error:
        return [], [(root, reason(error))]

    def wanted(path: Path) -> bool:
        if exclude is not None and is_url(exclude) and path.is_relative_to(exclude):
            return False
        return hidden or not any(part.startswith(".") for part in path.relative_to(root).parts)

    return sorted(filter(wanted, found), key=os.fsencode), []


def _is_image(path: Path) -> bool:
    if path.name.startswith(("._", SCRATCH_PREFIX)):  # macOS metadata files; incomplete outputs
        return False
    return path.suffix.lower() in IMAGE_SUFFIXES or sniff_file(path) is not None


def _names_a_file(output: Path) -> bool:
    """Whether the suffix is that of an image or of another format that Pillow knows, such as .pdf; not 'out.v2'."""
    suffix = output.suffix.lower()
    return suffix in IMAGE_SUFFIXES or suffix in Image.registered_extensions()


def _target_name(source: Path, file_format: str | None = None, added: str = "") -> str:
    """The source's stem plus `added`, with the suffix of `file_format`.

    Without a format the source's own suffix stays, with a second one if it cannot be written or would lose
    transparency. The suffix is appended because 'a.gif' and 'a.png' may be in the same folder.
    """
    suffix = source.suffix.lower()
    if file_format is not None:
        keeps = WRITERS.get(suffix) == WRITERS[f".{file_format}"]
        return f"{source.stem}{added}{source.suffix if keeps else f'.{file_format}'}"
    stem = source.stem + added
    if suffix in WRITABLE_SUFFIXES and suffix not in _JPEG_SUFFIXES:
        return stem + source.suffix
    found = sniff_file(source)
    if suffix in _JPEG_SUFFIXES and found in (None, "JPEG"):
        return stem + source.suffix
    new_suffix = _SUFFIX_OF.get(found or "", ".png")
    name = stem + source.suffix + new_suffix
    return name if len(os.fsencode(name)) <= _MAX_NAME else stem + new_suffix
