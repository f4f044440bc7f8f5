"""Readable reasons for the exceptions that broken image files and full disks cause."""

from __future__ import annotations

import errno
import re

from PIL import Image, UnidentifiedImageError, features

from sr3_jax.errors import printable as printable  # for messages about files, with `reason`

_REASONS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "does not exist",
    errno.ELOOP: "is a symbolic link to itself",
    errno.ENAMETOOLONG: "has too long a name",
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EROFS: "the disk is read-only",
}


_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000"}
_UNREADABLE = {
    "HEIC": "is a HEIC image: install the extra sr3_jax[heic] to read it",
    "JPEG XL": "is a JPEG XL image, which cannot be read: convert it to PNG",
    "AVIF": "is an AVIF image, which this version of Pillow cannot read: update Pillow, or convert the image to PNG",
    "JPEG2000": "is a JPEG 2000 image, which this version of Pillow cannot read: update Pillow, or convert the image",
}


def sniff(head: bytes) -> str | None:
    """The format that the first 32 bytes of a file claim: 'PNG', 'JPEG', ... or None."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    # Many text files start with 'BM', so the size of BMP's second header must be a known one too.
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124):
        return "BMP"
    if head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "JPEG2000"
    if head.startswith((b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")):
        return "JPEG XL"
    if head[4:8] == b"ftyp":  # ISO media: the major brand, then the compatible ones
        if head[8:12] in (b"avif", b"avis") or b"avif" in head[16:]:
            return "AVIF"
        if head[8:12] in _HEIC_BRANDS:
            return "HEIC"
    return None


def reason(error: Exception, *, head: bytes = b"", max_megapixels: float = 0.0) -> str:
    """Why reading or writing failed, as a clause that follows the path.

    Args:
        head: the first bytes of the file, to distinguish a damaged image from other files.
        max_megapixels: the limit that a `DecompressionBombError` refers to.
    """
    text = " ".join(str(error).split())[:120]
    claimed = sniff(head)
    if isinstance(error, MemoryError):
        return "needs more memory than is available"
    if isinstance(error, Image.DecompressionBombError):
        count = re.search(r"(\d+) pixels", text)
        size = f"has {int(count[1]) / 1e6:.0f} megapixels" if count else "has too many pixels"
        return f"{size}, above the limit of {max_megapixels:g}"
    if isinstance(error, UnidentifiedImageError) and claimed in _UNREADABLE and not _reads(claimed):
        return _UNREADABLE[claimed]
    if isinstance(error, UnidentifiedImageError):
        return f"is a damaged {claimed} file" if claimed else "is not an image in a supported format"
    if isinstance(error, OSError) and error.errno is not None:
        return _REASONS.get(error.errno, (error.strerror or text).lower())
    if "truncated" in text.lower():
        return "is truncated"
    return f"is damaged ({text or type(error).__name__})"


def _reads(file_format: str) -> bool:
    """Whether the installed Pillow, or its HEIC plugin, decodes this format."""
    name = "HEIF" if file_format == "HEIC" else file_format
    return name in Image.OPEN and features.check(_CODECS.get(file_format, "jpg")) is True
