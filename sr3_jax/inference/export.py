"""Export a model for other programs: the whole sampling program as StableHLO, the denoiser as ONNX.

Both are one file with the weights inside. `sr3_jax.load` does not read them: the native form is .safetensors.

Shape legend: B batch, h x w the low-res image, s the scale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import sr3_jax
from sr3_jax.errors import UserError
from sr3_jax.files import write_text
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.inference.model import Model
from sr3_jax.inference.program import generate, program_settings
from sr3_jax.nn.unet import apply_unet
from sr3_jax.numerics import fixed_numerics
from sr3_jax.sampling import Sampling
from sr3_jax.storage import atomic_write
from sr3_jax.types import Params

STABLEHLO_FORMAT, ONNX_FORMAT = "sr3_jax.stablehlo.1", "sr3_jax.onnx.1"
ONNX_TOLERANCE = 1e-4  # of the prediction, which is about 1; relative where it is larger
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_LARGEST = 2**31 - 2**24  # bytes of weights: neither format can hold more in one file
_OPSET = 21  # of ONNX 1.16 (2024)


def size_multiple(model: Model) -> int:
    """Height and width of the low-res image must be multiples of this."""
    return model.network.stride // math.gcd(model.network.stride, model.scale)


@fixed_numerics()
def export_stablehlo(
    path: Path,
    model: Model,
    *,
    sampling: Sampling,
    size: tuple[int, int] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write the sampling program of `jax.export` to PATH, and its description to PATH.json.

    The program takes uint8 [B,h,w,3], a seed (uint32 scalar) and, if the model has classes, int32 [B] labels; it
    returns uint8 [B,s*h,s*w,3], the same as `Model.upscale` of these images within rounding. B is any number, and so
    are h and w, up to a multiple, unless `size` fixes them.

    Args:
        sampling: settings of the sampler, which become part of the program.
        size: (h, w); None for any.
        platforms: the kinds of devices that the program can run on, from `PLATFORMS`.
        dtype: of the weights in the file, 'float32' or 'bfloat16'; they are used as float32.

    Returns:
        The description.

    Raises:
        UserError: the model takes no low-res image, a setting does not fit it, it is too large for one file, or the
            files cannot be written.
    """
    unit, classes = size_multiple(model), model.network.num_classes
    _check(model, sampling, size, dtype)
    if not model.network.low_res:
        raise UserError(
            f"model {model.name} is unconditional (config.model.low_res is false), and .stablehlo is for models that "
            "upscale: use .onnx or .safetensors"
        )
    batch, height, width = jax.export.symbolic_shape(f"b, {unit}*h, {unit}*w")
    if size is not None:
        height, width = size
    inputs = [
        jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8),
        jax.ShapeDtypeStruct((), jnp.uint32),
        *([jax.ShapeDtypeStruct((batch,), jnp.int32)] if classes else []),
    ]
    program = jax.jit(_sampling_program(model, sampling, dtype))
    try:
        exported = jax.export.export(program, platforms=tuple(platforms))(*inputs)
    except (jax.errors.InconclusiveDimensionOperation, jax.errors.TracerIntegerConversionError) as error:
        raise UserError(
            f"model {model.name} cannot be exported for images of any size: give --size=HxW"
        ) from error
    content = bytes(exported.serialize())
    about = _about(model, sampling, STABLEHLO_FORMAT) | {
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "platforms": list(platforms),
        "size": None if size is None else list(size),
        "size_multiple": unit,
        "num_classes": classes,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    _write(path, content)
    write_text(path.with_name(f"{path.name}.json"), json.dumps(about, indent=2) + "\n")
    return about


@fixed_numerics()
def export_onnx(
    path: Path, model: Model, *, sampling: Sampling, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Write the denoiser to an ONNX file, with the extra `onnx`.

    Its inputs, float32 except for the label, are y_t [B,H,W,3], gamma [B], then, as far as the model takes them,
    upsampled [B,H,W,3], label int32 [B] and augment [B]; its output is prediction [B,H,W,3], without the variance that
    some networks predict. H and W are those of the high-res image. The file's metadata, under 'sr3_jax', has as JSON
    what a sampler needs: prediction, space, scale, upsampling, and gamma of the inference schedule.

    Args:
        sampling: settings of the sampler, of which the schedule is stored.
        size: (h, w) of the low-res image; None for any.

    Raises:
        UserError: the extra is not installed, the model is too large for one file, onnxruntime does not give the
            network's outputs, or the file cannot be written.
    """
    _check(model, sampling, size)
    network = model.network
    names = [
        name
        for name, taken in (
            ("upsampled", network.low_res),
            ("label", bool(network.num_classes)),
            ("augment", network.augment),
        )
        if taken
    ]

    stride = network.stride

    def denoise(y_t: jax.Array, gamma: jax.Array, *cond: jax.Array) -> jax.Array:
        given = dict(zip(names, cond, strict=True))
        if "upsampled" in given:
            given["upsampled"] = _join(given["upsampled"])
        return apply_unet(network, model.params, _join(y_t), gamma, given)[..., : network.out_channels]

    # The converter has symbols for whole sizes only, not for multiples: it gets the images as blocks of the stride.
    batch, rows, columns = jax.export.symbolic_shape("B, h, w")
    if size is not None:
        rows, columns = (side * model.scale // stride for side in size)
    blocks = jax.ShapeDtypeStruct((batch, rows, stride, columns, stride, network.out_channels), jnp.float32)
    vector = jax.ShapeDtypeStruct((batch,), jnp.float32)
    shapes = {"upsampled": blocks, "label": jax.ShapeDtypeStruct((batch,), jnp.int32), "augment": vector}
    proto = _convert(denoise, [blocks, vector, *(shapes[name] for name in names)], ["y_t", "gamma", *names])
    side = None if size is None else (size[0] * model.scale, size[1] * model.scale)
    for name in ("y_t", *(("upsampled",) if network.low_res else ())):
        _take_whole_images(proto.graph, name, stride, side)
    about = _about(model, sampling, ONNX_FORMAT) | {
        "prediction": model.prediction,
        "space": model.config["diffusion"]["space"],
        "residual_scale": model.config["diffusion"]["residual_scale"],
        "upsampling": model.config["data"]["upsampling"],
        "size_multiple": stride,
        "num_classes": network.num_classes,
        "gamma": sampling.grid(model.schedule).gamma64[::-1].tolist(),  # from noise to 1
    }
    proto.metadata_props.add(key="sr3_jax", value=json.dumps(about))
    content = proto.SerializeToString()
    _check_onnx(content, model, side or (stride, 2 * stride))
    _write(path, content)
    return about


def _sampling_program(model: Model, sampling: Sampling, dtype: str) -> Callable[..., jax.Array]:
    """(uint8 [B,h,w,3], uint32 seed, labels [B] if the model has classes) -> uint8 [B,s*h,s*w,3]."""
    stored = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), model.params)
    coefficients = sampling.coefficients(model.schedule)

    def program(images: jax.Array, seed: jax.Array, label: jax.Array | None = None) -> jax.Array:
        params: Params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
        count, height, width, _ = images.shape
        output, _ = generate(
            params,
            {"image": images} if label is None else {"image": images, "label": label},
            jax.vmap(jax.random.key)(jnp.broadcast_to(seed, (count,))),
            coefficients,
            None if sampling.guidance == 1 else jnp.float32(sampling.guidance),
            None if not sampling.augment else jnp.float32(sampling.augment),
            jnp.zeros((count, 2), jnp.int32),
            shape=(count, height * model.scale, width * model.scale, model.network.out_channels),
            mesh=None,
            **program_settings(model, sampling),
        )
        return output

    return program


def _convert(function: Callable[..., jax.Array], inputs: Sequence[Any], names: Sequence[str]) -> Any:
    """The ONNX proto of a function."""
    libraries = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    for library in libraries:
        library.setLevel(logging.ERROR)  # they report what they skip, with tracebacks
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError("an ONNX file needs the extra onnx: run pip install 'sr3_jax[onnx]'") from error
    # It prints the modules that it meets, and its layers rely on the promotion of ranks.
    with contextlib.redirect_stdout(io.StringIO()), jax.numpy_rank_promotion("allow"):
        return to_onnx(
            function,
            inputs,
            model_name="sr3_jax",
            opset=_OPSET,
            input_names=names,
            output_names=["prediction"],
        )


def _check_onnx(content: bytes, model: Model, size: tuple[int, int]) -> None:
    """UserError if onnxruntime's output for random inputs of this size differs from the network's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    shape = (2, *size, model.network.out_channels)
    # The label for "no label", where there is one, is the last.
    last_label = model.network.num_classes - (0 if model.config["data"]["label_dropout"] else 1)
    inputs = {
        "y_t": generator.standard_normal(shape, np.float32),
        "gamma": np.array([0.2, 0.99], np.float32),
        "upsampled": generator.uniform(-1, 1, shape).astype(np.float32),
        "label": np.array([0, last_label], np.int32),
        "augment": np.array([0, 0.5], np.float32),
    }
    taken = {value.name: inputs[value.name] for value in session.get_inputs()}
    (output,) = session.run(None, taken)
    cond = {name: jnp.asarray(value) for name, value in inputs.items() if name in taken}
    y_t, gamma = (jnp.asarray(inputs[name]) for name in ("y_t", "gamma"))
    wanted = np.asarray(apply_unet(model.network, model.params, y_t, gamma, cond))[..., : shape[-1]]
    error = float(np.max(np.abs(output - wanted) / np.maximum(1.0, np.abs(wanted))))
    if not error < ONNX_TOLERANCE:
        raise UserError(
            f"the ONNX file of model {model.name} does not compute what the model does (difference {error:.1e}): use "
            ".stablehlo or .safetensors"
        )


def _join(blocks: jax.Array) -> jax.Array:
    """[B,h,n,w,n,C] -> [B,h*n,w*n,C]."""
    count, rows, height, columns, width, channels = blocks.shape
    return blocks.reshape(count, rows * height, columns * width, channels)


def _take_whole_images(graph: Any, name: str, stride: int, size: tuple[int, int] | None) -> None:
    """Change an input of an ONNX graph from blocks [B,h,stride,w,stride,C] to images [B,H,W,C], reshaped inside."""
    from onnx import TensorProto, helper, numpy_helper

    (value,) = (value for value in graph.input if value.name == name)
    channels = value.type.tensor_type.shape.dim[-1].dim_value
    shape = ("B", *(size or ("H", "W")), channels)
    value.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    for node in graph.node:
        node.input[:] = [f"{name}_blocks" if one == name else one for one in node.input]
    constants = {  # of the shape of the blocks: sides of the image, their divisors, and what is known
        "sides": [0, 1, 1, 2, 2, 3],
        "divisors": [1, stride, 1, stride, 1, 1],
        "known": [0, 0, stride, 0, stride, channels],
        "zero": [0],
    }
    graph.initializer.extend(
        numpy_helper.from_array(np.array(values, np.int64), f"{name}_{key}")
        for key, values in constants.items()
    )
    steps = [
        ("Shape", [name], "shape"),
        ("Gather", [f"{name}_shape", f"{name}_sides"], "gathered"),
        ("Div", [f"{name}_gathered", f"{name}_divisors"], "divided"),
        ("Greater", [f"{name}_known", f"{name}_zero"], "is_known"),
        ("Where", [f"{name}_is_known", f"{name}_known", f"{name}_divided"], "block_shape"),
        ("Reshape", [name, f"{name}_block_shape"], "blocks"),
    ]
    nodes = [helper.make_node(kind, inputs, [f"{name}_{output}"]) for kind, inputs, output in steps]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _check(model: Model, sampling: Sampling, size: tuple[int, int] | None, dtype: str = "float32") -> None:
    labels = np.zeros(1, np.int32) if model.network.num_classes else None
    model.check(sampling, labels=labels, count=1)
    unit = size_multiple(model)
    if size is not None and any(side < 1 or side % unit for side in size):
        raise UserError(f"size {size[0]}x{size[1]} does not fit model {model.name}: use multiples of {unit}")
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.params)) * jnp.dtype(dtype).itemsize
    if weights > _LARGEST:
        raise UserError(
            f"model {model.name} has {weights / 1e9:.1f} GB of weights, and such a file holds 2 GB: use .safetensors"
        )


def _about(model: Model, sampling: Sampling, format: str) -> dict[str, Any]:
    return {
        "format": format,
        "sr3_jax": sr3_jax.__version__,
        "model": model.name,
        "scale": model.scale,
        "sampling": dataclasses.asdict(sampling),
    }


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be written ({reason(error)}): use another path") from error
