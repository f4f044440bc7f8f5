"""`sr3 search-schedule` end to end on a tiny model: its metrics, its choice and its files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from test_set_metrics import frechet

from sr3_jax import metrics
from sr3_jax.cli.main import main
from sr3_jax.config import build
from sr3_jax.config.load import complete
from sr3_jax.data.crops import Crops, crops_of, halves, search_and_check, shrunk
from sr3_jax.data.sources import Source
from sr3_jax.evaluation import candidates, search
from sr3_jax.evaluation.candidates import OutOfTime
from sr3_jax.evaluation.search import choose
from sr3_jax.features import metric_suite
from sr3_jax.features.networks import Network
from sr3_jax.features.statistics import FeatureProtocol
from sr3_jax.image_io.image_file import ImageError, read_rgb
from sr3_jax.image_ops import degrade, to_uint8, to_unit
from sr3_jax.inference import loading as models
from sr3_jax.inference import sampling_file
from sr3_jax.sampling import Sampling
from sr3_jax.train import weights
from tests import tiny

CROP = 32
SHORT = ["--metric", "psnr", "--candidates", "3", "--crops", "8", "--crop", str(CROP)]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sr3_jax.evaluation.candidates.REFINEMENTS", 1)
        yield


def exported(path: Path, **sections) -> models.Model:
    values = complete(tiny.config(**sections))
    network = build.build_network(values["model"])
    shapes = jax.eval_shape(lambda key: build.init_params(network, key), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    weights.export(path, tiny.perturbed(zeros), values)
    return models.load(path)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    tiny.images(folder / "in", count=4, side=70)
    exported(folder / "m.safetensors")
    exported(
        folder / "regression.safetensors",
        model={"regression": True},
        diffusion={"prediction": "y0"},
        sampling={"steps": 1},
    )
    return folder


def run(workspace: Path, out: Path, *extra: object, model: str = "m") -> int:
    named = ["--model", str(workspace / f"{model}.safetensors"), "--data", f"folder:{workspace / 'in'}"]
    return main(["search-schedule", *named, "-o", str(out), *SHORT, *map(str, extra)])


@pytest.fixture(scope="module")
def finished(workspace) -> Path:
    assert run(workspace, workspace / "out", "--solver", "ancestral,ddim", "--steps", "2,1") == 0
    return workspace / "out"


def report(folder: Path) -> dict:
    return json.loads((folder / "search.json").read_text())


# ---- The command


def test_result_becomes_the_models_default(workspace, finished):
    found, stored = report(finished), sampling_file.read_sampling(workspace / "m.sampling.json")
    model = models.load(workspace / "m.safetensors")
    assert model.sampling == stored.sampling == Sampling(**found["chosen"]) != Sampling("ddim", 2)
    assert (
        stored.weights == sampling_file.params_fingerprint(model.params) and stored.model == "m.safetensors"
    )
    found = stored.found
    assert (found["metric"], found["crop"], found["seed"], found["guarded"]) == ("psnr", CROP, 0, True)
    assert found["value"] > found["default"]["value"] and found["metrics"]["psnr"] == found["value"]


def test_table_has_each_solver_and_budget_with_its_default(finished):
    rows = report(finished)["rows"]
    jobs = {(row["sampling"]["solver"], row["nfe"]) for row in rows}
    assert jobs == {("ancestral", 2), ("ancestral", 1), ("ddim", 2), ("ddim", 1)}
    for job in jobs:
        of = [row for row in rows if (row["sampling"]["solver"], row["nfe"]) == job]
        assert of[0]["which"] == "default" and of[0]["sampling"]["spacing"] is None
        best = of[-1]
        assert best["search"]["psnr"] >= of[0]["search"]["psnr"] and len(of) <= 2
        for row in of:
            assert set(row["check"]) >= {"psnr", "ssim", "consistency"}
            assert row["search"] != row["check"]
    page = (finished / "search.md").read_text()
    assert page.count("| ancestral") >= 3 and "Chosen: " in page


def test_metrics_are_those_of_the_models_outputs(workspace, finished):
    """Computed in another way: the crops cut by hand, all of them in one batch."""
    images = [read_rgb(path) for path in sorted((workspace / "in").iterdir())]
    tiles = {
        part: np.stack(
            [image[3 + row : 35 + row, 3 + column : 35 + column] for image in images[first::2]
             for row in (0, 32) for column in (0, 32)]
        )
        for part, first in (("search", 0), ("check", 1))
    }  # fmt: skip
    model = models.load(workspace / "m.safetensors")
    for part, truths in tiles.items():
        crops = search_and_check(f"folder:{workspace / 'in'}", None, crop=CROP, count=8)
        images = crops[part == "check"].images
        assert {image.tobytes() for image in images} == {image.tobytes() for image in truths}
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(np.arange(8))
        for row in report(finished)["rows"]:
            chosen = Sampling(**row["sampling"])
            low_res = metric_suite.low_res_of(images, 4)
            outputs = model.upscale(low_res, jax.random.clone(keys), sampling=chosen)
            assert row[part]["psnr"] == pytest.approx(float(np.mean(metrics.psnr(outputs, images))), abs=1e-3)
            wanted = float(np.mean(metrics.consistency(outputs, low_res)))
            assert row[part]["consistency"] == pytest.approx(wanted, rel=1e-3)


def counted(monkeypatch, *, fail_at: int = 10**9) -> list[Sampling]:
    calls: list[Sampling] = []
    whole = models.Model.upscale

    def upscale(self, *arguments, **options):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(options["sampling"])
        return whole(self, *arguments, **options)

    monkeypatch.setattr(models.Model, "upscale", upscale)
    return calls


def test_second_run_samples_nothing(workspace, finished, monkeypatch):
    before = report(finished)
    calls = counted(monkeypatch)
    assert run(workspace, finished, "--solver", "ancestral,ddim", "--steps", "2,1") == 0
    assert calls == [] and report(finished)["rows"] == before["rows"]
    assert run(workspace, finished, "--solver", "ddim", "--steps", "2", "--metric", "ssim", "--no-store") == 0
    assert len(calls) < 10  # metrics of one search are cached for another


def test_stopped_search_continues_to_the_same_result(workspace, tmp_path, monkeypatch):
    extra = ["--solver", "ddim", "--steps", "2", "--no-store"]
    assert run(workspace, tmp_path / "whole", *extra) == 0
    calls = counted(monkeypatch, fail_at=5)
    assert run(workspace, tmp_path / "cut", *extra) == 130
    lines = tmp_path / "cut" / "search.jsonl"
    assert (
        len(calls) == 5 == len(lines.read_text().splitlines())
        and not (tmp_path / "cut" / "search.json").exists()
    )
    lines.write_bytes(lines.read_bytes()[:-20])  # killed while it wrote
    monkeypatch.undo()
    calls = counted(monkeypatch)
    assert run(workspace, tmp_path / "cut", *extra) == 0
    assert report(tmp_path / "cut")["rows"] == report(tmp_path / "whole")["rows"]
    assert len(calls) + 4 == len((tmp_path / "whole" / "search.jsonl").read_text().splitlines())
    assert not (workspace / "regression.sampling.json").exists()


def test_without_a_gain_nothing_is_stored(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sr3_jax.evaluation.search.minimize", lambda space, *rest, **options: (space.default, 8)
    )
    before = (
        (workspace / "m.sampling.json").read_bytes() if (workspace / "m.sampling.json").exists() else None
    )
    assert run(workspace, tmp_path, "--solver", "ddim") == 0
    assert "default is kept" in capsys.readouterr().out
    assert report(tmp_path)["chosen"] is None and len(report(tmp_path)["rows"]) == 1
    after = (workspace / "m.sampling.json").read_bytes() if (workspace / "m.sampling.json").exists() else None
    assert before == after


def test_search_ends_in_time_with_what_it_has(workspace, tmp_path):
    assert run(workspace, tmp_path, "--solver", "ancestral", "--minutes", "1e-9", "--no-store") == 0
    rows = report(tmp_path)["rows"]
    assert [(row["sampling"]["solver"], row["which"], row["search"]) for row in rows] == [
        ("ancestral", "default", {}), ("ddim", "default", {})
    ]  # fmt: skip
    assert all("psnr" in row["check"] for row in rows)


def test_check_can_use_other_images(workspace, tmp_path):
    tiny.images(tmp_path / "other", count=2, side=70, seed=9)
    extra = [
        "--solver",
        "ddim",
        "--eval-data",
        f"folder:{tmp_path / 'other'}",
        "--no-store",
        "--candidates",
        1,
    ]
    assert run(workspace, tmp_path / "out", *extra) == 0
    found = report(tmp_path / "out")
    assert (found["search_crops"], found["check_crops"], found["images"]) == (8, 8, [4, 2])
    assert "crops of folder:" in (tmp_path / "out" / "search.md").read_text()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--metric", "fid"], ["metric", "fid", "psnr, ssim", "lpips, frechet"]),
        (["--solver", "euler"], ["solver", "euler", "ancestral, ddpm, ddim"]),
        (["--solver", "ddim,"], ["solver", "''"]),
        (["--steps", "0"], ["--steps", "0"]),
        (["--minutes", "0"], ["--minutes", "0"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--crop", "30"], ["crop=30", "4", "20"]),
        (["--crop", "16"], ["crop=16", "4", "20"]),
        (["--metric", "lpips", "--crop", "28"], ["metric=lpips", "31", "28"]),
        (["--metric", "frechet"], ["metric=frechet", "100", "8"]),
        (["--crop", "200"], ["200"]),
        (["--limit", "1"], ["one usable image", "eval_data"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--label", "1"], ["m.safetensors", "without labels"]),
        (["--model", "nonesuch"], ["nonesuch"]),
        (["--model", "{workspace}/regression.safetensors"], ["regression.safetensors", "regression model"]),
        (["-o", "{workspace}/m.safetensors"], ["m.safetensors", "folder"]),
    ],
)
def test_invalid_options_fail_with_the_value(workspace, tmp_path, capsys, extra, words):
    assert run(workspace, tmp_path, *(text.format(workspace=workspace) for text in extra)) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("sr3 search-schedule: ")
    ]
    assert len(lines) == 1 and [word for word in words if word not in lines[0]] == []


# ---- Crops


def test_crops_do_not_overlap_and_come_from_every_image():
    generator = np.random.default_rng(0)
    shapes = [(40, 70), (33, 33), (64, 96), (20, 90)]
    images = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    source = Source("some", lambda index: {"image": images[index].copy(), "label": index}, 4)
    crops = crops_of(source, range(4), crop=32, count=100, seed=0)
    assert np.bincount(crops.labels).tolist() == [2, 1, 6] and crops.source_images == 3
    assert len({crop.tobytes() for crop in crops.images}) == 9
    few = crops_of(source, range(4), crop=32, count=4, seed=0)
    assert sorted(few.labels.tolist()) == [0, 0, 1, 2]
    assert np.array_equal(few.images, crops_of(source, range(4), crop=32, count=4, seed=0).images)
    others = [crops_of(source, range(4), crop=32, count=4, seed=seed).images for seed in range(1, 6)]
    assert any(not np.array_equal(few.images, other) for other in others)
    assert crops.whole_batches(4).images.shape == (8, 32, 32, 3) and len(crops.whole_batches(4).labels) == 8


def test_many_images_give_one_crop_each_evenly_spaced():
    seen = []

    def load(index):
        seen.append(index)
        if index == 50:
            raise ImageError("is truncated")
        return {"image": np.full((32, 32, 3), index, np.uint8)}

    crops = crops_of(Source("many", load, 100), range(100), crop=32, count=10, seed=0)
    assert seen == list(range(0, 100, 10)) and crops.source_images == 9
    assert crops.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 60, 70, 80, 90]


def test_crops_of_pairs_are_cut_from_both_images_and_are_the_models_input(workspace, tmp_path, monkeypatch):
    whole = np.random.default_rng(0).integers(0, 256, (39 * 4, 20 * 4, 3), dtype=np.uint8)
    pair = {"image": whole, "low_res": whole[::4, ::4]}
    crops = crops_of(Source("pair", lambda index: dict(pair), 1, scale=4), [0], crop=CROP, count=4, seed=0)
    np.testing.assert_array_equal(crops.images[:, ::4, ::4], crops.low_res)
    seen = []

    def upscale(self, low_res, keys, **options):
        seen.append(low_res)
        return np.repeat(np.repeat(low_res, 4, axis=1), 4, axis=2)

    monkeypatch.setattr(models.Model, "upscale", upscale)
    suite = metric_suite.MetricSuite((metric_suite.standard_metrics(),))
    of_pairs = candidates.CropEvaluator(
        models.load(workspace / "m.safetensors"),
        crops,
        tmp_path / "s.jsonl",
        suite=suite,
        batch_size=4,
        seed=0,
    )
    of_pairs.means(Sampling("ddim", 1), 4)
    np.testing.assert_array_equal(seen[0], crops.low_res)


def test_low_res_images_are_degraded_as_in_training_or_as_requested(workspace, tmp_path, monkeypatch):
    evaluators = []

    class Recorded(candidates.CropEvaluator):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            evaluators.append(self)

    monkeypatch.setattr(search, "CropEvaluator", Recorded)
    for name, options in (
        ("default", ()),
        ("clean", ("--degradation", "clean")),
        ("photo", ("--degradation", "photo")),
    ):
        folder = tmp_path / name
        assert (
            run(
                workspace,
                folder,
                "--solver",
                "ddim",
                "--steps",
                "1",
                "--candidates",
                "1",
                "--no-store",
                *options,
            )
            == 0
        )
        assert json.loads((folder / "search.json").read_text())["degradation"] == (
            options[-1] if options else "clean"
        )
    default, clean, photo = (evaluators[index]._low_res for index in (0, 2, 4))
    np.testing.assert_array_equal(default, clean)
    assert np.mean(clean != photo) > 0.5


def test_halves_share_no_image():
    first, second = halves(7)
    assert sorted([*first, *second]) == list(range(7)) and abs(len(first) - len(second)) == 1


# ---- Metrics of crops


def evaluator(workspace, path, *, network=None, labels=None, model=None):
    images = np.random.default_rng(1).integers(0, 256, (8, CROP, CROP, 3), dtype=np.uint8)
    suite = metric_suite.MetricSuite((metric_suite.standard_metrics(),), network=network)
    return candidates.CropEvaluator(
        model or models.load(workspace / "m.safetensors"), Crops(images, labels, 1), path / "s.jsonl",
        suite=suite, batch_size=4, seed=0,
    )  # fmt: skip


def test_past_the_deadline_only_cached_metrics_are_available(workspace, tmp_path):
    one = evaluator(workspace, tmp_path)
    before = one.means(Sampling("ddim", 2), 4)
    one.deadline = -math.inf
    assert one.means(Sampling("ddim", 2), 4) == before
    with pytest.raises(OutOfTime):
        one.means(Sampling("ddim", 2), 8)


def test_outputs_that_are_not_finite_have_no_metrics(workspace, tmp_path, monkeypatch):
    def broken(self, *arguments, **options):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(models.Model, "upscale", broken)
    one = evaluator(workspace, tmp_path)
    assert one.means(Sampling("ddim", 2), 4) == {}
    objective = candidates.objective(one, "psnr", default=Sampling("heun", 2), guarded=False)
    assert objective(Sampling("ddim", 2), 4) == math.inf


class _Given:
    """An evaluator with given metrics."""

    def __init__(self, **values: dict[str, float]) -> None:
        self._values = values

    def means(self, candidate: Sampling, count: int) -> dict[str, float]:
        return self._values[candidate.solver]


def test_guard_excludes_samplings_that_are_not_consistent():
    given = _Given(
        ddim={"lpips": 0.3, "psnr": 20.0, "consistency": 2.0},
        heun={"lpips": 0.1, "psnr": 22.0, "consistency": 3.6},
        ancestral={"lpips": 0.2, "psnr": 21.0, "consistency": 3.4},
    )
    objective = candidates.objective(given, "lpips", default=Sampling("ddim"), guarded=True)
    assert [objective(Sampling(solver), 4) for solver in ("ddim", "heun", "ancestral")] == [
        0.3,
        math.inf,
        0.2,
    ]
    unguarded = candidates.objective(given, "lpips", default=Sampling("ddim"), guarded=False)
    assert unguarded(Sampling("heun"), 4) == 0.1
    assert (
        candidates.objective(given, "psnr", default=Sampling("ddim"), guarded=False)(Sampling("heun"), 4)
        == -22.0
    )


def test_frechet_distance_is_of_the_whole_set_and_is_cached(workspace, tmp_path):
    def mean_colors(images):
        return np.asarray(images, np.float32).mean(axis=(1, 2))

    network = Network(FeatureProtocol("colors", "frechet_colors", "0" * 64, "none"), mean_colors)
    one = evaluator(workspace, tmp_path, network=network)
    found = one.means(Sampling("ddim", 2), 8)["frechet_alexnet"]
    again = evaluator(workspace, tmp_path, network=network)
    again.deadline = -math.inf
    assert again.means(Sampling("ddim", 2), 8)["frechet_alexnet"] == pytest.approx(found, rel=1e-6)
    features = one.per_crop(Sampling("ddim", 2), 8)["features"]
    truth = mean_colors(np.random.default_rng(1).integers(0, 256, (8, CROP, CROP, 3), dtype=np.uint8))
    assert found == pytest.approx(frechet(features, truth), rel=1e-3)
    objective = candidates.objective(one, "frechet", default=Sampling("ddim", 2), guarded=False)
    assert objective(Sampling("ddim", 2), 8) == found


def test_class_conditional_network_receives_labels(workspace, tmp_path, monkeypatch):
    given = []

    def upscale(self, images, key, *, labels=None, sampling=None):
        given.append(labels)
        return np.zeros((len(images), CROP, CROP, 3), np.uint8)

    monkeypatch.setattr(models.Model, "upscale", upscale)
    labels = np.arange(8, dtype=np.int32)
    evaluator(workspace, tmp_path, labels=labels).means(Sampling("ddim", 2), 8)
    classy = exported(tmp_path / "c.safetensors", model={"num_classes": 8})
    evaluator(workspace, tmp_path, labels=labels, model=classy).means(Sampling("ddim", 2), 8)
    assert given[:2] == [None, None]
    assert [part.tolist() for part in given[2:]] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_one_label_serves_images_without_labels(workspace, tmp_path, capsys):
    exported(workspace / "classes.safetensors", model={"num_classes": 3})
    options = ["--solver=ddim", "--steps=1", "--candidates=1"]
    for extra, words in ((["--label=3"], "got 3"), ([], "--label")):
        assert run(workspace, tmp_path, *options, *extra, model="classes") == 2
        assert words in capsys.readouterr().err
    found = []
    for label in (0, 1):  # metrics of another label are not reused
        assert run(workspace, tmp_path, *options, f"--label={label}", model="classes") == 0
        found.append(report(tmp_path))
    assert [one["label"] for one in found] == [0, 1]
    assert found[0]["rows"][0]["check"] != found[1]["rows"][0]["check"]


# ---- The choice


def row(
    which: str, solver: str, search: float, check: float, low: float | None = 0.01, usual: float = 0.3
) -> dict:
    return {
        "which": which,
        "nfe": 5,
        "sampling": {"solver": solver, "steps": 5},
        "search": {"lpips": search},
        "own": {"lpips": usual},
        "check": {"lpips": check},
        "over_own": None if low is None else {"low": low},
    }


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([("best", "ddim", 0.2, 0.25)], 1),
        ([("best", "ddim", 0.2, 0.31)], None),  # better only on the crops of the search
        ([("best", "ddim", 0.2, 0.25, -0.01)], None),  # not by more than chance
        ([("best", "ddim", 0.2, 0.25, None)], 1),  # a metric of the whole set, without an interval
        ([("best", "ddim", 0.4, 0.25)], None),
        ([("best", "ddim", 0.2, 0.25), ("default", "ancestral", 0.1, 0.2)], 2),
        (
            [("best", "ddim", 0.2, 0.25), ("best", "ancestral", 0.1, 0.2, 0.01, 0.15)],
            1,
        ),  # on other, easier crops
    ],
)
def test_choice_must_hold_on_crops_of_the_check(rows, chosen):
    own = Sampling("heun", 5)
    default = row("default", "heun", 0.3, 0.3) | {"sampling": dataclasses.asdict(own)}
    rows = [default, *(row(*values) for values in rows)]
    rows.append(row("best", "dpmpp_2m", 0.01, 0.01) | {"nfe": 25})  # not the first budget
    best, against = choose(rows, own=own, nfe=5, metric="lpips")
    assert best is (None if chosen is None else rows[chosen])
    assert against is default


def test_stage_of_a_cascade_is_searched_on_images_of_its_training_size():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    crops = Crops(images, None, 2)
    assert shrunk(crops, 1) is crops
    expected = to_uint8(degrade(to_unit(images), 4))
    np.testing.assert_array_equal(shrunk(crops, 4).images, expected)
