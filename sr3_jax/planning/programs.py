"""The cost of a job's two programs on one topology: compiled ahead of time, or estimated from shapes.

The programs are those of the training loop: the training step and the held-out evaluation. Sizes are bytes per chip;
FLOPs are those of all chips together.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractMesh, AxisType, Mesh

from sr3_jax.distributed.sharding import AXES, batch_sharding, fsdp_spec, replicated
from sr3_jax.flops import flops, inner_jaxprs, open_jaxpr
from sr3_jax.memory import program_memory
from sr3_jax.train.experiment import Experiment
from sr3_jax.train.held_out import LOSS_LEVELS, held_out_jit
from sr3_jax.train.state import TrainState, abstract_state
from sr3_jax.train.step import jit_train_step, make_train_step
from sr3_jax.types import Conditioning

PROGRAMS = {"train": "training step", "sample": "held-out evaluation"}
# libtpu orders the instructions within each operation last, after memory is laid out. For the gradient of a float32
# convolution at highest precision that takes most of an hour, and it changes nothing that is reported here.
OPTIONS: Mapping[str, Any] = {"xla_jf_critical_path_scheduler": False}
QUICK: Mapping[str, Any] = {**OPTIONS, "exec_time_optimization_effort": -1.0}
Watch = Callable[[str], AbstractContextManager[Any]]  # reports progress on the named task
Program = tuple[Any, tuple[Any, ...]]  # a jitted function and its arguments as shapes with shardings
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT]?)\) exceeds")


# ---- The programs.


def train_program(experiment: Experiment, mesh: Mesh) -> Program:
    """The jitted training step with abstract arguments."""
    optimizer = experiment.optimizer()
    step = make_train_step(
        experiment.objective,
        optimizer,
        ema_decay=experiment.section("optim")["ema_decay"],
        accumulation=experiment.section("train")["accumulation"],
    )
    state = abstract_state(experiment.init_params, optimizer, mesh)
    batch = _batch(experiment, experiment.section("train")["batch_size"], mesh)
    return jit_train_step(step, state, mesh), (state, batch, _key(mesh))


def sample_program(experiment: Experiment, mesh: Mesh) -> Program:
    """The jitted held-out evaluation, with its sampler, and abstract arguments."""
    rows, sampling = experiment.section("eval")["num_images"], experiment.section("sampling")
    jitted = held_out_jit(
        experiment.objective, mesh, rows=rows, steps=sampling["steps"], solver=sampling["solver"]
    )
    params = abstract_state(experiment.init_params, experiment.optimizer(), mesh).ema_params
    batch = _batch(experiment, rows + -rows % mesh.size, mesh)  # padded to equal shards, as the loop does
    return jitted, (params, batch, _key(mesh))


def abstract_state_on(experiment: Experiment, sizes: tuple[int, int]) -> TrainState:
    """Shapes and shardings of the state over a mesh of ('data', 'fsdp') sizes, without any device."""
    mesh: Any = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 2)
    return abstract_state(experiment.init_params, experiment.optimizer(), mesh)


def _batch(experiment: Experiment, rows: int, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    crop = experiment.section("data")["crop"]
    sharding = None if mesh is None else batch_sharding(mesh)
    batch = {"image": jax.ShapeDtypeStruct((rows, crop, crop, 3), jnp.uint8, sharding=sharding)}
    if experiment.section("model")["num_classes"]:
        batch["label"] = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sharding)
    return batch


def _key(mesh: Mesh | None = None) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=None if mesh is None else replicated(mesh))


# ---- Compiled.


def compile_program(
    program: Program, *, title: str, platform: str, options: Mapping[str, Any], watch: Watch
) -> dict[str, Any]:
    """Compile a program for the devices in its arguments' shardings, and read off its cost.

    Returns:
        'flops'; 'memory' per chip: 'arguments', 'outputs', 'aliased', 'temporaries', 'code' and 'peak';
        'compiler_options'; 'seconds_to_compile'. If the compiler runs out of the chip's memory, 'compiler_error' is
        its message and 'memory' is read from it.
    """
    jitted, arguments = program
    start = time.monotonic()
    with watch(f"tracing the {title}"):
        traced = jitted.trace(*arguments)
        found: dict[str, Any] = {"flops": flops(traced.jaxpr), "compiler_options": dict(options)}
        lowered = traced.lower(lowering_platforms=(platform,))
    with watch(f"compiling the {title}"):
        try:
            with _without_compilation_cache():
                found["memory"] = program_memory(lowered.compile(compiler_options=dict(options)))
        except jax.errors.JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            given = shard_bytes(arguments)
            peak = max(needed, given) if "Used" in str(error) else needed + given
            found["memory"] = {"arguments": given, "temporaries": peak - given, "peak": peak}
            found["compiler_error"] = str(error).splitlines()[0][:400]
    return found | {"seconds_to_compile": round(time.monotonic() - start, 1)}


def out_of_memory(message: str) -> int | None:
    """Bytes that a program needs, from the compiler's error; None if the error is about something else."""
    found = _OUT_OF_MEMORY.search(message) if "RESOURCE_EXHAUSTED" in message else None
    if found is None:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """JAX's cache cannot load a program for devices that this machine lacks, so do not store one there."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # the setting is read only when the cache is initialized
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


# ---- Estimated.


def estimate_program(
    experiment: Experiment, program: str, state: TrainState, sizes: tuple[int, int], watch: Watch
) -> dict[str, Any]:
    """Estimate the cost of a program in seconds, from one trace of the network's forward pass.

    Arguments are exact. FLOPs are exact for sampling; a training step counts as 3 forward passes, or 3.5 where
    activations are recomputed (`model.remat` recomputes all but the last product of a block). The rule for temporaries,
    per example on a chip, with P the bytes of the outputs of all convolutions and matrix products, p those of the
    largest block, and S those of the blocks' outputs:

        training         2 P + 8 p: the outputs, the activations made from them, and one block with its gradients
        with model.remat 2 S + 8 p: only the blocks' inputs are stored
        with remat_keeps='convs'  P + 8 p
        sampling         S / 2 + 4 p: the skip connections and one block

    Training adds the gradients, which are as large as the weights. For the compiled programs in docs/pods/ the compiler
    allocated 0.6 to 3.3 times the estimate: narrow channels are padded to the width of a TPU's registers, and layouts
    are copied.
    """
    config, chips = experiment.config, math.prod(sizes)
    with watch(f"tracing the {PROGRAMS[program]}"):
        cost = _forward_cost(experiment)
    model = config["model"]
    arguments: tuple[Any, ...]
    if program == "train":
        images, accumulation = config["train"]["batch_size"], config["train"]["accumulation"]
        rows, arguments = images // chips, (state, _batch(experiment, images // chips), _key())
        passes = 3.5 if model["remat"] and model["remat_keeps"] == "nothing" else 3
        stored = 2 * cost["products"]
        if model["remat"]:
            stored = 2 * cost["blocks"] if model["remat_keeps"] == "nothing" else cost["products"]
        per_image = stored + 8 * cost["largest"]
        temporaries = rows // accumulation * per_image + shard_bytes(state.params)
    else:
        images = config["eval"]["num_images"]
        rows = -(-images // chips)
        arguments = (state.ema_params, _batch(experiment, rows), _key())
        # The sampler, and the held-out loss at enough noise levels
        images, passes = rows * chips, config["sampling"]["steps"] + -(-LOSS_LEVELS // images)
        temporaries = rows * (cost["blocks"] // 2 + 4 * cost["largest"])
    given = shard_bytes(arguments)
    return {
        "flops": float(passes * cost["flops"] * images),
        "memory": {"arguments": given, "temporaries": temporaries, "peak": given + temporaries},
    }


def _forward_cost(experiment: Experiment) -> dict[str, int]:
    """FLOPs of a forward pass on one example, and bytes: 'products', 'blocks' and 'largest' (the largest block)."""
    # Rematerialization marks the network's blocks in the jaxpr; a forward pass computes the same with it.
    network = experiment.objective.network.clone(remat=True)
    data = experiment.section("data")
    side = data["crop"] // data["shrink"]
    image = jax.ShapeDtypeStruct((1, side, side, network.out_channels), jnp.float32)
    cond: dict[str, Any] = {"upsampled": image} if network.low_res else {}
    if network.num_classes:
        cond["label"] = jax.ShapeDtypeStruct((1,), jnp.int32)

    def forward(params: Any, y_t: jax.Array, gamma: jax.Array, cond: Conditioning) -> jax.Array:
        return network.apply({"params": params}, y_t, gamma, cond)  # type: ignore[return-value]

    params = jax.eval_shape(experiment.init_params, jax.random.key(0))
    jaxpr = jax.make_jaxpr(forward)(params, image, jax.ShapeDtypeStruct((1,), jnp.float32), cond)
    blocks = [
        equation
        for equation in jaxpr.jaxpr.eqns
        if equation.primitive.name.startswith(("remat", "checkpoint"))
    ]
    return {
        "flops": int(flops(jaxpr)),
        "products": _product_bytes(jaxpr),
        "blocks": sum(_bytes(var.aval) for block in blocks for var in block.outvars),
        "largest": max(sum(_product_bytes(part) for part in inner_jaxprs(block)) for block in blocks),
    }


# ---- Shapes.


def _product_bytes(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Bytes of the outputs of all convolutions and matrix products."""
    total = 0
    for equation in open_jaxpr(jaxpr).eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            total += _bytes(equation.outvars[0].aval)
        total += sum(_product_bytes(part) for part in inner_jaxprs(equation))
    return total


def shard_bytes(tree: Any) -> int:
    """Bytes per chip of a tree of shapes, each split as its sharding says."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * _itemsize(leaf.dtype)
    return total


def state_bytes(shapes: Iterable[tuple[tuple[int, ...], int]], fsdp: int) -> int:
    """Bytes per chip of arrays given as (shape, itemsize), sharded by the state's rule over `fsdp` chips."""
    total = 0
    for shape, itemsize in shapes:
        split = any(fsdp_spec(shape, itemsize, fsdp))
        total += math.prod(shape) * itemsize // (fsdp if split else 1)
    return total


def _bytes(aval: Any) -> int:
    return aval.size * _itemsize(aval.dtype)


def _itemsize(dtype: Any) -> int:
    return getattr(dtype, "itemsize", 8)  # a PRNG key is two 32-bit words
