"""Lets a docstring describe several arguments at once, as in `height, width: size in pixels`.

The API reference's parser reads one name per line. With the names split, each is checked against the signature, so that
the description of an argument that does not exist fails the build.
"""

import re
from typing import Any

import griffe

SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


def split_names(docstring: str) -> str:
    """Repeat each description of several names for each of them."""
    return SEVERAL.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), docstring)


class SplitNames(griffe.Extension):
    """Applies `split_names` to all docstrings."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_names(obj.docstring.value)
