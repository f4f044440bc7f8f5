"""The layers of the U-Net, compared with float64 NumPy.

Shape legend: B batch, H height, W width, C channels, E width of the embedding.
"""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.diffusion import schedule
from sr3_jax.nn import blocks
from tests import tiny


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


def normal(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# ---- Rearrangements


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_space_to_depth_packs_blocks_and_depth_to_space_inverts_it(factor):
    x = normal(2, 8, 12, 3)
    packed = np.asarray(blocks.space_to_depth(jnp.asarray(x), factor))
    assert packed.shape == (2, 8 // factor, 12 // factor, 3 * factor**2)
    square = x[1, factor : 2 * factor, 2 * factor : 3 * factor]  # row 1, column 2 of the blocks
    np.testing.assert_array_equal(packed[1, 1, 2], square.reshape(-1))
    np.testing.assert_array_equal(blocks.depth_to_space(jnp.asarray(packed), factor), x)


def test_average_pool_and_nearest_upsample():
    x = normal(2, 4, 6, 3)
    squares = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    np.testing.assert_allclose(blocks.average_pool(jnp.asarray(x)), sum(squares) / 4, atol=1e-6)
    np.testing.assert_array_equal(blocks.nearest_upsample(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2))


def test_convolution_of_an_upsampled_image_is_computed_at_its_own_size():
    """Output, borders and gradients are those of the two operations."""
    x, kernel, weights = normal(2, 3, 5, 4), normal(3, 3, 4, 6, seed=1), normal(2, 6, 10, 6, seed=2)

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        wide = blocks.nearest_upsample(x)
        return jax.lax.conv(wide.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME")

    def values(function):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(function(*args) * weights), argnums=(0, 1)))

    output = jax.jit(blocks.upsampled_conv)(x, kernel)
    np.testing.assert_allclose(output, plain(x, kernel).transpose(0, 2, 3, 1), atol=2e-5)
    got = values(blocks.upsampled_conv)(x, kernel)[1]
    wanted = values(lambda *args: plain(*args).transpose(0, 2, 3, 1))(x, kernel)[1]
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_convolution_of_one_pixel_has_the_gradients_of_a_matrix_product():
    x, module = normal(2, 3, 5, 4), blocks.conv(6, 1, jnp.dtype("float32"))
    _, params = apply(module, x)
    kernel, bias = params["kernel"], params["bias"]
    y, pullback = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, jnp.asarray(x))
    np.testing.assert_allclose(y, x @ kernel[0, 0] + bias, atol=1e-5)
    weights, dx = pullback(jnp.asarray(normal(2, 3, 5, 6, seed=1)))
    ct = normal(2, 3, 5, 6, seed=1)
    np.testing.assert_allclose(dx, ct @ kernel[0, 0].T, atol=1e-5)
    np.testing.assert_allclose(weights["kernel"][0, 0], np.einsum("bhwc,bhwd->cd", x, ct), atol=1e-5)


# ---- The embedding of the noise level


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the spectrum of the centered features: the number of directions that they use."""
    values = np.linalg.svd(features - features.mean(0), compute_uv=False) ** 2
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.fixture(scope="module")
def levels() -> np.ndarray:
    return schedule.linear().gamma[1:]  # the 2000 noisy levels of training


def test_log_snr_features_separate_levels_better_than_gamma(levels):
    features = np.asarray(blocks.log_snr_features(jnp.asarray(levels), 64))
    raw = np.asarray(
        blocks.sinusoidal(jnp.asarray(levels), 64, 1e-4, 1.0)
    )  # as in common ports: gamma itself
    assert effective_rank(raw) < 1.5
    assert effective_rank(features) > 10

    def nearest(table: np.ndarray, steps: slice) -> float:
        chosen = table[steps]
        return float(np.linalg.norm(chosen[1:] - chosen[:-1], axis=1).min() / np.sqrt(table.shape[1] / 2))

    for end in (
        slice(0, 2000, 100),
        slice(0, 100, 10),
        slice(1900, 2000, 20),
    ):  # all, log_snr_max, log_snr_min
        assert nearest(features, end) > 0.05
    assert nearest(raw, slice(0, 100, 10)) < 1e-3
    assert nearest(raw, slice(1900, 2000, 20)) < 1e-3


def test_log_snr_features_are_finite_and_clipped_at_the_ends():
    gamma = jnp.asarray([1.0, 1 - 1e-7, 0.5, 1e-30, 1e-9], jnp.float32)
    features = np.asarray(blocks.log_snr_features(gamma, 16))
    assert features.shape == (5, 16) and features.dtype == np.float32
    assert np.isfinite(features).all()
    frequencies = np.geomspace(0.1, 20.0, 8)
    for row, log_snr in ((0, 20.0), (2, 0.0), (3, -20.0), (4, -20.0)):
        angle = log_snr * frequencies
        np.testing.assert_allclose(features[row], np.concatenate([np.cos(angle), np.sin(angle)]), atol=1e-4)


# ---- Norms


def apply(module, *inputs, seed: int = 0, size: float = 0.3, **options):
    """(output, weights) of a module with perturbed weights."""
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **options))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables["params"])
    params = tiny.perturbed(zeros, seed=seed, size=size)
    return jax.jit(lambda p, *x: module.apply({"params": p}, *x, **options))(params, *inputs), params


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (8, 2), (12, 3), (48, 12), (128, 32), (160, 32)])
def test_group_norm_has_groups_of_at_least_four_channels(channels, groups):
    x = 3 + 2 * normal(2, 4, 4, channels)
    y, params = apply(blocks.Norm("group"), x)
    parts = x.astype(np.float64).reshape(2, 16, groups, -1)
    mean, variance = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
    weights = params["GroupNorm_0"]
    wanted = ((parts - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * weights["scale"] + weights["bias"]
    np.testing.assert_allclose(y, wanted, atol=2e-5)


def test_pixel_norm_divides_by_the_rms_over_channels():
    x = normal(2, 4, 4, 8)
    y, params = apply(blocks.Norm("pixel"), x)
    rms = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, x / rms * params["RMSNorm_0"]["scale"], atol=1e-5)


@pytest.mark.parametrize("kind", ["group", "pixel"])
def test_norms_of_bfloat16_are_computed_in_float32(kind):
    """At 256 the spacing of bfloat16 is 2, so sums over pixels would be useless."""
    x = jnp.asarray(256 + normal(1, 32, 32, 4), jnp.bfloat16)
    y, params = apply(blocks.Norm(kind), x)
    exact = jax.jit(lambda p, x: blocks.Norm(kind).apply({"params": p}, x))(params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), exact, atol=0.01)


# ---- The residual block


def block(channels: int, **fields) -> blocks.ResidualBlock:
    return blocks.ResidualBlock(channels, fields.pop("norm", "pixel"), jnp.dtype("float32"), **fields)


def fresh(module, *inputs):
    """(output, weights) of a module with its initial weights."""
    params = jax.jit(lambda key: module.init(key, *inputs, False)["params"])(jax.random.key(1))
    return np.asarray(module.apply({"params": params}, *inputs, False)), params


EMBEDDING = normal(2, 8, seed=5)


@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_untrained_block_is_its_scaled_skip_branch(resample):
    x = normal(2, 4, 4, 4)
    change = {None: lambda x: x, "up": blocks.nearest_upsample, "down": blocks.average_pool}[resample]
    y, params = fresh(block(4, resample=resample), x, EMBEDDING)
    np.testing.assert_allclose(y, np.asarray(change(jnp.asarray(x))) / np.sqrt(2), atol=1e-6)
    assert "skip" not in params


def test_untrained_block_of_another_width_is_a_1x1_convolution():
    x = normal(2, 4, 4, 4)
    y, params = fresh(block(8), x, EMBEDDING)
    assert params["skip"]["kernel"].shape == (1, 1, 4, 8)
    np.testing.assert_allclose(y, x @ np.asarray(params["skip"]["kernel"])[0, 0] / np.sqrt(2), atol=1e-5)


def swish(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def convolve(x: np.ndarray, weights) -> np.ndarray:
    """A 3x3 convolution with zero padding in float64."""
    kernel, padded = weights["kernel"], np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1:3]
    taps = [padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3)]
    return sum(taps) + weights["bias"]


def rms_norm(x: np.ndarray, weights) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights["RMSNorm_0"]["scale"]


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_block_matches_numpy(film, resample):
    """norm, swish, resample, conv, + embedding (or scale and shift), norm, swish, conv; (x + h) / sqrt 2."""
    x = normal(2, 4, 4, 4)
    y, p = apply(block(4, film=film, resample=resample), x, EMBEDDING, train=False)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    change = {
        None: lambda x: x,
        "up": lambda x: x.repeat(2, 1).repeat(2, 2),
        "down": lambda x: (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4,
    }[resample]
    x = x.astype(np.float64)
    h = convolve(change(swish(rms_norm(x, p["Norm_0"]))), p["Conv_0"])
    condition = (swish(EMBEDDING) @ p["embedding"]["kernel"] + p["embedding"]["bias"])[:, None, None]
    if film:
        h = rms_norm(h, p["Norm_1"]) * (1 + condition[..., :4]) + condition[..., 4:]
    else:
        h = rms_norm(h + condition, p["Norm_1"])
    np.testing.assert_allclose(y, (change(x) + convolve(swish(h), p["Conv_1"])) / np.sqrt(2), atol=1e-5)


def test_dropout_only_in_training_and_determined_by_its_key():
    x, module = normal(2, 4, 4, 4), block(4, dropout=0.5)
    _, params = apply(module, x, EMBEDDING, train=False)

    def run(train: bool, seed: int) -> np.ndarray:
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(module.apply({"params": params}, x, EMBEDDING, train, rngs=rngs))

    np.testing.assert_array_equal(run(False, 0), run(False, 1))
    np.testing.assert_array_equal(run(True, 0), run(True, 0))
    assert np.abs(run(True, 0) - run(True, 1)).max() > 1e-3
    assert np.abs(run(True, 0) - run(False, 0)).max() > 1e-3


# ---- Attention


@pytest.mark.parametrize("head_channels", [0, 4])
def test_attention_matches_numpy(head_channels):
    x = normal(2, 3, 4, 8)
    y, p = apply(blocks.Attention("pixel", jnp.dtype("float32"), head_channels), x, size=0.7)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    flat = rms_norm(x.astype(np.float64), p["Norm_0"]).reshape(2, 12, 8)
    qkv = flat @ p["qkv"]["kernel"] + p["qkv"]["bias"]
    heads = 8 // head_channels if head_channels else 1
    query, key, value = (part.reshape(2, 12, heads, -1) for part in np.split(qkv, 3, axis=-1))
    logits = np.einsum("bqhc,bkhc->bhqk", query, key) / np.sqrt(8 / heads)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("bhqk,bkhc->bqhc", weights, value).reshape(2, 12, 8)
    out = (attended @ p["out"]["kernel"] + p["out"]["bias"]).reshape(x.shape)
    np.testing.assert_allclose(y, (x + out) / np.sqrt(2), atol=1e-5)


@pytest.mark.parametrize(
    ("gpu", "dtype", "channels", "expected"),
    [
        (True, "bfloat16", 64, "cudnn"),
        (True, "float16", 128, "cudnn"),
        (True, "float32", 64, None),
        (True, "bfloat16", 256, None),
        (True, "bfloat16", 12, None),
        (False, "bfloat16", 64, None),
    ],
)
def test_attention_uses_cudnn_where_it_can(monkeypatch, gpu, dtype, channels, expected):
    used = []

    def attention(
        query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: str | None
    ) -> jax.Array:
        used.append(implementation)
        return value

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    monkeypatch.setattr(blocks, "has_fused_attention", lambda: gpu)
    heads = jnp.zeros((2, 4, 2, channels), dtype)
    blocks.attend(heads, heads, heads)
    assert used == [expected]


def test_only_an_nvidia_gpu_from_ampere_has_fused_attention(monkeypatch):
    assert not blocks.has_fused_attention()

    def gpu(version: str, capability: str) -> bool:
        device = types.SimpleNamespace(
            client=types.SimpleNamespace(platform_version=version), compute_capability=capability
        )
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        return blocks.has_fused_attention()

    assert gpu("cuda 12090", "9.0") and gpu("cuda 12090", "10.0")
    assert not gpu("cuda 12090", "7.5") and not gpu("rocm 60300", "gfx942")


def test_attention_is_permutation_equivariant():
    x, order = normal(2, 3, 4, 8), np.random.default_rng(3).permutation(12)
    module = blocks.Attention("pixel", jnp.dtype("float32"))
    y, params = apply(module, x, size=0.7)
    shuffled = x.reshape(2, 12, 8)[:, order].reshape(x.shape)
    y_shuffled = np.asarray(module.apply({"params": params}, shuffled)).reshape(2, 12, 8)
    np.testing.assert_allclose(y_shuffled, np.asarray(y).reshape(2, 12, 8)[:, order], atol=1e-5)
    others = x.copy()
    others[:, 0, 0] += 1
    assert np.abs(np.asarray(module.apply({"params": params}, others) - y)[:, 1:]).max() > 1e-4
