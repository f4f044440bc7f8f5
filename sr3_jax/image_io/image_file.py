"""Read and write image files with Pillow.

Anything wrong with a user's file raises an `ImageError` whose message is the reason without the path, so that the
caller can put the path in front. Shape legend: H height, W width.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import io
import os
import re
import stat
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from sr3_jax.errors import UserError
from sr3_jax.image_io import metadata
from sr3_jax.image_io.errors import reason, sniff
from sr3_jax.image_io.metadata import Metadata
from sr3_jax.image_io.pixels import UnsupportedPixels, fill_transparent, raw_mode, to_pixels
from sr3_jax.storage import as_path, atomic_write, is_url, read_object

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_MAX_MEGAPIXELS = 200.0
_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "TIFF",
    "GIF",
    "BMP",
    "AVIF",
    "JPEG2000",
)  # no others: for EPS, Pillow starts Ghostscript
WRITERS = {
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
LOSSY_FORMATS = ("JPEG", "WEBP")
_MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}  # pixels; libjpeg's limit is slightly below 65535
_LARGEST_REREAD = 512 * 2**20  # bytes of a PNG that is read again without its large chunks
_DROPPED = "sr3_jax dropped"  # key of their names in Image.info
_MAX_LOSSLESS_WEBP = 64  # megapixels; libwebp takes 31 bytes for each pixel, and lossy 1 byte
WRITABLE_SUFFIXES = frozenset(WRITERS)
OUTPUT_FORMATS = ("png", "jpg", "webp", "tif")  # the usual suffix of each, without the dot
# With formats that need an extra or cannot be read, so that such files are named and not passed over.
IMAGE_SUFFIXES = WRITABLE_SUFFIXES | {
    ".gif",
    ".bmp",
    ".avif",
    ".jp2",
    ".j2k",
    ".jpx",
    ".heic",
    ".heif",
    ".jxl",
}

# Pillow warns about odd tags and large images. Both are handled here, and warnings would break up a progress bar.
warnings.filterwarnings("ignore", module=r"PIL\.")
_BOMB_LIMIT = threading.Lock()


class ImageError(UserError):
    """An image that cannot be read or written; the message is the reason without the path."""


class UnreadableError(ImageError):
    """The operating system could not read the file. Its content may be fine: storage may have been away.

    Attributes:
        errno: of the operating system.
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An upright image in memory with 8 bits per channel.

    Attributes:
        rgb: uint8 [H,W,3]; three equal channels if `gray`.
        alpha: uint8 [H,W], 255 is opaque; None for an image without transparency.
        gray: whether the image is grayscale.
        metadata: what its file says about the pixels.
        format: the file format that it was read from.
        notes: changes made by reading, one clause each.
        dropped: names of metadata that reading left out, as too large or damaged.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    gray: bool = False
    metadata: Metadata = field(default_factory=Metadata)
    format: str = "PNG"
    notes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def sniff_file(path: Path) -> str | None:
    """`sniff` for a file; None also if it cannot be opened or is not a regular file."""
    try:
        if not path.is_file():  # opening a pipe would block
            return None
        with path.open("rb") as file:
            return sniff(file.read(32))
    except OSError:
        return None


def read_image(source: Path | bytes, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> DecodedImage:
    """Read an image file, or the bytes of one. EXIF orientation is applied; of an animation, the first frame is read.

    Args:
        max_megapixels: larger images fail. Checked against the header, before memory is allocated.

    Raises:
        ImageError: not an image, damaged, truncated or too large.
    """
    with _opened(source, max_megapixels) as image:
        return _decode(image)


def visible_rgb(image: DecodedImage) -> np.ndarray:
    """uint8 [H,W,3] for a network or a resize: colors hidden by full transparency are replaced by visible ones."""
    return image.rgb if image.alpha is None else fill_transparent(image.rgb, image.alpha)


def from_pillow(image: Image.Image) -> DecodedImage:
    """Convert a Pillow image of any mode, with its metadata.

    Raises:
        ImageError: the pixels have no meaning as an 8-bit image.
    """
    try:
        return _decode(image)
    except UnsupportedPixels as error:
        raise ImageError(f"image {error}") from error


def to_pillow(image: DecodedImage) -> Image.Image:
    """Convert to a Pillow image in mode L, LA, RGB or RGBA, with the metadata that Pillow knows in its `info`."""
    result = Image.fromarray(to_channels(image))
    result.info.update(metadata.pillow_info(image.metadata))
    return result


def with_pixels(image: DecodedImage, rgb: np.ndarray) -> DecodedImage:
    """Replace the pixels of `image` by uint8 [H',W',3] and resize its alpha to match; metadata is kept."""
    height, width, _ = rgb.shape
    if image.gray:
        luma = np.asarray(Image.fromarray(rgb).convert("L"))  # BT.601
        rgb = np.broadcast_to(luma[..., None], rgb.shape)
    alpha = image.alpha
    if alpha is not None:
        alpha = np.asarray(Image.fromarray(alpha).resize((width, height), Image.Resampling.BICUBIC))
    return replace(image, rgb=rgb, alpha=alpha)


def _decode(image: Image.Image) -> DecodedImage:
    raw = raw_mode(image)
    try:
        image.load()
    except ValueError as error:
        if not _is_large_chunk(error):  # one that follows the pixels of a PNG, which are decoded
            raise
    pixels = to_pixels(image, raw)
    # After loading: that is when Pillow rotates TIFFs itself, and some PNGs store EXIF after the pixels.
    orientation = metadata.orientation(image)
    found, notes, dropped = metadata.read(image, gray=pixels.gray)
    before = image.info.get(_DROPPED)
    file_format = image.format or ""
    return DecodedImage(
        rgb=_upright(pixels.rgb, orientation),
        alpha=None if pixels.alpha is None else _upright(pixels.alpha, orientation),
        gray=pixels.gray,
        metadata=found,
        format="JPEG" if file_format == "MPO" else file_format,
        notes=(*pixels.notes, *notes, *metadata.frames(image)),
        dropped=(*before, *dropped) if isinstance(before, tuple) else dropped,
    )


def to_channels(image: DecodedImage) -> np.ndarray:
    """uint8 [H,W] for a grayscale image without alpha, otherwise [H,W,2..4]."""
    channels = [image.rgb[..., :1] if image.gray else image.rgb]
    if image.alpha is not None:
        channels.append(image.alpha[..., None])
    pixels = np.concatenate(channels, axis=-1) if len(channels) > 1 else channels[0]
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def read_rgb(source: Path | bytes, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> np.ndarray:
    """`read_image`, but only the colors: uint8 [H,W,3], see `visible_rgb`."""
    return visible_rgb(read_image(source, max_megapixels=max_megapixels))


def read_size(source: Path | bytes, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> tuple[int, int]:
    """(height, width) of the upright image. Only the header is read, so the pixels may still be damaged."""
    with _opened(source, max_megapixels) as image:
        width, height = image.size
        # For TIFF, Pillow already reports the size of the upright image.
        swapped = metadata.orientation(image) >= 5 and image.format != "TIFF"
        return (width, height) if swapped else (height, width)


def is_plain(source: bytes, rgb: np.ndarray, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> bool:
    """Whether every decoder gives these pixels [H,W,3]: an RGB JPEG or PNG, 8 bits, no rotation, opaque, one frame.

    Raises:
        ImageError: as `read_image`.
    """
    with _opened(source, max_megapixels) as image:
        try:
            upright = image.getexif().get(metadata.ORIENTATION, 1) == 1
        except Exception:  # broken EXIF data raises anything, in other decoders too
            return False
        if image.mode != "RGB" or image.size != rgb.shape[1::-1] or not upright:
            return False
        if image.format == "PNG" and metadata.without_large_chunks(source)[1]:
            return False
        if image.format == "PNG":  # bit depth; Pillow does not read EXIF that follows the pixels
            return source[24] == 8 and not any(chunk in source for chunk in (b"eXIf", b"tRNS", b"acTL"))
        return image.format in ("JPEG", "MPO")  # MPO: a JPEG followed by more images


@contextmanager
def _opened(source: Path | bytes, max_megapixels: float) -> Iterator[Image.Image]:
    """The Pillow image in `source`, with its header checked. Every exception inside becomes an `ImageError`."""
    head = b""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else _open_regular(source) as file:
            head = file.read(32)
            file.seek(0)
            if not head:
                raise ImageError("is empty")
            with _open_header(file, max_megapixels) as image:
                width, height = image.size
                if width < 1 or height < 1:
                    raise ImageError("has no pixels")
                if _is_raw(image, head):
                    raise ImageError(
                        "is a camera raw file with a preview: develop it to a TIFF or JPEG first"
                    )
                if width * height > max_megapixels * 1e6:
                    raise ImageError(
                        f"has {width}x{height} pixels, above the limit of {max_megapixels:g} megapixels"
                    )
                yield image
    except ImageError:
        raise
    except UnsupportedPixels as error:
        raise ImageError(str(error)) from error
    except Exception as error:  # broken bytes make decoders raise anything: struct.error, KeyError
        why = reason(error, head=head, max_megapixels=max_megapixels)
        if isinstance(error, OSError) and error.errno is not None and not isinstance(source, bytes):
            raise UnreadableError(why, error.errno) from error
        raise ImageError(why) from error


_REDUCED, _SUBFILE, _DNG_VERSION = 1, 254, 50706  # TIFF tags, and the bit of a reduced-resolution image


def _is_raw(image: Image.Image, head: bytes) -> bool:
    """Whether this is a raw file based on TIFF (DNG, NEF, ARW, CR2, ...), of which Pillow reads a thumbnail only."""
    if image.format != "TIFF":
        return False
    tags = image.tag_v2  # type: ignore[attr-defined]
    return bool(int(tags.get(_SUBFILE, 0)) & _REDUCED) or _DNG_VERSION in tags or head[8:10] == b"CR"


def _open_regular(path: Path) -> IO[bytes]:
    if is_url(path):
        return io.BytesIO(read_object(path))
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ImageError("is a folder")
    if not stat.S_ISREG(mode):  # opening a pipe would block
        raise ImageError("is not a regular file")
    return Path(path).open("rb")


def _open_header(file: IO[bytes], max_megapixels: float) -> Image.Image:
    # Pillow has one limit for the whole process, which also covers TIFF tiles, that may be larger than the image.
    # Set it to ours while a header is parsed, and restore it for other users of Pillow.
    with _BOMB_LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max(1, int(max_megapixels * 1e6))
        try:
            return Image.open(file, formats=_readable_formats())
        except UnidentifiedImageError:
            file.seek(0)
            if sniff(file.read(32)) == "TIFF" and _has_unsupported_layout(file):
                raise ImageError(
                    "has a TIFF pixel layout that is not supported: convert it to 8 or 16 bits per channel"
                ) from None
            raise
        except ValueError as error:
            if not _is_large_chunk(error) or file.seek(0, os.SEEK_END) > _LARGEST_REREAD:
                raise
            file.seek(0)
            data, dropped = metadata.without_large_chunks(file.read())
            image = Image.open(io.BytesIO(data), formats=_readable_formats())
            image.info[_DROPPED] = dropped
            return image
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _is_large_chunk(error: ValueError) -> bool:
    """Whether Pillow gave up because a text or a color profile in a PNG is larger than it accepts."""
    return "PngImagePlugin.MAX_TEXT" in str(error) or "MAX_TEXT_MEMORY" in str(error)


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """Formats to open: HEIC if its plugin is installed. Also makes libtiff silent, before the first file is opened."""
    _silence_libtiff()
    try:
        plugin = importlib.import_module("pillow_heif")
    except ImportError:
        return _FORMATS
    plugin.register_heif_opener()
    return (*_FORMATS, "HEIF")


def _silence_libtiff() -> None:
    """Remove libtiff's handlers that print on stderr; Pillow raises an exception for what matters."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
        found = re.search(r"/.*/libtiff[^/\n]*\.so[^/\n]*", maps)
        if found:  # Pillow's own copy, which is loaded already
            library = ctypes.CDLL(found[0])
            for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
                getattr(library, name).restype = ctypes.c_void_p
                getattr(library, name)(None)
    except (OSError, AttributeError):
        pass  # another system: lines on stderr do no harm


def _has_unsupported_layout(file: IO[bytes]) -> bool:
    """Whether Pillow parses this TIFF but has no mode for its pixels, such as 32-bit or floating-point RGB."""
    file.seek(0)
    try:
        TiffImagePlugin.TiffImageFile(file)
    except SyntaxError as error:
        return "mode" in str(error)
    except Exception:  # damaged
        return False
    return False


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1 to 8) to `array` [H,W,...]."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def require_writable(path: Path, *, height: int, width: int, alpha: bool, quality: int | None = None) -> None:
    """Check that the format of this suffix can store such an image. Cheap, so call it before long work.

    Args:
        quality: as for `write_image`.

    Raises:
        ImageError: it cannot.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long a name, or a folder that may not be entered
        raise ImageError(f"could not be written: {reason(error)}") from error
    file_format = WRITERS.get(path.suffix.lower())
    if file_format is None:
        raise ImageError(f"cannot be written as '{path.suffix}': use .png, .jpg, .webp or .tif")
    if alpha and file_format == "JPEG":
        raise ImageError("has transparency, which JPEG cannot store: write a .png instead")
    if max(height, width) > _MAX_SIDE.get(file_format, 2**31 - 1):
        raise ImageError(
            f"would be {width}x{height} pixels, more than {file_format} can store: write a .png instead"
        )
    if file_format == "WEBP" and quality is None and height * width > _MAX_LOSSLESS_WEBP * 1e6:
        raise ImageError(
            f"would be {width}x{height} pixels, above the limit of {_MAX_LOSSLESS_WEBP} megapixels for lossless WebP, "
            "which takes much memory: write a .png instead, or set the quality"
        )


def not_storable(path: Path, image: DecodedImage) -> tuple[str, ...]:
    """Names of the metadata of `image` that the format of this suffix cannot hold."""
    return metadata.fitting(image.metadata, WRITERS[path.suffix.lower()])[1]


def write_image(path: Path, image: DecodedImage, *, durable: bool = True, quality: int | None = None) -> None:
    """Write `image` in the format of the suffix: JPEG with full chroma, the others losslessly.

    The write is atomic (`storage.atomic_write`, also for `durable`); the folder must exist. Metadata that the format
    cannot hold is left out (`metadata.fitting`).

    Args:
        quality: 1 to 100, of JPEG and lossy WebP; None for JPEG at 95 and lossless WebP. Other formats are lossless.

    Raises:
        ImageError: the image cannot be written.
    """
    path = as_path(path)
    height, width = image.rgb.shape[:2]
    require_writable(path, height=height, width=width, alpha=image.alpha is not None, quality=quality)
    file_format = WRITERS[path.suffix.lower()]
    options = save_options(file_format, quality) | metadata.save_options(image.metadata, file_format)
    try:
        with atomic_write(path, durable=durable) as file:
            Image.fromarray(to_channels(image)).save(file, format=file_format, **options)
    except Exception as error:
        raise ImageError(f"could not be written: {reason(error)}") from error


def save_options(file_format: str, quality: int | None) -> dict[str, Any]:
    """Options of Pillow's `save` for the pixels; for `quality` see `write_image`."""
    options = dict(_SAVE_OPTIONS[file_format])
    if quality is not None and file_format in LOSSY_FORMATS:
        options |= {"quality": quality} if file_format == "JPEG" else {"quality": quality, "lossless": False}
    return options
