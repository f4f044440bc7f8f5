"""Write large images from top to bottom, without holding them in memory. PNG and TIFF (BigTIFF above 4 GB).

Shape legend: H height, W width, C channels, s the scale.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from sr3_jax.image_io import metadata
from sr3_jax.image_io.errors import reason
from sr3_jax.image_io.image_file import DecodedImage, ImageError
from sr3_jax.storage import atomic_write

BAND_SUFFIXES = frozenset({".png", ".tif", ".tiff"})
_STRIP_ROWS = 64
_ALPHA_MARGIN = 4  # rows that a bicubic resize sees beyond its own


def write_bands(path: Path, image: DecodedImage, bands: Iterable[np.ndarray], *, scale: int) -> None:
    """Write the upscaled pixels of `image` with its alpha and metadata. The write is atomic, as `write_image`.

    Args:
        path: ends in one of BAND_SUFFIXES; its folder exists.
        image: the low-res image [H,W].
        bands: uint8 [*,s*W,3], the rows of the output in order.
        scale: s.

    Raises:
        ImageError: the file cannot be written. Exceptions of `bands` pass through.
    """
    rows = _with_alpha(image, bands, scale)
    height, width = (scale * side for side in image.rgb.shape[:2])
    channels = (1 if image.gray else 3) + (image.alpha is not None)
    write = _write_png if path.suffix.lower() == ".png" else _write_tiff
    try:
        with atomic_write(path) as file:
            write(file, rows, height=height, width=width, channels=channels, image=image)
    except OSError as error:
        raise ImageError(f"could not be written: {reason(error)}") from error


def _with_alpha(image: DecodedImage, bands: Iterable[np.ndarray], scale: int) -> Iterator[np.ndarray]:
    """Bands [*,W,C] as they are stored: gray where the image is, with its alpha."""
    top, (height, width) = 0, image.rgb.shape[:2]
    for band in bands:
        pixels = band
        if image.gray:
            pixels = np.asarray(Image.fromarray(band).convert("L"))[..., None]
        if image.alpha is not None:
            bottom = top + len(band)
            first = max(0, top // scale - _ALPHA_MARGIN)
            last = min(height, -(-bottom // scale) + _ALPHA_MARGIN)
            part = Image.fromarray(np.ascontiguousarray(image.alpha[first:last]))
            size = (width * scale, (last - first) * scale)
            alpha = np.asarray(part.resize(size, Image.Resampling.BICUBIC))
            pixels = np.concatenate(
                [pixels, alpha[top - first * scale : bottom - first * scale, :, None]], axis=-1
            )
        top += len(band)
        yield pixels


def _write_png(
    file: IO[bytes],
    rows: Iterable[np.ndarray],
    *,
    height: int,
    width: int,
    channels: int,
    image: DecodedImage,
) -> None:
    def chunk(kind: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0))
    found = image.metadata
    if found.icc_profile:
        chunk(b"iCCP", b"ICC Profile\x00\x00" + zlib.compress(found.icc_profile))
    if found.dpi:
        chunk(b"pHYs", struct.pack(">IIB", *(round(dpi / 0.0254) for dpi in found.dpi), 1))
    if found.exif:
        chunk(b"eXIf", found.exif.removeprefix(b"Exif\x00\x00"))
    if texts := metadata.png_chunks(found):
        for kind, data, *_ in texts.chunks:
            chunk(kind, data)
    packer = zlib.compressobj(6)
    before = np.zeros((1, width * channels), np.uint8)
    for strip in _strips(rows):
        lines = strip.reshape(len(strip), -1)
        if data := packer.compress(_filter(lines, before, channels).tobytes()):
            chunk(b"IDAT", data)
        before = lines[-1:]
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")


def _filter(lines: np.ndarray, before: np.ndarray, channels: int) -> np.ndarray:
    """PNG's filters: each line minus its left neighbor or the line above, whichever leaves less, with its type byte."""
    left = np.pad(lines, ((0, 0), (channels, 0)))[:, : lines.shape[1]]
    above = np.concatenate([before, lines[:-1]])
    candidates = [lines - left, lines - above]  # types 1 and 2; uint8 wraps around as PNG does
    left_over = [np.abs(one.view(np.int8).astype(np.int16)).sum(axis=1) for one in candidates]
    is_up = left_over[1] < left_over[0]
    chosen = np.where(is_up[:, None], candidates[1], candidates[0])
    return np.concatenate([np.where(is_up, 2, 1).astype(np.uint8)[:, None], chosen], axis=1)


def _write_tiff(
    file: IO[bytes],
    rows: Iterable[np.ndarray],
    *,
    height: int,
    width: int,
    channels: int,
    image: DecodedImage,
) -> None:
    import tifffile  # tiles from an iterator, and BigTIFF, neither of which Pillow can write

    alpha = image.alpha is not None
    failed: list[BaseException] = []

    def guarded() -> Iterator[np.ndarray]:
        try:
            for strip in _strips(
                rows
            ):  # as tiles as wide as the image, since strips are not taken one by one
                missing = ((0, _STRIP_ROWS - len(strip)), (0, -width % 16), (0, 0))
                tile = np.pad(strip, missing)
                yield tile[..., 0] if channels == 1 else tile
        except BaseException as error:  # the caller's, not the file's
            failed.append(error)
            raise

    try:
        tifffile.imwrite(
            file,
            guarded(),
            shape=(height, width, channels) if channels > 1 else (height, width),
            dtype=np.uint8,
            photometric="minisblack" if image.gray else "rgb",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=("unassalpha",) if alpha else None,
            tile=(_STRIP_ROWS, width + -width % 16),
            compression="zlib",
            predictor=True,
            iccprofile=image.metadata.icc_profile,
            bigtiff=height * width * channels > 2**32 - 2**25,
            metadata=None,
            software=False,
        )
        if tags := metadata.tiff_tags(image.metadata):
            metadata.add_tiff_tags(file, tags)
    except Exception as error:
        if failed:
            raise failed[0] from None
        raise ImageError(f"could not be written: {reason(error)}") from error


def _strips(rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Regroup bands into strips of _STRIP_ROWS rows; the last may be shorter."""
    rest: list[np.ndarray] = []
    for band in rows:
        rest.append(band)
        whole = np.concatenate(rest) if len(rest) > 1 else rest[0]
        count = len(whole) // _STRIP_ROWS * _STRIP_ROWS
        for first in range(0, count, _STRIP_ROWS):
            yield whole[first : first + _STRIP_ROWS]
        rest = [whole[count:]]
    if len(rest[0]):
        yield rest[0]
