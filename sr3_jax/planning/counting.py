"""FLOPs and memory of a traced program, from its shapes alone: no compiler, any machine.

A jaxpr lists the operations in their order, with the shape of each result, loops with their lengths and recomputed
parts written out: what it takes to count multiplications exactly, and memory roughly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

# These a compiler makes part of whoever reads their result; it takes no memory of its own.
VIEWS = {
    *("broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "expand_dims", "transpose", "copy"),
    *("iota", "sharding_constraint", "stop_gradient", "mesh_cast", "pvary", "name", "optimization_barrier"),
}


def flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Floating-point operations of all matrix products and convolutions, loops and recomputation included.

    A multiplication and an addition are two. Of a conditional the dearest branch counts; a loop without a known
    length counts once. Elementwise work is left out: it costs bandwidth, not FLOPs.
    """
    return sum(_flops(equation) for equation in _open(jaxpr).eqns)


def _flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        # The output features: each of them needs the rest of the kernel.
        made = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / made
    inner = [flops(part) for part in _inner(equation)]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def peak_bytes(jaxpr: Jaxpr | ClosedJaxpr, size: Callable[[Any], float]) -> float:
    """The most bytes that the results of operations take at one time, done in order, each freed after its last use.

    An estimate. It leaves out the program's own arguments and what `VIEWS` make. It knows no fusion besides, so it is
    too high where a compiler joins elementwise operations, and too low where a compiler needs scratch or reorders.

    Args:
        size: aval -> bytes, such as those of a shard.
    """
    return _peak(_open(jaxpr), size)


def moved_bytes(jaxpr: Jaxpr | ClosedJaxpr, size: Callable[[Any], float]) -> float:
    """Bytes that matrix products and convolutions read and write, twice that for all else that goes on between them.

    An estimate: the elementwise work between two products is taken to read and write what the products do.
    """
    total = 0.0
    for equation in _open(jaxpr).eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            total += 2 * sum(size(var.aval) for var in (*equation.invars, *equation.outvars))
        inner = [moved_bytes(part, size) for part in _inner(equation)]
        if equation.primitive.name == "cond":
            total += max(inner, default=0.0)
        else:
            total += sum(inner) * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def _peak(jaxpr: Jaxpr, size: Callable[[Any], float]) -> float:
    last: dict[Var, int] = {}
    source: dict[Var, list[Var]] = {}  # a view -> what it keeps alive
    owned: dict[Var, float] = {}

    def owners(var: Any) -> list[Var]:
        return [] if isinstance(var, Literal) else source.get(var, [var])

    for index, equation in enumerate(jaxpr.eqns):
        used = [owner for var in equation.invars for owner in owners(var)]
        for owner in used:
            last[owner] = index
        if equation.primitive.name in VIEWS:
            for var in equation.outvars:
                source[var] = list(dict.fromkeys(used))
        else:
            for var in equation.outvars:
                owned[var] = size(var.aval)
    for var in jaxpr.outvars:
        for owner in owners(var):
            last[owner] = len(jaxpr.eqns)

    ends: dict[int, list[Var]] = {}
    for var in owned:
        if var in last:
            ends.setdefault(last[var], []).append(var)
    live = highest = 0.0
    for index, equation in enumerate(jaxpr.eqns):
        made = sum(owned.get(var, 0.0) for var in equation.outvars)
        inside = max((_peak(_open(part), size) for part in _inner(equation)), default=0.0)
        highest = max(highest, live + max(made, inside))
        live += sum(owned[var] for var in equation.outvars if var in owned and var in last)
        live -= sum(owned[var] for var in ends.get(index, ()))
    return highest


def _inner(equation: Any) -> list[Jaxpr]:
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, Jaxpr | ClosedJaxpr):
                found.append(_open(part))
    return found


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
