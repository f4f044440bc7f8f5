"""The page of the small cascade: written from its measurements alone, with a verdict that follows them."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "cascade" / "measured.json"


@pytest.fixture(scope="module")
def doc():
    spec = importlib.util.spec_from_file_location("cascade_doc", ROOT / "launch" / "cascade_doc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measured() -> dict:
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def test_the_page_is_what_the_script_writes(doc, measured):
    assert (ROOT / "docs" / "cascade.md").read_text(encoding="utf-8") == doc.page(measured)
    for name in ("grid", "stages"):
        assert f"images/cascade_{name}.png" in doc.page(measured)
        assert (ROOT / "docs" / "images" / f"cascade_{name}.png").is_file()


def test_the_verdict_follows_the_figures(doc, measured):
    changed = copy.deepcopy(measured)
    for row in changed["rows"]:
        if row["group"] == "chain" and row["origin"] == "drawn" and not row["augmented"]:
            row["frechet"] = 0.5
    assert "augmentation helps here" in doc.page(measured)
    assert "augmentation does not help here" in doc.page(changed)
    assert "distance is 0.500 where its stages were trained on clean conditions" in doc.page(changed)


def test_every_measured_row_is_on_the_page(doc, measured):
    page = doc.page(measured)
    for row in measured["rows"]:
        assert f"{row['frechet']:.3f} |" in page and doc.accuracy(row) in page, row


def test_the_chosen_settings_are_options_of_the_command(doc, measured):
    assert doc.settings({"guidance": 1.5, "strength": 0.2}) == "--guidance 1.5 --augment 0.2"
    assert doc.settings(measured) in doc.page(measured)


def test_measurements_that_are_not_there_are_a_sentence(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "cascade_doc.py"), str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and "make it by launch/cascade_measure.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_stages_come_with_the_package_and_chain():
    from sr3_jax.inference import stages
    from sr3_jax.inference.model import load

    names = ["fashion_base_8", "fashion_8_16", "fashion_16_32"]
    stages = stages.find_stages(names)
    stages.check_chain(stages)
    assert [stage.spec.size for stage in stages] == [8, 16, 32]
    assert [load(name).network.augment for name in names] == [False, True, True]
