"""The exception for all errors that the user can fix, and texts that a terminal can print."""

from __future__ import annotations


class UserError(ValueError):
    """Invalid input: one sentence that names the field or file, its value and the fix.

    The command line prints the sentence without a traceback and exits with `exit_code`. It is printable: it may quote
    texts from files.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, keep="\n"))


def printable(text: object, *, keep: str = "") -> str:
    """A path or text from a file as one line that any terminal can print.

    Control characters, which can change what the terminal shows or does, and undecodable bytes of file names are
    escaped.

    Args:
        keep: characters that stay.
    """
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # as Python keeps undecodable bytes
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()
