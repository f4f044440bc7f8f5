"""The jitted sampling program: condition, guidance and the reverse loop, over a mesh; and how a model runs it.

Shape legend: B batch, H x W the images, h x w their low-res images, C channels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sr3_jax import memory
from sr3_jax.config.build import build_augmentation
from sr3_jax.degradations import ConditioningAugmentation
from sr3_jax.diffusion.guidance import guided
from sr3_jax.diffusion.process import Prediction
from sr3_jax.diffusion.sampler import sample_part, sample_with_coefficients, split
from sr3_jax.diffusion.solvers import Carry, SolverStep
from sr3_jax.diffusion.space import Space
from sr3_jax.distributed import sharding
from sr3_jax.image_ops import back_project, to_uint8, to_unit
from sr3_jax.inference.tiling import cell_size, position_noise
from sr3_jax.nn.unet import Network, apply_unet
from sr3_jax.numerics import fixed_numerics
from sr3_jax.sampling import Sampling
from sr3_jax.train.examples import Batch, condition
from sr3_jax.types import Conditioning, Denoiser, Key, Params

if TYPE_CHECKING:
    from sr3_jax.inference.model import Model

# Called with the steps done, the steps of the batch, and uint8 [B,H,W,C], the images so far.
OnStep = Callable[[int, int, np.ndarray], object]

_needed: dict[Any, int] = {}  # bytes per device, by the shapes and static values of a program
_STATIC = (
    *("shape", "mesh", "network", "step", "prediction", "space", "scale", "augmentation"),
    *("upsampling", "back_projection", "cell"),
)


@functools.partial(jax.jit, static_argnames=_STATIC)
def generate_jit(
    params: Params,
    batch: Batch,
    key: Key,
    coefficients: Any,
    guidance: jax.Array | None,
    strength: jax.Array | None,
    origins: jax.Array | None,
    *,
    shape: tuple[int, int, int, int],
    mesh: Mesh | None,
    network: Network,
    step: SolverStep,
    prediction: Prediction,
    space: Space,
    scale: int,
    augmentation: ConditioningAugmentation | None,
    upsampling: str,
    back_projection: int,
    cell: int,
) -> tuple[jax.Array, jax.Array]:
    """Sample a batch of images.

    Args:
        batch: 'image', the low-res images uint8 [B,h,w,C], except for a base stage; 'label' [B], for a
            class-conditional network.
        key: one key, or [B] keys.
        coefficients: `Sampling.coefficients`.
        guidance: weight of classifier-free guidance; None for no guidance.
        strength: of the conditioning augmentation; None for none.
        origins: [B,2] positions of the images in larger ones, in cells, for [B] keys: the noise of a pixel then depends
            on its position (`position_noise`). None for noise that depends on the size of the image.
        shape: (B,H,W,C) of the output.
        mesh: the batch is split over all of it; None for one device of any kind.
        step: `Solver.compiled`.
        scale: H / h.
        upsampling: of the low-res image, as in `image_ops.upsample`.
        back_projection: rounds of `back_project`.
        cell: side of a cell in low-res pixels.

    Returns:
        uint8 [B,H,W,C], and whether all values were finite before rounding.
    """

    denoiser, key, cond, given, noise = _conditioned(
        params,
        batch,
        key,
        guidance,
        strength,
        origins,
        shape=shape,
        network=network,
        scale=scale,
        augmentation=augmentation,
        upsampling=upsampling,
        cell=cell,
    )
    samples = sample_with_coefficients(
        denoiser,
        key,
        cond,
        shape=shape,
        coefficients=coefficients,
        step=step,
        prediction=prediction,
        space=space,
        noise=noise,
    )
    return _finished(samples.image, given, scale=scale, back_projection=back_projection, mesh=mesh)


@functools.partial(jax.jit, static_argnames=_STATIC)
def generate_part_jit(
    params: Params,
    batch: Batch,
    key: Key,
    coefficients: Any,
    guidance: jax.Array | None,
    strength: jax.Array | None,
    origins: jax.Array | None,
    carry: Carry | None,
    first: jax.Array,
    last: jax.Array,
    *,
    shape: tuple[int, int, int, int],
    mesh: Mesh | None,
    network: Network,
    step: SolverStep,
    prediction: Prediction,
    space: Space,
    scale: int,
    augmentation: ConditioningAugmentation | None,
    upsampling: str,
    back_projection: int,
    cell: int,
) -> tuple[jax.Array, jax.Array, Carry]:
    """Steps `first` to `last` - 1 of `generate_jit`: the same arithmetic, so the last part gives the same bytes.

    Args:
        carry, first, last: as in `sample_part`.

    Returns:
        As `generate_jit`, of y_t as an image; and the state for the next part.
    """
    denoiser, key, cond, given, noise = _conditioned(
        params,
        batch,
        key,
        guidance,
        strength,
        origins,
        shape=shape,
        network=network,
        scale=scale,
        augmentation=augmentation,
        upsampling=upsampling,
        cell=cell,
    )
    image, carry = sample_part(
        denoiser,
        key,
        cond,
        carry,
        first,
        last,
        shape=shape,
        coefficients=coefficients,
        step=step,
        prediction=prediction,
        space=space,
        noise=noise,
    )
    output, finite = _finished(image, given, scale=scale, back_projection=back_projection, mesh=mesh)
    return output, finite, carry


def _conditioned(
    params: Params,
    batch: Batch,
    key: Key,
    guidance: jax.Array | None,
    strength: jax.Array | None,
    origins: jax.Array | None,
    *,
    shape: tuple[int, int, int, int],
    network: Network,
    scale: int,
    augmentation: ConditioningAugmentation | None,
    upsampling: str,
    cell: int,
) -> tuple[Denoiser, Key, Conditioning, jax.Array | None, Callable[[Key], jax.Array] | None]:
    """The denoiser, the key of its noise, its condition, the low-res images in [-1,1], and the noise by position."""

    def positioned(size: tuple[int, ...], cell: int) -> Callable[[Key], jax.Array] | None:
        if origins is None:
            return None
        one = functools.partial(position_noise, shape=size, cell=cell)
        return lambda keys: jax.vmap(one)(keys, origins)

    low_res = given = to_unit(batch["image"]) if "image" in batch else None
    levels = None
    if low_res is not None and augmentation is not None and strength is not None:
        levels = jnp.full(shape[:1], strength)
        key, augment_key = split(key)
        low_res = augmentation.apply(augment_key, low_res, levels, normal=positioned(low_res.shape[1:], cell))
    cond = condition(low_res, scale, batch.get("label"), levels, upsampling=upsampling)
    denoiser: Denoiser = functools.partial(apply_unet, network, params)
    if guidance is not None:
        denoiser = guided(denoiser, guidance=guidance, no_label=network.num_classes)
    return denoiser, key, cond, given, positioned(shape[1:], cell * scale)


def _finished(
    image: jax.Array, given: jax.Array | None, *, scale: int, back_projection: int, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """uint8 of images in [-1,1], and whether all their values were finite."""
    if given is not None and back_projection:
        image = back_project(image, given, scale, rounds=back_projection)
    output = to_uint8(image)
    if mesh is not None:
        # Constrain the output too, so that XLA cannot choose another sharding than rows over devices.
        output = jax.lax.with_sharding_constraint(output, sharding.batch_sharding(mesh))
    return output, jnp.all(jnp.isfinite(image))


# Without jit, whose cache cannot compare the symbolic sizes of `jax.export`.
generate: Callable[..., tuple[jax.Array, jax.Array]] = inspect.unwrap(generate_jit)


@fixed_numerics()
def run_program(
    model: Model,
    shape: tuple[int, int, int, int],
    *,
    images: np.ndarray | None,
    labels: np.ndarray | None,
    key: Key,
    sampling: Sampling,
    origins: np.ndarray | None,
) -> np.ndarray:
    """uint8 [B,H,W,C] from `generate_jit` for a model; see there for the arguments.

    Raises:
        OutOfMemory: it does not fit into what is free on the devices.
        FloatingPointError: the network's output is not finite.
    """
    arguments, settings = program_arguments(
        model, shape, images=images, labels=labels, key=key, sampling=sampling, origins=origins
    )
    if model.on_step is None:
        require_memory(generate_jit, arguments, settings)
        output, finite = generate_jit(*arguments, **settings)
    else:
        output, finite = _run_stepwise(arguments, settings, sampling.steps, model.on_step)
    if not finite:
        raise FloatingPointError(
            f"model {model.name} produced values that are not finite: try another solver, other steps, or float32"
        )
    return np.asarray(output)


def _run_stepwise(
    arguments: tuple[Any, ...],
    settings: dict[str, Any],
    steps: int,
    on_step: OnStep,
) -> tuple[jax.Array, jax.Array]:
    """`generate_jit`, with a call of `on_step` after each step: see `Model.watched`."""
    params, batch, key, *rest = arguments

    def same_key() -> Key:
        return jax.random.clone(key)  # each part derives the key of its steps from it

    start = (params, batch, same_key(), *rest, None, np.int32(0), np.int32(0))
    output, finite, carry = generate_part_jit(*start, **settings)
    for index in range(steps):
        part = (params, batch, same_key(), *rest, carry, np.int32(index), np.int32(index + 1))
        if index == 0:
            require_memory(generate_part_jit, part, settings)
        output, finite, carry = generate_part_jit(*part, **settings)
        on_step(index + 1, steps, np.asarray(output))
    return output, finite


def program_arguments(
    model: Model,
    shape: tuple[int, int, int, int],
    *,
    images: np.ndarray | None,
    labels: np.ndarray | None,
    key: Key,
    sampling: Sampling,
    origins: np.ndarray | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `generate_jit`: arrays on the devices, and static values."""
    guidance, strength = sampling.guidance, sampling.augment
    mesh = sharding.mesh_for_batch(shape[0])
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    arguments = (
        model.params_on(mesh),
        {
            name: jax.device_put(value, rows)
            for name, value in (("image", images), ("label", labels))
            if value is not None
        },
        jax.device_put(key, rows if key.ndim else everywhere),
        jax.device_put(sampling.coefficients(model.schedule), everywhere),
        None if guidance == 1 else jax.device_put(np.float32(guidance), everywhere),
        None if not strength else jax.device_put(np.float32(strength), everywhere),
        None if origins is None else jax.device_put(origins, rows),
    )
    return arguments, {"shape": shape, "mesh": mesh, **program_settings(model, sampling)}


def program_settings(model: Model, sampling: Sampling) -> dict[str, Any]:
    """The static arguments of `generate`, except for the shape of the output and the mesh."""
    return {
        "network": model.network,
        "step": sampling.make_solver().compiled,
        "prediction": model.prediction,
        "space": model.space,
        "scale": model.scale,
        "augmentation": build_augmentation(model.config["data"]) if sampling.augment else None,
        "upsampling": model.config["data"]["upsampling"],
        "back_projection": sampling.back_projection,
        "cell": cell_size(stride=model.network.stride, scale=model.scale),
    }


def require_memory(program: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
    """Check that a program fits into what is free on its devices with these arguments and static values.

    The first call of each shape compiles the program, which its next call then finds in its cache.

    Args:
        program: `generate_jit` or `generate_part_jit`.

    Raises:
        OutOfMemory: it does not fit.
    """
    count, height, width, _ = settings["shape"]
    what = f"sampling {count} x {width}x{height} pixels at once"
    remedy = "use smaller batches or tiles (--batch-size, --tile), or free memory"
    devices = settings["mesh"].local_devices
    leaves, structure = jax.tree.flatten(
        arguments[1:]
    )  # the shapes of the parameters follow from the network
    key = (program, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), *settings.values())
    if key not in _needed:
        _needed[key] = memory.needed_bytes(program.lower(*arguments, **settings).compile())
    memory.require(_needed[key], devices, what=what, remedy=remedy)
