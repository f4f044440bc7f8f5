"""features/statistics.py against closed forms, scipy and sums written out."""

import dataclasses

import numpy as np
import pytest
from scipy import linalg
from scipy.stats import entropy

from sr3_jax.errors import UserError
from sr3_jax.features.statistics import (
    FeatureProtocol,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_statistics,
    merged,
    save_statistics,
    statistics_of,
)

PROTOCOL = FeatureProtocol("some-network", "frechet_some", "0" * 64, "none")


def features(seed, count, width, *, mean=0.0):
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(width, width))
    return (random.normal(size=(count, width)) @ mixing + mean).astype(np.float32)


def gaussian(mean, covariance, count=101):
    """Statistics of just this mean and covariance."""
    mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
    return Statistics(PROTOCOL, count, mean, covariance * (count - 1))


@pytest.mark.parametrize("cuts", [[], [1], [37], [1, 2, 3], [10, 11, 60, 99]])
def test_parts_in_any_order_give_the_mean_and_covariance_of_all(cuts):
    """A mean of 10^4 and a spread of 1: sums of squares in float32, or their difference, would lose it."""
    data = features(0, 100, 5, mean=1e4)
    parts = [statistics_of(part, PROTOCOL) for part in np.split(data, cuts)]
    whole = merged(parts[::-1])
    assert whole.count == 100 and whole.mean.dtype == whole.scatter.dtype == np.float64
    np.testing.assert_allclose(whole.mean, np.mean(data.astype(np.float64), axis=0), rtol=1e-12)
    expected = np.cov(data.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(whole.covariance, expected, rtol=1e-9, atol=1e-9)


def test_a_stream_keeps_its_digits():
    """Ten thousand merges about a mean of a million."""
    data = 1e6 + np.random.default_rng(1).normal(size=(10_000, 2))
    so_far = statistics_of(data[:1], PROTOCOL)
    for row in data[1:]:
        so_far = merged([so_far, statistics_of(row[None], PROTOCOL)])
    np.testing.assert_allclose(so_far.covariance, np.cov(data, rowvar=False), rtol=1e-8, atol=1e-10)


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    """There it is |difference of means|^2 + the squared differences of the deviations along the common axes."""
    random = np.random.default_rng(2)
    axes = np.linalg.qr(random.normal(size=(6, 6)))[0]
    deviations = random.uniform(0.1, 3, (2, 6))
    means = random.normal(size=(2, 6))
    a, b = (gaussian(m, (axes * d**2) @ axes.T) for m, d in zip(means, deviations, strict=True))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("width", [1, 3, 64])
def test_frechet_distance_is_that_with_scipys_matrix_root(width):
    a = statistics_of(features(3, 200, width), PROTOCOL)
    b = statistics_of(features(4, 150, width, mean=0.5), PROTOCOL)
    root = linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.sum((a.mean - b.mean) ** 2)
    expected += np.trace(a.covariance + b.covariance) - 2 * np.trace(np.atleast_2d(root)).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_of_fewer_images_than_features():
    """Singular covariances, as nearly always: N = 12, D = 64, where the trace of the root has a small form.

    With deviations X and Y, tr (X'X Y'Y)^(1/2) is the sum of the singular values of the 12x12 matrix X Y'.
    """
    data = [features(seed, 12, 64).astype(np.float64) for seed in (5, 6)]
    x, y = (part - part.mean(axis=0) for part in data)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum() / 11
    expected = np.sum((data[0].mean(axis=0) - data[1].mean(axis=0)) ** 2)
    expected += (np.sum(x**2) + np.sum(y**2)) / 11 - 2 * cross
    a, b = (statistics_of(part, PROTOCOL) for part in data)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * np.trace(a.covariance))


def test_a_saved_reference_is_the_same(tmp_path):
    path = tmp_path / "reference.npz"
    before = statistics_of(features(7, 30, 4), PROTOCOL)
    save_statistics(path, before)
    after = load_statistics(path)
    assert (after.protocol, after.count) == (PROTOCOL, 30)
    np.testing.assert_array_equal(after.mean, before.mean)
    np.testing.assert_array_equal(after.covariance, before.covariance)
    assert [file.name for file in tmp_path.iterdir()] == ["reference.npz"]


def test_what_is_no_reference_is_named(tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(UserError, match="cannot be read"):
        load_statistics(path)
    with pytest.raises(UserError, match="cannot be written"):
        save_statistics(tmp_path / "none" / "x.npz", statistics_of(features(0, 3, 2), PROTOCOL))
    save_statistics(path, statistics_of(features(7, 30, 4), PROTOCOL))
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    contents = [b"", b"text", whole[: len(whole) // 2]]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no reference statistics"):
            load_statistics(path)
    for change in ({"mean": np.zeros(3)}, {"count": np.array(0)}, {"mean": np.array([None] * 4)}):
        np.savez(path, **(arrays | change))
        with pytest.raises(UserError, match="holds no reference statistics"):
            load_statistics(path)
    del arrays["network"]
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="holds no reference statistics"):
        load_statistics(path)


@pytest.mark.parametrize("field", ["network", "weights_sha256", "preprocessing"])
def test_different_features_are_not_compared(field):
    a = statistics_of(features(8, 10, 3), PROTOCOL)
    b = dataclasses.replace(a, protocol=dataclasses.replace(PROTOCOL, **{field: "another"}))
    for call in (frechet_distance, lambda a, b: merged([a, b])):
        with pytest.raises(UserError, match=f"cannot be compared .*{field} .* and 'another'"):
            call(a, b)


def test_too_few_images_are_refused():
    one, two = (statistics_of(features(9, count, 3), PROTOCOL) for count in (1, 2))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        frechet_distance(two, one)
    frechet_distance(two, two)
    with pytest.raises(UserError, match="KID needs at least 2 images of each kind, got 5 and 1"):
        kernel_distance(np.ones((5, 3)), np.ones((1, 3)), seed=0)
    with pytest.raises(UserError, match="in 10 splits needs at least 20 images, got 19"):
        inception_score(np.ones((19, 3)))
    with pytest.raises(UserError, match="no images"):
        merged([])
    with pytest.raises(UserError, match="features of 3 and of 4 numbers"):
        frechet_distance(two, statistics_of(features(9, 5, 4), PROTOCOL))
    with pytest.raises(UserError, match="features of 3 and of 4 numbers"):
        kernel_distance(np.ones((5, 3)), np.ones((5, 4)), seed=0)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(3), np.full((2, 3), np.nan)])
def test_features_that_are_none_are_refused(bad):
    for call in (
        lambda x: statistics_of(x, PROTOCOL),
        lambda x: kernel_distance(x, np.ones((2, 3)), seed=0),
        lambda x: inception_score(x, splits=1),
    ):
        with pytest.raises(ValueError, match="finite numbers"):
            call(bad)


def test_kid_is_the_sum_over_pairs():
    a, b = features(10, 7, 4), features(11, 5, 4, mean=0.3)

    def kernel(x, y):
        return (float(np.dot(x.astype(np.float64), y.astype(np.float64))) / 4 + 1) ** 3

    within = [
        np.mean([kernel(x, y) for i, x in enumerate(z) for j, y in enumerate(z) if i != j]) for z in (a, b)
    ]
    expected = sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    result = kernel_distance(a, b, seed=0)
    assert result.mean == pytest.approx(expected, rel=1e-10)
    assert (result.deviation, result.parts, result.size) == (None, 1, 5)


def test_kid_in_subsets_is_unbiased_and_seeded():
    """The mean over subsets tends to the value of all images; images of one kind have a KID of 0 on average."""
    a, b = features(12, 300, 3) / 3, features(13, 200, 3, mean=1.0) / 3
    whole = kernel_distance(a, b, seed=0).mean
    subsets = kernel_distance(a, b, seed=0, subsets=2000, subset_size=20)
    assert (subsets.parts, subsets.size) == (2000, 20)
    error = subsets.deviation / np.sqrt(2000)
    assert 0 < error < 0.1 * whole
    assert abs(subsets.mean - whole) < 4 * error
    assert kernel_distance(a, b, seed=0, subsets=5, subset_size=20) == kernel_distance(
        a, b, seed=0, subsets=5, subset_size=20
    )
    assert (
        kernel_distance(a, b, seed=1, subsets=5, subset_size=20).mean
        != kernel_distance(a, b, seed=0, subsets=5, subset_size=20).mean
    )
    same = kernel_distance(a[:150], a[150:], seed=0, subsets=2000, subset_size=20)
    assert abs(same.mean) < 0.1 * whole


def test_a_kid_subset_has_no_image_twice():
    """Subsets as large as the set are the set: where the other kind is all one image, they differ in nothing."""
    a, b = np.ones((21, 3)), features(15, 20, 3)
    assert kernel_distance(a, b, seed=0, subsets=5, subset_size=20).deviation == pytest.approx(0, abs=1e-9)


def test_inception_score_has_its_closed_forms():
    assert inception_score(np.zeros((40, 8))).mean == pytest.approx(1)  # nothing recognised
    sure = 1000 * np.eye(8)[np.arange(80) % 8]  # each class as often, without doubt
    score = inception_score(sure, splits=10)
    assert score.mean == pytest.approx(8) and score.deviation == pytest.approx(0, abs=1e-9)
    assert (score.parts, score.size) == (10, 8)
    one_class = inception_score(1000 * np.eye(8)[np.zeros(20, int)], splits=1)
    assert one_class.mean == pytest.approx(1) and one_class.deviation is None


def test_inception_score_is_that_with_scipys_entropy():
    logits = np.random.default_rng(14).normal(size=(25, 6)) * 3 + 500
    p = np.exp(logits - 500) / np.exp(logits - 500).sum(axis=1, keepdims=True)
    parts = [p[:9], p[9:17], p[17:]]
    scores = [np.exp(np.mean([entropy(row, part.mean(axis=0)) for row in part])) for part in parts]
    score = inception_score(logits, splits=3)
    assert score.mean == pytest.approx(np.mean(scores), rel=1e-10)
    assert score.deviation == pytest.approx(np.std(scores), rel=1e-10)
