"""Sets the long description: README.md with absolute links, since the page of a package index cannot resolve others.

Everything else is in setup.cfg.
"""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/sr3-jax/sr3_jax"
RAW = "https://raw.githubusercontent.com/sr3-jax/sr3_jax"


def absolute_links(markdown: str) -> str:
    """Markdown with its relative links and images pointing to the main branch of the repository."""

    def absolute(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if target.startswith("#") or re.match(r"[a-z]+:", target):
            return match.group()
        base = f"{RAW}/main" if image else f"{REPOSITORY}/blob/main"
        return f"{image}[{text}]({base}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, markdown)


if __name__ == "__main__":
    readme = Path(__file__).parent / "README.md"
    setup(
        long_description=absolute_links(readme.read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
