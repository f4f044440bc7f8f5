"""Statistics of features: against closed forms, scipy and explicit sums."""

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
    """Statistics with exactly this mean and covariance."""
    mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
    return Statistics(PROTOCOL, count, mean, covariance * (count - 1))


@pytest.mark.parametrize("cuts", [[], [1], [37], [1, 2, 3], [10, 11, 60, 99]])
def test_merged_parts_have_the_mean_and_covariance_of_all(cuts):
    """With a mean of 10^4 and a deviation of 1, sums of squares in float32 would lose all digits."""
    data = features(0, 100, 5, mean=1e4)
    parts = [statistics_of(part, PROTOCOL) for part in np.split(data, cuts)]
    whole = merged(parts[::-1])
    assert whole.count == 100 and whole.mean.dtype == whole.scatter.dtype == np.float64
    np.testing.assert_allclose(whole.mean, np.mean(data.astype(np.float64), axis=0), rtol=1e-12)
    expected = np.cov(data.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(whole.covariance, expected, rtol=1e-9, atol=1e-9)


def test_merging_a_stream_is_numerically_stable():
    """Ten thousand merges with a mean of a million."""
    data = 1e6 + np.random.default_rng(1).normal(size=(10_000, 2))
    so_far = statistics_of(data[:1], PROTOCOL)
    for row in data[1:]:
        so_far = merged([so_far, statistics_of(row[None], PROTOCOL)])
    np.testing.assert_allclose(so_far.covariance, np.cov(data, rowvar=False), rtol=1e-8, atol=1e-10)


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    """The closed form is |mean difference|^2 + the sum of squared differences of the standard deviations."""
    random = np.random.default_rng(2)
    axes = np.linalg.qr(random.normal(size=(6, 6)))[0]
    deviations = random.uniform(0.1, 3, (2, 6))
    means = random.normal(size=(2, 6))
    a, b = (gaussian(m, (axes * d**2) @ axes.T) for m, d in zip(means, deviations, strict=True))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("width", [1, 3, 64])
def test_frechet_distance_agrees_with_scipys_sqrtm(width):
    a = statistics_of(features(3, 200, width), PROTOCOL)
    b = statistics_of(features(4, 150, width, mean=0.5), PROTOCOL)
    root = linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.sum((a.mean - b.mean) ** 2)
    expected += np.trace(a.covariance + b.covariance) - 2 * np.trace(np.atleast_2d(root)).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_of_fewer_images_than_features():
    """Singular covariances (N = 12, D = 64), where the trace of the root can be computed from an N x N matrix.

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


def test_saved_statistics_are_read_back(tmp_path):
    path = tmp_path / "reference.npz"
    before = statistics_of(features(7, 30, 4), PROTOCOL)
    save_statistics(path, before)
    after = load_statistics(path)
    assert (after.protocol, after.count) == (PROTOCOL, 30)
    np.testing.assert_array_equal(after.mean, before.mean)
    np.testing.assert_array_equal(after.covariance, before.covariance)
    assert [file.name for file in tmp_path.iterdir()] == ["reference.npz"]


def test_a_file_that_is_not_a_reference_is_an_error(tmp_path):
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
        with pytest.raises(UserError, match="reference statistics"):
            load_statistics(path)
    for change in ({"mean": np.zeros(3)}, {"count": np.array(0)}, {"mean": np.array([None] * 4)}):
        np.savez(path, **(arrays | change))
        with pytest.raises(UserError, match="reference statistics"):
            load_statistics(path)
    del arrays["network"]
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="reference statistics"):
        load_statistics(path)


@pytest.mark.parametrize("field", ["network", "weights_sha256", "preprocessing"])
def test_different_features_cannot_be_compared(field):
    a = statistics_of(features(8, 10, 3), PROTOCOL)
    b = dataclasses.replace(a, protocol=dataclasses.replace(PROTOCOL, **{field: "another"}))
    for call in (frechet_distance, lambda a, b: merged([a, b])):
        with pytest.raises(UserError, match=f"cannot be compared .*{field} .* and 'another'"):
            call(a, b)


def test_too_few_images_are_errors():
    one, two = (statistics_of(features(9, count, 3), PROTOCOL) for count in (1, 2))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        frechet_distance(two, one)
    frechet_distance(two, two)
    with pytest.raises(UserError, match=r"KID .* 2 images .* 5 and 1"):
        kernel_distance(np.ones((5, 3)), np.ones((1, 3)), seed=0)
    with pytest.raises(UserError, match=r"10 splits .* 20 images, got 19"):
        inception_score(np.ones((19, 3)))
    with pytest.raises(UserError, match="no images"):
        merged([])
    with pytest.raises(UserError, match="3 and 4"):
        frechet_distance(two, statistics_of(features(9, 5, 4), PROTOCOL))
    with pytest.raises(UserError, match="3 and 4"):
        kernel_distance(np.ones((5, 3)), np.ones((5, 4)), seed=0)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(3), np.full((2, 3), np.nan)])
def test_invalid_features_are_errors(bad):
    for call in (
        lambda x: statistics_of(x, PROTOCOL),
        lambda x: kernel_distance(x, np.ones((2, 3)), seed=0),
        lambda x: inception_score(x, splits=1),
    ):
        with pytest.raises(ValueError, match="finite numbers"):
            call(bad)


def test_kid_is_a_sum_over_pairs():
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
    """The mean over subsets approaches the value of all images; two sets of one distribution have a mean KID of 0."""
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


def test_kid_subsets_are_without_replacement():
    """Subsets as large as the set equal it: against copies of one image, all subsets give the same value."""
    a, b = np.ones((21, 3)), features(15, 20, 3)
    assert kernel_distance(a, b, seed=0, subsets=5, subset_size=20).deviation == pytest.approx(0, abs=1e-9)


def test_inception_score_closed_forms():
    assert inception_score(np.zeros((40, 8))).mean == pytest.approx(1)  # uniform predictions
    sure = 1000 * np.eye(8)[np.arange(80) % 8]  # balanced and certain
    score = inception_score(sure, splits=10)
    assert score.mean == pytest.approx(8) and score.deviation == pytest.approx(0, abs=1e-9)
    assert (score.parts, score.size) == (10, 8)
    one_class = inception_score(1000 * np.eye(8)[np.zeros(20, int)], splits=1)
    assert one_class.mean == pytest.approx(1) and one_class.deviation is None


def test_inception_score_agrees_with_scipys_entropy():
    logits = np.random.default_rng(14).normal(size=(25, 6)) * 3 + 500
    p = np.exp(logits - 500) / np.exp(logits - 500).sum(axis=1, keepdims=True)
    parts = [p[:9], p[9:17], p[17:]]
    scores = [np.exp(np.mean([entropy(row, part.mean(axis=0)) for row in part])) for part in parts]
    score = inception_score(logits, splits=3)
    assert score.mean == pytest.approx(np.mean(scores), rel=1e-10)
    assert score.deviation == pytest.approx(np.std(scores), rel=1e-10)


def test_kid_of_paired_sets_leaves_the_pairs_out():
    generator = np.random.default_rng(3)
    a, b = generator.standard_normal((2, 12, 5))

    def kernel(x, y) -> float:
        return (x @ y / 5 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    expected = np.mean([kernel(a[i], a[j]) + kernel(b[i], b[j]) - 2 * kernel(a[i], b[j]) for i, j in pairs])
    assert kernel_distance(a, b, seed=0, paired=True).mean == pytest.approx(expected, rel=1e-6)
    subsets = kernel_distance(a, b, seed=0, subsets=5000, subset_size=10, paired=True)
    assert subsets.mean == pytest.approx(expected, abs=0.1)
