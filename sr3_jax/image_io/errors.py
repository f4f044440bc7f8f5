"""One-line reasons for the errors of image files and disks, and printable paths. Opens no files."""

from __future__ import annotations

import errno
import re

from PIL import Image, UnidentifiedImageError

_REASONS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "does not exist",
    errno.ELOOP: "is a link that leads to itself",
    errno.ENAMETOOLONG: "has a name that is too long",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
}


def sniff(head: bytes) -> str | None:
    """The format that a file with these first 32 bytes claims to be: 'PNG', 'JPEG', ... or None."""
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
    # 'BM' alone begins many a text: the length of BMP's second header must be one that exists.
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124):
        return "BMP"
    return None


def reason(error: Exception, *, head: bytes = b"", max_megapixels: float = 0.0) -> str:
    """One clause without the path for an error of reading or writing; `head` is the file's first bytes."""
    text = " ".join(str(error).split())[:120]
    claimed = sniff(head)
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, Image.DecompressionBombError):
        count = re.search(r"(\d+) pixels", text)
        size = f"has {int(count[1]) / 1e6:.0f} megapixels" if count else "has too many pixels"
        return f"{size}, over the limit of {max_megapixels:g}"
    if isinstance(error, UnidentifiedImageError):
        return f"is a damaged {claimed} file" if claimed else "is not an image of a kind that we read"
    if isinstance(error, OSError) and error.errno is not None:
        return _REASONS.get(error.errno, (error.strerror or text).lower())
    if "truncated" in text.lower():
        return "is truncated"
    return f"is damaged ({text or type(error).__name__})"


def printable(path: object) -> str:
    """A path as one printable line: bytes that are not UTF-8, and control characters, are escaped."""
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)
