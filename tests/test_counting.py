"""FLOPs and memory from shapes: against counts by hand, and against XLA where it counts the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from sr3_jax.planning import counting


def trace(function, *shapes):
    return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options)


def test_products_and_convolutions_by_hand():
    assert counting.flops(trace(lambda a, b: jnp.tanh(a @ b), (5, 7), (7, 3))) == 2 * 5 * 7 * 3
    assert counting.flops(trace(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 5, 7), (4, 7, 3))) == 840
    assert counting.flops(trace(conv, (2, 8, 8, 6), (3, 3, 6, 10))) == 2 * (2 * 8 * 8 * 10) * 9 * 6
    grouped = trace(lambda x, k: conv(x, k, feature_group_count=2), (2, 8, 8, 6), (3, 3, 3, 10))
    assert counting.flops(grouped) == 2 * (2 * 8 * 8 * 10) * 9 * 3


def test_loops_count_each_round_and_conditionals_their_dearest_branch():
    def loop(x, weight):
        return jax.lax.scan(lambda x, _: (x @ weight, None), x, length=11)[0]

    def choose(x, weight):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ weight @ weight, lambda: x)

    assert counting.flops(trace(loop, (5, 7), (7, 7))) == 11 * 2 * 5 * 7 * 7
    assert counting.flops(trace(choose, (5, 7), (7, 7))) == 2 * 2 * 5 * 7 * 7
    assert counting.flops(trace(jax.jit(loop), (5, 7), (7, 7))) == 11 * 2 * 5 * 7 * 7


def test_backward_costs_twice_and_recomputation_once_more():
    def loss(weight, x):
        return jnp.sum(jnp.sin(jnp.sin(x @ weight) @ weight))

    forward = counting.flops(trace(loss, (8, 8), (8, 8)))
    assert counting.flops(trace(jax.grad(loss), (8, 8), (8, 8))) == pytest.approx(
        forward * 2.5
    )  # no gradient of x
    again = counting.flops(trace(jax.grad(jax.checkpoint(loss)), (8, 8), (8, 8)))
    assert again > forward * 2.5


def test_a_convolutions_gradient_costs_what_xla_says():
    def loss(kernel, x):
        return jnp.sum(jnp.sin(conv(x, kernel)))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1, 16, 32), (4, 16, 16, 16))]
    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile().cost_analysis()["flops"]
    assert counting.flops(jax.make_jaxpr(jax.grad(loss))(*shapes)) == pytest.approx(compiled, rel=0.1)


def size(aval):
    return aval.size * aval.dtype.itemsize


def test_memory_is_what_lives_at_one_time():
    def chain(x):
        for _ in range(5):
            x = jnp.sin(x)
        return x

    def kept(x):
        parts = [jnp.sin(i * x) for i in range(1, 6)]
        return sum(parts[1:], parts[0])

    assert counting.peak_bytes(trace(chain, (100,)), size) == 2 * 400  # one is read while the next is made
    # Five sines, made one after the other from a product each; the sums come when all five are there.
    assert counting.peak_bytes(trace(kept, (100,)), size) in (6 * 400, 7 * 400)


def test_views_take_nothing_and_keep_what_they_look_at():
    def seen(x):
        y = jnp.sin(x)
        view = y.reshape(10, 10).T
        z = jnp.sin(jnp.sin(x))  # y's view is still wanted
        return view, z

    assert counting.peak_bytes(trace(lambda x: x.reshape(10, 10).T, (100,)), size) == 0
    assert counting.peak_bytes(trace(seen, (100,)), size) == 3 * 400


def test_recomputation_saves_memory():
    def block(x, weight):
        for _ in range(4):
            x = jnp.tanh(x @ weight)
        return x

    def loss(weight, x, wrap):
        for _ in range(4):
            x = wrap(block)(x, weight)
        return jnp.sum(x)

    peaks = [
        counting.peak_bytes(trace(jax.grad(lambda w, x, f=wrap: loss(w, x, f)), (16, 16), (512, 16)), size)
        for wrap in (lambda f: f, jax.checkpoint)
    ]
    assert peaks[1] < 0.8 * peaks[0]


def test_shards_count_as_their_part():
    whole = trace(lambda x: jnp.sin(jnp.sin(x)), (100,))
    assert counting.peak_bytes(whole, lambda aval: size(aval) / 4) == 200


def test_traffic_of_products_counts_their_operands():
    moved = counting.moved_bytes(trace(lambda a, b: a @ b, (5, 7), (7, 3)), size)
    assert moved == 2 * 4 * (35 + 21 + 15)
