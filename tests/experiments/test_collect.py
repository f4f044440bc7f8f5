"""Evaluations of an experiment become one JSON file with paired differences."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments import collect, resample, tables
from sr3_jax.errors import UserError

NAMES = ["a-0", "a-1", "b-0", "b-1"]  # two tiles each of two photographs


def row(method, *, solver=None, steps=None, detail="", nfe=0, own=True, **scores) -> dict[str, Any]:
    """A row of evaluation.json; scores: {metric: of each of the four images}."""
    return {
        "method": method,
        "scale": 4,
        "solver": solver,
        "steps": steps,
        "detail": detail,
        "nfe": nfe,
        "own": own,
        "summary": {
            key: {"mean": float(np.mean(of)), "low": min(of), "high": max(of)} for key, of in scores.items()
        },
        "images": {name: {key: [of[at]] for key, of in scores.items()} for at, name in enumerate(NAMES)},
    }


def evaluation(**scores) -> dict[str, Any]:
    sr3 = {"psnr": [20, 21, 22, 23], "lpips": [0.1, 0.1, 0.2, 0.2]} | scores
    rows = [
        row("bicubic", psnr=[19, 19, 20, 20], lpips=[0.5] * 4),
        row("sr3", solver="ddim", steps=5, nfe=5, **sr3),
        row("regression", nfe=1, psnr=[22, 23, 24, 24.5], lpips=[0.2, 0.25, 0.3, 0.35]),
    ]
    model = {"name": "x", "scale": 4, "parameters": 7, "sha256": "ab" * 32, "config": {}}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "command": ["sr3", "evaluate"],
        "seconds": 60.0,
        "hardware": "a machine",
        "versions": {"jax": "0"},
        "outputs_reused": 0,
        "protocol": {"source": "folder:tiles", "images": 4, "samples": 1, "seed": 0, "crop": None},
        "models": [{"label": "sr3", **model}, {"label": "regression", **model}],
        "images": [{"name": name} for name in NAMES],
        "rows": rows,
    }


def training_folder(path) -> None:
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


def experiment_folder(path) -> None:
    """A finished run of the photographs experiment, in part."""
    training_folder(path / "sr3")
    for run in ("evaluation", "recognition", "sweep"):
        (path / run).mkdir()
        (path / run / "evaluation.json").write_text(json.dumps(evaluation()))
    Image.new("RGB", (30, 20)).save(path / "evaluation" / "grid.png")


def test_differences_are_paired_and_resample_whole_groups():
    difference = np.array([1.0, 1.0, 3.0, 3.0])
    single = collect.paired(difference, np.arange(4))
    grouped = collect.paired(difference, np.array([0, 0, 1, 1]))
    assert single["mean"] == grouped["mean"] == 2.0
    assert (grouped["low"], grouped["high"]) == (1.0, 3.0)  # either of two groups may be resampled twice
    assert grouped["share"] == 1.0
    assert collect.paired(np.full(9, 0.5), np.arange(9))["low"] == 0.5


def test_images_are_grouped_by_photograph_and_person():
    assert list(collect.groups("photos", NAMES)) == [0, 0, 1, 1]
    assert list(collect.groups("fashion", NAMES)) == [0, 1, 2, 3]
    assert list(collect.groups("orl", [str(index) for index in range(6)])) == [0] * 5 + [1]


def test_rows_of_one_sampler_are_compared():
    rows = [
        row("sr3", solver="ddim", steps=5, nfe=5),
        row("sr3", solver="ddim", steps=5, nfe=5, detail="eta 0.5"),
        row("sr3", solver="ddim", steps=9, nfe=9),
        row("sr3_l1", solver="ddim", steps=5, nfe=5),
        row("regression", nfe=1),
        row("bicubic"),
    ]
    found = {(a, b): contrast for a, b, contrast in collect.contrasts(rows)}
    assert found.pop((1, 0)) == "searched - default" and found.pop((3, 0)) == "l1 - l2"
    assert {key for key, contrast in found.items() if contrast == "regression - sr3"} == {
        (4, b) for b in range(4)
    }
    assert {key for key, contrast in found.items() if contrast == "model - bicubic"} == {
        (a, 5) for a in range(5)
    }


def test_distances_of_sets_are_compared_over_the_same_resamples(tmp_path):
    """The regression's features are further from the ground truth's than SR3's, by more than chance."""
    from sr3_jax.evaluation.cache import FeatureCache
    from sr3_jax.features.statistics import FeatureProtocol

    found, count = evaluation(), 200
    found["images"] = [{"name": f"p{number}"} for number in range(count)]
    found["protocol"]["features"] = {
        "network": "n", "sha256": "f" * 64, "preprocessing": "none", "distance": "frechet_alexnet",
        "count": count, "images": count,
    }  # fmt: skip
    for at, one in enumerate(found["rows"]):
        one["images"] = {image["name"]: {"psnr": [at]} for image in found["images"]}
        one["summary"] |= {key: {"mean": float(at)} for key in ("frechet_alexnet", "kid_alexnet")}
    cache = FeatureCache(tmp_path / "outputs", FeatureProtocol("n", "frechet_alexnet", "f" * 64, "none"))
    real = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    hashes = {}
    for at, name in enumerate(("truth", "bicubic/4x", "sr3/ddim-5", "regression/4x")):
        hashes[name] = [f"{at:02x}{number:062x}" for number in range(count)]
        cache.add(hashes[name], real + {"sr3/ddim-5": 0.3, "regression/4x": 1.0}.get(name, 0.0))
        lines = [
            {"image": f"p{number}", "sample": 0, "output": output, "ground_truth": truth}
            for number, (output, truth) in enumerate(zip(hashes[name], hashes["truth"], strict=True))
        ]
        (tmp_path / "outputs" / name).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "outputs" / name / "scores.jsonl").write_text(text + '{"half')
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    pairs = collect.compact("fashion", tmp_path)["pairs"]
    columns = next(pair["columns"] for pair in pairs if pair["contrast"] == "regression - sr3")
    for key in ("frechet_alexnet", "kid_alexnet"):
        assert columns[key]["mean"] == 1.0  # the difference of the means in the table
        assert 0 < columns[key]["high"] - 1.0 == pytest.approx(1.0 - columns[key]["low"])
    assert columns["frechet_alexnet"]["low"] > 0.5


def test_kernel_distances_of_a_resample_leave_out_pairs_of_one_image():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 3))
    [value] = resample.kernel_distances(a, b, [np.array([0, 2, 3])])

    def mean(x, y):
        pairs = [(i, j) for i in (0, 2, 3) for j in (0, 2, 3) if i != j]
        return np.mean([(x[i] @ y[j] / 3 + 1) ** 3 for i, j in pairs])

    assert value == pytest.approx(1e3 * (mean(a, a) - 2 * mean(a, b)))


def test_a_training_run_is_summarized_from_its_log(tmp_path):
    training_folder(tmp_path / "sr3")
    found = collect.training(tmp_path / "sr3")
    assert (found["seconds"], found["steps"]) == (15, 120)
    assert found["peak"] == {"step": 60, "psnr": 25.0}


def test_a_stamp_names_the_commit_that_started_a_training_run(tmp_path):
    training_folder(tmp_path / "sr3")
    collect.stamp(tmp_path / "sr3")
    assert collect.training(tmp_path / "sr3")["hardware"]
    (tmp_path / "sr3" / collect.STAMP).write_text('{"commit": "an earlier one"}')
    collect.stamp(tmp_path / "sr3")
    assert collect.training(tmp_path / "sr3")["commit"] == "an earlier one"


def test_an_experiment_is_collected_without_single_images_and_with_credits(tmp_path):
    out, docs = tmp_path / "out", tmp_path / "docs"
    experiment_folder(out)
    (tmp_path / "who.csv").write_text("file,author,license,package\na.jpg,Ann,CC0,pack\nb.jpg,Bob,CC0,pack\n")
    arguments = ["results", "photos", str(out), "--docs", str(docs), "--credits", str(tmp_path / "who.csv")]
    assert collect.main(arguments) == 0
    found = json.loads((docs / "results" / "photos.json").read_text())
    assert list(found["runs"]) == ["evaluation", "recognition", "sweep"]
    assert all("images" not in one for one in found["runs"]["evaluation"]["rows"])
    [pair] = [one for one in found["runs"]["evaluation"]["pairs"] if one["contrast"] == "regression - sr3"]
    assert pair["columns"]["psnr"]["mean"] == pytest.approx(np.mean([2, 2, 2, 1.5]))
    assert f"--workdir={out}/sr3" in found["training"]["sr3"]["command"]
    assert any("Ann" in line and "CC0" in line for line in found["credits"])
    assert (docs / "images" / "results_photos.png").is_file()


def test_a_folder_without_an_evaluation_fails_with_its_name(tmp_path):
    with pytest.raises(UserError, match="nothing_here"):
        collect.collect_results("photos", tmp_path / "nothing_here", tmp_path)


def test_large_images_become_jpegs_of_bounded_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    copied = collect.copy_image(tmp_path / "noise.png", tmp_path / "docs" / "noise")
    assert copied.suffix == ".jpg" and 200_000 < copied.stat().st_size <= collect.MAX_BYTES
    Image.fromarray(noise // 255).save(tmp_path / "plain.png")
    copied = collect.copy_image(tmp_path / "plain.png", tmp_path / "docs" / "noise")
    assert copied.suffix == ".png" and [path.name for path in (tmp_path / "docs").iterdir()] == ["noise.png"]


@pytest.mark.parametrize("both", ["", "back_projection 3"])
def test_a_searched_sampler_is_compared_with_its_default_also_with_back_projection(both):
    one = row("sr3", solver="ddim", steps=5, nfe=5, detail=", ".join(filter(None, ["eta 0.5", both])))
    other = row("sr3", solver="ddim", steps=5, nfe=5, detail=both)
    assert collect.contrasts([one, other]) == [(0, 1, "searched - default")]
    assert tables.sampler(one).endswith("searched") and "searched" not in tables.sampler(other)
    assert ("back-projection" in tables.sampler(other)) == bool(both)
