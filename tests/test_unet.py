"""The U-Net: gradients of weights and inputs, precision, receptive field, and initial output.

Shape legend: B batch, H height, W width, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.config.build import init_params
from sr3_jax.nn.unet import UNet, apply_unet
from tests import tiny

SIDE = 8
TWO_LEVELS = {"channels": 4, "multipliers": (1, 2), "num_blocks": (1, 1)}
# Each option is used by one of them, and each layout has every input.
NETWORKS = {
    "biggan": UNet(**TWO_LEVELS, attention_levels=(1,), head_channels=4, num_classes=3, augment=True),
    "efficient": UNet(
        **TWO_LEVELS, layout="efficient", patch=2, norm="pixel", film=True, num_classes=3, augment=True
    ),
}
SKIP = UNet(
    **TWO_LEVELS, layout="efficient", patch=2, stem_channels=12, output_skip=0.5, num_classes=3, augment=True
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(network: UNet, *, batch: int = 2, side: int = SIDE) -> tuple:
    """y_t, gamma and cond with every field."""
    y_t, upsampled = normal(batch, side, side, 3), normal(batch, side, side, 3, seed=1)
    cond = {
        "upsampled": upsampled,
        "label": np.arange(batch, dtype=np.int32) % 2,
        "augment": np.linspace(0.2, 0.6, batch, dtype=np.float32),
    }
    return y_t, np.linspace(0.3, 0.9, batch, dtype=np.float32), cond


@functools.cache
def weights(network: UNet):
    """Random weights: no layer is zero, and no two are equal."""
    shapes = jax.eval_shape(lambda key: init_params(network, key), jax.random.key(0))
    return tiny.perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), size=0.3)


@functools.cache
def gradients(network: UNet):
    """The jitted (output [B,H,W,C], gradients) of a random projection of the output, by weights and all inputs."""
    projection = normal(2, SIDE, SIDE, 3, seed=2)

    def projected(params, y_t, gamma, upsampled, augment, label):
        cond = {"upsampled": upsampled, "label": label, "augment": augment}
        out = network.apply({"params": params}, y_t, gamma, cond)
        return jnp.sum(out * projection), out

    by_all = jax.jit(jax.grad(projected, argnums=(0, 1, 2, 3, 4), has_aux=True))

    def run(params, y_t, gamma, cond):
        grads, out = by_all(params, y_t, gamma, cond["upsampled"], cond["augment"], cond["label"])
        return np.asarray(out), jax.device_get(grads)

    return run


# ---- Output and gradients


@pytest.mark.parametrize("layout", ["biggan", "efficient"])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_output_shape_equals_input_shape(layout, patch):
    network = UNet(**TWO_LEVELS, layout=layout, patch=patch)
    assert network.stride == 2 * patch
    params = weights(network)
    y_t, gamma, cond = inputs(network, side=16)
    out = jax.eval_shape(lambda p, *x: network.apply({"params": p}, *x), params, y_t, gamma, cond)
    assert out.shape == y_t.shape and out.dtype == jnp.float32
    assert params["input"]["kernel"].shape == (3, 3, 6 * patch**2, 4)
    assert params["output"]["kernel"].shape == (3, 3, 4, 3 * patch**2)


def test_untrained_network_predicts_zero():
    network = UNet(channels=4, multipliers=(1,), num_blocks=(1,))
    y_t, gamma, cond = inputs(network)

    def fresh(key):
        params = init_params(network, key)
        return network.apply({"params": params}, y_t, gamma, cond), params

    out, params = jax.jit(fresh)(jax.random.key(3))
    np.testing.assert_array_equal(out, 0)
    # Each block starts as its skip branch: its last convolution is zero, its first is not.
    blocks = [part for name, part in params.items() if "Conv_1" in part]
    assert len(blocks) == 5  # 1 down, 2 in the middle, 2 up
    for part in blocks:
        np.testing.assert_array_equal(part["Conv_1"]["kernel"], 0)
        assert np.abs(part["Conv_0"]["kernel"]).max() > 0
    np.testing.assert_array_equal(params["mid_attention"]["out"]["kernel"], 0)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("network", [*NETWORKS.values(), SKIP], ids=[*NETWORKS, "output_skip"])
def test_all_weights_and_inputs_have_gradients(network):
    y_t, gamma, cond = inputs(network)
    _, (params, *by_input) = gradients(network)(weights(network), y_t, gamma, cond)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4, name
        if "kernel" in name:  # each input channel (also of skip connections) and output channel
            for axis in (-2, -1):
                by_channel = np.abs(np.moveaxis(leaf, axis, 0)).reshape(leaf.shape[axis], -1).max(1)
                assert by_channel.min() > 1e-5, name
    assert np.all(np.abs(params["label"]["embedding"]).max(1)[:2] > 0)  # the labels of the batch
    for field, grad in zip(("y_t", "gamma", "upsampled", "augment"), by_input, strict=True):
        assert np.all(np.abs(grad).reshape(2, -1).max(1) > 1e-4), field


@pytest.mark.parametrize("name", NETWORKS)
def test_label_changes_only_its_own_example(name):
    network = NETWORKS[name]
    y_t, gamma, cond = inputs(network)
    run = gradients(network)
    out, _ = run(weights(network), y_t, gamma, cond)
    other, _ = run(weights(network), y_t, gamma, cond | {"label": np.array([0, 3], np.int32)})  # 3: no label
    np.testing.assert_array_equal(out[0], other[0])
    assert np.abs(out[1] - other[1]).max() > 1e-3


def test_examples_of_a_batch_are_independent():
    network = NETWORKS["biggan"]
    y_t, gamma, cond = inputs(network)
    run, twice = gradients(network), np.array([1, 1])
    out, _ = run(weights(network), y_t, gamma, cond)
    same, _ = run(weights(network), y_t[twice], gamma[twice], {k: v[twice] for k, v in cond.items()})
    np.testing.assert_allclose(same, out[twice], atol=1e-5)


def test_augmentation_strength_has_no_effect_before_training():
    """So that training can start from the weights of a model without this input."""
    network = NETWORKS["biggan"]
    y_t, gamma, cond = inputs(network)
    initial = init_params(network, jax.random.key(0))
    params = {**weights(network), "augment_out": initial["augment_out"]}
    outputs = [
        apply_unet(network, params, y_t, gamma, {**cond, "augment": np.full(2, strength, np.float32)})
        for strength in (0.0, 1.0)
    ]
    np.testing.assert_array_equal(*outputs)


def test_missing_augmentation_strength_means_zero():
    network = NETWORKS["efficient"]
    y_t, gamma, cond = inputs(network)
    apply = jax.jit(lambda p, *x: network.apply({"params": p}, *x))
    without = {name: value for name, value in cond.items() if name != "augment"}
    zero = cond | {"augment": np.zeros(2, np.float32)}
    np.testing.assert_allclose(
        apply(weights(network), y_t, gamma, without), apply(weights(network), y_t, gamma, zero), atol=1e-6
    )


# ---- Training


@pytest.mark.parametrize("keeps", ["nothing", "convs"])
def test_remat_does_not_change_values_or_parameters(keeps):
    network = NETWORKS["biggan"]
    y_t, gamma, cond = inputs(network)
    again = network.clone(remat=True, remat_keeps=keeps)
    assert jax.tree.structure(weights(again)) == jax.tree.structure(weights(network))  # checkpoints fit both
    out, grads = gradients(network)(weights(network), y_t, gamma, cond)
    out_again, grads_again = gradients(again)(weights(network), y_t, gamma, cond)
    np.testing.assert_allclose(out_again, out, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads_again), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    count = sum(each.primitive.name in ("remat2", "checkpoint") for each in equations(trace(again)))
    assert count == len([name for name in weights(network) if name.startswith(("up", "down", "mid"))])


def test_remat_of_convs_recomputes_no_convolution():
    network = NETWORKS["biggan"]
    y_t, gamma, cond = inputs(network)

    def convolutions(**options) -> int:
        chosen = network.clone(**options)
        loss = lambda params: jnp.sum(chosen.apply({"params": params}, y_t, gamma, cond))  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss))(weights(network)).jaxpr
        return sum(each.primitive.name == "conv_general_dilated" for each in equations(jaxpr))

    plain = convolutions()
    assert convolutions(remat=True, remat_keeps="convs") == plain < convolutions(remat=True)


def test_dropout_only_in_training_also_with_remat():
    network = UNet(
        channels=4, multipliers=(1,), num_blocks=(1,), dropout=0.5, remat=True, mid_attention=False
    )
    y_t, gamma, cond = inputs(network)

    @functools.partial(jax.jit, static_argnums=0)
    def run(train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return network.apply({"params": weights(network)}, y_t, gamma, cond, train=train, rngs=rngs)

    quiet = run(False, 0)
    np.testing.assert_array_equal(quiet, run(False, 1))
    assert np.abs(run(True, 0) - run(True, 1)).max() > 1e-3
    assert np.abs(run(True, 0) - quiet).max() > 1e-3


# ---- Precision


def equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def trace(network: UNet):
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights(network))
    return jax.make_jaxpr(lambda p, *x: network.apply({"params": p}, *x))(params, *inputs(network)).jaxpr


@pytest.mark.parametrize("layout", ["biggan", "efficient"])
@pytest.mark.parametrize("norm", ["group", "pixel"])
def test_bfloat16_activations_and_float32_norms_softmax_and_output(layout, norm):
    network = NETWORKS["biggan"].clone(dtype="bfloat16", layout=layout, norm=norm, film=norm == "pixel")
    found: dict[str, list] = {}
    for equation in equations(trace(network)):
        if equation.invars and hasattr(equation.invars[0].aval, "dtype"):
            found.setdefault(equation.primitive.name, []).append(equation)

    convolutions = [tuple(str(v.aval.dtype) for v in e.invars) for e in found["conv_general_dilated"]]
    assert len(convolutions) > 8
    assert convolutions[-1] == ("float32", "float32")
    assert set(convolutions[:-1]) == {("bfloat16", "bfloat16")}
    # Otherwise accelerators compute float32 convolutions in bfloat16 or TF32.
    highest = jax.lax.Precision.HIGHEST
    assert found["conv_general_dilated"][-1].params["precision"] == (highest, highest)

    def kinds(*names: str) -> set[str]:
        return {str(e.invars[0].aval.dtype) for name in names for e in found.get(name, [])}

    assert kinds("exp") == {"float32"}  # softmax
    assert kinds("rsqrt", "sqrt") == {"float32"}  # norms
    assert kinds("cos", "sin", "log", "log1p") == {"float32"}  # the noise level
    # Sums over pixels or channels, of norms and softmax; bfloat16 would lose integers above 256.
    assert kinds("reduce_sum") <= {"float32"}
    # The last norm and swish return float32; activations between blocks are bfloat16.
    assert str(found["logistic"][-1].invars[0].aval.dtype) == "float32"
    assert str(found["concatenate"][-1].invars[0].aval.dtype) == "bfloat16"  # the last skip connection

    y_t, gamma, cond = inputs(network)
    out = jax.eval_shape(lambda p, *x: network.apply({"params": p}, *x), weights(network), y_t, gamma, cond)
    assert out.dtype == jnp.float32
    fresh = jax.eval_shape(lambda key: init_params(network, key), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_bfloat16_is_close_to_float32():
    network = NETWORKS["efficient"]
    y_t, gamma, cond = inputs(network)
    out, _ = gradients(network)(weights(network), y_t, gamma, cond)
    half = network.clone(dtype="bfloat16")
    rough = jax.jit(lambda p, *x: half.apply({"params": p}, *x))(weights(network), y_t, gamma, cond)
    error = np.sqrt(np.mean((np.asarray(rough) - out) ** 2)) / out.std()
    assert 1e-4 < error < 0.05


# ---- The receptive field


def reach(norm: str) -> np.ndarray:
    """[H,W] gradient magnitude of the first output pixel with respect to each pixel of y_t."""
    network = UNet(
        channels=4, multipliers=(1,), num_blocks=(1,), norm=norm, layout="efficient", mid_attention=False
    )
    y_t, gamma, cond = inputs(network, batch=1, side=14)
    params, cond = weights(network), {"upsampled": cond["upsampled"]}

    @jax.jit
    def corner(y_t):
        return network.apply({"params": params}, y_t, gamma, cond)[0, 0, 0, 0]

    return np.abs(jax.grad(corner)(y_t)).max((0, 3))


def test_receptive_field_is_local_with_pixel_norm_and_global_with_group_norm():
    # 10 convolutions of 3x3: input, two in each of four blocks, output.
    near = np.maximum(*np.indices((14, 14))) <= 10
    pixel = reach("pixel")
    assert np.all(pixel[near] > 0)
    np.testing.assert_array_equal(pixel[~near], 0)
    assert np.all(reach("group") > 0)


# ---- Errors


def test_output_skip_is_the_posterior_mean_of_a_gaussian():
    """An untrained network predicts mean 0 and deviation d everywhere: the exact posterior mean of N(0, d^2)."""
    network = UNet(**TWO_LEVELS, layout="efficient", patch=2, output_skip=0.1, stem_channels=12)
    y_t = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    gamma = jnp.array([1e-4, 0.5, 1.0 - 1e-6])
    cond = {"upsampled": jnp.zeros_like(y_t)}
    params = network.init(jax.random.key(1), y_t, gamma, cond)["params"]
    a, s = (np.sqrt(np.asarray(x, np.float64))[:, None, None, None] for x in (gamma, 1 - gamma))
    wanted = 0.1**2 * a * np.asarray(y_t) / (0.1**2 * a**2 + s**2)
    np.testing.assert_allclose(apply_unet(network, params, y_t, gamma, cond), wanted, rtol=1e-3, atol=1e-6)
    assert params["input"]["kernel"].shape[-1] == 12
    clean = apply_unet(network, params, y_t, jnp.ones(3), cond)  # gamma = 1: y_t is y0
    np.testing.assert_allclose(clean, y_t, rtol=1e-6)


def test_size_that_is_not_a_multiple_of_the_stride_fails():
    network = UNet(**TWO_LEVELS, patch=4)
    y_t, gamma, cond = inputs(network, side=12)
    with pytest.raises(ValueError, match="multiples of 8, got 12x12"):
        jax.eval_shape(lambda *x: network.apply({"params": weights(network)}, *x), y_t, gamma, cond)


def test_missing_label_fails():
    network = NETWORKS["biggan"]
    y_t, gamma, cond = inputs(network)
    del cond["label"]
    with pytest.raises(ValueError, match=r"num_classes=3 .*label"):
        jax.eval_shape(lambda *x: network.apply({"params": weights(network)}, *x), y_t, gamma, cond)
