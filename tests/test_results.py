"""docs/results.md is judged and written from collected figures, and its experiments are one command each."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sr3_jax.errors import UserError
from sr3_jax.sampling import Sampling

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "launch" / "experiment.sh"
NAMES = ["a-0", "a-1", "b-0", "b-1"]


@pytest.fixture(scope="module", autouse=True)
def launch():
    sys.path.insert(0, str(ROOT / "launch"))
    yield
    sys.path.remove(str(ROOT / "launch"))


def row(method, *, solver=None, steps=None, detail="", evaluations=0, own=True, **scores):
    """A row of evaluation.json; scores {column: of each of the four images}."""
    return {
        "method": method,
        "scale": 4,
        "solver": solver,
        "steps": steps,
        "detail": detail,
        "evaluations": evaluations,
        "own": own,
        "summary": {
            key: {"mean": float(np.mean(of)), "low": min(of), "high": max(of)} for key, of in scores.items()
        },
        "images": {name: {key: [of[at]] for key, of in scores.items()} for at, name in enumerate(NAMES)},
    }


def evaluation(**changes):
    """As in the paper: the regression first in PSNR and SSIM, SR3 in LPIPS and recognition."""
    sr3 = {"psnr": [20, 21, 22, 23], "ssim": [0.5, 0.6, 0.5, 0.6], "lpips": [0.1, 0.1, 0.2, 0.2]}
    sr3 |= {"consistency": [1.0, 1.1, 1.2, 1.3], "top1": [100, 100, 100, 100]} | changes
    rows = [
        row("bicubic", psnr=[19, 19, 20, 20], ssim=[0.4] * 4, consistency=[20.0] * 4, top1=[0, 0, 100, 0]),
        row("sr3", solver="ddim", steps=5, evaluations=5, **sr3),
        row(
            "regression", evaluations=1, psnr=[22, 23, 24, 24.5], ssim=[0.6, 0.7, 0.6, 0.7],
            lpips=[0.2, 0.25, 0.3, 0.35], consistency=[1.0] * 4, top1=[0, 100, 0, 0],
        ),
    ]  # fmt: skip
    model = {"name": "x", "scale": 4, "parameters": 7, "sha256": "ab" * 32}
    config = {"sampling": {"solver": "ddim", "steps": 5}}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "command": ["sr3", "evaluate"],
        "seconds": 60.0,
        "hardware": "a machine",
        "versions": {"jax": "0"},
        "outputs_reused": 0,
        "protocol": {"source": "folder:tiles", "images": 4, "samples": 1, "seed": 0, "crop": None},
        "models": [
            {"label": "sr3", "config": config, **model},
            {"label": "regression", "config": config, **model},
        ],
        "images": [{"name": name} for name in NAMES],
        "rows": rows,
    }


def training_folder(path):
    path.mkdir(parents=True)
    config = {
        "train": {"batch_size": 8, "seed": 3},
        "model": {"regression": False},
        "diffusion": {"norm": "l2"},
    }
    (path / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": 50, "step_ms": 100.0},
        {"step": 60, "eval_psnr": 25.0},
        {"step": 100, "step_ms": 200.0},
        {"step": 120, "eval_psnr": 24.0},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def search(low=0.1):
    gain = {"mean": 0.2, "low": low, "high": 0.3}
    figures = {"lpips": 0.2}
    common = {"evaluations": 5, "images": 4, "search": figures, "own": figures, "check": figures}
    usual = dataclasses.asdict(Sampling("ancestral", 5))
    return {
        "model": "sr3", "metric": "lpips", "data": "photos:test", "eval_data": None, "crop": 64,
        "search_crops": 4, "check_crops": 4, "images": [4, 4], "seed": 0, "guarded": True, "tried": 9,
        "version": "0", "chosen": None, "choice": "The default stands.", "seconds": 3.0, "command": ["sr3"],
        "rows": [
            {"which": "default", "sampling": usual, "gain": None, "over_own": None, **common},
            {"which": "best", "sampling": {**usual, "variance": 0.5}, "gain": gain, "over_own": gain, **common},
        ],
    }  # fmt: skip


def verdicts(found):
    from results_findings import findings

    return {one.key: one.verdict for one in findings(found)}


def compacted(tmp_path, found, name="photos"):
    import results_figures

    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    return results_figures.compact(name, tmp_path)


def test_findings_as_in_the_paper_have_appeared(tmp_path):
    assert verdicts(compacted(tmp_path, evaluation())) == {
        "distortion": "appeared", "perception": "appeared", "consistency": "appeared", "recognition": "appeared",
        "recognition_bicubic": "appeared",
    }  # fmt: skip


def test_findings_that_do_not_appear_are_said(tmp_path):
    other = evaluation(psnr=[30, 31, 32, 33], lpips=[0.5] * 4, top1=[0, 100, 0, 0], consistency=[1.0] * 4)
    assert verdicts(compacted(tmp_path / "other", other)) == {
        "distortion": "in part", "perception": "the opposite", "consistency": "appeared",
        "recognition": "not decided", "recognition_bicubic": "not decided",
    }  # fmt: skip
    assert (
        verdicts(compacted(tmp_path / "worse", evaluation(consistency=[30.0] * 4)))["consistency"]
        == "in part"
    )


def test_differences_are_over_the_same_images_and_whole_groups():
    import results_figures

    difference = np.array([1.0, 1.0, 3.0, 3.0])
    alone = results_figures.paired(difference, np.arange(4))
    grouped = results_figures.paired(difference, np.array([0, 0, 1, 1]))
    assert alone["mean"] == grouped["mean"] == 2.0
    assert (grouped["low"], grouped["high"]) == (1.0, 3.0)  # of two groups either may be drawn twice
    assert grouped["share"] == 1.0
    assert results_figures.paired(np.full(9, 0.5), np.arange(9))["low"] == 0.5
    assert list(results_figures.groups("photos", NAMES)) == [0, 0, 1, 1]
    assert list(results_figures.groups("fashion", NAMES)) == [0, 1, 2, 3]
    assert list(results_figures.groups("orl", [str(one) for one in range(6)])) == [0] * 5 + [1]


def test_l1_is_compared_with_l2_and_a_missing_column_decides_nothing():
    rows = [row(name, solver="ddim", steps=5, evaluations=5) for name in ("sr3", "sr3_l1")]
    below, across = {"mean": -1.0, "low": -2.0, "high": -0.5}, {"mean": 0.0, "low": -1.0, "high": 1.0}
    pair = {"kind": "L1 - L2", "a": 1, "b": 0, "columns": {"diversity": below, "frechet_alexnet": across}}
    assert verdicts({"rows": rows, "pairs": [pair]}) == {
        "norm": "not decided",
        "diversity": "appeared",
    }
    lacking = {**pair, "columns": {"frechet_alexnet": below}}
    assert verdicts({"rows": rows, "pairs": [pair, lacking]})["diversity"] == "in part"


def test_the_models_own_sampler_decides(tmp_path):
    found = evaluation()
    worse = row("sr3", solver="heun", steps=2, evaluations=3, own=False, psnr=[99] * 4, ssim=[0.9] * 4, lpips=[0.9] * 4,
                consistency=[99.0] * 4, top1=[0] * 4)  # fmt: skip
    found["rows"].insert(2, worse)
    run = compacted(tmp_path, found)
    assert verdicts(run)["perception"] == verdicts(run)["consistency"] == "appeared"
    found["rows"][2] = {**worse, "own": True}
    assert verdicts(compacted(tmp_path / "both", found))["perception"] == "in part"


def test_pairs_are_of_one_sampler(tmp_path):
    import results_figures

    rows = [
        row("sr3", solver="ddim", steps=5, evaluations=5),
        row("sr3", solver="ddim", steps=5, evaluations=5, detail="eta 0.5"),
        row("sr3", solver="ddim", steps=9, evaluations=9),
        row("sr3_l1", solver="ddim", steps=5, evaluations=5),
    ]
    assert results_figures.interesting(rows) == [(1, 0, "searched - usual"), (3, 0, "L1 - L2")]


def test_distances_of_sets_are_compared_over_the_same_resamples(tmp_path):
    """The regression's features lie further from the originals' than SR3's, and not by chance."""
    from sr3_jax.features.cache import KeptFeatures
    from sr3_jax.features.statistics import FeatureProtocol

    found, count = evaluation(), 200
    found["images"] = [{"name": f"p{number}"} for number in range(count)]
    found["protocol"]["features"] = {
        "network": "n", "sha256": "f" * 64, "preprocessing": "none", "distance": "frechet_alexnet",
        "count": count, "images": count,
    }  # fmt: skip
    for at, row_of in enumerate(found["rows"]):
        row_of["images"] = {image["name"]: {"psnr": [at]} for image in found["images"]}
        row_of["summary"] |= {key: {"mean": float(at)} for key in ("frechet_alexnet", "kid_alexnet")}
    protocol = FeatureProtocol("n", "frechet_alexnet", "f" * 64, "none")
    kept = KeptFeatures.of(tmp_path / "outputs", protocol)
    real = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    digests = {}
    for at, name in enumerate(("original", "bicubic/4x", "sr3/ddim-5", "regression/4x")):
        digests[name] = [f"{at:02x}{number:062x}" for number in range(count)]
        kept.add(digests[name], real + {"sr3/ddim-5": 0.3, "regression/4x": 1.0}.get(name, 0.0))
        lines = [
            {"image": f"p{number}", "sample": 0, "output": output, "original": original}
            for number, (output, original) in enumerate(zip(digests[name], digests["original"], strict=True))
        ]
        (tmp_path / "outputs" / name).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "outputs" / name / "scores.jsonl").write_text(text + '{"half')
    pairs = compacted(tmp_path, found, name="fashion")["pairs"]
    columns = next(pair["columns"] for pair in pairs if pair["kind"] == "regression - diffusion")
    for key in ("frechet_alexnet", "kid_alexnet"):
        assert columns[key]["mean"] == 1.0  # of the table
        assert 0 < columns[key]["high"] - 1.0 == pytest.approx(1.0 - columns[key]["low"])
    assert columns["frechet_alexnet"]["low"] > 0.5


def test_a_training_is_summed_up_from_its_log(tmp_path):
    import results_figures

    training_folder(tmp_path / "sr3")
    found = results_figures.training(tmp_path / "sr3")
    assert (found["seconds"], found["steps"]) == (15, 120)
    assert found["peak"] == {"step": 60, "psnr": 25.0}
    results_figures.stamp(tmp_path / "sr3")
    assert results_figures.training(tmp_path / "sr3")["hardware"]
    (tmp_path / "sr3" / "made.json").write_text('{"commit": "an earlier one"}')
    results_figures.stamp(tmp_path / "sr3")  # of where it was begun, not of where it went on
    assert results_figures.training(tmp_path / "sr3")["commit"] == "an earlier one"


def test_the_page_has_figures_verdicts_notes_and_images(tmp_path):
    import results_doc

    out = tmp_path / "out"
    training_folder(out / "sr3")
    for run in ("evaluation", "recognition", "sweep"):
        (out / run).mkdir()
        (out / run / "evaluation.json").write_text(json.dumps(evaluation()))
    (out / "search").mkdir()
    (out / "search" / "search.json").write_text(json.dumps(search()))
    Image.new("RGB", (30, 20)).save(out / "evaluation" / "grid.png")
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    (docs / "results" / "notes.json").write_text(json.dumps({"photos": {"perception": "It is so."}}))
    (tmp_path / "who.csv").write_text("file,author,licence,package\na.jpg,Ann,CC0,pack\nb.jpg,Bob,CC0,pack\n")
    assert (
        results_doc.main(
            ["--collect", "photos", str(out), "--docs", str(docs), "--credits", str(tmp_path / "who.csv")]
        )
        == 0
    )
    page = (docs / "results.md").read_text()
    assert "+1.88 (" in page  # the mean of 22-20, 23-21, 24-22, 24.5-23
    assert "| regression above SR3 in PSNR, SSIM | appeared |" in page
    assert "| a layer on AlexNet better on SR3's outputs than on bicubic's | appeared |" in page
    assert "| a small classifier better on SR3's outputs than on bicubic's | appeared |" in page
    assert "### Recognition by a linear layer on AlexNet" in page
    assert "A schedule found by search is better than the usual one" in page
    assert "Not evaluated yet: regression, sr3_l1." in page
    assert "It is so." in page and "Ann, CC0" in page and "23.96" in page
    assert "images/results_photos.png" in page and "images/results_photos_curve.png" in page
    assert "sr3 train --config=configs/photos_4x_small.py" in page
    kept = json.loads((docs / "results" / "photos.json").read_text())
    assert "images" not in kept["runs"]["evaluation"]["rows"][0]
    assert (docs / "images" / "results_photos_curve.png").stat().st_size < 400_000
    # What is wrong is said in a sentence.
    assert results_doc.main(["--collect", "photos", str(tmp_path / "none"), "--docs", str(docs)]) == 2
    with pytest.raises(UserError, match="no results"):
        results_doc.write(tmp_path / "empty")


def searched_run():
    """A schedule that was found halves LPIPS, and the regression is worse than it."""
    rows = [
        row("x", solver="ddim", steps=5, evaluations=5, lpips=[0.2] * 4),
        row("x", solver="ddim", steps=5, evaluations=5, detail="eta 0.5", lpips=[0.1] * 4),
        row("regression", evaluations=1, lpips=[0.15, 0.15, 0.16, 0.16]),
    ]
    return {**evaluation(), "rows": rows}


def test_each_kind_of_run_answers_its_own_question(tmp_path):
    """Runs beside the main one belong to its part, and say nothing of what they were not made for."""
    from results_parts import parts

    of = {
        "8x/evaluation": evaluation(),
        "8x/recognition": evaluation(top1=[0] * 4),
        "8x/searched": searched_run(),
        "8x/sweep": evaluation(),
        "4x/evaluation": evaluation(),
        "2x/recognition": evaluation(),  # whose main one is not there yet
    }
    runs = {run: compacted(tmp_path / run.replace("/", "_"), found, "orl") for run, found in of.items()}
    large, small = parts({"name": "orl", "runs": runs, "searches": [search()]})
    assert (large.name, small.name) == ("8x", "4x") and small.title == "The ORL faces, 4x"
    assert (len(large.searches), len(small.searches)) == (1, 0)
    found = {one.key: one.verdict for one in large.findings}
    assert found == {
        "distortion": "appeared", "perception": "appeared", "consistency": "appeared", "recognition": "appeared",
        "recognition_bicubic": "appeared", "recognition_alexnet": "the opposite",
        "recognition_bicubic_alexnet": "the opposite", "searched": "appeared", "perception_searched": "appeared",
        "search": "appeared",
    }  # fmt: skip
    assert [one.key for one in small.findings] == [
        "distortion", "perception", "consistency", "recognition", "recognition_bicubic",
    ]  # fmt: skip


def test_without_lpips_a_found_schedule_is_judged_by_distances():
    from results_findings import searched_finding

    rows = [row("x", solver="ddim", steps=5), row("x", solver="ddim", steps=5, detail="eta 0.5")]
    below = {"mean": -1.0, "low": -2.0, "high": -0.5}
    pair = {
        "kind": "searched - usual",
        "a": 1,
        "b": 0,
        "columns": {"frechet_classifier": below, "psnr": below},
    }
    found = searched_finding({"rows": rows, "pairs": [pair]})
    assert found.verdict == "appeared" and dict(found.wanted) == {"frechet_classifier": -1}
    assert searched_finding({"rows": rows, "pairs": [{**pair, "columns": {"psnr": below}}]}) is None


def test_a_search_is_judged_by_what_it_gains_on_other_images():
    from results_findings import search_finding

    assert search_finding([search()]).verdict == "appeared"
    assert search_finding([search(low=-0.1)]).verdict == "not decided"


def test_curves_are_of_what_was_measured():
    from results_images import curve

    run = evaluation(frechet_classifier=[3.0, 2.0, 1.0, 2.0])
    run["rows"].append(row("original", frechet_classifier=[9.0] * 4, top1=[100] * 4))
    panels = curve(run)
    assert list(panels) == ["LPIPS", "Frechet (classifier)", "top-1 %", "PSNR"]
    assert panels["Frechet (classifier)"] == ({"ddim": [(5, 2.0)]}, {})
    assert panels["top-1 %"] == ({"ddim": [(5, 100.0)]}, {"bicubic": 25.0, "regression": 25.0})


def test_ticks_are_round():
    from results_curve import ticks

    assert ticks(0.11, 0.52) == [0.2, 0.3, 0.4, 0.5]
    assert ticks(18, 31) == [20, 25, 30]


def dry_run(*arguments, **environment):
    return subprocess.run(
        ["bash", str(EXPERIMENT), "--dry-run", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", **environment},
        check=False,
    )


@pytest.mark.parametrize("name", ["photos", "fashion", "orl"])
def test_an_experiment_is_one_command(name):
    """What it would run: configs that are there, models that it has trained, and the page at the end."""
    ran = dry_run(name, "out/x", *(["images"] if name == "photos" else []))
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    trained = set()
    for line in lines:
        words = line.split()
        trained |= {word.partition("=")[2] for word in words if word.startswith("--workdir=")}
        if words[:2] == ["sr3", "export"]:
            assert words[2] in trained
            trained.add(words[4])
        if words[0] == "cp":
            assert words[1].removesuffix("/best.safetensors") in trained
            trained.add(words[2])
        for config in (word.partition("=")[2] for word in words if word.startswith("--config=")):
            assert (ROOT / config).is_file()
        models = [words[at + 1] for at, word in enumerate(words) if word == "--model"]
        assert set(models) <= trained
    assert len(trained) >= 4
    assert lines[-1] == f"python launch/results_doc.py --collect {name} out/x --docs docs"


def test_an_experiment_in_parts_and_small():
    ran = dry_run("fashion", "out/x", SR3_STAGES="train", SR3_REHEARSE="1")
    assert "num_steps=2" in ran.stdout and "evaluate" not in ran.stdout and "make_dataset" not in ran.stdout


@pytest.mark.parametrize(
    "arguments", [("cats", "out"), ("photos", "out"), ("fashion",), ("orl", "out", "more")]
)
def test_an_experiment_refuses_what_it_does_not_know(arguments):
    ran = dry_run(*arguments)
    assert ran.returncode == 2 and "experiment.sh" in ran.stderr and not ran.stdout
