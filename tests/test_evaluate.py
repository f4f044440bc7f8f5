"""`sr3 evaluate` end to end with a tiny model, and its building blocks."""

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
from sr3_jax.errors import UserError
from sr3_jax.evaluation import evaluate, outputs, results, runner
from sr3_jax.evaluation.inputs import GroundTruth
from sr3_jax.evaluation.outputs import Settings, bicubic, model_methods, unique_labels
from sr3_jax.features import metric_suite
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_rgb, write_image
from sr3_jax.inference.loading import from_config, load
from sr3_jax.sampling import Sampling
from sr3_jax.train.experiment import read
from sr3_jax.train.weights import export

# The model pads these sizes to few: compilation takes most of the time here.
SIZES = {"b-wide": (41, 52), "a-tall": (54, 39), "c-wide": (40, 55)}


@pytest.fixture(autouse=True, scope="module")
def _without_lpips():
    """These tests do not need LPIPS; tests/test_outputs.py has it."""

    def missing():
        raise UserError("LPIPS weights are not installed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_suite, "load_lpips", missing)
        yield


def build(scale=4, seed=0, **sections):
    """A model with random weights, made from shapes: initialization would compile for seconds."""
    data = {"scale": scale, "source": "photos:train"} | sections.pop("data", {})
    experiment = read(tiny.config(data=data, **sections))
    shapes = jax.eval_shape(experiment.init_params, jax.random.key(0))
    params = tiny.perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), seed=seed)
    return from_config(experiment.config, params, name=f"tiny-{scale}x")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with three images of different sizes in in/, and three exported models."""
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


def run(workspace, *extra, models=("one",), out):
    named = [part for name in models for part in ("--model", str(workspace / f"{name}.safetensors"))]
    return main(
        ["evaluate", *named, "--data", f"folder:{workspace / 'in'}", "-o", str(out), *map(str, extra)]
    )


@pytest.fixture(scope="module")
def finished(workspace):
    assert run(workspace, "--steps", "1,2", out=workspace / "out") == 0
    return workspace / "out"


def report(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_rows_and_files(finished):
    found = report(finished)
    rows = [(row["method"], row["solver"], row["steps"], row["nfe"]) for row in found["rows"]]
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
    assert (finished / "evaluation.md").read_text().count("\n| one ") == 5  # 2 rows in 2 tables, 1 difference


def test_metrics_are_those_of_the_written_images(workspace, finished):
    """Computed again from the files, with the low-res image made in another way."""
    row = report(finished)["rows"][2]
    for name, (height, width) in SIZES.items():
        whole = read_rgb(workspace / "in" / f"{name}.png")
        truth = whole[None, : height // 4 * 4, : width // 4 * 4]
        low_res = image_ops.to_uint8(image_ops.degrade(image_ops.to_unit(truth), 4))
        output = read_rgb(finished / "outputs" / "one" / "ddim-2" / f"{name}.png")[None]
        expected = {
            "psnr": metrics.psnr(output, truth),
            "ssim": metrics.ssim(output, truth),
            "psnr_luma": metrics.psnr_luma(output, truth, crop=4),
            "ssim_luma": metrics.ssim_luma(output, truth, crop=4),
            "consistency": metrics.consistency(output, low_res),
            "mean_color_error": metrics.mean_color_error(output, low_res),
        }
        got = row["images"][name]
        assert {key: got[key][0] for key in expected} == pytest.approx(
            {key: float(value[0]) for key, value in expected.items()}, rel=1e-4, abs=1e-4
        )
        assert got["seconds"][0] > 0
    psnr = [row["images"][name]["psnr"][0] for name in SIZES]
    assert row["summary"]["psnr"]["mean"] == pytest.approx(np.mean(psnr))
    assert row["summary"]["psnr"]["low"] <= np.mean(psnr) <= row["summary"]["psnr"]["high"]


def counted(monkeypatch):
    """The (shape, solver, steps) of every batch that a model samples."""
    calls = []
    upscale = type(build()).upscale

    def wrapped(self, images, key, **options):
        calls.append((images.shape, options["sampling"].solver, options["sampling"].steps))
        return upscale(self, images, key, **options)

    monkeypatch.setattr("sr3_jax.inference.model.Model.upscale", wrapped)
    return calls


def test_second_run_samples_only_what_is_missing_or_changed(workspace, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = report(out)
    calls = counted(monkeypatch)
    assert run(workspace, "--steps", "1,2", out=out) == 0
    assert calls == [] and report(out)["outputs_reused"] == 9
    assert report(out)["rows"] == before["rows"]

    gone = out / "outputs" / "one" / "ddim-2" / "b-wide.png"
    bytes_before = gone.read_bytes()
    gone.unlink()
    assert run(workspace, "--steps", "1,2", out=out) == 0
    assert calls == [((1, 10, 13, 3), "ddim", 2)]  # no image is sampled twice
    assert gone.read_bytes() == bytes_before

    calls.clear()
    monkeypatch.setattr(outputs, "params_fingerprint", lambda params: "other weights")
    assert run(workspace, "--steps", "2", "--solver", "ddim", out=out) == 0
    assert len(calls) == 3 and report(out)["outputs_reused"] == 3
    monkeypatch.undo()
    assert run(workspace, "--steps", "2", "--solver", "ddim", "--seed", "1", out=out) == 0
    assert report(out)["outputs_reused"] == 0


def test_time_of_an_output_excludes_compilation():
    """The timed call compiles no sampling program, and its images are those of any other call."""
    model = build(seed=7)
    method = model_methods(model, "m", solvers=["heun"], steps=[4])[0]
    low_res = np.random.default_rng(0).integers(0, 256, (2, 9, 14, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), 2)
    compiled = []

    def record(event, seconds, **details):
        if event.endswith("backend_compile_duration"):
            compiled.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        method.compile(low_res.shape)
        ahead = [name for name in compiled if "generate_jit" in name]
        made = method.upscale(low_res, jax.random.clone(keys), np.zeros(2, int))
        total = [name for name in compiled if "generate_jit" in name]
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    assert len(ahead) == len(total) == 1
    assert np.array_equal(made, model.upscale(low_res, keys, solver="heun", steps=4))


def test_output_depends_only_on_its_image_model_seed_and_sample(workspace, finished, tmp_path):
    extra = ["--steps", "2", "--solver", "ddim", "--samples", "2", "--limit", "2"]
    assert run(workspace, *extra, models=("two", "one"), out=tmp_path) == 0
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


def test_each_scale_has_its_own_bicubic(workspace, tmp_path, capsys):
    assert run(workspace, "--steps", "1", "--crop", "32", models=("one", "double"), out=tmp_path) == 0
    rows = report(tmp_path)["rows"]
    assert [(row["method"], row["scale"]) for row in rows] == [
        ("bicubic", 4), ("bicubic", 2), ("one", 4), ("double", 2)
    ]  # fmt: skip
    assert rows[1]["summary"]["psnr"]["mean"] > rows[0]["summary"]["psnr"]["mean"]
    for folder in ("one/ddim-1", "double/ddim-1", "bicubic/2x"):
        assert read_rgb(tmp_path / "outputs" / folder / "a-tall.png").shape == (32, 32, 3)
    out = capsys.readouterr().out
    assert "| double  |    2x |" in out and "center 32x32" in out
    center = read_rgb(workspace / "in" / "a-tall.png")[11:43, 3:35]
    assert np.array_equal(
        GroundTruth.of("a", {"image": read_rgb(workspace / "in" / "a-tall.png")}, 4, 32).image, center
    )


STANDARD = metric_suite.MetricSuite((metric_suite.standard_metrics(),))


def test_unreadable_image_is_named_and_skipped(workspace, tmp_path):
    good = open_source(f"folder:{workspace / 'in'}")

    def load_some(index):
        if index == 1:
            raise ImageError("is truncated")
        return {"image": good[index]["image"].copy()}

    calls = []
    source = Source("three", load_some, 3, file_name=good.file_name)
    part = runner.evaluate_images(
        [bicubic(4)], source, tmp_path, STANDARD, Settings(), lambda *counts: calls.append(counts)
    )
    assert part.failed == [(1, "record 1: is truncated")]
    assert [image.name for image in part.images] == ["a-tall", "c-wide"] and calls == [(1, 3)] * 3


def test_public_function_takes_loaded_models_and_sources(workspace, tmp_path):
    model = load(workspace / "one.safetensors")
    source = open_source(f"folder:{workspace / 'in'}")
    seen = []
    done = evaluate(
        [model],
        source,
        tmp_path,
        steps=[1],
        limit=2,
        on_output=lambda count, total: seen.append((count, total)),
    )
    assert [row["method"] for row in done.report["rows"]] == ["bicubic", "one"]
    assert done.report["format"] == results.FORMAT and done.failed == () and done.reused == 0
    assert sum(count for count, _ in seen) == 4 and {total for _, total in seen} == {4}
    assert done.markdown() == (tmp_path / "evaluation.md").read_text()
    assert all(path.is_file() for path in done.files) and len(done.files) == 4


def test_processes_divide_the_images_and_the_first_merges_them(workspace, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "wait_for_all", lambda: None)
    model, data = workspace / "one.safetensors", f"folder:{workspace / 'in'}"
    assert evaluate([model], data, tmp_path, steps=[1, 2], process=(1, 2)) is None
    done = evaluate([model], data, tmp_path, steps=[1, 2], process=(0, 2))
    single = report(finished)
    assert done.report["protocol"]["processes"] == 2
    assert [image["name"] for image in done.report["images"]] == sorted(SIZES)
    for one, other in zip(done.report["rows"], single["rows"], strict=True):
        assert list(one["images"]) == list(other["images"])
        assert one["summary"]["psnr"] == other["summary"]["psnr"]


def test_outputs_that_are_not_finite_fail(workspace, tmp_path, monkeypatch, capsys):
    def broken(self, images, key, **options):
        raise FloatingPointError("model one gave values that are not finite")

    monkeypatch.setattr("sr3_jax.inference.model.Model.upscale", broken)
    assert run(workspace, "--steps", "3", out=tmp_path) == 2
    assert "ddim, 3 steps" in capsys.readouterr().err


def test_stopped_run_continues_from_its_outputs(workspace, tmp_path, monkeypatch, capsys):
    upscale, calls = type(build()).upscale, []

    def signaled(self, images, key, **options):
        calls.append(images.shape)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return upscale(self, images, key, **options)

    monkeypatch.setattr("sr3_jax.inference.model.Model.upscale", signaled)
    assert run(workspace, "--steps", "2", out=tmp_path) == 143
    assert not (tmp_path / "evaluation.json").exists() and len(calls) == 2
    capsys.readouterr()
    assert run(workspace, "--steps", "2", out=tmp_path) == 0
    assert len(calls) == 3 and report(tmp_path)["outputs_reused"] == 4
    assert "4 outputs were cached" in capsys.readouterr().out


def test_exact_output_has_infinite_psnr_and_the_files_are_valid_json(tmp_path):
    flat = Source("flat", lambda index: {"image": np.full((32, 40, 3), 77, np.uint8)}, 2)
    rows = [bicubic(4)]
    for reused in (0, 2):  # also when it is read back
        part = runner.evaluate_images(rows, flat, tmp_path, STANDARD, Settings())
        assert [image.results[0].metrics["psnr"] for image in part.images] == [[np.inf]] * 2
        assert sum(image.results[0].reused for image in part.images) == reused
    how = {"source": "flat", "seconds": 1.0}
    results.write_tables(tmp_path, results.make_report(part, rows, tmp_path, STANDARD, Settings(), **how))
    assert report(tmp_path)["rows"][0]["summary"]["psnr"] == {"mean": None, "low": None, "high": None}
    assert " inf |" in (tmp_path / "evaluation.md").read_text()


def test_model_has_a_method_for_each_solver_and_number_of_steps():
    model = build()
    rows = model_methods(model, "m", solvers=["heun", "ddim"], steps=[5, 2])
    assert [(row.name, row.solver, row.steps, row.nfe) for row in rows] == [
        ("m", "heun", 5, 9), ("m", "heun", 2, 3), ("m", "ddim", 5, 5), ("m", "ddim", 2, 2)
    ]  # fmt: skip
    assert len({json.dumps(row.settings) for row in rows}) == len({row.folder for row in rows}) == 4
    own = model_methods(model, "m")
    assert [(row.solver, row.steps, row.own) for row in own] == [
        (model.sampling.solver, model.sampling.steps, True)
    ]
    assert [row.own for row in rows] == [False, False, False, True]


def test_searched_sampler_is_compared_with_the_default_one():
    searched = Sampling("ddim", 3, spacing="linear", log_snr_min=1.25, eta=0.5)
    model = dataclasses.replace(build(), sampling=searched)
    rows = model_methods(model, "m", steps=[3, 5], unsearched=True)
    assert [(row.steps, row.detail, row.own) for row in rows] == [
        (3, "", False),
        (3, "spacing linear, log_snr_min 1.25, eta 0.5", True),
        (5, "", False),
    ]
    assert len({row.folder for row in rows}) == 3
    assert [row.own for row in model_methods(model, "m")] == [True]
    low_res = np.random.default_rng(0).integers(0, 256, (1, 10, 12, 3), np.uint8)
    keys = jax.vmap(jax.random.key)(np.arange(1))
    made = [row.upscale(low_res, jax.random.clone(keys), np.zeros(1, int)) for row in rows[:2]]
    assert not np.array_equal(*made)
    wanted = model.upscale(low_res, jax.random.clone(keys), sampling=searched)
    assert np.array_equal(made[1], wanted)


def test_class_conditional_model_receives_the_label_of_each_image(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "data"))
    for name, label in (("a-tall", "cat"), ("b-wide", "dog"), ("c-wide", "dog")):
        (tmp_path / "in" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(workspace / "in" / f"{name}.png", tmp_path / "in" / label)
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

    def labels_given(*options):
        """{height of the ground truth: the label that the model received}"""
        given.clear()
        assert main([*command, *options]) == 0
        source = open_source(f"folder:{workspace / 'in'}")
        truths = [source[index]["image"] for index in range(3)]
        return {
            image.shape[0]: given[low_res.tobytes()]
            for image in truths
            if (
                low_res := metric_suite.low_res_of(
                    GroundTruth.of("a", {"image": image}, 4, None).image[None], 4
                )[0]
            ).tobytes()
            in given
        }

    labels = {54: 0, 41: 1, 40: 1}
    assert labels_given("--data=tfds:pets:train") == labels
    assert report(tmp_path / "out")["models"][0]["labeled"]
    assert labels_given("--data=tfds:pets:train") == {}  # everything is cached
    # Without labels, or with others, they are other outputs than the cached ones.
    assert labels_given("--data=tfds:pets:train", "--no-labels") == dict.fromkeys(labels)
    assert labels_given(f"--data=folder:{tmp_path / 'in'}") == {}
    (tmp_path / "in" / "cat").rename(tmp_path / "in" / "zebra")
    assert main(["prepare", str(tmp_path / "in"), "--name=pets", "--overwrite"]) == 0
    assert labels_given("--data=tfds:pets:train") == {54: 1, 41: 0, 40: 0}
    # A model without classes receives none.
    command[2] = str(workspace / "one.safetensors")
    assert labels_given("--data=tfds:pets:train") == dict.fromkeys(labels)
    # More classes than the model knows fail before anything is sampled.
    command[2] = str(tmp_path / "pets.safetensors")
    (tmp_path / "in" / "ape").mkdir()
    shutil.copy(workspace / "in" / "a-tall.png", tmp_path / "in" / "ape")
    assert main(["prepare", str(tmp_path / "in"), "--name=pets", "--overwrite"]) == 0
    given.clear()
    capsys.readouterr()
    assert main([*command, "--data=tfds:pets:train"]) == 2
    error = capsys.readouterr().err
    assert "3 classes" in error and "pets.safetensors knows 2" in error and not given


def test_one_label_serves_images_without_labels(workspace, tmp_path, capsys):
    """For models that have no label for "no label", as converted upsamplers."""
    model = build(model={"num_classes": 2})
    export(tmp_path / "classes.safetensors", model.params, model.config)
    out = tmp_path / "out"
    command = [
        "evaluate",
        f"--model={tmp_path / 'classes.safetensors'}",
        f"--model={workspace / 'one.safetensors'}",
    ]
    command += [f"--data=folder:{workspace / 'in'}", "--steps=1", "-o", str(out)]
    assert main(command) == 2
    assert "--label" in capsys.readouterr().err
    pixels = []
    for label in (0, 1, 0):  # outputs of another label are not reused
        assert main([*command, f"--label={label}"]) == 0
        pixels.append(read_rgb(out / "outputs" / "classes" / "ddim-1" / "b-wide.png"))
    assert np.any(pixels[0] != pixels[1]) and np.array_equal(pixels[0], pixels[2])
    assert [one["given_label"] for one in report(out)["models"]] == [0, None]
    assert "label 0 for all images" in (out / "evaluation.md").read_text()
    assert main([*command, "--label=2"]) == 2
    assert "got 2" in capsys.readouterr().err


def test_model_is_represented_by_its_own_sampler_or_by_most_steps():
    a = dataclasses.replace(build(), sampling=Sampling("ddim", 5))
    rows = model_methods(a, "a", steps=[5, 50])
    rows += model_methods(build(), "b", solvers=["ddim", "heun"], steps=[5, 50])
    groups = runner.methods_by_model([bicubic(4), *rows])
    assert groups == {"a": [1, 2], "b": [3, 4, 5, 6]}
    assert [runner.representative([bicubic(4), *rows], at) for at in groups.values()] == [1, 4]


def test_outputs_of_other_weights_are_other_outputs(workspace):
    model = load(workspace / "one.safetensors")
    leaves, tree = jax.tree.flatten(model.params)
    leaves[3] = leaves[3] + np.float32(1e-6)
    models = [build(), model, dataclasses.replace(model, params=jax.tree.unflatten(tree, leaves))]
    settings = [model_methods(one, "m")[0].settings for one in models]
    assert settings[0] == settings[1] != settings[2]


def test_labels_are_short_and_unique():
    names = ["out/run", "x/run.safetensors", "photo_4x", "bicubic", "at.step.5"]
    assert unique_labels(names) == ["run", "run_2", "photo_4x", "bicubic_2", "at_step_5"]
    assert unique_labels(["a/x4"], ["a/x4", "b/x4"]) == ["x4", "a_x4", "b_x4"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--steps", "5,x"], ["--steps", "5,x"]),
        (["--solver", "euler"], ["solver", "euler", "ancestral, ddpm, ddim"]),
        (["--samples", "-1"], ["--samples"]),
        (["--seed", "1e3"], ["--seed", "1e3"]),
        (["--limit", "0"], ["--limit", "0"]),
        (["--batch", "0"], ["--batch", "0"]),
        (["--patch", "30"], ["patch=30", "31"]),
        (["--features", "vgg"], ["features=vgg", "inception:FILE, alexnet, classifier or none"]),
        (["--features", "inception"], ["inception:pt_inception-2015-12-05-6726825d.pth"]),
        (["--classifier", "nonesuch.onnx"], ["nonesuch.onnx"]),
        (["--reference", "x.npz"], ["reference=x.npz", "features"]),
        (["--save-reference", "x.npz"], ["save_reference=x.npz", "features"]),
        (["--crop", "30"], ["crop=30", "4", "20"]),
        (["--crop", "16"], ["crop=16", "20"]),
        (["--crop", "400"], ["400"]),
        (["--label", "1"], ["label=1", "class-conditional"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--data", "folder:/nonexistent"], ["/nonexistent"]),
        (["--model", "nonesuch"], ["nonesuch"]),
        (["-o", "{workspace}/one.safetensors"], ["one.safetensors", "folder"]),
        (["-o", "{workspace}/one.safetensors/x"], ["one.safetensors/x", "not a directory"]),
    ],
)
def test_invalid_options_fail_with_the_value(workspace, tmp_path, capsys, extra, words):
    assert run(workspace, *(text.format(workspace=workspace) for text in extra), out=tmp_path) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sr3 evaluate: ")]
    assert len(lines) == 1 and [word for word in words if word not in lines[0]] == []


def test_degraded_inputs_are_the_same_for_every_method_and_run(workspace, tmp_path):
    def rows(out, *extra) -> list:
        assert run(workspace, *extra, out=out) == 0
        return json.loads((out / "evaluation.json").read_text())

    clean = rows(tmp_path / "a")
    photo = rows(tmp_path / "a", "--degradation", "photo")  # in the same folder: nothing of it is reused
    assert photo["outputs_reused"] == 0 and photo["protocol"]["degradation"] == "photo"
    again = rows(tmp_path / "b", "--degradation", "photo")
    for one, two, three in zip(clean["rows"], photo["rows"], again["rows"], strict=True):
        psnr = [row["summary"]["psnr"]["mean"] for row in (one, two, three)]
        assert psnr[0] != psnr[1] == psnr[2]


# ---- Pairs, and the outputs of other programs


def program(folder, workspace, *, levels=9, suffix="_out", cut=True):
    """A folder with the ground truth plus some levels, of the size that a program gives that upscales by 4."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (height, width) in SIZES.items():
        rgb = read_rgb(workspace / "in" / f"{name}.png").astype(int) + levels
        rgb = rgb[: height // 4 * 4, : width // 4 * 4] if cut else rgb
        write_image(folder / f"{name}{suffix}.png", DecodedImage(np.clip(rgb, 0, 255).astype(np.uint8)))
    return folder


def test_two_folders_are_enough(workspace, tmp_path, capsys):
    mine = program(tmp_path / "mine", workspace)
    command = [
        "evaluate",
        f"--outputs=mine={mine}",
        f"--data=folder:{workspace / 'in'}",
        "-o",
        str(tmp_path / "out"),
    ]
    for option in ("--steps=2", "--solver=ddim", "--samples=2", "--no-labels"):  # there is no model
        assert main([*command, option]) == 2
        assert option.partition("=")[0] in capsys.readouterr().err
    assert main(command) == 0
    found = report(tmp_path / "out")
    assert [(row["method"], row["scale"], row["nfe"]) for row in found["rows"]] == [
        ("bicubic", 4, 0),
        ("mine", 4, None),
    ]
    for name, (height, width) in SIZES.items():
        truth = read_rgb(workspace / "in" / f"{name}.png")[None, : height // 4 * 4, : width // 4 * 4]
        low_res = image_ops.to_uint8(image_ops.degrade(image_ops.to_unit(truth), 4))
        output = read_rgb(mine / f"{name}_out.png")[None]
        values = found["rows"][1]["images"][name]
        assert values["psnr"] == pytest.approx([float(metrics.psnr(output, truth)[0])], rel=1e-4)
        wanted = float(metrics.consistency(output, low_res)[0])
        assert values["consistency"] == pytest.approx([wanted], rel=1e-3)
    assert str(mine) in (tmp_path / "out" / "evaluation.md").read_text()
    assert not list((tmp_path / "out" / "outputs" / "mine").rglob("*.png"))  # no copies
    assert read_rgb(tmp_path / "out" / "grid.png").shape[1] > 3 * 40
    # Whole sizes are as good, and only what changed is scored again.
    program(mine, workspace, levels=20, cut=False)
    assert main(command) == 0
    again = report(tmp_path / "out")
    assert again["rows"][0] == found["rows"][0]
    assert again["rows"][1]["summary"]["psnr"]["mean"] < found["rows"][1]["summary"]["psnr"]["mean"]


def test_outputs_are_compared_with_models_image_by_image(workspace, finished, tmp_path):
    copies = finished / "outputs" / "one" / "ddim-1"
    worse = program(tmp_path / "worse", workspace, levels=40, suffix="")
    options = ["--outputs", f"same={copies}", "--outputs", f"worse={worse}", "--steps=1"]
    assert run(workspace, *options, out=tmp_path / "out") == 0
    found = report(tmp_path / "out")
    assert [row["method"] for row in found["rows"]] == ["bicubic", "one", "same", "worse"]
    one, same = (
        {key: found["rows"][row]["images"][name][key] for name in SIZES for key in ("psnr", "ssim")}
        for row in (1, 2)
    )
    assert one == same
    text = (tmp_path / "out" / "evaluation.md").read_text()
    table = text[text.index("Differences to one 4x ddim 1") :].split("\n\n")[1].splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[5].strip() for line in table[2:]}
    assert set(cells) == {"bicubic", "same", "worse"}
    assert cells["same"] == "+0.00 [+0.00, +0.00]"
    difference = found["rows"][3]["summary"]["psnr"]["mean"] - found["rows"][1]["summary"]["psnr"]["mean"]
    assert cells["worse"].startswith(f"{difference:+.2f} [")


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: (folder / "a-tall_out.png").unlink(), ["1 of 3", "'a-tall.png'"]),
    (lambda folder: (folder / "a-tall_out.png").write_bytes(b"no image"), ["a-tall_out.png'", "not an image"]),
    (shutil.rmtree, ["outputs mine", "not a folder"]),
    (
        lambda folder: write_image(folder / "b-wide_out.png", DecodedImage(np.zeros((40, 51, 3), np.uint8))),
        ["1 of 3", "'b-wide_out.png'", "51x40", "52x41"],
    ),
    (
        lambda folder: (folder / "c-wide_out.png").write_bytes((folder / "c-wide_out.png").read_bytes()[:-99]),
        ["c-wide_out.png"],
    ),
])  # fmt: skip
def test_missing_or_unsuitable_outputs_are_named(workspace, tmp_path, capsys, spoil, words):
    mine = program(tmp_path / "mine", workspace)
    spoil(mine)
    data = f"--data=folder:{workspace / 'in'}"
    assert main(["evaluate", f"--outputs=mine={mine}", data, "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words), err


def test_pairs_give_the_models_input(workspace, tmp_path, monkeypatch, capsys):
    """Low-res images that bicubic would not give; crops are at their pixels."""
    low_res = {}
    for name, (height, width) in SIZES.items():
        cut = read_rgb(workspace / "in" / f"{name}.png")[: height // 4 * 4, : width // 4 * 4]
        (tmp_path / "hr").mkdir(exist_ok=True)
        (tmp_path / "lr").mkdir(exist_ok=True)
        low_res[name] = np.ascontiguousarray(cut[1::4, 2::4])
        write_image(tmp_path / "hr" / f"{name}_HR.png", DecodedImage(np.ascontiguousarray(cut)))
        write_image(tmp_path / "lr" / f"{name}_LR4.png", DecodedImage(low_res[name]))
    given = []

    def upscale(self, images, key, **options):
        given.extend(images)
        return np.repeat(np.repeat(images, 4, axis=1), 4, axis=2)

    monkeypatch.setattr("sr3_jax.inference.model.Model.upscale", upscale)
    data = f"--data=pairs:{tmp_path / 'lr'}:{tmp_path / 'hr'}"
    command = ["evaluate", "--steps=1", data, "-o", str(tmp_path / "out"), "--model"]
    one = str(workspace / "one.safetensors")
    assert main([*command, one]) == 0
    assert {image.tobytes() for image in given} == {image.tobytes() for image in low_res.values()}
    row = report(tmp_path / "out")["rows"][1]
    for name, small in low_res.items():
        output = np.repeat(np.repeat(small[None], 4, axis=1), 4, axis=2)
        wanted = float(metrics.consistency(output, small[None])[0])
        assert row["images"][f"{name}_HR"]["consistency"] == pytest.approx([wanted], rel=1e-3, abs=1e-4)
    assert "low-res: those of the pairs" in (tmp_path / "out" / "evaluation.md").read_text()
    given.clear()
    assert main([*command, one, "--crop=32"]) == 0
    assert {image.shape for image in given} == {(8, 8, 3)}
    assert all(any(image.tobytes() in _windows(small) for small in low_res.values()) for image in given)
    capsys.readouterr()
    assert (
        main([*command, str(workspace / "double.safetensors")]) == 2 and "scale 2" in capsys.readouterr().err
    )
    assert main([*command, one, "--degradation=photo"]) == 2 and "photo" in capsys.readouterr().err


def _windows(image, side=8):
    rows, columns = (length - side + 1 for length in image.shape[:2])
    return {image[y : y + side, x : x + side].tobytes() for y in range(rows) for x in range(columns)}
