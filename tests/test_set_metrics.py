"""Metrics of a set against scipy and explicit sums, and the cache of features."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import linalg
from scipy.stats import entropy

from sr3_jax.evaluation.cache import FeatureCache
from sr3_jax.features import set_metrics
from sr3_jax.features.networks import Network
from sr3_jax.features.statistics import FeatureProtocol, kernel_distance, statistics_of

PROTOCOL = FeatureProtocol("some", "frechet_alexnet", "0" * 64, "none")
FID = dataclasses.replace(PROTOCOL, distance="fid")


def features(seed, count=30, width=4, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1.0, (count, width)).astype(np.float32)


def frechet(a, b):
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
    shift = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    return shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root)


def kid(a, b):
    """Of all pairs of different images; test_features_statistics.py has its definition."""
    return kernel_distance(a, b, seed=0, paired=True).mean


def test_metrics_follow_their_definitions():
    a, b = features(0, mean=0.3), features(1)
    found = set_metrics.output_metrics(a, b, PROTOCOL)
    assert set(found) == {"frechet_alexnet", "kid_alexnet"}
    assert found["frechet_alexnet"]["mean"] == pytest.approx(frechet(a, b), rel=1e-6)
    assert found["kid_alexnet"]["mean"] == pytest.approx(1e3 * kid(a, b), rel=1e-5)
    for of in found.values():
        assert of["low"] < of["mean"] < of["high"]


def test_only_the_network_of_fid_gives_metrics_of_that_name():
    names = [
        set_metrics.metric_keys(dataclasses.replace(PROTOCOL, distance=distance))
        for distance in ("fid", "frechet_x")
    ]
    assert names == [("fid", "kid", "inception_score"), ("frechet_x", "kid_x", "inception_score_x")]


def test_inception_score_uses_the_logits_only():
    """Against scipy, on the same random order and splits."""
    guesses = np.random.default_rng(2).normal(0, 3, (40, 5)).astype(np.float32)
    both = np.hstack([features(0, 40), guesses])
    found = set_metrics.output_metrics(both, np.hstack([features(1, 40), guesses]), FID, logits=5)
    order = np.random.default_rng(0).permutation(40)
    p = np.exp(guesses[order].astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    scores = [
        np.exp(entropy(part, part.mean(axis=0, keepdims=True), axis=1).mean()) for part in np.split(p, 10)
    ]
    assert found["inception_score"]["mean"] == pytest.approx(np.mean(scores), rel=1e-6)
    half = 1.96 * np.std(scores) / 10**0.5
    assert found["inception_score"]["high"] == pytest.approx(np.mean(scores) + half, rel=1e-6)
    assert found["fid"]["mean"] == pytest.approx(frechet(features(0, 40), features(1, 40)), rel=1e-6)
    few = set_metrics.output_metrics(both[:19], both[:19], FID, logits=5)
    assert "fid" in few and "inception_score" not in few


def test_intervals_are_as_wide_as_the_metric_varies():
    """Compared with the spread over new samples of both sets."""

    def sampled(seed):
        common = features(seed, 300)
        return common + features(seed + 1000, 300, mean=0.2), common

    found = [set_metrics.output_metrics(*sampled(seed), PROTOCOL) for seed in range(12)]
    for key in ("frechet_alexnet", "kid_alexnet"):
        widths = [(of[key]["high"] - of[key]["low"]) / 2 / 1.96 for of in found]
        assert 0.6 < np.mean(widths) / np.std([of[key]["mean"] for of in found], ddof=1) < 1.7


def unpaired_kid(a, b):
    aa, bb, ab = ((x.astype(np.float64) @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb)]
    return sum(within) - 2 * ab.mean()


def test_a_reference_replaces_the_ground_truth():
    a, b, other = features(0), features(1), features(2, 500, mean=1.0)
    found = set_metrics.output_metrics(a, b, PROTOCOL, reference=statistics_of(other, PROTOCOL))
    assert set(found) == {"frechet_alexnet"}  # KID needs every image of it
    assert found["frechet_alexnet"]["mean"] == pytest.approx(frechet(a, other), rel=1e-6)
    known = {"reference": statistics_of(other, PROTOCOL), "reference_features": other}
    with_kid = set_metrics.output_metrics(a, None, PROTOCOL, **known)
    assert with_kid["frechet_alexnet"] == found["frechet_alexnet"]
    assert with_kid["kid_alexnet"]["mean"] == pytest.approx(1e3 * unpaired_kid(a, other), rel=1e-6)
    assert with_kid["kid_alexnet"]["low"] < with_kid["kid_alexnet"]["mean"] < with_kid["kid_alexnet"]["high"]
    reals = set_metrics.ground_truth_metrics(b, PROTOCOL, reference=statistics_of(other, PROTOCOL))
    assert reals["frechet_alexnet"]["mean"] == pytest.approx(frechet(b, other), rel=1e-6)


def test_ground_truth_is_compared_in_halves():
    b = features(3, 400)
    found = set_metrics.ground_truth_metrics(b, PROTOCOL)
    parts = [frechet(*np.split(b[np.random.default_rng(seed).permutation(400)], 2)) for seed in range(40)]
    assert found["frechet_alexnet"]["mean"] == pytest.approx(np.mean(parts), rel=0.25)
    assert (
        found["frechet_alexnet"]["low"]
        <= found["frechet_alexnet"]["mean"]
        <= found["frechet_alexnet"]["high"]
    )
    assert found["kid_alexnet"]["low"] < 0 < found["kid_alexnet"]["high"]


def test_few_images_have_no_metrics_and_wide_features_no_interval(monkeypatch):
    assert set_metrics.output_metrics(features(0, 1), features(1, 1), PROTOCOL) == {}
    assert set_metrics.ground_truth_metrics(features(0, 3), PROTOCOL) == {}
    monkeypatch.setattr(set_metrics, "MAX_WIDTH", 3)
    found = set_metrics.output_metrics(features(0), features(1), PROTOCOL)
    assert list(found["frechet_alexnet"]) == ["mean"] and "low" in found["kid_alexnet"]


def test_kid_of_many_images_uses_subsets(monkeypatch):
    monkeypatch.setattr(set_metrics, "SUBSET", 100)
    a, b = features(0, 400, mean=0.5), features(1, 400)
    found = set_metrics.kernel_distance_interval(a, b)
    assert found["mean"] == pytest.approx(1e3 * kid(a[:150], b[:150]), rel=0.4)
    assert found["low"] < 1e3 * kid(a[:150], b[:150]) * 1.2 and found["low"] < found["mean"] < found["high"]


def hashes(*numbers):
    return [f"{number:064x}" for number in numbers]


def test_features_are_shared_between_runs_and_processes(tmp_path):
    values = features(0, 5, 3)
    FeatureCache(tmp_path, PROTOCOL).add(hashes(1, 2), values[:2])
    second = FeatureCache(tmp_path, PROTOCOL, process=1)
    assert second.missing(hashes(1, 2, 3)) == [2]
    second.add(hashes(3), values[2:3])
    second.add(hashes(4), values[3:4])
    for found in (second, FeatureCache(tmp_path, PROTOCOL)):
        assert found.missing(hashes(4, 3, 2, 1)) == []
        np.testing.assert_array_equal(found.get(hashes(4, 1, 3)), values[[3, 0, 2]])
    assert FeatureCache(tmp_path, FID).missing(hashes(1)) == [0]
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_partial_row_of_a_killed_run_is_overwritten(tmp_path):
    values = features(0, 3, 3)
    FeatureCache(tmp_path, PROTOCOL).add(hashes(1, 2), values[:2])
    [path] = (tmp_path / "features").iterdir()
    with path.open("ab") as file:
        file.write(b"\x01" * 7)
    again = FeatureCache(tmp_path, PROTOCOL)
    again.add(hashes(3), values[2:])
    np.testing.assert_array_equal(FeatureCache(tmp_path, PROTOCOL).get(hashes(1, 2, 3)), values)


def test_patches_of_one_image_are_resampled_together():
    """Ten copies of each image are not ten times as many images: value and interval stay the same."""
    a, b = features(0, mean=0.3), features(1)
    copies = np.repeat(np.arange(30), 10)
    single = set_metrics.output_metrics(a, b, PROTOCOL)["frechet_alexnet"]
    many = set_metrics.output_metrics(a[copies], b[copies], PROTOCOL, images=copies)["frechet_alexnet"]
    naive = set_metrics.output_metrics(a[copies], b[copies], PROTOCOL)["frechet_alexnet"]
    assert many["mean"] == pytest.approx(single["mean"], rel=0.1)
    widths = [of["high"] - of["low"] for of in (single, many, naive)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1) and widths[2] < 0.5 * widths[0]
    halves = set_metrics.ground_truth_metrics(b[copies], PROTOCOL, images=copies)["frechet_alexnet"]
    assert (
        halves["mean"] > 2 * set_metrics.ground_truth_metrics(b[copies], PROTOCOL)["frechet_alexnet"]["mean"]
    )


def test_patches_tile_the_center():
    image = np.arange(7 * 11 * 3).reshape(7, 11, 3)
    network = Network(PROTOCOL, lambda images: images).in_patches(3)
    found = network.patches(image)
    wanted = [image[y : y + 3, x : x + 3] for y in (0, 3) for x in (1, 4, 7)]
    assert len(found) == 6 and all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert [patch.shape for patch in network.patches(image[:2])] == [(2, 11, 3)]
    assert "patches of 3x3" in network.protocol.preprocessing


def test_kid_of_a_perfect_sampler_is_0_however_close_its_outputs_are_to_their_ground_truth():
    """With the pairs of an output and its own ground truth, the ground truth itself scored far below 0."""
    truth = features(0, 60)
    near = truth + 0.1 * features(5, 60)
    independent, copies, close = (
        set_metrics.kernel_distance_interval(x, truth) for x in (features(1, 60), truth, near)
    )
    assert independent["low"] < 0 < independent["high"]
    assert copies["mean"] == pytest.approx(0, abs=1e-6)
    assert abs(close["mean"]) < 0.2 * (independent["high"] - independent["low"])
