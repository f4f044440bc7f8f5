"""Floating-point operations of a traced program, and the peak of each kind of device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

# Dense bfloat16 FLOP/s of one JAX device, by the start of its `device_kind`. TPU: Google's page of each version
# (cloud.google.com/tpu/docs), where v3 and TPU7x have two devices a chip; v4 lite from JAX's own table. GPU: NVIDIA's
# data sheets, half of the figures "with sparsity".
PEAK_FLOPS: Mapping[str, float] = {
    "TPU v3": 123e12 / 2,
    "TPU v4 lite": 137e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A10": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, by its `jax.Device.device_kind`; None if it is not in the table."""
    known = [name for name in PEAK_FLOPS if f"{device_kind} ".replace("-", " ").startswith(f"{name} ")]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Floating-point operations of the matrix products and convolutions in a jaxpr; a multiply-add counts as two.

    The body of a scan counts once per iteration, which the compiler's `cost_analysis()` does not do: it counts every
    loop body once, so a sampler of 100 steps would count as one. Of a conditional the most expensive branch counts.
    Elementwise operations are not counted: their cost is bandwidth.
    """
    return sum(_flops(equation) for equation in open_jaxpr(jaxpr).eqns)


def _flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_channels = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / out_channels
    inner = [flops(part) for part in inner_jaxprs(equation)]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def inner_jaxprs(equation: Any) -> list[Jaxpr]:
    """The jaxprs in the parameters of an equation: bodies of loops, branches, jitted functions."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, Jaxpr | ClosedJaxpr):
                found.append(open_jaxpr(part))
    return found


def open_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """The jaxpr without its constants."""
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
