"""Outputs of methods with stand-in networks: metrics, batches, references, patches, and the cache of outputs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types

import jax
import numpy as np
import pytest
from test_metric_suite import AlexNet, Brightness, Lookup
from test_set_metrics import frechet

from sr3_jax import files
from sr3_jax.cli.main import main
from sr3_jax.data.sources import Source
from sr3_jax.evaluation import outputs, results, runner
from sr3_jax.evaluation.cache import EvaluatedImage, Output, OutputCache, Part, Result
from sr3_jax.evaluation.outputs import Method, Settings
from sr3_jax.features import metric_suite, networks
from sr3_jax.features.metric_suite import ImageMetrics, MetricSuite
from sr3_jax.features.networks import Network
from sr3_jax.features.statistics import FeatureProtocol, load_statistics
from sr3_jax.image_io.image_file import DecodedImage, read_rgb, write_image
from sr3_jax.sampling import Sampling

COUNT, SIDE = 7, 32
GENERATOR = np.random.default_rng(4)
COARSE = GENERATOR.integers(0, 256, (COUNT, SIDE // 8, SIDE // 8, 3), np.uint8)
IMAGES = COARSE.repeat(8, axis=1).repeat(8, axis=2)


def source(*, labeled=True, side=SIDE):
    def load_one(index):
        item = {"image": IMAGES[index, :side].copy()}
        return item | {"label": index % 3} if labeled else item

    return Source("seven", load_one, COUNT)


class Corners:
    """Features of an image: three of its pixels. Counts the images it was called with."""

    def __init__(self):
        self.seen = 0
        self.protocol = FeatureProtocol("corners", "frechet_corners", "e" * 64, "as they are")

    def __call__(self, images):
        self.seen += len(images)
        return images[:, [0, -1, 5], [0, -1, 5], 0].astype(np.float32) / 100


class Noisy:
    """A model whose output is bicubic interpolation plus noise from its key. Records the batches and compilations."""

    name, scale, config, params, label = "stub", 4, {}, {}, None
    network = types.SimpleNamespace(num_classes=0, regression=False)
    sampling = Sampling("ddim", 2)

    def __init__(self, events=None, size=9):
        self.events, self.size = [] if events is None else events, size

    def watched(self, on_step):
        return self

    def compile(self, shape, *, labels, sampling):
        self.events.append(shape)

    def upscale(self, low_res, keys, *, labels, sampling):
        self.events.append(len(low_res))
        large = metric_suite.bicubic_of(low_res, 4).astype(int)
        noise = jax.vmap(lambda key: jax.random.randint(key, large.shape[1:], -self.size, self.size + 1))(
            keys
        )
        return np.clip(large + np.asarray(noise), 0, 255).astype(np.uint8)


def noisy(name="noisy", model=None):
    return Method(name, 4, {"weights": "noisy"}, model or Noisy(), Noisy.sampling)


def full_suite(corners, classifier=None, lpips=None):
    lpips = lpips or Brightness()
    classifier = classifier or Lookup(np.eye(3)[np.arange(256) % 3])
    image = (
        metric_suite.standard_metrics(),
        metric_suite.lpips_metric(lpips),
        metric_suite.accuracy(classifier),
    )
    samples = (metric_suite.pixel_diversity(), metric_suite.lpips_diversity(lpips))
    return MetricSuite(image, samples, Network(corners.protocol, corners), lpips, classifier)


STANDARD = MetricSuite((metric_suite.standard_metrics(),), (metric_suite.pixel_diversity(),))
BASELINES = (outputs.ground_truth(4), outputs.bicubic(4))


class Done:
    """Part and rows of an evaluation by `evaluate_part` and `summarize`."""

    def __init__(self, rows, data, folder, *, suite=STANDARD, **options):
        self.part = runner.evaluate_images(rows, data, folder, suite, Settings(**options))
        self.rows, self.networks = results.summarize(self.part, rows, folder, suite)
        self.reused = sum(result.reused for image in self.part.images for result in image.results)

    def values(self, row):
        """{metric: [images, samples]} of a row."""
        images = self.rows[row]["images"].values()
        return {key: np.array([image[key] for image in images]) for key in next(iter(images))}

    def mean(self, row, key):
        return self.rows[row]["summary"][key]["mean"]


def test_metrics_are_those_of_the_written_images(tmp_path):
    done = Done(
        [*BASELINES, noisy()], source(), tmp_path, suite=full_suite(Corners()), samples=3, batch_size=4
    )
    written = np.stack([
        [read_rgb(tmp_path / "noisy" / "ddim-2" / f"{at:05d}{suffix}.png") for suffix in ("", ".2", ".3")]
        for at in range(COUNT)
    ])  # fmt: skip
    assert len({output.tobytes() for of in written for output in of}) == 3 * COUNT
    real, bicubic, made = (done.values(row) for row in range(3))
    assert set(real) == {"top1"} and "diversity" not in bicubic and bicubic["lpips"].shape == (COUNT, 1)
    assert made["lpips"].shape == (COUNT, 3) and made["diversity"].shape == (COUNT, 1)
    brightness = written.astype(float).mean(axis=(2, 3, 4))
    apart = np.abs(brightness - IMAGES.astype(float).mean(axis=(1, 2, 3))[:, None])
    np.testing.assert_allclose(made["lpips"], apart, atol=1e-4)
    deviation = written.astype(float).std(axis=1, ddof=1).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(made["diversity"][:, 0], deviation, rtol=1e-5)
    pairs = [np.abs(brightness[:, a] - brightness[:, b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(made["diversity_lpips"][:, 0], np.mean(pairs, axis=0), atol=1e-4)
    right = written[:, :, 0, 0, 0] % 3 == (np.arange(COUNT) % 3)[:, None]
    np.testing.assert_array_equal(made["top1"], 100.0 * right)
    np.testing.assert_array_equal(
        real["top1"][:, 0], 100.0 * (IMAGES[:, 0, 0, 0] % 3 == np.arange(COUNT) % 3)
    )
    expected = frechet(Corners()(written[:, 0]), Corners()(IMAGES))
    assert done.mean(2, "frechet_corners") == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert all({"frechet_corners", "kid_corners"} <= set(row["summary"]) for row in done.rows)


def test_outputs_do_not_depend_on_the_rest_of_their_batch(tmp_path):
    whole = Done([noisy()], source(), tmp_path / "a", samples=2, batch_size=4)
    part = Done([noisy()], source(), tmp_path / "b", limit=3, batch_size=4)
    for at in range(3):
        name = f"noisy/ddim-2/{at:05d}.png"
        np.testing.assert_array_equal(read_rgb(tmp_path / "a" / name), read_rgb(tmp_path / "b" / name))
    np.testing.assert_allclose(whole.values(0)["psnr"][:3, :1], part.values(0)["psnr"])
    odd = Done([noisy()], source(), tmp_path / "c", batch_size=4, process=(1, 2))
    assert [image.index for image in odd.part.images] == [1, 3, 5]
    for at in (1, 3, 5):
        name = f"noisy/ddim-2/{at:05d}.png"
        np.testing.assert_array_equal(read_rgb(tmp_path / "a" / name), read_rgb(tmp_path / "c" / name))
    other = Done([noisy()], source(), tmp_path / "a", batch_size=2)
    assert other.reused == 0  # another batch size is another program


def test_other_metrics_are_computed_from_the_cached_images(tmp_path, monkeypatch):
    """Neither the sampler nor a known metric runs again; a damaged image is sampled again."""
    sampled, options = [], {"samples": 2, "batch_size": 4}
    rows = [*BASELINES, noisy(model=Noisy(sampled))]
    Done(rows, source(), tmp_path, **options)
    sampled.clear()
    corners, lpips = Corners(), Brightness()
    before = Done(rows, source(), tmp_path, suite=full_suite(corners, lpips=lpips), **options)
    assert sampled == [] and before.reused == 3 * COUNT
    assert corners.seen > 0 and lpips.shapes and before.values(2)["lpips"].shape == (COUNT, 2)

    corners, lpips = Corners(), Brightness()
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "read_rgb", None)  # no image file is decoded
        again = Done(rows, source(), tmp_path, suite=full_suite(corners, lpips=lpips), **options)
    assert (sampled, corners.seen, lpips.shapes) == ([], 0, [])
    assert before.rows == again.rows

    other = Lookup(np.eye(3)[(np.arange(256) + 1) % 3])
    other.sha256 = "f" * 64
    changed = Done(rows, source(), tmp_path, suite=full_suite(corners, other, lpips), **options)
    assert (sampled, corners.seen, lpips.shapes) == ([], 0, [])
    assert not np.array_equal(changed.values(2)["top1"], before.values(2)["top1"])

    fives = ImageMetrics("standard 99", lambda batch: {"psnr": np.full(4, 5.0)})
    newer = Done(rows[2:], source(), tmp_path, suite=MetricSuite((fives,)), **options)
    assert sampled == [] and set(newer.values(0)) == {"psnr", "seconds"}
    assert (newer.values(0)["psnr"] == 5).all()

    (tmp_path / "noisy" / "ddim-2" / "00003.2.png").write_bytes(b"not an image")
    Done(rows[2:], source(), tmp_path, **options)
    assert [event for event in sampled if event == 4] == [4]  # one full batch


def test_each_shape_is_compiled_once_and_no_batch_is_sampled_twice(tmp_path):
    def load_one(index):
        return {"image": IMAGES[index, : 28 if index in (2, 5) else SIDE].copy()}

    events = []
    method = noisy(model=Noisy(events))
    done = Done([method], Source("mixed", load_one, COUNT), tmp_path, batch_size=2)
    shapes = [event for event in events if isinstance(event, tuple)]
    assert sorted(shapes) == [(2, 7, 8, 3), (2, 8, 8, 3)]
    assert events.count(2) == 4 and len(events) == 6  # 5 images of one size, 2 of the other
    assert isinstance(events[0], tuple)  # compiled before the first call
    assert (done.values(0)["seconds"] > 0).all()


def test_diversity_of_other_outputs_is_computed_again(tmp_path):
    """Samples that were replaced by others have no diversity yet, whatever is known of the earlier ones."""
    model = Noisy(size=3)
    method = noisy(model=model)
    before = Done([method], source(), tmp_path, samples=2)
    model.size = 9
    for path in (tmp_path / "noisy" / "ddim-2").glob("*.png"):
        path.unlink()
    after = Done([method], source(), tmp_path, samples=2)
    assert after.reused == 0
    assert after.mean(0, "diversity") > 2 * before.mean(0, "diversity") > 0


def test_samples_of_an_image_are_averaged_before_images_are_resampled(tmp_path):
    values = [[0.0, 10.0], [10.0, 0.0], [5.0, 5.0]]  # equal images whose samples differ
    part = Part([
        EvaluatedImage(index, str(index), 8, 8, [Result({"psnr": row}, [], [], 0)])
        for index, row in enumerate(values)
    ])  # fmt: skip
    rows, _ = results.summarize(part, [noisy()], tmp_path, STANDARD)
    assert rows[0]["summary"]["psnr"] == {"mean": 5.0, "low": 5.0, "high": 5.0}


def test_metric_that_some_images_lack_is_omitted_with_the_reason(tmp_path):
    def load_one(index):
        return {"image": IMAGES[index, : 28 if index == 2 else SIDE].copy()}

    lpips, corners = Brightness(), Corners()
    network = Network(corners.protocol, corners, least_side=31)
    image = (metric_suite.standard_metrics(), metric_suite.lpips_metric(lpips))
    suite = MetricSuite(image, (), network, lpips)
    done = Done(BASELINES, Source("mixed", load_one, 4), tmp_path, suite=suite)
    assert "psnr" in done.rows[1]["summary"] and not {"lpips", "frechet_corners"} & set(
        done.rows[1]["summary"]
    )
    omitted = done.networks["omitted"]
    assert len(omitted) == 2 and "LPIPS" in omitted[0] and "1 of 4 images" in omitted[0]
    assert "corners" in omitted[1] and "31 pixels" in omitted[1]
    small = Done(BASELINES, source(side=28), tmp_path / "small", suite=suite)
    assert "LPIPS" in small.networks["omitted"][0] and "7 of 7 images" in small.networks["omitted"][0]


def test_command_line_with_every_network(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(metric_suite, "load_lpips", Brightness)
    monkeypatch.setattr(networks, "AlexNetFeatures", lambda lpips: AlexNet())
    monkeypatch.setattr(runner, "open_source", lambda name, **options: source())
    monkeypatch.setattr(runner, "load", lambda name: Noisy())
    monkeypatch.setattr(runner, "model_methods", lambda model, label, **options: [noisy(label)])
    monkeypatch.setattr(metric_suite, "load_classifier", lambda spec: Lookup(np.eye(10)[np.arange(256) % 10]))

    def run(*extra, out="out"):
        options = ["--model=stub", "--data=seven", "--classifier=x.onnx", "--batch=4", "--samples=2"]
        assert main(["evaluate", *options, "-o", str(tmp_path / out), *extra]) == 0
        return json.loads((tmp_path / out / "evaluation.json").read_text())

    statistics = tmp_path / "reference.npz"
    found = run(f"--save-reference={statistics}")
    assert [row["method"] for row in found["rows"]] == ["ground truth", "bicubic", "stub"]
    sets = {"frechet_alexnet", "kid_alexnet"}
    assert set(found["rows"][0]["summary"]) == {"top1", "top5"} | sets
    assert (
        set(found["rows"][2]["summary"]) >= {"psnr", "lpips", "top1", "diversity", "diversity_lpips"} | sets
    )
    assert "diversity" not in found["rows"][1]["summary"]
    text = capsys.readouterr().out
    for words in ("top-5 %", "lookup, weights sha256 cccccccccccccccc, 10 classes", "N = 7"):
        assert words in text
    saved = load_statistics(statistics)
    assert saved.count == COUNT
    np.testing.assert_allclose(saved.mean, Corners()(IMAGES).mean(axis=0, dtype=np.float64))

    compared = run(f"--reference={statistics}")
    assert compared["outputs_reused"] == 3 * COUNT
    assert compared["rows"][0]["summary"]["frechet_alexnet"]["mean"] == pytest.approx(0, abs=1e-6)
    same = [of["rows"][2]["summary"]["frechet_alexnet"]["mean"] for of in (found, compared)]
    assert same[0] == pytest.approx(same[1], rel=1e-6) and "kid_alexnet" not in compared["rows"][2]["summary"]
    assert "reference.npz (7 images)" in (tmp_path / "out" / "evaluation.md").read_text()


def test_sets_of_images_are_compared_without_ground_truth(monkeypatch, tmp_path, capsys):
    """A folder against a folder of other images; and as the reference of an evaluation with ground truth."""
    monkeypatch.setattr(metric_suite, "load_lpips", Brightness)
    monkeypatch.setattr(networks, "AlexNetFeatures", lambda lpips: AlexNet())
    pixels = {name: np.random.default_rng(len(name)).integers(0, 256, (count, 48, 40, 3), np.uint8) for name, count in
              (("mine", 9), ("real", 12))}  # fmt: skip
    for name, images in pixels.items():
        (tmp_path / name).mkdir()
        for number, one in enumerate(images):
            write_image(tmp_path / name / f"{name}{number}.png", DecodedImage(one))
    command = ["evaluate", f"--outputs=mine={tmp_path / 'mine'}", f"--reference=folder:{tmp_path / 'real'}"]
    more = f"--outputs=other={tmp_path / 'real'}"
    assert main([*command, more, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "N = 9 images" in out and "(12 images)" in out and "PSNR" not in out and "Differences" not in out
    row = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"][0]
    a, b = (AlexNet().features(images) for images in pixels.values())
    assert row["summary"]["frechet_alexnet"]["mean"] == pytest.approx(frechet(a, b), rel=1e-5)
    assert set(row["summary"]) == {"frechet_alexnet", "kid_alexnet"}
    for option in ("--crop=40", "--steps=2", "--label=1"):
        assert main([*command, option, "-o", str(tmp_path / "x")]) == 2
        assert option.partition("=")[0] in capsys.readouterr().err
    data = f"--data=folder:{tmp_path / 'mine'}"
    assert main([*command, data, "-o", str(tmp_path / "paired")]) == 0
    rows = json.loads((tmp_path / "paired" / "evaluation.json").read_text())["rows"]
    for key in ("frechet_alexnet", "kid_alexnet"):
        assert rows[2]["summary"][key]["mean"] == pytest.approx(row["summary"][key]["mean"], rel=1e-5)
    assert (
        main(["evaluate", command[1], f"--reference=folder:{tmp_path / 'none'}", "-o", str(tmp_path / "x")])
        == 2
    )


def test_patches_are_compared_instead_of_images(tmp_path):
    corners = Corners()
    network = Network(corners.protocol, corners).in_patches(16)
    suite = MetricSuite((metric_suite.standard_metrics(),), (), network)
    done = Done(BASELINES, source(), tmp_path, suite=suite)
    bicubic = np.stack([read_rgb(tmp_path / "bicubic" / "4x" / f"{at:05d}.png") for at in range(COUNT)])

    def patches(images):
        return np.stack([image[y : y + 16, x : x + 16] for image in images for y in (0, 16) for x in (0, 16)])

    expected = frechet(Corners()(patches(bicubic)), Corners()(patches(IMAGES)))
    assert done.networks["features"]["count"] == 4 * COUNT
    assert done.mean(1, "frechet_corners") == pytest.approx(expected, rel=1e-5)
    before = corners.seen
    Done(BASELINES, source(), tmp_path, suite=suite)
    assert corners.seen == before


# ---- The cache

VALUES = {"psnr": 21.5, "ssim": 0.5}
SETTINGS = {"weights": "ab", "seed": 0}


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)


def add(cache, name, sample, ground_truth, image, values, *, group="standard"):
    output = Output(name, sample, ground_truth, files.sha256_hex(image), None, 0.5, {group: values})
    cache.add([output], [image])


def find(cache, *place):
    """The standard metrics of an output."""
    found = cache.find(*place)
    return found and found.metrics["standard"]


@pytest.fixture
def folder(tmp_path):
    add(OutputCache(tmp_path / "m", SETTINGS), "crab", 0, "orig", image(), VALUES)
    return tmp_path / "m"


def test_only_the_same_output_is_found_by_the_next_run(folder):
    assert find(OutputCache(folder, SETTINGS), "crab", 0, "orig") == VALUES
    assert np.array_equal(read_rgb(folder / "crab.png"), image())
    for settings in (SETTINGS | {"weights": "cd"}, SETTINGS | {"seed": 1}):
        assert find(OutputCache(folder, settings), "crab", 0, "orig") is None
    for other in (("bird", 0, "orig"), ("crab", 1, "orig"), ("crab", 0, "another")):
        assert find(OutputCache(folder, SETTINGS), *other) is None


def test_missing_damaged_or_changed_files_are_not_found(folder):
    path = folder / "crab.png"
    whole = path.read_bytes()
    for spoil in (path.unlink, lambda: path.write_bytes(whole[:50]), lambda: write(path, image(1))):
        spoil()
        assert find(OutputCache(folder, SETTINGS), "crab", 0, "orig") is None
    path.write_bytes(whole)
    assert find(OutputCache(folder, SETTINGS), "crab", 0, "orig") == VALUES


def write(path, rgb):
    write_image(path, DecodedImage(rgb))


def test_partial_line_costs_only_its_own_output(folder):
    lines = folder / "scores.jsonl"
    add(OutputCache(folder, SETTINGS), "bird", 0, "o", image(1), VALUES)
    os.truncate(lines, lines.stat().st_size - 20)
    again = OutputCache(folder, SETTINGS)
    assert find(again, "crab", 0, "orig") == VALUES and find(again, "bird", 0, "o") is None
    add(again, "bird", 0, "o", image(1), VALUES)
    assert find(OutputCache(folder, SETTINGS), "bird", 0, "o") == VALUES
    lines.write_bytes(b'{"method": 3}\n[]\nnull\n\xff\n' + lines.read_bytes())
    assert find(OutputCache(folder, SETTINGS), "bird", 0, "o") == VALUES


def test_infinite_values_are_valid_json(tmp_path):
    add(OutputCache(tmp_path, SETTINGS), "flat", 0, "o", image(), {"psnr": math.inf, "ssim": 1.0})

    def fail(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "scores.jsonl").read_text(), parse_constant=fail)
    assert find(OutputCache(tmp_path, SETTINGS), "flat", 0, "o") == {"psnr": math.inf, "ssim": 1.0}


def test_metrics_accumulate_over_runs_and_processes(folder):
    """Each process writes its own file and reads all of them."""
    first, second = (OutputCache(folder, SETTINGS, process=process) for process in (1, 2))
    before = first.find("crab", 0, "orig")
    assert before.seconds == 0.5 and before.file is not None
    for cache, group in ((first, "lpips"), (second, "accuracy")):
        cache.add([dataclasses.replace(before, metrics={group: {group: 1.0}})], [None])
    assert sorted(path.name for path in folder.glob("*.jsonl")) == [
        "scores.1.jsonl",
        "scores.2.jsonl",
        "scores.jsonl",
    ]
    found = OutputCache(folder, SETTINGS, process=3).find("crab", 0, "orig")
    assert found.metrics == {"standard": VALUES, "lpips": {"lpips": 1.0}, "accuracy": {"accuracy": 1.0}}
    assert (found.pixels, found.file) == (before.pixels, before.file)


def test_of_two_outputs_in_two_files_the_one_on_disk_counts(folder):
    add(OutputCache(folder, SETTINGS, process=7), "crab", 0, "orig", image(1), {"psnr": 1.0})
    add(OutputCache(folder, SETTINGS), "crab", 0, "orig", image(2), {"psnr": 2.0})
    for other in (2, 1):  # the files are read in the order of their names, whichever was written last
        write(folder / "crab.png", image(other))
        assert find(OutputCache(folder, SETTINGS), "crab", 0, "orig") == {"psnr": float(other)}
    other = OutputCache(folder, SETTINGS)
    assert other.find("crab", 0, "orig", pixels=files.sha256_hex(image(2))) is None
