"""What is measured of each output with networks, and of all samples of one input, against sums written out."""

from __future__ import annotations

import numpy as np
import pytest

from sr3_jax.errors import UserError
from sr3_jax.evaluation import measures, meters


class Brightness:
    """Stands for LPIPS: how far apart the means of two images are. Notes the shapes that it was asked for."""

    sha256 = "b" * 64
    name = "brightness"

    def __init__(self):
        self.shapes = []

    def distance(self, a, b):
        self.shapes.append(a.shape)
        return np.abs(a.astype(float).mean(axis=(1, 2, 3)) - b.astype(float).mean(axis=(1, 2, 3)))


class Lookup:
    """Stands for a classifier: logits by the red value of an image's first pixel."""

    name, sha256 = "lookup", "c" * 64

    def __init__(self, table):
        self.table = np.asarray(table, np.float32)
        self.num_classes = self.table.shape[1]

    def logits(self, images):
        return self.table[images[:, 0, 0, 0]]


def flat(*levels, side=32):
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def test_diversity_is_the_mean_deviation_of_the_samples():
    random = np.random.default_rng(0)
    samples = random.integers(0, 256, (4, 5, 6, 3), np.uint8)
    total = 0.0
    for y, x, c in np.ndindex(5, 6, 3):
        values = [int(sample[y, x, c]) for sample in samples]
        mean = sum(values) / 4
        total += (sum((value - mean) ** 2 for value in values) / 3) ** 0.5
    found = measures.pixel_spread().run(samples)
    assert found == {"diversity": pytest.approx(total / 90, rel=1e-5)}
    assert measures.pixel_spread().run(np.stack([samples[0]] * 3)) == {"diversity": 0.0}


@pytest.mark.parametrize("batch", [1, 4])
def test_lpips_of_pairs_is_the_mean_over_all_pairs(batch):
    network = Brightness()
    found = measures.perceptual_spread(network, batch=batch).run(flat(10, 14, 40, 90))
    pairs = [4, 30, 80, 26, 76, 50]
    assert found == {"diversity_lpips": pytest.approx(sum(pairs) / 6)}
    assert set(network.shapes) == {(batch, 32, 32, 3)}  # one shape, one program


def test_lpips_is_between_output_and_original():
    one = measures.perceptual(Brightness())
    found = one.run(flat(10, 20), flat(15, 50), flat(0, 0), np.zeros(2, int))
    np.testing.assert_allclose(found["lpips"], [5.0, 30.0])
    assert not one.fits(np.zeros((30, 40, 3))) and one.fits(np.zeros((31, 40, 3)))
    assert one.key != measures.plain().key


def test_accuracy_counts_best_guesses_and_five_best():
    table = np.zeros((6, 10))
    table[0, 3] = 1.0  # right
    table[1, 4] = 1.0  # 3 is among the zeros: of equal guesses the first count, after 4 come 0, 1, 2, 3
    table[2, 5:10] = 1.0  # all five before 3
    table[3] = np.arange(10)  # 3 is the seventh
    table[4] = -np.arange(10)  # 3 is the fourth
    one = meters.recognition(Lookup(table))
    images = flat(0, 1, 2, 3, 4)
    found = one.run(images, images, images, np.full(5, 3))
    assert found["top1"].tolist() == [100, 0, 0, 0, 0]
    assert found["top5"].tolist() == [100, 100, 0, 0, 100]
    assert one.of_originals and one.key_for(3) != one.key_for(4) != one.key


def test_of_few_classes_only_the_best_guess_counts():
    one = meters.recognition(Lookup(np.eye(9)))
    found = one.run(flat(1, 2), flat(1, 2), flat(1, 2), np.array([1, 1]))
    assert {name: values.tolist() for name, values in found.items()} == {"top1": [100.0, 0.0]}
    with pytest.raises(UserError, match="labels from 2 to 9 are not those of a classifier of 9 classes"):
        one.run(flat(1, 2), flat(1, 2), flat(1, 2), np.array([2, 9]))


def test_another_classifier_gives_other_scores():
    two = [Lookup(np.eye(3)) for _ in range(2)]
    two[1].sha256 = "d" * 64
    assert len({meters.recognition(one).key for one in two}) == 2
