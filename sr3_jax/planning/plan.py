"""What a job will need before anything is paid for: its real programs, compiled ahead of time for a topology."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from sr3_jax.distributed.sharding import AXES, batch_sharding, make_mesh, replicated
from sr3_jax.errors import UserError
from sr3_jax.planning import cache as results
from sr3_jax.planning import costs, verdict
from sr3_jax.planning.costs import Watch
from sr3_jax.planning.topologies import Topology, compiler
from sr3_jax.train.experiment import Experiment, check_batch
from sr3_jax.train.held_out import held_out_jit
from sr3_jax.train.state import TrainState, abstract_state
from sr3_jax.train.step import jit_train_step, make_train_step

PROGRAMS = {"train": "the training step", "sample": "the held-out evaluation"}
Program = tuple[Any, tuple[Any, ...]]  # a jitted function and its arguments as shapes


def plan(
    experiment: Experiment,
    topology: Topology,
    *,
    programs: Sequence[str] = tuple(PROGRAMS),
    estimate: bool = False,
    quick: bool = False,
    cache: Path | None = None,
    refresh: bool = False,
    watch: Watch = lambda title: contextlib.nullcontext(),
) -> dict[str, Any]:
    """The needs of an experiment's programs on a topology, as JSON has it: bytes and seconds, of one chip and one run.

    On a TPU topology the programs are compiled by libtpu, which needs no TPU. On others, or with `estimate`, they are
    only traced: arguments and FLOPs are exact then, temporaries and traffic estimates.

    Args:
        programs: 'train', the training step; 'sample', the held-out evaluation with its sampler.
        quick: let the compiler make less effort, which takes half the time and memory somewhat above the truth.
        cache: a folder of earlier results, which are used unless `refresh`.

    Raises:
        UserError: the config does not fit the topology, or libtpu is missing.
    """
    config = experiment.config
    estimate = estimate or topology.chip.backend != "tpu"
    sizes = mesh_sizes(config["mesh"], topology.count)
    check_batch(config, devices=topology.count, processes=1)
    state = abstract_state(experiment.init_params, experiment.optimizer(), _abstract_mesh(sizes))
    judged: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        mesh: Mesh | None = None
        for program in programs:
            options = costs.QUICK if quick else costs.OPTIONS
            how = "estimate" if estimate else dict(options)
            name = results.key(config, topology=topology.name, program=program, how=how)
            file = None if cache is None else cache / f"{name}.json"
            found = None if file is None or refresh else results.load(file)
            if found is None:
                if estimate:
                    found = _estimate(experiment, program, state, sizes, watch)
                else:
                    mesh = mesh or make_mesh(
                        **config["mesh"], devices=stack.enter_context(compiler(topology))
                    )
                    found = _compile(experiment, topology, program, mesh, options, watch)
                found |= results.circumstances()
                if file is not None:
                    results.save(file, found)
            judged[program] = _judge(found, program, config, topology, state, sizes)
    return {
        "topology": topology.name,
        "chips": topology.count,
        "capacity": topology.memory,
        "estimate": estimate,
        "parameters": sum(math.prod(shape) for shape, _ in _shapes(state.params)),
        "mesh": dict(zip(AXES, sizes, strict=True)),
        "batch_size": config["train"]["batch_size"],
        "eval_images": config["eval"]["num_images"],
        "assumed": dict(verdict.REACHED),
        "programs": judged,
        "fits": all(result["fits"] for result in judged.values()),
    }


def mesh_sizes(section: Mapping[str, int], count: int) -> tuple[int, int]:
    """The sizes of ('data', 'fsdp') over that many devices, as `make_mesh` has them, without having the devices.

    Raises:
        UserError: they do not multiply to `count`.
    """
    data, fsdp = section["data"], section["fsdp"]
    if fsdp == -1 and data > 0:
        fsdp = count // data
    elif data == -1 and fsdp > 0:
        data = count // fsdp
    if data < 1 or fsdp < 1 or data * fsdp != count:
        raise UserError(
            f"mesh.data={section['data']} and mesh.fsdp={section['fsdp']} do not fit {count} devices: "
            f"give sizes whose product is {count}, or -1 for one of them"
        )
    return data, fsdp


def _abstract_mesh(sizes: tuple[int, int]) -> Any:
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 2)


# ---- The programs, as the training loop has them.


def _train_program(experiment: Experiment, mesh: Mesh) -> Program:
    optimizer = experiment.optimizer()
    state = abstract_state(experiment.init_params, optimizer, mesh)
    batch = _batch(experiment, experiment.section("train")["batch_size"], mesh)
    return jit_train_step(_train_step(experiment, optimizer), state, mesh), (state, batch, _key(mesh))


def _train_step(experiment: Experiment, optimizer: Any) -> Callable:
    return make_train_step(
        experiment.objective,
        optimizer,
        ema_decay=experiment.section("optim")["ema_decay"],
        accumulation=experiment.section("train")["accumulation"],
    )


def _sample_program(experiment: Experiment, mesh: Mesh, rows: int) -> Program:
    section = experiment.section("eval")
    jitted = held_out_jit(
        experiment.objective, mesh, rows=rows, steps=section["steps"], solver=section["solver"]
    )
    params = abstract_state(experiment.init_params, experiment.optimizer(), mesh).ema_params
    batch = _batch(experiment, rows + -rows % mesh.size, mesh)  # filled up, as HeldOutEvaluation does
    return jitted, (params, batch, _key(mesh))


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


# ---- Their costs, and what these mean.


def _compile(
    experiment: Experiment,
    topology: Topology,
    program: str,
    mesh: Mesh,
    options: Mapping[str, Any],
    watch: Watch,
) -> dict[str, Any]:
    if program == "train":
        jitted, arguments = _train_program(experiment, mesh)
    else:
        jitted, arguments = _sample_program(experiment, mesh, experiment.section("eval")["num_images"])
    return costs.compiled(
        jitted,
        arguments,
        title=f"{PROGRAMS[program]} for {topology.name}",
        platform=topology.chip.backend,
        devices=topology.count,
        watch=watch,
        options=options,
    )


def _estimate(
    experiment: Experiment, program: str, state: TrainState, sizes: tuple[int, int], watch: Watch
) -> dict[str, Any]:
    config, chips = experiment.config, math.prod(sizes)
    if program == "train":
        rows = config["train"]["batch_size"] // chips
        function: Callable = _train_step(experiment, experiment.optimizer())
        arguments: tuple[Any, ...] = (state, _batch(experiment, rows), _key())
    else:
        rows = -(-config["eval"]["num_images"] // chips)
        function, _ = _sample_program(experiment, make_mesh(devices=jax.devices()[:1]), rows)
        arguments = (state.ema_params, _batch(experiment, rows), _key())
    title = PROGRAMS[program]
    found = costs.traced(function, arguments, chips=chips, fsdp=sizes[1], watch=watch, title=title)
    training = program == "train"
    found["collectives"] = verdict.weight_traffic(
        _shapes(state.params),
        data=sizes[0],
        fsdp=sizes[1],
        rounds=config["train"]["accumulation"] if training else config["sampling"]["steps"] + 1,
        itemsize=2 if config["model"]["dtype"] == "bfloat16" else 4,
        gradients=training,
    )
    return found


def _judge(
    found: Mapping[str, Any],
    program: str,
    config: Mapping[str, Any],
    topology: Topology,
    state: TrainState,
    sizes: tuple[int, int],
) -> dict[str, Any]:
    """The costs with their meaning: 'resident', 'peak', 'fits', 'seconds' and, if it does not fit, 'change'."""
    memory = found["memory"]
    whole, weights = _shapes(state), _shapes(state.ema_params)
    # While a run evaluates, the rest of its state stays where it is.
    beside = 0
    if program == "sample":
        beside = verdict.state_bytes(whole, sizes[1]) - verdict.state_bytes(weights, sizes[1])
    peak = memory["peak"] + beside
    result = {**found, "beside": beside, "peak": peak, "fits": peak <= topology.memory}
    result["fits"] = result["fits"] and "refused" not in found
    result["seconds"] = None
    if found["traffic"] is not None:
        result["seconds"] = verdict.seconds(
            topology.chip,
            flops=found["flops"] / topology.count,
            memory=found["traffic"],
            interconnect=sum(size for _, size in found["collectives"].values()),
        )
    if not result["fits"]:
        rest = peak - memory["temporaries"] - verdict.state_bytes(whole, sizes[1])
        result["change"] = verdict.advise(
            config,
            topology,
            fsdp=sizes[1],
            resident=lambda fsdp: verdict.state_bytes(whole, fsdp) + max(0, rest),
            temporaries=memory["temporaries"],
            program=program,
        )
    return result


def _shapes(tree: Any) -> list[tuple[tuple[int, ...], int]]:
    return [(leaf.shape, leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree)]
