"""MkDocs hooks: pages that are generated at build time, so that they cannot fall behind the code.

- index.md, contributing.md and changelog.md are the files of the repository's root (SOURCES).
- reference/config.md comes from the config schema.
- reference/commands.md comes from `sr3 COMMAND --help`.
- reference/api/*.md come from the modules of the package (API).
- notebook.md comes from quickstart.ipynb.

Links to files outside docs/ point to the repository. A missing file is a warning, and so an error in a strict build.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
log = get_plugin_logger("hooks")
REPOSITORY = "https://github.com/sr3-jax/sr3_jax"
SOURCES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(\]\(|src=\"|href=\")([^)\s\"]+)")

# Title: the purpose of the page, and the modules (or packages, with all their public modules) on it.
API: dict[str, tuple[str, tuple[str, ...]]] = {
    "sr3_jax": (
        "Load a model, upscale and generate.",
        (
            "sr3_jax",
            "sr3_jax.inference.loading",
            "sr3_jax.inference.model",
            "sr3_jax.sampling",
            "sr3_jax.types",
            "sr3_jax.errors",
        ),
    ),
    "diffusion": ("The pure core: schedules, process, loss, solvers, sampling.", ("sr3_jax.diffusion",)),
    "nn": ("The U-Net and its blocks.", ("sr3_jax.nn",)),
    "images and metrics": (
        "Pure image operations, degradations and metrics.",
        ("sr3_jax.image_ops", "sr3_jax.degradations", "sr3_jax.metrics"),
    ),
    "image_io": ("Reading and writing image files.", ("sr3_jax.image_io",)),
    "data": ("Data sources, batches and prepared data sets.", ("sr3_jax.data",)),
    "config": ("The config schema, loading, and objects built from a config.", ("sr3_jax.config",)),
    "train": ("Training state, step, loop, checkpoints and metrics.", ("sr3_jax.train",)),
    "inference": ("The sampling program, large images, folders and cascades.", ("sr3_jax.inference",)),
    "evaluation": (
        "Metrics of a held-out set, tables, grids and schedule search.",
        ("sr3_jax.evaluation",),
    ),
    "features": ("Networks and statistics that metrics need.", ("sr3_jax.features",)),
    "distributed": ("Meshes, sharding, processes and signals.", ("sr3_jax.distributed",)),
    "conversion": ("Models from the published weights of others.", ("sr3_jax.conversion",)),
    "planning": ("Memory and FLOPs of a job before it runs.", ("sr3_jax.planning",)),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API pages into the navigation, below their index."""
    assert config.nav is not None
    reference = next(item["Reference"] for item in config.nav if "Reference" in item)
    entry = next(item for item in reference if "Python API" in item)
    entry["Python API"] = [
        entry["Python API"],
        *({title: api_path(title)} for title in API if api_modules(title)),
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        **{page: (ROOT / source).read_text(encoding="utf-8") for page, source in SOURCES.items()},
        "notebook.md": notebook_page(DOCS / "quickstart.ipynb"),
        "reference/config.md": config_page(),
        "reference/commands.md": commands_page(),
        **api_pages(),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside docs/ at the repository."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return rewrite_links(markdown, source=source, page=page.file.src_uri)


def rewrite_links(markdown: str, *, source: str, page: str) -> str:
    """Make the relative links of a text from `source` (a path in the repository) right for `page` (a path in docs/)."""

    documents = {origin: f"docs/{path}" for path, origin in SOURCES.items()}
    documents["docs/quickstart.ipynb"] = "docs/notebook.md"

    def link(match: re.Match[str]) -> str:
        before, target = match.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or ":" in path or path.startswith("/"):
            return match.group()
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        wanted = documents.get(wanted, wanted)
        if wanted.startswith("docs/"):
            here = posixpath.dirname(page) or "."
            return f"{before}{posixpath.relpath(wanted.removeprefix('docs/'), here)}{hash_sign}{anchor}"
        if not (ROOT / wanted).exists():
            log.warning(f"{source} links to {target}, which does not exist")
        return f"{before}{REPOSITORY}/blob/main/{wanted}{hash_sign}{anchor}"

    fenced = re.split(r"(^```.*?^```\s*$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in fenced)


def config_page() -> str:
    """The reference of all config fields, from the schema."""
    from sr3_jax.config import schema

    return schema.markdown()


def commands_page() -> str:
    """The help of every command."""
    from sr3_jax.cli.main import commands, main

    os.environ["COLUMNS"] = "100"  # the width that argparse wraps to
    parts = ["# Commands", "", "`python -m sr3_jax COMMAND` is the same as `sr3 COMMAND`.", ""]
    for name in sorted(commands()):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            main([name, "--help"])
        parts += [f"## sr3 {name}", "", "```text", output.getvalue().rstrip(), "```", ""]
    return "\n".join(parts)


def api_pages() -> dict[str, str]:
    """The index of the API reference, and one page for each entry of API."""
    pages, rows = {}, []
    for title, (purpose, _) in API.items():
        if modules := api_modules(title):
            sections = [f"## {module}\n\n::: {module}\n{options(module)}" for module in modules]
            pages[api_path(title)] = "\n".join([f"# {title}", "", purpose, "", *sections])
            rows.append(f"| [{title}]({posixpath.basename(api_path(title))}) | {purpose} |")
    head = ["# Python API", "", "| package | purpose |", "|---|---|"]
    return {"reference/api/index.md": "\n".join([*head, *rows]) + "\n", **pages}


def api_path(title: str) -> str:
    """The path of an API page in docs/."""
    return f"reference/api/{title.replace(' ', '_')}.md"


def api_modules(title: str) -> list[str]:
    """The modules on an API page; a module with its own entry is only on that page."""
    entries = {name for other, (_, names) in API.items() if other != title for name in names}
    return [m for name in API[title][1] for m in public_modules(name) if m not in entries]


def options(module: str) -> str:
    """mkdocstrings options: of a package only its docstring, since its modules follow."""
    lines = ["show_root_heading: false", "show_root_toc_entry: false"]
    if (ROOT / module.replace(".", "/")).is_dir():
        lines.append("members: false")
    return "    options:\n" + "".join(f"      {line}\n" for line in lines)


def public_modules(name: str) -> list[str]:
    """A module, or a package followed by its public modules; empty if it does not exist."""
    path = ROOT / name.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return [name]
    if not (path / "__init__.py").is_file():
        return []
    if name == "sr3_jax":  # its subpackages have their own pages
        return [name]
    return [name, *(f"{name}.{file.stem}" for file in sorted(path.glob("[!_]*.py")))]


def notebook_page(path: Path) -> str:
    """The cells of a notebook as Markdown, with the outputs that are stored in it."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"]).rstrip()
        if cell["cell_type"] != "code":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/jpeg" in data:
                parts.append(f"![](data:image/jpeg;base64,{data['image/jpeg'].strip()})")
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    link = f"[Download this notebook]({REPOSITORY}/blob/main/docs/{path.name}) to run it."
    return "\n\n".join([*parts[:1], link, *parts[1:]]) + "\n"
