"""Resize and write large images as bands of rows, from top to bottom, without holding them in memory.

PNG, TIFF (BigTIFF above 4 GB) and JPEG. Shape legend: H height, W width, C channels.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, TiffImagePlugin

from sr3_jax.image_io import metadata
from sr3_jax.image_io.errors import reason
from sr3_jax.image_io.image_file import WRITERS, DecodedImage, ImageError, save_options
from sr3_jax.storage import atomic_write

BAND_FORMATS = ("PNG", "TIFF", "JPEG")
_STRIP_ROWS = 64
_SUPPORT = {Image.Resampling.BICUBIC: 2.0, Image.Resampling.LANCZOS: 3.0}  # pixels, of the filters


def is_written_in_bands(path: Path) -> bool:
    """Whether `write_bands` can write the format of this suffix."""
    return WRITERS.get(path.suffix.lower()) in BAND_FORMATS


def resize_bands(
    bands: Iterable[np.ndarray], size: tuple[int, int], new_size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Resize an image by Pillow's Lanczos filter, from top to bottom: the pixels that Pillow makes of the whole image.

    Args:
        bands: uint8 [*,W,3], the rows of the image in order.
        size: (H,W) of the image.
        new_size: height and width of the result.

    Yields:
        uint8 [*,width,3], the rows of the result in order.
    """
    if size == new_size:
        yield from bands
        return
    (height, _), (new_height, new_width) = size, new_size
    lanczos = Image.Resampling.LANCZOS
    margin = _margin(height, new_height, lanczos)
    kept, top, done = np.empty((0, new_width, 3), np.uint8), 0, 0
    for band in bands:
        # Columns first, as Pillow does in most cases; which one is first matters where overshoot is clipped.
        kept = np.concatenate([kept, Image.fromarray(band).resize((new_width, len(band)), lanczos)])
        bottom = top + len(kept)
        ready = new_height if bottom == height else int((bottom - margin) * new_height / height)
        if ready > done:
            yield _resize_rows(kept, top, (done, ready), height, new_height, lanczos)
            done = ready
            first = max(top, done * height // new_height - margin)
            kept, top = kept[first - top :], first


def _margin(height: int, new_height: int, filter_: Image.Resampling) -> int:
    """Rows that a resize of the height sees beyond those that the result covers."""
    return math.ceil(_SUPPORT[filter_] * max(1.0, height / new_height)) + 1


def _resize_rows(
    part: np.ndarray, top: int, rows: tuple[int, int], height: int, new_height: int, filter_: Image.Resampling
) -> np.ndarray:
    """Rows `rows` of an image whose height is resized, from its rows that begin at `top`, with a margin."""
    image, width = Image.fromarray(np.ascontiguousarray(part)), part.shape[1]
    scale, rest = divmod(new_height, height)
    if not rest:  # the part begins and ends between rows of the result, which is then exact
        whole = np.asarray(image.resize((width, scale * len(part)), filter_))
        return whole[rows[0] - scale * top : rows[1] - scale * top]
    # Pillow's box says which rows the result covers; the filter also sees those around them.
    first, last = (row * height / new_height - top for row in rows)
    box = (0, max(first, 0), width, min(last, len(part)))
    return np.asarray(image.resize((width, rows[1] - rows[0]), filter_, box=box))


def write_bands(
    path: Path,
    image: DecodedImage,
    bands: Iterable[np.ndarray],
    *,
    size: tuple[int, int],
    quality: int | None = None,
) -> None:
    """Write the upscaled pixels of `image` with its alpha and metadata. The write is atomic, as `write_image`.

    Args:
        path: `is_written_in_bands`; its folder exists.
        image: the low-res image.
        bands: uint8 [*,W,3], the rows of the output in order.
        size: (H,W) of the output.
        quality: of JPEG, as for `write_image`.

    Raises:
        ImageError: the file cannot be written. Exceptions of `bands` pass through.
    """
    rows = _with_alpha(image, bands, size)
    file_format = WRITERS[path.suffix.lower()]
    try:
        with atomic_write(path) as file:
            if file_format == "JPEG":
                options = save_options(file_format, quality)
                _write_jpeg(file, rows, height=size[0], options=options, image=image)
            else:
                write = _write_png if file_format == "PNG" else _write_tiff
                channels = (1 if image.gray else 3) + (image.alpha is not None)
                write(file, rows, height=size[0], width=size[1], channels=channels, image=image)
    except OSError as error:
        raise ImageError(f"could not be written: {reason(error)}") from error


def _with_alpha(
    image: DecodedImage, bands: Iterable[np.ndarray], size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Bands [*,W,C] as they are stored: gray where the image is, with its alpha."""
    top, small = 0, image.rgb.shape[:2]
    bicubic = Image.Resampling.BICUBIC
    margin = _margin(small[0], size[0], bicubic)
    for band in bands:
        pixels, bottom = band, top + len(band)
        if image.gray:
            pixels = np.asarray(Image.fromarray(band).convert("L"))[..., None]
        if image.alpha is not None:
            first = max(0, top * small[0] // size[0] - margin)
            part = Image.fromarray(image.alpha[first : -(-bottom * small[0] // size[0]) + margin])
            columns = np.asarray(part.resize((size[1], part.height), bicubic))
            alpha = _resize_rows(columns, first, (top, bottom), small[0], size[0], bicubic)
            pixels = np.concatenate([pixels, alpha[..., None]], axis=-1)
        top = bottom
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
            _add_tiff_tags(file, tags)
    except Exception as error:
        if failed:
            raise failed[0] from None
        raise ImageError(f"could not be written: {reason(error)}") from error


def _add_tiff_tags(file: IO[bytes], tags: Image.Exif) -> None:
    """Add tags, also whole directories of them, to the image of a TIFF or BigTIFF file whose pixels are in tiles.

    Its directory is written again, at the end of the file.
    """
    file.seek(0)
    head = file.read(8)
    large = head[2:4] in (b"+\0", b"\0+")
    head += file.read(8) if large else b""
    directory = TiffImagePlugin.ImageFileDirectory_v2(head)
    file.seek(directory.next)
    directory.load(file)
    for tag in [*directory]:
        _ = directory[tag]  # decodes it: only decoded tags are written
    for tag in tags:
        inner = tags.get_ifd(tag) if tag in metadata.SUB_IFDS else None
        if inner and large:
            inner = {name: value for name, value in inner.items() if name != metadata.INTEROP}
        directory[tag] = tags[tag] if inner is None else inner
    start = file.seek(0, io.SEEK_END)
    start += -start % 8
    data = bytearray(directory.tobytes(start))
    order = "<" if head[:2] == b"II" else ">"
    if large:  # Pillow gives the offsets of directories 4 bytes
        for entry in range(8, 8 + 20 * struct.unpack_from(f"{order}Q", data)[0], 20):
            if struct.unpack_from(f"{order}H", data, entry)[0] in metadata.SUB_IFDS:
                struct.pack_into(f"{order}H", data, entry + 2, 16)  # LONG8
    file.seek(start)
    file.write(data)
    file.seek(8 if large else 4)
    file.write(struct.pack(f"{order}{'Q' if large else 'L'}", start))


def _write_jpeg(
    file: IO[bytes], rows: Iterable[np.ndarray], *, height: int, options: dict[str, Any], image: DecodedImage
) -> None:
    """A baseline JPEG of strips that Pillow encodes one by one, joined by restart markers.

    At a restart marker the decoder starts afresh, as at the beginning of an image, so that the coded data of a strip
    is the same in both. Strips have the same tables, since these depend on the quality only.
    """
    for index, strip in enumerate(_strips(rows)):
        encoded, header = io.BytesIO(), metadata.save_options(image.metadata, "JPEG") if index == 0 else {}
        pixels = Image.fromarray(strip[..., 0] if strip.shape[-1] == 1 else strip)
        try:
            pixels.save(encoded, format="JPEG", **options, **header)
        except Exception as error:  # metadata that Pillow cannot store raises anything
            raise ImageError(f"could not be written: {reason(error)}") from error
        data = encoded.getvalue()
        frame, scan = (_segment(data, kind) for kind in (b"\xff\xc0", b"\xff\xda"))
        if index == 0:
            width_blocks = -(-strip.shape[1] // 8)  # of 8x8 pixels, as there is no chroma subsampling
            interval = width_blocks * _STRIP_ROWS // 8  # up to 65504 blocks for JPEG's largest width
            head = bytearray(data[:scan])
            struct.pack_into(">H", head, frame + 5, height)
            file.write(head + struct.pack(">2sHH", b"\xff\xdd", 4, interval))
            file.write(data[scan:-2])  # up to the end marker
        else:
            (length,) = struct.unpack_from(">H", data, scan + 2)
            file.write(bytes([0xFF, 0xD0 + (index - 1) % 8]) + data[scan + 2 + length : -2])
    file.write(b"\xff\xd9")


def _segment(data: bytes, marker: bytes) -> int:
    """Position of the first segment of this kind in the header of a JPEG file."""
    position = 2
    while data[position : position + 2] != marker:
        (length,) = struct.unpack_from(">H", data, position + 2)
        position += 2 + length
    return position


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
