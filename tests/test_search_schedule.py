"""sr3 search-schedule end to end on a tiny model, and what its figures, its choice and its file are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from sr3_jax import metrics, sampling
from sr3_jax.cli.main import main
from sr3_jax.config import build
from sr3_jax.config.load import complete
from sr3_jax.data.crops import Crops, crops_of, halves
from sr3_jax.data.sources import Source
from sr3_jax.evaluation import measures, scoring
from sr3_jax.image_io.image_file import ImageError, read_rgb
from sr3_jax.image_ops import degrade, to_uint8, to_unit
from sr3_jax.inference import model as models
from sr3_jax.inference import sampling_file
from sr3_jax.sampling import Sampling
from sr3_jax.search import inputs as search_inputs
from sr3_jax.search import report as search_report
from sr3_jax.search import scores
from sr3_jax.search.successive_halving import TimeUp
from sr3_jax.train import experiment, weights
from tests import tiny

CROP = 32
SHORT = ["--metric", "psnr", "--candidates", "3", "--crops", "8", "--crop", str(CROP)]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sr3_jax.search.successive_halving.REFINEMENTS", 1)
        yield


def exported(path: Path, **sections) -> models.Model:
    values = json.loads(json.dumps(experiment.read(tiny.config(**sections)).config))
    network = build.build_network(complete(values)["model"])
    shapes = jax.eval_shape(lambda key: build.init_params(network, key), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    weights.export(path, tiny.perturbed(zeros), values)
    return models.load(path)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    tiny.images(folder / "in", count=4, side=70)
    exported(folder / "m.safetensors")
    exported(
        folder / "regression.safetensors",
        model={"regression": True},
        diffusion={"prediction": "y0"},
        eval={"steps": 1},
    )
    return folder


def run(house: Path, out: Path, *extra: object, model: str = "m") -> int:
    named = ["--model", str(house / f"{model}.safetensors"), "--data", f"folder:{house / 'in'}"]
    return main(["search-schedule", *named, "-o", str(out), *SHORT, *map(str, extra)])


@pytest.fixture(scope="module")
def finished(house) -> Path:
    assert run(house, house / "out", "--solver", "ancestral,ddim", "--steps", "2,1") == 0
    return house / "out"


def report(folder: Path) -> dict:
    return json.loads((folder / "search.json").read_text())


# ---- The command


def test_what_it_found_is_the_models_default_from_then_on(house, finished):
    found, stored = report(finished), sampling_file.read_sampling(house / "m.sampling.json")
    model = models.load(house / "m.safetensors")
    assert model.sampling == stored.sampling == Sampling(**found["chosen"]) != Sampling("ddim", 2)
    assert (
        stored.weights == sampling_file.params_fingerprint(model.params) and stored.model == "m.safetensors"
    )
    about = stored.found
    assert (about["metric"], about["crop"], about["seed"], about["guarded"]) == ("psnr", CROP, 0, True)
    assert about["score"] > about["default"]["score"] and about["figures"]["psnr"] == about["score"]


def test_the_table_has_every_race_with_its_default(finished):
    rows = report(finished)["rows"]
    races = {(row["sampling"]["solver"], row["evaluations"]) for row in rows}
    assert races == {("ancestral", 2), ("ancestral", 1), ("ddim", 2), ("ddim", 1)}
    for solver, evaluations in races:
        of = [row for row in rows if (row["sampling"]["solver"], row["evaluations"]) == (solver, evaluations)]
        assert of[0]["which"] == "default" and of[0]["sampling"]["spacing"] is None
        best = of[-1]
        assert best["search"]["psnr"] >= of[0]["search"]["psnr"] and len(of) <= 2
        for row in of:
            assert set(row["check"]) >= {"psnr", "ssim", "consistency"}
            assert row["search"] != row["check"]
    page = (finished / "search.md").read_text()
    assert page.count("| ancestral") >= 3 and "Chosen: " in page and "not seen by the search" in page


def test_its_figures_are_those_of_the_models_outputs(house, finished):
    """From the files by another path: the crops by hand, the whole batch at once."""
    images = [read_rgb(path) for path in sorted((house / "in").iterdir())]
    tiles = {
        part: np.stack(
            [image[3 + row : 35 + row, 3 + column : 35 + column] for image in images[first::2]
             for row in (0, 32) for column in (0, 32)]
        )
        for part, first in (("search", 0), ("check", 1))
    }  # fmt: skip
    model = models.load(house / "m.safetensors")
    for part, originals in tiles.items():
        crops, _ = search_inputs.open_crops(
            model, f"folder:{house / 'in'}", None, metric="psnr", crop=CROP, count=8
        )
        images = crops[part == "check"].images
        assert {image.tobytes() for image in images} == {image.tobytes() for image in originals}
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(np.arange(8))
        for row in report(finished)["rows"]:
            chosen = Sampling(**row["sampling"])
            low_res = scoring.low_res_of(images, 4)
            outputs = model.upscale(low_res, jax.random.clone(keys), sampling=chosen)
            assert row[part]["psnr"] == pytest.approx(float(np.mean(metrics.psnr(outputs, images))), abs=1e-3)
            wanted = float(np.mean(metrics.consistency(outputs, low_res)))
            assert row[part]["consistency"] == pytest.approx(wanted, rel=1e-3)


def counted(monkeypatch, *, fail_at: int = 10**9) -> list[Sampling]:
    asked: list[Sampling] = []
    whole = models.Model.upscale

    def upscale(self, *arguments, **options):
        if len(asked) == fail_at:
            raise KeyboardInterrupt
        asked.append(options["sampling"])
        return whole(self, *arguments, **options)

    monkeypatch.setattr(models.Model, "upscale", upscale)
    return asked


def test_the_same_command_again_computes_nothing(house, finished, monkeypatch):
    before = report(finished)
    asked = counted(monkeypatch)
    assert run(house, finished, "--solver", "ancestral,ddim", "--steps", "2,1") == 0
    assert asked == [] and report(finished)["rows"] == before["rows"]
    assert run(house, finished, "--solver", "ddim", "--steps", "2", "--metric", "ssim", "--no-store") == 0
    assert len(asked) < 10  # the scores of one metric are there for another


def test_one_that_was_stopped_goes_on_and_ends_alike(house, tmp_path, monkeypatch):
    extra = ["--solver", "ddim", "--steps", "2", "--no-store"]
    assert run(house, tmp_path / "whole", *extra) == 0
    asked = counted(monkeypatch, fail_at=5)
    assert run(house, tmp_path / "cut", *extra) == 130
    lines = tmp_path / "cut" / "search.jsonl"
    assert (
        len(asked) == 5 == len(lines.read_text().splitlines())
        and not (tmp_path / "cut" / "search.json").exists()
    )
    lines.write_bytes(lines.read_bytes()[:-20])  # killed while it wrote
    monkeypatch.undo()
    asked = counted(monkeypatch)
    assert run(house, tmp_path / "cut", *extra) == 0
    assert report(tmp_path / "cut")["rows"] == report(tmp_path / "whole")["rows"]
    assert len(asked) + 4 == len((tmp_path / "whole" / "search.jsonl").read_text().splitlines())
    assert not (house / "regression.sampling.json").exists()


def test_without_a_gain_nothing_is_stored_and_it_says_so(house, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sr3_jax.search.successive_halving.best", lambda race, *rest, **options: (race.default, 8)
    )
    before = (house / "m.sampling.json").read_bytes() if (house / "m.sampling.json").exists() else None
    assert run(house, tmp_path, "--solver", "ddim") == 0
    assert "by more than chance: the default stands" in capsys.readouterr().out
    assert report(tmp_path)["chosen"] is None and len(report(tmp_path)["rows"]) == 1
    after = (house / "m.sampling.json").read_bytes() if (house / "m.sampling.json").exists() else None
    assert before == after


def test_it_ends_in_time_with_what_there_is(house, tmp_path):
    assert run(house, tmp_path, "--solver", "ancestral", "--minutes", "1e-9", "--no-store") == 0
    rows = report(tmp_path)["rows"]
    assert [(row["sampling"]["solver"], row["which"], row["search"]) for row in rows] == [
        ("ancestral", "default", {}), ("ddim", "default", {})
    ]  # fmt: skip
    assert all("psnr" in row["check"] for row in rows)


def test_other_images_can_be_given_to_see_on(house, tmp_path):
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
    assert run(house, tmp_path / "out", *extra) == 0
    found = report(tmp_path / "out")
    assert (found["search_crops"], found["check_crops"], found["images"]) == (8, 8, [4, 2])
    assert "crops of folder:" in (tmp_path / "out" / "search.md").read_text()


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--metric", "fid"], "--metric must be one of psnr, ssim, psnr_luma, ssim_luma, lpips, frechet"),
        (["--solver", "euler"], "solver must be one of ancestral, ddim"),
        (["--solver", "ddim,"], "solver must be one of ancestral, ddim, dpmpp_2m, heun, got ''"),
        (["--steps", "0"], "0 is too small"),
        (["--steps", "5,x"], "invalid list of whole numbers value: '5,x'"),
        (["--minutes", "0"], "0 is out of range: it must be above 0"),
        (["--seed", "-1"], "-1 is not a seed"),
        (["--crop", "30"], "--crop=30 must be a multiple of the scale, 4, and at least 20"),
        (["--crop", "16"], "--crop=16 must be a multiple of the scale, 4, and at least 20"),
        (
            ["--metric", "lpips", "--crop", "28"],
            "--metric=lpips needs a --crop of 31 pixels at least, got 28",
        ),
        (
            ["--metric", "frechet"],
            "--metric=frechet needs 100 crops to search on and as many to see on, got 8",
        ),
        (["--crop", "200"], "200 pixels): put images there"),
        (
            ["--limit", "1"],
            "has one image to use, and none to see on what the search is worth: give --eval-data",
        ),
        (["--data", "nowhere"], "no data source is called 'nowhere'"),
        (["--model", "nonesuch"], "no model 'nonesuch'"),
        (["--model", "{house}/regression.safetensors"], "is a regression, of one pass without a schedule"),
        (["-o", "{house}/m.safetensors"], "m.safetensors is a file: name a folder"),
    ],
)
def test_mistakes_are_one_sentence(house, tmp_path, capsys, extra, sentence):
    assert run(house, tmp_path, *(text.format(house=house) for text in extra)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "left out: " not in line]
    assert len(lines) == 1 and lines[0].startswith("sr3 search-schedule: ") and sentence in lines[0]


# ---- Crops


def test_crops_do_not_overlap_and_come_from_every_image():
    generator = np.random.default_rng(0)
    shapes = [(40, 70), (33, 33), (64, 96), (20, 90)]
    images = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    source = Source("some", lambda index: {"image": images[index].copy(), "label": index}, 4)
    crops = crops_of(source, range(4), crop=32, count=100, seed=0)
    assert np.bincount(crops.labels).tolist() == [2, 1, 6] and crops.images == 3
    assert len({crop.tobytes() for crop in crops.images}) == 9
    few = crops_of(source, range(4), crop=32, count=4, seed=0)
    assert sorted(few.labels.tolist()) == [0, 0, 1, 2]
    assert np.array_equal(few.images, crops_of(source, range(4), crop=32, count=4, seed=0).images)
    others = [crops_of(source, range(4), crop=32, count=4, seed=seed).images for seed in range(1, 6)]
    assert any(not np.array_equal(few.images, other) for other in others)
    assert crops.whole_batches(4).images.shape == (8, 32, 32, 3) and len(crops.whole_batches(4).labels) == 8


def test_many_images_give_a_crop_each_spread_evenly():
    seen = []

    def load(index):
        seen.append(index)
        if index == 50:
            raise ImageError("is truncated")
        return {"image": np.full((32, 32, 3), index, np.uint8)}

    crops = crops_of(Source("many", load, 100), range(100), crop=32, count=10, seed=0)
    assert seen == list(range(0, 100, 10)) and crops.images == 9
    assert crops.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 60, 70, 80, 90]


def test_the_two_parts_share_no_image():
    first, second = halves(7)
    assert sorted([*first, *second]) == list(range(7)) and abs(len(first) - len(second)) == 1


# ---- Scores


def judge(house, path, *, count: int = 8, batch: int = 4, features=None, labels=None, model=None, **options):
    images = np.random.default_rng(1).integers(0, 256, (count, CROP, CROP, 3), dtype=np.uint8)
    return scores.Judge(
        model or models.load(house / "m.safetensors"), Crops(images, labels, 1), scores.Ledger(path / "s.jsonl"),
        measures=[measures.plain()], features=features, batch=batch, seed=0, **options,
    )  # fmt: skip


def test_more_crops_go_on_from_what_is_scored(house, tmp_path, monkeypatch):
    asked = counted(monkeypatch)
    one = judge(house, tmp_path)
    few = one.columns(Sampling("ddim", 2), 4)
    many = one.columns(Sampling("ddim", 2), 8)
    assert len(asked) == 2 and len(many["psnr"]) == 8
    np.testing.assert_array_equal(many["psnr"][:4], few["psnr"])
    np.testing.assert_array_equal(
        judge(house, tmp_path).columns(Sampling("ddim", 2), 8)["ssim"], many["ssim"]
    )
    assert len(asked) == 2
    one.columns(Sampling("ddim", 2, "karras"), 4)
    assert len(asked) == 3


def test_past_the_deadline_only_what_is_there_is_told(house, tmp_path):
    one = judge(house, tmp_path)
    before = one.figures(Sampling("ddim", 2), 4)
    one.deadline = -math.inf
    assert one.figures(Sampling("ddim", 2), 4) == before
    with pytest.raises(TimeUp):
        one.figures(Sampling("ddim", 2), 8)


def test_outputs_that_are_not_finite_have_no_figures_and_no_chance(house, tmp_path, monkeypatch):
    def broken(self, *arguments, **options):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(models.Model, "upscale", broken)
    one = judge(house, tmp_path)
    assert one.figures(Sampling("ddim", 2), 4) == {}
    score = scores.score_by(one, "psnr", default=Sampling("heun", 2), guarded=False)
    assert score(Sampling("ddim", 2), 4) == math.inf


class _Told:
    """A judge whose figures are given."""

    def __init__(self, **figures: dict[str, float]) -> None:
        self._figures = figures

    def figures(self, candidate: Sampling, count: int) -> dict[str, float]:
        return self._figures[candidate.solver]


def test_the_guard_keeps_out_what_forgets_its_low_res_image():
    told = _Told(
        ddim={"lpips": 0.3, "psnr": 20.0, "consistency": 2.0},
        heun={"lpips": 0.1, "psnr": 22.0, "consistency": 3.6},
        ancestral={"lpips": 0.2, "psnr": 21.0, "consistency": 3.4},
    )
    score = scores.score_by(told, "lpips", default=Sampling("ddim"), guarded=True)
    assert [score(Sampling(solver), 4) for solver in ("ddim", "heun", "ancestral")] == [0.3, math.inf, 0.2]
    free = scores.score_by(told, "lpips", default=Sampling("ddim"), guarded=False)
    assert free(Sampling("heun"), 4) == 0.1
    assert (
        scores.score_by(told, "psnr", default=Sampling("ddim"), guarded=False)(Sampling("heun"), 4) == -22.0
    )


class _Means:
    """Features [B,3]: the mean of each colour."""

    class protocol:
        weights_sha256 = "none"

    def features(self, images):
        return np.asarray(images, np.float32).mean(axis=(1, 2))


def test_the_frechet_distance_is_of_the_whole_set_and_survives_a_restart(house, tmp_path):
    one = judge(house, tmp_path, features=_Means())
    found = one.figures(Sampling("ddim", 2), 8)["frechet_alexnet"]
    again = judge(house, tmp_path, features=_Means())
    again.deadline = -math.inf
    assert again.figures(Sampling("ddim", 2), 8)["frechet_alexnet"] == pytest.approx(found, rel=1e-6)
    features = one.columns(Sampling("ddim", 2), 8)["features"].astype(np.float64)
    originals = _Means().features(one._crops.images).astype(np.float64)
    mean = np.sum((features.mean(0) - originals.mean(0)) ** 2)
    product = np.linalg.eigvals(np.cov(features.T) @ np.cov(originals.T))
    rest = np.trace(np.cov(features.T) + np.cov(originals.T)) - 2 * np.sqrt(np.abs(product)).sum()
    assert found == pytest.approx(mean + rest, rel=1e-3)
    score = scores.score_by(one, "frechet", default=Sampling("ddim", 2), guarded=False)
    assert score(Sampling("ddim", 2), 8) == found


def test_labels_go_to_a_network_that_has_classes(house, tmp_path, monkeypatch):
    given = []

    def upscale(self, images, key, *, labels=None, sampling=None):
        given.append(labels)
        return np.zeros((len(images), CROP, CROP, 3), np.uint8)

    monkeypatch.setattr(models.Model, "upscale", upscale)
    labels = np.arange(8, dtype=np.int32)
    judge(house, tmp_path, labels=labels).figures(Sampling("ddim", 2), 8)
    classy = exported(tmp_path / "c.safetensors", model={"num_classes": 8})
    judge(house, tmp_path, labels=labels, model=classy).figures(Sampling("ddim", 2), 8)
    assert given[:2] == [None, None]
    assert [part.tolist() for part in given[2:]] == [[0, 1, 2, 3], [4, 5, 6, 7]]


# ---- The choice


def row(
    which: str, solver: str, search: float, check: float, low: float | None = 0.01, usual: float = 0.3
) -> dict:
    return {
        "which": which,
        "evaluations": 5,
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
        ([("best", "ddim", 0.2, 0.31)], None),  # only on the crops that were searched
        ([("best", "ddim", 0.2, 0.25, -0.01)], None),  # by chance
        ([("best", "ddim", 0.2, 0.25, None)], 1),  # of a whole set, without an interval
        ([("best", "ddim", 0.4, 0.25)], None),
        ([("best", "ddim", 0.2, 0.25), ("default", "ancestral", 0.1, 0.2)], 2),
        (
            [("best", "ddim", 0.2, 0.25), ("best", "ancestral", 0.1, 0.2, 0.01, 0.15)],
            1,
        ),  # on other, easier crops
    ],
)
def test_what_is_chosen_holds_on_crops_that_were_not_searched(rows, chosen):
    own = Sampling("heun", 5)
    default = row("default", "heun", 0.3, 0.3) | {"sampling": sampling.dataclasses.asdict(own)}
    rows = [default, *(row(*values) for values in rows)]
    rows.append(row("best", "dpmpp_2m", 0.01, 0.01) | {"evaluations": 25})  # not what was asked for first
    best, against = search_report.choose(rows, own=own, evaluations=5, metric="lpips")
    assert best is (None if chosen is None else rows[chosen])
    assert against is default


def test_a_stage_of_a_cascade_is_searched_on_images_as_it_was_trained_to_make_them():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    crops = Crops(images, None, 2)
    assert search_inputs.shrunk(crops, 1) is crops
    expected = to_uint8(degrade(to_unit(images), 4))
    np.testing.assert_array_equal(search_inputs.shrunk(crops, 4).images, expected)
