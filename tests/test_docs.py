"""The documentation: its code runs, and links in the package's long description are absolute."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
import yaml

import sr3_jax
from sr3_jax import diffusion
from sr3_jax.cli.main import main
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_solver_of_the_guide_equals_ddim():
    guide = (ROOT / "docs" / "how_to" / "add_a_solver.md").read_text(encoding="utf-8")
    namespace: dict = {}
    exec(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], namespace)

    def sample(solver):
        return diffusion.sample(
            lambda y, gamma, cond: 0.5 * y,
            jax.random.key(0),
            {},
            shape=(2, 8, 8, 3),
            schedule=diffusion.respace(diffusion.linear(100), 6),
            solver=solver,
        ).image

    np.testing.assert_allclose(sample(namespace["euler"]()), sample(diffusion.ddim()), atol=1e-6)


def test_the_tutorial_of_a_study_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """At its own size: training, fine-tuning, a user's solver, and another program's images in one table."""
    page = (ROOT / "docs" / "tutorials" / "research.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with tiny.quick_compilation():
        for language, title, code in re.findall(r'```(\w+)(?: title="(.*?)")?\n(.*?)```', page, re.DOTALL):
            if title:
                Path(title).write_text(code)
            elif language == "python":
                exec(code, {})
            else:
                command = shlex.split(code.replace("\\\n", ""))
                assert command[0] == "sr3" and main(command[1:]) == 0, code
    monkeypatch.delitem(sys.modules, "my_solvers")
    assert len(list(Path("faces/train").iterdir())) == 16
    assert list(Path("runs/faces/samples").iterdir())
    table = Path("out/compare/evaluation.md").read_text()
    for name in ("photo_4x", "runs/tuned", "lanczos", "churned", "bicubic"):
        assert name in table


@pytest.mark.parametrize(
    ("link", "absolute"),
    [
        ("[models](docs/models.md)", "https://github.com/sr3-jax/sr3_jax/blob/main/docs/models.md"),
        (
            "![figure](docs/images/a.jpg)",
            "https://raw.githubusercontent.com/sr3-jax/sr3_jax/main/docs/images/a.jpg",
        ),
        ("[section](#comparison)", "#comparison"),
        ("[paper](https://arxiv.org/abs/2104.07636)", "https://arxiv.org/abs/2104.07636"),
    ],
)
def test_links_of_the_long_description_are_absolute(link, absolute):
    text = _module(ROOT / "setup.py").absolute_links(f"before {link} after")
    assert text == f"before {link.split('(')[0]}({absolute}) after"


def test_the_citation_names_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == sr3_jax.__version__


def test_docs_script_rejects_unknown_arguments():
    result = subprocess.run(
        ["bash", ROOT / "launch" / "docs.sh", "nonsense"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "nonsense" in result.stderr
