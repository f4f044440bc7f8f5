"""The cost of sampling: traces, network calls, memory, and each device's part of the batch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sr3_jax.diffusion import solvers
from sr3_jax.diffusion.sampler import Samples, sample
from sr3_jax.diffusion.schedule import linear, respace

TRAINING = linear()
SHAPE = (3, 4, 5, 2)
ALL = {
    "ancestral": solvers.ancestral(),
    "ddim": solvers.ddim(),
    "ddim_noisy": solvers.ddim(0.5),
    "dpmpp_2m": solvers.dpmpp_2m(),
    "heun": solvers.heun(),
}
each_solver = pytest.mark.parametrize("solver", ALL.values(), ids=ALL.keys())


def network(y, gamma, cond):
    """A nonlinear estimate of y0, so that a wrong y, gamma or order of steps changes the image."""
    return 0.8 * jnp.tanh(2.0 * y) * gamma.reshape(-1, 1, 1, 1) ** 0.25


def sampled(
    steps=5, *, denoiser=network, key=None, cond=None, shape=SHAPE, prediction="y0", **settings
) -> Samples:
    key = jax.random.key(0) if key is None else key
    schedule = respace(TRAINING, steps)
    return sample(
        denoiser, key, cond or {}, shape=shape, schedule=schedule, prediction=prediction, **settings
    )


@each_solver
def test_the_number_of_traces_does_not_depend_on_the_number_of_steps(solver):
    traces = []

    def counted(y, gamma, cond):
        traces.append((y.shape, gamma.shape))
        return network(y, gamma, cond)

    counts = []
    for steps in (3, 40):
        traces.clear()
        run = jax.jit(lambda key, steps=steps: sampled(steps, denoiser=counted, key=key, solver=solver).image)
        run(jax.random.key(0))
        run(jax.random.key(1))  # no second trace
        counts.append(len(traces))
        assert set(traces) == {(SHAPE, (3,))}
    assert counts == [2, 2] if solver is ALL["heun"] else counts == [1, 1]


@pytest.mark.parametrize("name", ["ancestral", "dpmpp_2m", "heun"])
def test_the_network_runs_once_per_step_and_twice_in_heun_except_the_last(name):
    seen = []

    def counted(y, gamma, cond):
        jax.debug.callback(lambda level: seen.append(np.asarray(level)), gamma)
        return network(y, gamma, cond)

    steps = 40  # narrow enough that Heun corrects each of them
    sampled(steps, denoiser=counted, solver=ALL[name])
    jax.effects_barrier()
    levels = respace(TRAINING, steps).gamma[1:]  # clean to noise, as sorted below
    if name == "heun":  # every level but the noisiest ends one step and starts the next
        levels = np.append(np.repeat(levels[:-1], 2), levels[-1])
    assert len(seen) == (2 * steps - 1 if name == "heun" else steps)
    assert all(np.ptp(level) == 0 for level in seen)
    np.testing.assert_allclose(np.sort([level[0] for level in seen])[::-1], levels, rtol=1e-6)


def arrays_in(jaxpr) -> list[tuple[int, ...]]:
    """The shapes of all values in a jaxpr and in those inside it."""
    shapes = []
    for equation in jaxpr.eqns:
        shapes += [v.aval.shape for v in [*equation.invars, *equation.outvars] if hasattr(v.aval, "shape")]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                shapes += arrays_in(inner)
    return shapes


@each_solver
@pytest.mark.parametrize("snapshots, count", [(0, 0), (20, 2)])
def test_memory_holds_the_snapshots_and_never_the_trajectory(solver, snapshots, count):
    steps = 50
    run = functools.partial(sampled, steps, solver=solver, snapshots=snapshots)
    shapes = arrays_in(jax.make_jaxpr(lambda key: run(key=key))(jax.random.key(0)).jaxpr)
    assert SHAPE in shapes
    images = [shape for shape in shapes if shape[-len(SHAPE) :] == SHAPE and len(shape) > len(SHAPE)]
    assert all(shape[0] <= max(count, 1) for shape in images)
    assert ((count, *SHAPE) in images) == bool(count)
    assert max(int(np.prod(shape)) for shape in shapes) <= max(count, 1) * np.prod(SHAPE)


def convolution(kernel, y, gamma, cond):
    y0 = jax.lax.conv_general_dilated(
        jnp.concatenate([y, cond["upsampled"]], axis=-1),
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jnp.tanh(y0)


@pytest.mark.parametrize("keyed", [False, True], ids=["one_key", "key_per_example"])
@pytest.mark.parametrize("name", ["ancestral", "dpmpp_2m", "heun"])
def test_each_device_computes_only_its_part_of_the_batch(name, keyed):
    """No array in the program of a device, neither noise nor activations, has the size of the whole batch, 24."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shape = (24, 4, 4, 2)
    kernel = 0.3 * jax.random.normal(jax.random.key(9), (3, 3, 4, 2))
    cond = {"upsampled": jax.random.normal(jax.random.key(8), shape)}
    keys = jax.random.split(jax.random.key(7), 24) if keyed else jax.random.key(7)

    def run(key, cond, kernel):
        denoiser = functools.partial(convolution, kernel)
        return sampled(4, denoiser=denoiser, key=key, cond=cond, shape=shape, solver=ALL[name], snapshots=2)

    def compiled(batch: PartitionSpec):
        shardings = Samples(NamedSharding(mesh, batch), NamedSharding(mesh, PartitionSpec(None, *batch)))
        program = jax.jit(run, out_shardings=shardings).lower(keys, cond, kernel).compile()
        shapes = set(re.findall(r"\w+\[[\d,]*\b24\b[\d,]*\]", program.as_text()))
        return program, shapes

    split, whole = compiled(PartitionSpec("data"))
    assert whole == set()
    assert compiled(PartitionSpec())[1] >= {
        "f32[24,4,4,2]",
        "f32[24,4,4,4]",
    }  # the same search finds the arrays of an unsharded program
    with jax.debug_key_reuse(False):
        arguments = jax.device_put((keys, cond, kernel), split.input_shardings[0])
        got, single = split(*arguments), run(keys, cond, kernel)
    assert {shard.data.shape for shard in got.image.addressable_shards} == {(3, 4, 4, 2)}
    assert {shard.data.shape for shard in got.snapshots.addressable_shards} == {(2, 3, 4, 4, 2)}
    np.testing.assert_allclose(got.image, single.image, atol=1e-4)
