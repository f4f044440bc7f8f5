"""Metrics that need networks or several samples, against explicit sums; which metrics are available."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sr3_jax.errors import UserError
from sr3_jax.features import metric_suite, networks
from sr3_jax.features.metric_suite import Batch, open_suite
from sr3_jax.features.networks import open_network
from sr3_jax.features.statistics import FeatureProtocol, save_statistics, statistics_of


class Brightness:
    """Stands in for LPIPS: the difference of the means of two images. Records the shapes it was called with."""

    sha256 = "b" * 64
    name = "brightness"

    def __init__(self):
        self.shapes = []

    def distance(self, a, b):
        self.shapes.append(a.shape)
        return np.abs(a.astype(float).mean(axis=(1, 2, 3)) - b.astype(float).mean(axis=(1, 2, 3)))


class Lookup:
    """Stands in for a classifier: logits by the red value of an image's first pixel."""

    name, sha256 = "lookup", "c" * 64

    def __init__(self, table):
        self.table = np.asarray(table, np.float32)
        self.num_classes = self.table.shape[1]

    def logits(self, images):
        return self.table[images[:, 0, 0, 0]]


def flat(*levels, side=32):
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def test_diversity_is_the_mean_standard_deviation_of_the_samples():
    random = np.random.default_rng(0)
    samples = random.integers(0, 256, (4, 5, 6, 3), np.uint8)
    total = 0.0
    for y, x, c in np.ndindex(5, 6, 3):
        values = [int(sample[y, x, c]) for sample in samples]
        mean = sum(values) / 4
        total += (sum((value - mean) ** 2 for value in values) / 3) ** 0.5
    found = metric_suite.pixel_diversity().compute(samples)
    assert found == {"diversity": pytest.approx(total / 90, rel=1e-5)}
    assert metric_suite.pixel_diversity().compute(np.stack([samples[0]] * 3)) == {"diversity": 0.0}


@pytest.mark.parametrize("batch", [1, 4])
def test_lpips_of_pairs_is_the_mean_over_all_pairs(batch):
    network = Brightness()
    found = metric_suite.lpips_diversity(network, batch_size=batch).compute(flat(10, 14, 40, 90))
    pairs = [4, 30, 80, 26, 76, 50]
    assert found == {"diversity_lpips": pytest.approx(sum(pairs) / 6)}
    assert set(network.shapes) == {(batch, 32, 32, 3)}  # one shape, one program


def test_lpips_compares_output_and_ground_truth():
    one = metric_suite.lpips_metric(Brightness())
    found = one.compute(Batch(flat(10, 20), flat(15, 50), flat(0, 0), np.zeros(2, int)))
    np.testing.assert_allclose(found["lpips"], [5.0, 30.0])
    assert not one.supports(np.zeros((30, 40, 3))) and one.supports(np.zeros((31, 40, 3)))
    assert one.key != metric_suite.standard_metrics().key


def test_accuracy_is_top1_and_top5():
    table = np.zeros((6, 10))
    table[0, 3] = 1.0  # correct
    table[1, 4] = 1.0  # ties go to lower classes: after 4 come 0, 1, 2, 3
    table[2, 5:10] = 1.0  # all five before 3
    table[3] = np.arange(10)  # 3 is the seventh
    table[4] = -np.arange(10)  # 3 is the fourth
    one = metric_suite.accuracy(Lookup(table))
    images = flat(0, 1, 2, 3, 4)
    found = one.compute(Batch(images, images, images, np.full(5, 3)))
    assert found["top1"].tolist() == [100, 0, 0, 0, 0]
    assert found["top5"].tolist() == [100, 100, 0, 0, 100]
    assert one.of_ground_truth and one.key_for(3) != one.key_for(4) != one.key


def test_few_classes_have_no_top5_accuracy():
    one = metric_suite.accuracy(Lookup(np.eye(9)))
    found = one.compute(Batch(*[flat(1, 2)] * 3, np.array([1, 1])))
    assert {name: values.tolist() for name, values in found.items()} == {"top1": [100.0, 0.0]}
    with pytest.raises(UserError, match=r"2 to 9.*9 classes"):
        one.compute(Batch(*[flat(1, 2)] * 3, np.array([2, 9])))


def test_another_classifier_has_another_cache_key():
    two = [Lookup(np.eye(3)) for _ in range(2)]
    two[1].sha256 = "d" * 64
    assert len({metric_suite.accuracy(one).key for one in two}) == 2


# ---- Networks by their options


class AlexNet:
    """Stands in for AlexNet's features: three pixels."""

    protocol = FeatureProtocol("alexnet", "frechet_alexnet", "e" * 64, "as they are")

    def features(self, images):
        return images[:, [0, -1, 5], [0, -1, 5], 0].astype(np.float32) / 100


@pytest.fixture
def installed(monkeypatch):
    """The weights of LPIPS are installed."""
    monkeypatch.setattr(metric_suite, "load_lpips", Brightness)
    monkeypatch.setattr(networks, "AlexNetFeatures", lambda lpips: AlexNet())


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
    ("spec", "classifier", "words"),
    [
        ("inception", None, r"inception:pt_inception-2015-12-05-6726825d\.pth"),
        ("inception:/none.pth", None, r"/none\.pth"),
        ("alexnet", None, "features=alexnet"),
        ("classifier", None, "--classifier"),
        ("classifier", Lookup(np.eye(3)), "lookup"),
        ("vgg", None, "features=vgg"),
        ("none:x", None, "features=none:x"),
    ],
)
def test_unavailable_networks_fail(spec, classifier, words):
    with pytest.raises(UserError, match=words):
        open_network(spec, lpips=None, classifier=classifier)


def test_missing_weights_are_reported_once(monkeypatch):
    def missing():
        raise UserError("LPIPS weights are not installed: install the extra")

    monkeypatch.setattr(metric_suite, "load_lpips", missing)
    suite = open_suite(labeled=True)
    assert len(suite.omitted) == 1 and "LPIPS weights are not installed" in suite.omitted[0]
    assert len(suite.image) == 1 and suite.network is None and not suite.of_ground_truth


def test_classifier_without_labels_is_reported(installed, monkeypatch):
    monkeypatch.setattr(metric_suite, "load_classifier", lambda spec: Lookup(np.eye(3)))
    suite = open_suite(features="none", classifier="x", labeled=False)
    assert len(suite.omitted) == 1 and "labels" in suite.omitted[0] and "lookup" in suite.omitted[0]
    assert len(suite.image) == 2  # the standard metrics and LPIPS


def test_reference_must_be_of_the_same_network(installed, tmp_path):
    own = statistics_of(np.eye(3) + 1.0, AlexNet.protocol)
    other = dataclasses.replace(AlexNet.protocol, network="other", weights_sha256="9" * 64)
    for name, statistics in (("own", own), ("other", dataclasses.replace(own, protocol=other))):
        save_statistics(tmp_path / f"{name}.npz", statistics)
    assert open_suite(reference=tmp_path / "own.npz").reference.count == 3
    with pytest.raises(UserError, match=r"other\.npz.*other.*999999999999.*alexnet"):
        open_suite(reference=tmp_path / "other.npz")
    with pytest.raises(UserError, match="features"):
        open_suite(features="none", reference=tmp_path / "own.npz")


def test_metrics_of_a_large_image_do_not_depend_on_its_bands(monkeypatch):
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 256, (2, 100, 52, 3), np.uint8)
    noise = (
        generator.normal(size=truth.shape) * np.arange(100)[:, None, None]
    )  # no two bands have the same metrics
    outputs = np.clip(truth + noise, 0, 255).astype(np.uint8)
    outputs[1] = truth[1]  # of infinite PSNR
    batch = metric_suite.Batch(outputs, truth, metric_suite.low_res_of(truth, 4), np.zeros(2, np.int64))
    whole = metric_suite.standard_metrics().compute(batch)
    monkeypatch.setattr(metric_suite, "LARGE", 1000)
    monkeypatch.setattr(metric_suite, "BAND", 52 * 24)
    parts = metric_suite.standard_metrics().compute(batch)
    assert set(parts) == set(whole)
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, rtol=1e-5, atol=5e-5, err_msg=name)
