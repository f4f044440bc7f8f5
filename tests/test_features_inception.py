"""FID's Inception network against a second implementation in NumPy, and in PyTorch if it is installed."""

import dataclasses
import hashlib

import jax
import numpy as np
import plain_layers
import pytest
from safetensors.numpy import save_file
from scipy.ndimage import map_coordinates

from sr3_jax.errors import UserError
from sr3_jax.features import inception
from sr3_jax.features.inception_layers import kernel_shapes

SIDE = 107  # of the image that the layers are compared on; the network takes any from 75


class PlainLayers:
    """The layers in NumPy. Random weights are made on demand, with PyTorch's names and shapes."""

    def __init__(self, arrays=None):
        self.arrays = {} if arrays is None else arrays
        self.random = np.random.default_rng(0)

    def image(self, x):
        return x

    def channels_last(self, x):
        return x

    def weights(self, name, out, into, height, width):
        if f"{name}.conv.weight" not in self.arrays:
            random, deviation = self.random, (2 / (into * height * width)) ** 0.5
            self.arrays |= {
                f"{name}.conv.weight": random.standard_normal((out, into, height, width), np.float32)
                * np.float32(deviation),
                f"{name}.bn.weight": random.uniform(0.5, 1.5, out),
                f"{name}.bn.bias": random.normal(0, 0.2, out),
                f"{name}.bn.running_mean": random.normal(0, 0.2, out),
                f"{name}.bn.running_var": random.uniform(0.5, 1.5, out),
                f"{name}.bn.num_batches_tracked": np.zeros((), np.int64),
            }
        parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        return [self.arrays[f"{name}.{part}"] for part in parts]

    def convolution(self, x, name, out, size, stride, padding):
        kernel, gain, bias, mean, variance = self.weights(name, out, x.shape[-1], *size)
        x = plain_layers.convolution(x, kernel, stride, padding)
        return np.maximum((x - mean) / np.sqrt(variance + 0.001) * gain + bias, 0)

    max_pool = staticmethod(plain_layers.max_pool)
    mean_pool = staticmethod(plain_layers.mean_pool)

    def concatenate(self, branches):
        return np.concatenate(branches, axis=-1)


def torch_layers(arrays):
    """The same layers in PyTorch, [B,C,H,W], with PyTorch's batch norm and pools."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    class TorchLayers:
        def image(self, x):
            return torch.from_numpy(x).double().permute(0, 3, 1, 2)

        def channels_last(self, x):
            return x.permute(0, 2, 3, 1).numpy()

        def convolution(self, x, name, out, size, stride, padding):
            weights = PlainLayers(arrays).weights(name, out, x.shape[1], *size)
            kernel, gain, bias, mean, variance = (
                torch.from_numpy(np.asarray(w, np.float64)) for w in weights
            )
            x = functional.conv2d(x, kernel, stride=stride, padding=padding)
            return functional.relu(functional.batch_norm(x, mean, variance, gain, bias, eps=0.001))

        def max_pool(self, x, stride, padding=0):
            return functional.max_pool2d(x, 3, stride, padding)

        def mean_pool(self, x):
            return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

        def concatenate(self, branches):
            return torch.cat(branches, 1)

    return TorchLayers()


def architecture(ops, image):
    """Szegedy et al. 2015 (figures 5, 6, 7 and table 1) with the pools of the 2015-12-05 graph."""
    blocks = {}

    def conv(x, name, out, size=1, stride=1, padded=True):
        size = (size, size) if isinstance(size, int) else size
        padding = tuple(side // 2 for side in size) if padded and stride == 1 else (0, 0)
        return ops.convolution(x, name, out, size, stride, padding)

    x = ops.image(image)
    x = blocks["Conv2d_1a_3x3"] = conv(x, "Conv2d_1a_3x3", 32, 3, stride=2)
    x = blocks["Conv2d_2a_3x3"] = conv(x, "Conv2d_2a_3x3", 32, 3, padded=False)
    x = blocks["Conv2d_2b_3x3"] = conv(x, "Conv2d_2b_3x3", 64, 3)
    x = blocks["pool1"] = ops.max_pool(x, 2)
    x = blocks["Conv2d_3b_1x1"] = conv(x, "Conv2d_3b_1x1", 80)
    x = blocks["Conv2d_4a_3x3"] = conv(x, "Conv2d_4a_3x3", 192, 3, padded=False)
    x = blocks["pool2"] = ops.max_pool(x, 2)

    def small(x, name, pooled):
        one = conv(x, f"{name}.branch1x1", 64)
        five = conv(conv(x, f"{name}.branch5x5_1", 48), f"{name}.branch5x5_2", 64, 5)
        double = conv(conv(x, f"{name}.branch3x3dbl_1", 64), f"{name}.branch3x3dbl_2", 96, 3)
        double = conv(double, f"{name}.branch3x3dbl_3", 96, 3)
        pool = conv(ops.mean_pool(x), f"{name}.branch_pool", pooled)
        return ops.concatenate([one, five, double, pool])

    def middle(x, name, c):
        one = conv(x, f"{name}.branch1x1", 192)
        seven = conv(conv(x, f"{name}.branch7x7_1", c), f"{name}.branch7x7_2", c, (1, 7))
        seven = conv(seven, f"{name}.branch7x7_3", 192, (7, 1))
        double = conv(conv(x, f"{name}.branch7x7dbl_1", c), f"{name}.branch7x7dbl_2", c, (7, 1))
        double = conv(double, f"{name}.branch7x7dbl_3", c, (1, 7))
        double = conv(double, f"{name}.branch7x7dbl_4", c, (7, 1))
        double = conv(double, f"{name}.branch7x7dbl_5", 192, (1, 7))
        pool = conv(ops.mean_pool(x), f"{name}.branch_pool", 192)
        return ops.concatenate([one, seven, double, pool])

    def large(x, name, pooled):
        one = conv(x, f"{name}.branch1x1", 320)
        fork = conv(x, f"{name}.branch3x3_1", 384)
        fork = [
            conv(fork, f"{name}.branch3x3_2a", 384, (1, 3)),
            conv(fork, f"{name}.branch3x3_2b", 384, (3, 1)),
        ]
        double = conv(conv(x, f"{name}.branch3x3dbl_1", 448), f"{name}.branch3x3dbl_2", 384, 3)
        double = [
            conv(double, f"{name}.branch3x3dbl_3a", 384, (1, 3)),
            conv(double, f"{name}.branch3x3dbl_3b", 384, (3, 1)),
        ]
        return ops.concatenate([one, *fork, *double, conv(pooled, f"{name}.branch_pool", 192)])

    x = blocks["Mixed_5b"] = small(x, "Mixed_5b", 32)
    x = blocks["Mixed_5c"] = small(x, "Mixed_5c", 64)
    x = blocks["Mixed_5d"] = small(x, "Mixed_5d", 64)
    double = conv(conv(x, "Mixed_6a.branch3x3dbl_1", 64), "Mixed_6a.branch3x3dbl_2", 96, 3)
    double = conv(double, "Mixed_6a.branch3x3dbl_3", 96, 3, stride=2)
    single = conv(x, "Mixed_6a.branch3x3", 384, 3, stride=2)
    x = blocks["Mixed_6a"] = ops.concatenate([single, double, ops.max_pool(x, 2)])
    x = blocks["Mixed_6b"] = middle(x, "Mixed_6b", 128)
    x = blocks["Mixed_6c"] = middle(x, "Mixed_6c", 160)
    x = blocks["Mixed_6d"] = middle(x, "Mixed_6d", 160)
    x = blocks["Mixed_6e"] = middle(x, "Mixed_6e", 192)
    single = conv(conv(x, "Mixed_7a.branch3x3_1", 192), "Mixed_7a.branch3x3_2", 320, 3, stride=2)
    seven = conv(conv(x, "Mixed_7a.branch7x7x3_1", 192), "Mixed_7a.branch7x7x3_2", 192, (1, 7))
    seven = conv(seven, "Mixed_7a.branch7x7x3_3", 192, (7, 1))
    seven = conv(seven, "Mixed_7a.branch7x7x3_4", 192, 3, stride=2)
    x = blocks["Mixed_7a"] = ops.concatenate([single, seven, ops.max_pool(x, 2)])
    x = blocks["Mixed_7b"] = large(x, "Mixed_7b", ops.mean_pool(x))
    x = blocks["Mixed_7c"] = large(x, "Mixed_7c", ops.max_pool(x, 1, 1))
    return {name: ops.channels_last(x) for name, x in blocks.items()}


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).uniform(-1, 1, (1, SIDE, SIDE, 3))


@pytest.fixture(scope="module")
def numpy_network(image):
    """(random weights with PyTorch's names, outputs of the NumPy network's blocks)."""
    ops = PlainLayers()
    blocks = architecture(ops, image)
    ops.arrays |= {
        "fc.weight": ops.random.standard_normal((1008, 2048), np.float32) * np.float32(0.02),
        "fc.bias": ops.random.normal(0, 0.5, 1008),
    }
    return ops.arrays, blocks


@pytest.fixture(scope="module")
def weights(numpy_network):
    return inception.folded(numpy_network[0], "made up")


@pytest.fixture(scope="module")
def ours(weights, image):
    return jax.device_get(jax.jit(inception.network)(weights, image.astype(np.float32)))


def compare(ours, reference):
    assert len(reference) == 18
    for name, expected in reference.items():
        assert ours[name].shape == expected.shape, name
        assert np.abs(ours[name] - expected).max() < 2e-5 * np.abs(expected).max(), name


def test_every_block_agrees_with_numpy(numpy_network, ours):
    arrays, blocks = numpy_network
    compare(ours, blocks)
    pool3 = blocks["Mixed_7c"].mean(axis=(1, 2))
    np.testing.assert_allclose(ours["pool3"], pool3, rtol=1e-4, atol=1e-4)
    logits = pool3 @ arrays["fc.weight"].T + arrays["fc.bias"]
    np.testing.assert_allclose(ours["logits"], logits, rtol=1e-3, atol=1e-4)


def test_every_block_agrees_with_pytorch(numpy_network, ours, image):
    compare(ours, architecture(torch_layers(numpy_network[0]), image))


def test_number_of_parameters(numpy_network):
    """torchvision's Inception v3 has 23,834,568 without its auxiliary head, for 1000 classes; this one has 8 more."""
    learned = [array.size for name, array in numpy_network[0].items() if ".running_" not in name]
    learned = sum(learned) - 94  # counters of batches
    assert learned == 23_834_568 + 8 * 2049
    assert len(kernel_shapes()) == 94


@pytest.mark.parametrize("size", [(37, 52), (299, 410)])
@pytest.mark.parametrize("preprocessing", ["tf1", "pytorch_fid"])
def test_preprocessing_agrees_with_each_library(size, preprocessing):
    images = np.random.default_rng(2).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    shift = 0.5 if preprocessing == "pytorch_fid" else 0.0
    places = [(np.arange(299) + shift) * side / 299 - shift for side in size]
    grid = np.meshgrid(*places, indexing="ij")
    levels = [
        map_coordinates(images[0, ..., c].astype(float), grid, order=1, mode="nearest") for c in range(3)
    ]
    expected = np.stack(levels, axis=-1)
    expected = (expected - 128) / 128 if preprocessing == "tf1" else expected / 255 * 2 - 1
    got = inception.resized(images, preprocessing=preprocessing)[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_outputs_are_of_the_resized_images_without_the_bias(monkeypatch):
    def network(weights, x):
        pool3 = x.sum(axis=(1, 2))
        return {"pool3": pool3, "logits": pool3 @ weights["fc"]["kernel"] + weights["fc"]["bias"][None]}

    monkeypatch.setattr(inception, "network", network)
    random = np.random.default_rng(3)
    kernel, bias = (random.normal(size=size).astype(np.float32) for size in [(3, 5), (5,)])
    images = random.integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    for preprocessing in ("tf1", "pytorch_fid"):
        model = inception.Inception({"fc": {"kernel": kernel, "bias": bias}}, "0" * 64, preprocessing)
        pool3 = np.asarray(inception.resized(images, preprocessing=preprocessing)).sum(axis=(1, 2))
        np.testing.assert_allclose(model.features(images), pool3, rtol=1e-4)
        np.testing.assert_allclose(model.outputs(images).logits, pool3 @ kernel, rtol=1e-3)
    with pytest.raises(ValueError, match="uint8"):
        model.outputs(images / 255)


def test_only_the_published_weights_give_a_fid(monkeypatch, tmp_path):
    monkeypatch.setattr(inception, "folded", lambda arrays, name: arrays)
    path = tmp_path / "inception.safetensors"
    save_file({"fc.bias": np.arange(3, dtype=np.float32)}, path)
    network = inception.load_inception(path)
    assert network.weights["fc.bias"].tolist() == [0, 1, 2]
    assert network.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not network.verified and "fid" not in network.protocol.distance
    assert "unknown" in network.protocol.network and network.protocol.weights_sha256 == network.sha256
    published = dataclasses.replace(network, sha256=inception.INCEPTION_SHA256)
    assert published.verified and published.protocol.distance == "fid"
    other = inception.load_inception(path, preprocessing="pytorch_fid")
    assert other.protocol != network.protocol


def test_another_network_is_an_error(numpy_network, tmp_path):
    arrays = {
        name: array for name, array in numpy_network[0].items() if name != "Mixed_6b.branch_pool.bn.bias"
    }
    with pytest.raises(UserError, match=r"file .*Mixed_6b\.branch_pool\.bn\.bias .*\(192,\), got none"):
        inception.folded(arrays, "file")
    with pytest.raises(UserError, match=r"fc\.weight .*\(1008, 2048\), got \(1000, 2048\)"):
        inception.folded(numpy_network[0] | {"fc.weight": np.zeros((1000, 2048))}, "file")
    with pytest.raises(UserError, match="cannot be read"):
        inception.load_inception(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"'clean' .*tf1, pytorch_fid"):
        inception.load_inception(tmp_path / "none.pth", preprocessing="clean")
