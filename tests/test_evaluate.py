"""`sr3 evaluate` from end to end with a tiny model, and the parts that it is made of."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny

from sr3_jax import image_ops, metrics
from sr3_jax.cli.main import main
from sr3_jax.data.sources import Source, open_source
from sr3_jax.diffusion.sampler import sample
from sr3_jax.errors import UserError
from sr3_jax.evaluation import bench, evaluate, meters, methods, scoring
from sr3_jax.evaluation import files as evaluation_files
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_rgb, write_image
from sr3_jax.inference.model import from_config, load
from sr3_jax.sampling import SOLVERS, Sampling, inference_grid, nfe, solver_named
from sr3_jax.train.experiment import read
from sr3_jax.train.weights import export

# Two sizes, which the model pads to one: compiling takes most of the time here.
SIZES = {"b-wide": (41, 52), "a-tall": (54, 39), "c-wide": (40, 55)}


@pytest.fixture(autouse=True, scope="module")
def _plain():
    """Without the weights of LPIPS, as these tests need none: tests/test_meters.py has them."""

    def missing():
        raise UserError("LPIPS needs weights that are not installed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meters, "load_lpips", missing)
        yield


def build(scale=4, seed=0, **sections):
    """A model of random weights, made from shapes: to initialise it would compile for seconds."""
    data = {"scale": scale, "source": "photos:train"} | sections.pop("data", {})
    experiment = read(tiny.config(data=data, **sections))
    shapes = jax.eval_shape(experiment.init_params, jax.random.key(0))
    params = tiny.perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), seed=seed)
    return from_config(experiment.config, params, name=f"tiny-{scale}x")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with three images of different sizes in in/, and two exported models."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "in").mkdir()
    generator = np.random.default_rng(5)
    for name, (height, width) in SIZES.items():
        coarse = generator.uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
        rgb = np.asarray(image_ops.to_uint8(image_ops.resize_bicubic(coarse, height, width)))[0]
        write_image(folder / "in" / f"{name}.png", DecodedImage(rgb))
    for name, model in {"one": build(), "two": build(seed=1), "double": build(scale=2)}.items():
        export(folder / f"{name}.safetensors", model.params, model.config)
    return folder


def run(house, *extra, models=("one",), out):
    named = [part for name in models for part in ("--model", str(house / f"{name}.safetensors"))]
    return main(["evaluate", *named, "--data", f"folder:{house / 'in'}", "-o", str(out), *map(str, extra)])


@pytest.fixture(scope="module")
def finished(house):
    assert run(house, "--steps", "1,2", out=house / "out") == 0
    return house / "out"


def report(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_every_row_and_file_is_there(finished):
    found = report(finished)
    rows = [(row["method"], row["solver"], row["steps"], row["evaluations"]) for row in found["rows"]]
    assert rows == [
        ("bicubic", None, None, 0),
        ("one", "ddim", 1, 1),
        ("one", "ddim", 2, 2),
    ]
    assert [image["name"] for image in found["images"]] == sorted(SIZES)
    outputs = {
        path.relative_to(finished / "outputs").as_posix() for path in finished.rglob("outputs/**/*.png")
    }
    folders = ["bicubic/4x", "one/ddim-1", "one/ddim-2"]
    assert outputs == {f"{folder}/{name}.png" for folder in folders for name in SIZES}
    tops = {path.name for path in finished.iterdir() if path.is_file()}
    assert tops == {
        "evaluation.json", "evaluation.md", "evaluation.csv", "grid.png", "grid_one.png"
    }  # fmt: skip
    assert read_rgb(finished / "grid_one.png").shape[1] > read_rgb(finished / "grid.png").shape[1]
    assert (finished / "evaluation.md").read_text().count("\n| one ") == 4


def test_figures_are_those_of_the_written_images(house, finished):
    """Computed anew from the files, the low-res by another path."""
    row = report(finished)["rows"][2]
    for name, (height, width) in SIZES.items():
        whole = read_rgb(house / "in" / f"{name}.png")
        original = whole[None, : height // 4 * 4, : width // 4 * 4]
        low_res = image_ops.to_uint8(image_ops.degrade(image_ops.to_unit(original), 4))
        output = read_rgb(finished / "outputs" / "one" / "ddim-2" / f"{name}.png")[None]
        expected = {
            "psnr": metrics.psnr(output, original),
            "ssim": metrics.ssim(output, original),
            "psnr_luma": metrics.psnr_luma(output, original, crop=4),
            "ssim_luma": metrics.ssim_luma(output, original, crop=4),
            "consistency": metrics.consistency(output, low_res),
            "mean_colour_error": metrics.mean_colour_error(output, low_res),
        }
        got = row["images"][name]
        assert {key: got[key][0] for key in expected} == pytest.approx(
            {key: float(value[0]) for key, value in expected.items()}, rel=1e-4, abs=1e-4
        )
        assert got["seconds"][0] > 0
    psnr = [row["images"][name]["psnr"][0] for name in SIZES]
    assert row["summary"]["psnr"]["mean"] == pytest.approx(np.mean(psnr))
    assert row["summary"]["psnr"]["low"] <= np.mean(psnr) <= row["summary"]["psnr"]["high"]


def test_a_second_run_computes_only_what_is_missing_or_changed(house, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = report(out)
    asked = []
    whole = type(build()).upscale

    def counted(self, images, key, **options):
        asked.append((image_ops.shape, options["sampling"].solver, options["sampling"].steps))
        return whole(self, images, key, **options)

    monkeypatch.setattr("sr3_jax.inference.model.Model.upscale", counted)
    assert run(house, "--steps", "1,2", out=out) == 0
    assert asked == [] and report(out)["outputs_reused"] == 9
    assert report(out)["rows"] == before["rows"]

    gone = out / "outputs" / "one" / "ddim-2" / "b-wide.png"
    bytes_before = gone.read_bytes()
    gone.unlink()
    assert run(house, "--steps", "1,2", out=out) == 0
    assert asked == [((1, 10, 13, 3), "ddim", 2)] * 2  # the first call of a size is not timed
    assert gone.read_bytes() == bytes_before

    asked.clear()
    monkeypatch.setattr(methods, "fingerprint", lambda model: "other weights")
    assert run(house, "--steps", "2", "--solver", "ddim", out=out) == 0
    assert len(asked) == 5 and report(out)["outputs_reused"] == 3  # twice for each of two sizes
    monkeypatch.undo()
    assert run(house, "--steps", "2", "--solver", "ddim", "--seed", "1", out=out) == 0
    assert report(out)["outputs_reused"] == 0


def test_an_output_depends_on_nothing_but_its_image_model_seed_and_sample(house, finished, tmp_path):
    extra = ["--steps", "2", "--solver", "ddim", "--samples", "2", "--limit", "2"]
    assert run(house, *extra, models=("two", "one"), out=tmp_path) == 0
    same = tmp_path / "outputs" / "one" / "ddim-2"
    for name in ("a-tall", "b-wide"):
        first = read_rgb(same / f"{name}.png")
        assert np.array_equal(first, read_rgb(finished / "outputs" / "one" / "ddim-2" / f"{name}.png"))
        assert not np.array_equal(first, read_rgb(same / f"{name}.2.png"))
        assert not np.array_equal(first, read_rgb(tmp_path / "outputs" / "two" / "ddim-2" / f"{name}.png"))
    found = report(tmp_path)
    assert [row["method"] for row in found["rows"]] == ["bicubic", "two", "one"]
    assert [len(row["images"]["a-tall"]["psnr"]) for row in found["rows"]] == [1, 2, 2]
    assert len(found["images"]) == 2 and len({model["sha256"] for model in found["models"]}) == 2


def test_two_scales_have_each_their_bicubic(house, tmp_path, capsys):
    assert run(house, "--steps", "1", "--crop", "32", models=("one", "double"), out=tmp_path) == 0
    rows = report(tmp_path)["rows"]
    assert [(row["method"], row["scale"]) for row in rows] == [
        ("bicubic", 4), ("bicubic", 2), ("one", 4), ("double", 2)
    ]  # fmt: skip
    assert rows[1]["summary"]["psnr"]["mean"] > rows[0]["summary"]["psnr"]["mean"]
    for folder in ("one/ddim-1", "double/ddim-1", "bicubic/2x"):
        assert read_rgb(tmp_path / "outputs" / folder / "a-tall.png").shape == (32, 32, 3)
    out = capsys.readouterr().out
    assert "| double  |    2x |" in out and "the centre 32x32 of each" in out
    centre = read_rgb(house / "in" / "a-tall.png")[11:43, 3:35]
    assert np.array_equal(scoring.original_at(read_rgb(house / "in" / "a-tall.png"), 4, 32), centre)


def test_a_image_that_cannot_be_read_is_named_and_left_out(house, tmp_path):
    rows = [evaluate.bicubic(4)]
    good = open_source(f"folder:{house / 'in'}")

    def load_some(index):
        if index == 1:
            raise ImageError("is truncated")
        return {"image": good[index]["image"].copy()}

    calls = []
    source = Source("three", load_some, 3, file_name=good.file_name)
    done = evaluate.evaluate(rows, source, tmp_path, on_output=calls.append)
    assert done.failed == ("record 1: is truncated",)
    assert [item.name for item in done.items] == ["a-tall", "c-wide"] and sum(calls) == 3
    assert done.scores[0]["psnr"].shape == (2, 1)


def test_each_image_and_sample_has_noise_of_its_own(house, tmp_path):
    def keys_of(folder, count, seed=0):
        keys = {}

        def upscale(low_res, key, labels):
            keys.setdefault(low_res.tobytes(), []).append(tuple(jax.random.key_data(key)[0].tolist()))
            return scoring.interpolated(low_res, 4)

        method = evaluate.Method("m", 4, upscale, {}, "ddim", 2)
        source = open_source(f"folder:{house / 'in'}")
        evaluate.evaluate([method], source, folder, samples=2, seed=seed, limit=count)
        return {image: set(of) for image, of in keys.items()}

    three, two = keys_of(tmp_path / "a", 3), keys_of(tmp_path / "b", 2)
    assert len(three) == 3 and len(set.union(*three.values())) == 6
    assert all(three[image] == keys for image, keys in two.items())
    assert set.union(*keys_of(tmp_path / "c", 3, seed=1).values()).isdisjoint(set.union(*three.values()))


def test_a_model_without_finite_outputs_is_one_sentence(house, tmp_path, monkeypatch, capsys):
    def broken(self, images, key, **options):
        raise FloatingPointError("model one gave values that are not finite")

    monkeypatch.setattr("sr3_jax.inference.model.Model.upscale", broken)
    assert run(house, "--steps", "3", out=tmp_path) == 2
    assert "not finite (ddim, 3 steps)" in capsys.readouterr().err


def test_told_to_stop_it_keeps_what_is_there_and_the_next_run_goes_on(house, tmp_path, monkeypatch, capsys):
    real, calls = bench.timed, []

    def signalled(run, low_res, key, labels, *, warm):
        calls.append(low_res.shape)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(run, low_res, key, labels, warm=warm)

    monkeypatch.setattr(bench, "timed", signalled)
    assert run(house, "--steps", "2", out=tmp_path) == 143
    assert "Stopped. Run the same command again to go on from there." in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists() and len(calls) == 3
    assert run(house, "--steps", "2", out=tmp_path) in (0, 3)
    assert "3 outputs were there already" in capsys.readouterr().out


def test_an_exact_output_has_infinite_psnr_and_the_files_are_json(tmp_path):
    flat = Source("flat", lambda index: {"image": np.full((32, 40, 3), 77, np.uint8)}, 2)
    assert (
        evaluate.evaluate([evaluate.bicubic(4)], flat, tmp_path).scores[0]["psnr"].tolist() == [[np.inf]] * 2
    )
    done = evaluate.evaluate([evaluate.bicubic(4)], flat, tmp_path)  # read back
    assert done.reused == 2 and done.scores[0]["psnr"].tolist() == [[np.inf]] * 2
    lines = (tmp_path / "bicubic" / "4x" / "scores.jsonl").read_text().splitlines()
    found = [scores for line in lines for scores in json.loads(line)["measures"].values()]
    assert [scores["psnr"] for scores in found] == [None, None]
    written = evaluation_files.assemble(
        done, [evaluate.bicubic(4)], [], source="flat", samples=1, seed=0, crop=None, seconds=1.0, command=[]
    )
    evaluation_files.write_tables(tmp_path, written)
    assert report(tmp_path)["rows"][0]["summary"]["psnr"] == {"mean": None, "low": None, "high": None}
    assert " inf |" in (tmp_path / "evaluation.md").read_text()


def test_a_model_gives_a_row_for_each_solver_and_number_of_steps():
    model = build()
    rows = evaluate.sampled(model, "m", solvers=["heun", "ddim"], steps=[5, 2])
    assert [(row.name, row.solver, row.steps, row.evaluations) for row in rows] == [
        ("m", "heun", 5, 9), ("m", "heun", 2, 3), ("m", "ddim", 5, 5), ("m", "ddim", 2, 2)
    ]  # fmt: skip
    assert len({json.dumps(row.identity) for row in rows}) == len({row.folder for row in rows}) == 4
    own = evaluate.sampled(model, "m")
    assert [(row.solver, row.steps, row.own) for row in own] == [(model.solver, model.steps, True)]
    assert [row.own for row in rows] == [False, False, False, True]


def test_a_searched_sampler_has_a_row_beside_the_usual_one():
    searched = Sampling("ddim", 3, spacing="linear", log_snr_min=1.25, eta=0.5)
    model = dataclasses.replace(build(), sampling=searched)
    rows = evaluate.sampled(model, "m", steps=[3, 5], unsearched=True)
    assert [(row.steps, row.detail, row.own) for row in rows] == [
        (3, "", False),
        (3, "spacing linear, log_snr_min 1.25, eta 0.5", True),
        (5, "", False),
    ]
    assert len({row.folder for row in rows}) == 3
    assert [row.own for row in evaluate.sampled(model, "m")] == [True]
    low_res = np.random.default_rng(0).integers(0, 256, (1, 10, 12, 3), np.uint8)
    keys = jax.vmap(jax.random.key)(np.arange(1))
    made = [row.run(low_res, jax.random.clone(keys), np.zeros(1, int)) for row in rows[:2]]
    assert not np.array_equal(*made)
    wanted = model.upscale(low_res, jax.random.clone(keys), sampling=searched)
    assert np.array_equal(made[1], wanted)


def test_a_model_of_classes_is_given_the_label_of_each_image(house, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "data"))
    for name, label in (("a-tall", "cat"), ("b-wide", "dog"), ("c-wide", "dog")):
        (tmp_path / "in" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(house / "in" / f"{name}.png", tmp_path / "in" / label)
    assert main(["prepare", str(tmp_path / "in"), "--name=pets"]) == 0
    model = build(model={"num_classes": 2}, data={"label_dropout": 0.1})
    export(tmp_path / "pets.safetensors", model.params, model.config)
    given = {}
    plain = type(model).upscale

    def upscale(self, images, key, *, labels=None, **how):
        known = [None] * len(images) if labels is None else labels.tolist()
        given.update(zip([image.tobytes() for image in images], known, strict=True))
        return plain(self, images, key, labels=labels, **how)

    monkeypatch.setattr(type(model), "upscale", upscale)
    command = [
        "evaluate",
        "--model",
        str(tmp_path / "pets.safetensors"),
        "--steps=1",
        "-o",
        str(tmp_path / "out"),
    ]

    def told(*options):
        """{height of the original: the label that the model was told}"""
        given.clear()
        assert main([*command, *options]) == 0
        source = open_source(f"folder:{house / 'in'}")
        originals = [source[index]["image"] for index in range(3)]
        return {
            image.shape[0]: given[low_res.tobytes()]
            for image in originals
            if (low_res := scoring.low_res_of(scoring.original_at(image, 4, None)[None], 4)[0]).tobytes()
            in given
        }

    labels = {54: 0, 41: 1, 40: 1}
    assert told("--data=tfds:pets:train") == labels
    assert "told the label of each image" in (tmp_path / "out" / "evaluation.md").read_text()
    assert told("--data=tfds:pets:train") == {}  # all is there
    # Without labels, and with others, they are other outputs than those that are kept.
    assert told("--data=tfds:pets:train", "--no-labels") == dict.fromkeys(labels)
    assert told(f"--data=folder:{tmp_path / 'in'}") == {}
    (tmp_path / "in" / "cat").rename(tmp_path / "in" / "zebra")
    assert main(["prepare", str(tmp_path / "in"), "--name=pets", "--overwrite"]) == 0
    assert told("--data=tfds:pets:train") == {54: 1, 41: 0, 40: 0}
    # A model without classes is told none.
    command[2] = str(house / "one.safetensors")
    assert told("--data=tfds:pets:train") == dict.fromkeys(labels)
    # More classes than it knows are refused before anything is drawn.
    command[2] = str(tmp_path / "pets.safetensors")
    (tmp_path / "in" / "ape").mkdir()
    shutil.copy(house / "in" / "a-tall.png", tmp_path / "in" / "ape")
    assert main(["prepare", str(tmp_path / "in"), "--name=pets", "--overwrite"]) == 0
    given.clear()
    capsys.readouterr()
    assert main([*command, "--data=tfds:pets:train"]) == 2
    assert (
        "tfds:pets:train has 3 classes, and model pets.safetensors knows 2" in capsys.readouterr().err
        and not given
    )


def test_a_model_is_shown_by_its_own_sampler_or_by_most_steps():
    def method(name, solver, steps, own=False):
        return evaluate.Method(name, 4, lambda low_res, key: low_res, {}, solver, steps, "", steps, own)

    rows = [evaluate.bicubic(4), method("a", "ddim", 5, True), method("b", "ddim", 5)]
    rows += [method("a", "ddim", 50), method("b", "ddim", 50), method("b", "heun", 50)]
    groups = evaluation_files.by_model(rows)
    assert groups == {"a": [1, 3], "b": [2, 4, 5]}
    assert [evaluation_files.representative(rows, numbers) for numbers in groups.values()] == [1, 4]


@pytest.mark.parametrize("solver", SOLVERS)
def test_network_evaluations_are_counted_right(solver):
    calls = []

    def denoiser(y, gamma, cond):
        calls.append(1)
        return 0.1 * y

    schedule = inference_grid(build().schedule, 3, solver)
    with jax.disable_jit():
        sample(
            denoiser,
            jax.random.key(0),
            {},
            shape=(1, 2, 2, 3),
            schedule=schedule,
            solver=solver_named(solver),
        )
    assert len(calls) == nfe(solver, 3)


def test_only_new_sizes_are_run_twice_and_slow_ones_never(monkeypatch):
    keys = []

    def upscale(low_res, key, labels):
        assert labels.tolist() == [5]
        keys.append(jax.random.key_data(jax.random.clone(key)).tolist())
        return low_res

    image, labels = np.zeros((4, 4, 3), np.uint8), np.array([5])
    assert bench.timed(upscale, image, jax.random.key(3), labels, warm=True)[0] is image
    assert len(keys) == 1
    bench.timed(upscale, image, jax.random.key(3), labels, warm=False)
    assert len(keys) == 3 and keys[1] == keys[2]
    clock = iter([0.0, 100.0, 100.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.timed(upscale, image, jax.random.key(3), labels, warm=False)[1] == 100.0
    assert len(keys) == 4


def test_the_fingerprint_is_of_the_weights(house):
    model = load(house / "one.safetensors")
    assert evaluate.fingerprint(model) == evaluate.fingerprint(build())
    leaves, tree = jax.tree.flatten(model.params)
    leaves[3] = leaves[3] + np.float32(1e-6)
    changed = dataclasses.replace(model, params=jax.tree.unflatten(tree, leaves))
    assert evaluate.fingerprint(changed) != evaluate.fingerprint(model)


def test_labels_are_short_and_unique():
    names = ["out/run", "x/run.safetensors", "photo_4x", "bicubic", "at.step.5"]
    assert evaluate.labels(names) == ["run", "run_2", "photo_4x", "bicubic_2", "at_step_5"]


def test_sources_know_the_names_of_their_files(house, tmp_path, monkeypatch):
    source = open_source(f"folder:{house / 'in'}")
    assert [source.file_name(index) for index in range(3)] == [f"{name}.png" for name in sorted(SIZES)]
    assert Source("numbers", lambda index: {}, 3).file_name(2) == "00002"
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path))
    assert open_source("photos:test").file_name(5) == "kingfisher.jpg"


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--steps", "5,x"], "--steps must be a whole number, 1 or more, got 'x'"),
        (["--steps", "0"], "--steps must be a whole number, 1 or more, got '0'"),
        (["--steps", "5,,6"], "--steps='5,,6' has an empty part"),
        (["--solver", "euler"], "solver must be one of ancestral, ddim"),
        (["--samples", "-1"], "--samples must be a whole number"),
        (["--seed", "1e3"], "--seed must be a whole number, 0 to 4294967295, got '1e3'"),
        (["--limit", "0"], "--limit must be"),
        (["--batch", "0"], "--batch must be a whole number, 1 or more, got '0'"),
        (["--patch", "30"], "--patch must be"),
        (
            ["--features", "vgg"],
            "--features=vgg is unknown: take inception:FILE, alexnet, classifier or none",
        ),
        (
            ["--features", "inception"],
            "write inception:pt_inception-2015-12-05-6726825d.pth, or take alexnet",
        ),
        (["--classifier", "nonesuch.onnx"], "nonesuch.onnx"),
        (["--reference", "x.npz"], "--reference=x.npz needs the network it was made with"),
        (["--save-reference", "x.npz"], "--save-reference needs a network: name it with --features"),
        (["--crop", "30"], "--crop=30 must be a multiple of the scale, 4, and at least 20"),
        (["--crop", "16"], "--crop=16 must be"),
        (["--crop", "400"], "holds no image that can be used"),
        (["--data", "nowhere"], "no data source is called 'nowhere'"),
        (["--data", "folder:/nonexistent"], "is not a folder"),
        (["--model", "nonesuch"], "no model 'nonesuch'"),
        (["-o", "{house}/one.safetensors"], "one.safetensors is a file: name a folder"),
        (["-o", "{house}/one.safetensors/x"], "cannot be written (not a directory)"),
    ],
)
def test_mistakes_are_one_sentence(house, tmp_path, capsys, extra, sentence):
    assert run(house, *(text.format(house=house) for text in extra), out=tmp_path) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "left out" not in line]
    assert len(err) == 1 and err[0].startswith("sr3 evaluate: ") and sentence in err[0]
