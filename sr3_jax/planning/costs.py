"""What one program costs a chip: by compiling it ahead of time for chips that are not here, or from its shapes."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from sr3_jax.distributed.sharding import fsdp_spec
from sr3_jax.planning import counting, hlo

# libtpu schedules the instructions inside each operation last, when memory is laid out: that takes most of an hour for
# the gradient of a float32 convolution at highest precision, and changes no figure here.
OPTIONS: Mapping[str, Any] = {"xla_jf_critical_path_scheduler": False}
# With less effort temporaries and traffic come out higher than they will be, FLOPs and arguments the same.
QUICK: Mapping[str, Any] = {**OPTIONS, "exec_time_optimization_effort": -1.0}
Watch = Callable[[str], AbstractContextManager[Any]]  # shows that what is named is being worked on
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT]?)\) exceeds")


def compiled(
    jitted: Any,
    arguments: tuple[Any, ...],
    *,
    title: str,
    platform: str,
    devices: int,
    watch: Watch,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The costs of a jitted program, from the compiler of the devices in its arguments' shardings.

    Returns:
        'flops' of all chips together; of one chip 'memory' (bytes: 'arguments', 'temporaries', 'peak' and more),
        'traffic' (bytes), 'collectives' {kind: [count, bytes]}; 'seconds_to_compile'. When the compiler refuses the
        program for want of memory, 'refused' is its sentence, and 'memory' what that says.
    """
    start = time.monotonic()
    with watch(f"tracing {title}"):
        traced = jitted.trace(*arguments)
        flops = counting.flops(traced.jaxpr)
        lowered = traced.lower(lowering_platforms=(platform,))
    found: dict[str, Any] = {"flops": flops, "compiler_options": dict(options)}
    with watch(f"compiling {title}"):
        try:
            with _no_cache():
                program = lowered.compile(compiler_options=dict(options))
        except jax.errors.JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            given = sum(shard_bytes(leaf) for leaf in jax.tree.leaves(arguments))
            peak = max(needed, given) if "Used" in str(error) else needed + given
            found["memory"] = {"arguments": given, "temporaries": peak - given, "peak": peak}
            found |= {"refused": str(error).splitlines()[0][:400], "traffic": None, "collectives": {}}
            return found | {"seconds_to_compile": round(time.monotonic() - start, 1)}
    seconds = round(time.monotonic() - start, 1)
    with watch(f"reading {title}"):
        moved = hlo.traffic(program.as_text(), devices=devices)
    return found | {
        "memory": _memory(program.memory_analysis()),
        "traffic": moved.memory,
        "collectives": moved.collectives,
        "unknown_loops": moved.unknown_loops,
        "seconds_to_compile": seconds,
    }


def traced(
    function: Callable, arguments: tuple[Any, ...], *, chips: int, fsdp: int, watch: Watch, title: str
) -> dict[str, Any]:
    """The costs of a program from its shapes alone; exact for 'flops', an estimate of 'temporaries' and 'traffic'.

    Args:
        function: traced as it is for one chip.
        arguments: shapes, of one chip's examples; those with a sharding are the state, and count as their shards.
        fsdp: arrays with the shape of a sharded one, such as its gradient, count as sharded as well.
    """
    leaves = jax.tree.leaves(arguments)
    sharded = {
        leaf.shape
        for leaf in leaves
        if leaf.sharding is not None and any(fsdp_spec(leaf.shape, leaf.dtype.itemsize, fsdp))
    }

    def size(aval: Any) -> float:
        return aval.size * getattr(aval.dtype, "itemsize", 8) / (fsdp if aval.shape in sharded else 1)

    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    with watch(f"tracing {title}"):
        jaxpr = jax.make_jaxpr(function)(*plain)
    given = sum(shard_bytes(leaf) for leaf in leaves)
    temporaries = int(counting.peak_bytes(jaxpr, size))
    return {
        "flops": counting.flops(jaxpr) * chips,
        "memory": {"arguments": given, "temporaries": temporaries, "peak": given + temporaries},
        "traffic": counting.moved_bytes(jaxpr, size) + 2 * given,  # the state is read and written besides
        "collectives": {},
    }


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a shape on one of the chips that its sharding spreads it over."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * getattr(leaf.dtype, "itemsize", 8)  # a key: two words of 32 bits


def out_of_memory(message: str) -> int | None:
    """Bytes that a program needs, from the compiler's refusal; None if that is about something else."""
    found = _OUT_OF_MEMORY.search(message) if "RESOURCE_EXHAUSTED" in message else None
    if found is None:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _memory(stats: Any) -> dict[str, int]:
    found = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,  # outputs that take the place of arguments
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return found | {"peak": sum(found.values()) - 2 * found["aliased"]}


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Programs for chips that are not here cannot be read back from JAX's cache, so they are not put there."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # else it goes on as it began
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
