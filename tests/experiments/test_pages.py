"""The pages in docs/ are up to date with the committed JSON files, and change with them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from test_collect import experiment_folder

from experiments import collect, pages, plans, tables
from sr3_jax.errors import UserError

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


@pytest.fixture
def docs(tmp_path) -> Path:
    """A copy of the inputs of the pages, without the pages."""
    for folder in ("results", "models", "cascade", "pods", "reliability"):
        shutil.copytree(DOCS / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.csv", "*.md"))
    for name in ("large_images.json", "speed.json"):
        shutil.copy(DOCS / name, tmp_path)
    (tmp_path / "images").mkdir()
    for path in (DOCS / "images").glob("*"):
        (tmp_path / "images" / path.name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("page", "files"),
    [
        ("results", ["results.md", "results/photos.csv", "results/orl_differences.csv"]),
        ("models", ["models.md", "models/photo_4x.csv"]),
        ("cascade", ["cascade.md"]),
        ("pods", ["pods/plans.md"]),
        ("reliability", ["reliability.md"]),
        ("large_images", ["large_images.md"]),
        ("speed", ["speed.md"]),
    ],
)
def test_the_committed_pages_are_up_to_date(docs, page, files):
    assert pages.main([page, "--docs", str(docs)]) == 0
    for file in files:
        assert (docs / file).read_text() == (DOCS / file).read_text(), file
    text = (docs / files[0]).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (DOCS / files[0]).parent.joinpath(link).is_file(), link


def test_a_new_experiment_gets_its_own_page(tmp_path):
    experiment_folder(tmp_path / "out")
    docs = tmp_path / "docs"
    assert collect.main(["results", "photos", str(tmp_path / "out"), "--docs", str(docs)]) == 0
    assert pages.main(["results", "--docs", str(docs)]) == 0
    text = (docs / "results.md").read_text()
    assert "-1.88" in text  # SR3 - regression in PSNR
    assert "Fashion-MNIST, 4x" not in text and "images/results_photos_curve.png" in text
    rows = pd.read_csv(docs / "results" / "photos.csv")
    assert set(rows["run"]) == {"evaluation", "recognition", "sweep"} and "psnr_low" in rows
    assert (docs / "images" / "results_photos_curve.png").is_file()


def test_a_change_of_the_measurements_changes_the_cascade_page(docs):
    path = docs / "cascade" / "measured.json"
    measured = json.loads(path.read_text())
    pages.write_cascade(docs)
    before = (docs / "cascade.md").read_text()
    for row in measured["rows"]:
        if row["group"] == "chain" and row["origin"] == "generated" and not row["augmented"]:
            row["frechet"] = 0.5
    path.write_text(json.dumps(measured | {"guidance": 2.0, "strength": 0.3}))
    pages.write_cascade(docs)
    after = (docs / "cascade.md").read_text()
    assert "augmentation helps" in before and "augmentation does not help" in after
    assert tables.cascade_options({"guidance": 2.0, "strength": 0.3}) == "--guidance 2 --augment 0.3"
    assert "--guidance 2 --augment 0.3" in after


def test_a_model_card_needs_evaluations_of_the_same_weights(docs):
    path = docs / "models" / "photo_4x_evaluations.json"
    evaluations = json.loads(path.read_text())
    evaluations["Set14"]["models"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(evaluations))
    with pytest.raises(UserError, match="Set14"):
        pages.write_models(docs)


def test_missing_or_broken_inputs_fail_with_one_sentence(docs, capsys):
    (docs / "cascade" / "measured.json").write_text("{")
    shutil.rmtree(docs / "results")
    for page, name in (("cascade", "measured.json"), ("results", "results")):
        assert pages.main([page, "--docs", str(docs)]) == 2
        err = capsys.readouterr().err
        assert name in err and err.count("\n") == 1


def test_a_row_that_does_not_fit_is_planned_again_with_its_own_suggestion(docs):
    [path] = [path for path in (docs / "pods").glob("faces_16_128_v5e*_train.json")]
    plan = json.loads(path.read_text())
    path.unlink()
    row = ("faces_16_128", "v5e:16x16", "train")
    assert plans.missing(docs / "pods") == ["faces_16_128 on v5e:16x16 (train)"]
    calls = []

    def run(options):
        calls.append(options)
        fits = "--config.train.accumulation=2" in options
        change = {} if fits else {"suggestion": {"overrides": ["--config.train.accumulation=2"]}}
        program = plan["programs"]["train"] | {"fits": fits} | change
        return plan | {"fits": fits, "programs": {"train": program}, "command": "sr3 " + " ".join(options)}

    plans.compute(row, docs / "pods", run=run)
    assert len(calls) == 2 and plans.missing(docs / "pods") == []
    pages.write_pods(docs)
    assert "--config.train.accumulation=2" in (docs / "pods" / "plans.md").read_text()


@pytest.mark.parametrize(
    ("metric", "value", "signed", "text"),
    [
        ("psnr", 23.456, False, "23.46"),
        ("psnr", 1.5, True, "+1.50"),
        ("psnr", -0.001, True, "0.00"),
        ("seconds", 0.63219, False, "0.632"),
        ("psnr", float("nan"), False, ""),
    ],
)
def test_numbers_have_the_digits_of_their_metric(metric, value, signed, text):
    assert tables.number(metric, value, signed=signed) == text


def test_the_stages_of_the_cascade_page_are_shipped_and_chain():
    from sr3_jax.inference import stages

    names = ["fashion_base_8", "fashion_8_16", "fashion_16_32"]
    assert " ".join(names) in (DOCS / "cascade.md").read_text()
    links = stages.find_stages(names)
    stages.check_chain(links)
    assert [link.spec.size for link in links] == [8, 16, 32]
