"""Picture files in and out: the only room that opens or writes them. Host side, Pillow and numpy.

Shape legend: H height, W width. A picture is a user's file; whatever is wrong with it becomes one
PictureError whose message is the reason alone, so that a caller can put the path before it.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import uuid
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sr3_jax.aliases import UserError
from sr3_jax.pictures import metadata
from sr3_jax.pictures.errors import reason, sniff
from sr3_jax.pictures.pixels import OddPixels, raw_mode, to_pixels

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_MAX_MEGAPIXELS = 200.0
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")  # no others: Pillow would start Ghostscript for EPS
_WRITERS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "TIFF": {"compression": "tiff_adobe_deflate"},
}
_MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}  # limits of the formats; libjpeg stops a little under 65535
_MAX_JPEG_EXIF = 65533  # bytes in one JPEG segment
SCRATCH_PREFIX = ".sr3-"  # of files that are being written
WRITABLE_SUFFIXES = frozenset(_WRITERS)
PICTURE_SUFFIXES = WRITABLE_SUFFIXES | {".gif", ".bmp"}

# Pillow warns of odd tags and of large pictures; both are judged here, and a progress bar must stay whole.
warnings.filterwarnings("ignore", module=r"PIL\.")
_BOMB_LIMIT = threading.Lock()


class PictureError(UserError):
    """A picture that cannot be read or written; the message is the reason without the path."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture in memory, upright, with 8 bits a channel.

    rgb uint8 [H,W,3], three equal channels when `grey`; alpha uint8 [H,W] or None, 255 opaque. icc_profile
    and exif are bytes as files hold them, the exif without orientation. `notes` tell what reading changed.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    grey: bool = False
    icc_profile: bytes | None = None
    exif: bytes | None = None
    format: str = "PNG"
    notes: tuple[str, ...] = ()


def sniff_file(path: Path) -> str | None:
    """`sniff` of a regular file; None also for what cannot be opened."""
    try:
        if not path.is_file():  # a pipe would block
            return None
        with path.open("rb") as file:
            return sniff(file.read(32))
    except OSError:
        return None


def read_picture(source: Path | bytes, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> Picture:
    """The picture in a file or in bytes, turned upright by its EXIF orientation; an animation's first frame.

    Raises PictureError if it is not a picture, is damaged or truncated, or has more than `max_megapixels`,
    which is judged from the header, before memory is taken.
    """
    with _opened(source, max_megapixels) as picture:
        raw = raw_mode(picture)
        picture.load()
        pixels = to_pixels(picture, raw)
        # After loading: Pillow itself turns TIFFs then, and some PNGs keep their EXIF behind the pixels.
        turn = metadata.orientation(picture)
        exif, exif_notes = metadata.exif(picture)
        profile, profile_notes = metadata.profile(picture, pixels.grey)
        file_format = picture.format or ""
        return Picture(
            rgb=_upright(pixels.rgb, turn),
            alpha=None if pixels.alpha is None else _upright(pixels.alpha, turn),
            grey=pixels.grey,
            icc_profile=profile,
            exif=exif,
            format="JPEG" if file_format == "MPO" else file_format,
            notes=(*pixels.notes, *exif_notes, *profile_notes, *metadata.frames(picture)),
        )


def read_rgb(source: Path | bytes, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> np.ndarray:
    """`read_picture`'s colours alone: uint8 [H,W,3]."""
    return read_picture(source, max_megapixels=max_megapixels).rgb


def read_size(source: Path | bytes, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> tuple[int, int]:
    """(height, width) of the upright picture, from the header alone: the pixels may still prove damaged."""
    with _opened(source, max_megapixels) as picture:
        width, height = picture.size
        # Where Pillow turns a TIFF on loading, its size is already that of the turned picture.
        turned = metadata.orientation(picture) >= 5 and picture.format != "TIFF"
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(source: Path | bytes, max_megapixels: float) -> Iterator[Image.Image]:
    """The Pillow picture behind `source`, its header checked; every failure inside becomes a PictureError."""
    head = b""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else _open_regular(source) as file:
            head = file.read(32)
            file.seek(0)
            if not head:
                raise PictureError("is empty")
            with _open_header(file, max_megapixels) as picture:
                width, height = picture.size
                if width < 1 or height < 1:
                    raise PictureError("has no pixels")
                if width * height > max_megapixels * 1e6:
                    raise PictureError(
                        f"is {width}x{height} pixels, over the limit of {max_megapixels:g} megapixels"
                    )
                yield picture
    except PictureError:
        raise
    except OddPixels as error:
        raise PictureError(str(error)) from error
    except Exception as error:  # decoders raise whatever broken bytes make of them: struct.error, KeyError
        raise PictureError(reason(error, head=head, max_megapixels=max_megapixels)) from error


def _open_regular(path: Path) -> IO[bytes]:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise PictureError("is a folder")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise PictureError("is not a regular file")
    return Path(path).open("rb")


def _open_header(file: IO[bytes], max_megapixels: float) -> Image.Image:
    # Pillow's own limit is one number for the process. It guards the tiles of a TIFF too, which may be larger
    # than the picture; it is raised or lowered to ours while a header is parsed, and others keep theirs.
    with _BOMB_LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max(1, int(max_megapixels * 1e6))
        try:
            return Image.open(file, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _upright(array: np.ndarray, turn: int) -> np.ndarray:
    """`array` [H,W,...] as EXIF orientation `turn` (1..8) says that it is to be looked at."""
    if turn >= 5:
        array = array.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        array = array[::-1]
    if turn in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def require_writable(path: Path, *, height: int, width: int, alpha: bool) -> None:
    """PictureError if a file of this name cannot hold such a picture. Cheap: ask before hours of work."""
    kind = _WRITERS.get(path.suffix.lower())
    if kind is None:
        raise PictureError(f"cannot be written as '{path.suffix}': name it .png, .jpg, .webp or .tif")
    if alpha and kind == "JPEG":
        raise PictureError("has transparency, which JPEG cannot hold: name the output .png")
    if max(height, width) > _MAX_SIDE.get(kind, 2**31 - 1):
        raise PictureError(
            f"would be {width}x{height} pixels, more than {kind} can hold: name the output .png"
        )


def write_picture(path: Path, picture: Picture, *, durable: bool = True) -> None:
    """Write `picture` in the format of the suffix: JPEG at quality 95 in full chroma, the others exactly.

    Whole or not at all: the bytes go to a hidden file beside `path`, which then takes its name. The folder
    must exist. Not `durable`, a power cut may leave a damaged file, and writing is ten times as fast for small ones:
    for those who check what they read. Raises PictureError.
    """
    path = Path(path)
    height, width = picture.rgb.shape[:2]
    require_writable(path, height=height, width=width, alpha=picture.alpha is not None)
    kind = _WRITERS[path.suffix.lower()]
    channels = [picture.rgb[..., :1] if picture.grey else picture.rgb]
    if picture.alpha is not None:
        channels.append(picture.alpha[..., None])
    pixels = np.concatenate(channels, axis=-1) if len(channels) > 1 else channels[0]  # [H,W,1..4]
    options = dict(_SAVE_OPTIONS[kind])
    if picture.icc_profile:
        options["icc_profile"] = picture.icc_profile
    if picture.exif and not (kind == "JPEG" and len(picture.exif) > _MAX_JPEG_EXIF):
        options["exif"] = picture.exif
        if kind == "TIFF":
            options["compression"] = "raw"  # Pillow fails to write EXIF through libtiff, which compresses
    # Its name is not made from the target's, which may be as long as names can be.
    scratch = path.parent / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}.tmp"
    try:
        with scratch.open("xb") as file:
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            image.save(file, format=kind, **options)
            file.flush()
            if durable:
                os.fsync(file.fileno())  # else a power cut could leave the name without the bytes
        os.replace(scratch, path)
    except Exception as error:
        raise PictureError(f"could not be written: {reason(error)}") from error
    finally:
        scratch.unlink(missing_ok=True)
