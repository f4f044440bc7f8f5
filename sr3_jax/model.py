"""A trained model as one value: network, weights, schedule and space, ready to upscale.

Shape legend: B batch, h x w the low-res picture, s the scale, C = 3 channels.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sr3_jax import parallel
from sr3_jax.aliases import Conditioning, Denoiser, Key, Params, UserError
from sr3_jax.checkpoint import CONFIG_FILE, load_ema, read_config, read_export
from sr3_jax.diffusion import schedule as schedules
from sr3_jax.diffusion import solvers
from sr3_jax.diffusion import space as spaces
from sr3_jax.diffusion.process import Kind
from sr3_jax.diffusion.sampler import sample
from sr3_jax.diffusion.schedule import NoiseSchedule, respace
from sr3_jax.diffusion.solvers import Solver
from sr3_jax.diffusion.space import Space
from sr3_jax.diffusion.tiling import tiled
from sr3_jax.images import to_uint8, to_unit
from sr3_jax.nn.unet import UNet
from sr3_jax.train.examples import condition

SHIPPED = Path(__file__).parent / "models"
SOLVERS = ("ancestral", "ddim", "dpmpp_2m", "heun")
TILE, OVERLAP = 1024, 64  # high-res pixels; about 1 GB of activations at the shipped model's width


@functools.cache
def solver_named(name: str) -> Solver:
    """The solver of that name at its default settings; the same value each time, so that jit compiles once."""
    if name not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}")
    return getattr(solvers, name)()


@functools.cache
def inference_grid(schedule: NoiseSchedule, steps: int, solver: str) -> NoiseSchedule:
    """The grid of a sampler with that many steps, of the solver's own spacing."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    return respace(schedule, steps, solver_named(solver).spacing)


@dataclass(frozen=True, eq=False)
class Model:
    """A network with weights and all that its use needs.

    Attributes:
        name: where it came from.
        params: float32 weights (the moving average of training).
        scale: s, the super-resolution factor.
        steps, solver: the sampler used when none is asked for.
        config: the config it was trained with, as plain values.
    """

    name: str
    network: UNet
    params: Params
    schedule: NoiseSchedule
    space: Space
    kind: Kind
    scale: int
    steps: int
    solver: str
    config: Mapping[str, Any]
    _copies: dict[Mesh, Params] = field(default_factory=dict, init=False, repr=False)

    def _on(self, mesh: Mesh) -> Params:
        """The weights on every device of a mesh, copied there once."""
        if mesh.size == 1:
            return self.params
        if mesh not in self._copies:
            self._copies[mesh] = jax.device_put(self.params, parallel.replicated(mesh))
        return self._copies[mesh]

    def denoiser(self) -> Denoiser:
        """The network with its weights, as the diffusion core takes it."""
        return functools.partial(_denoise, self.network, self.params)

    def upscale(
        self,
        images: np.ndarray | jax.Array,
        key: Key,
        *,
        steps: int | None = None,
        solver: str | None = None,
    ) -> np.ndarray:
        """uint8 [B,h,w,3] -> uint8 [B,s*h,s*w,3], one draw from p(y0 | x) each.

        A batch is shared by the devices of this process. Any size: the picture is padded by its edge pixels to one
        of a few sizes, so that a folder of many sizes compiles a few times, and worked through in tiles where it is
        large.

        Args:
            key: one key, or [B] keys, which make each output independent of its batch.
            steps: N of the sampler; None for the model's own default.
            solver: 'ancestral', 'ddim', 'dpmpp_2m' or 'heun'; None for the model's own default.

        Raises:
            UserError: `steps` or `solver` is out of range, or the model is of labelled pictures.
            ValueError: the images are not uint8 [B,h,w,3].
            FloatingPointError: the network's output is not finite: a black picture is never returned for one.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [B,h,w,3], got {images.dtype} {images.shape}")
        if self.network.num_classes:
            raise UserError(
                f"model {self.name} needs the class of each picture (num_classes={self.network.num_classes}), which "
                "nothing gives here; use a model trained with config.model.num_classes=0"
            )
        height, width = images.shape[1:3]
        unit = self.network.stride // math.gcd(self.network.stride, self.scale)
        padding = [(0, _bucket(side, unit) - side) for side in (height, width)]
        padded = np.pad(images, ((0, 0), *padding, (0, 0)), mode="edge")
        name = self.solver if solver is None else solver
        schedule = inference_grid(self.schedule, self.steps if steps is None else steps, name)
        mesh = parallel.mesh_for_batch(len(images))
        params = self._on(mesh)
        output, finite = _upscale(
            params,
            jax.device_put(padded, parallel.batch_sharding(mesh)),
            jax.device_put(key, parallel.batch_sharding(mesh) if key.ndim else parallel.replicated(mesh)),
            mesh=mesh,
            network=self.network,
            schedule=schedule,
            solver=solver_named(name),
            kind=self.kind,
            space=self.space,
            scale=self.scale,
        )
        if not finite:
            raise FloatingPointError(
                f"model {self.name} gave values that are not finite; try other steps or another solver, and float32"
            )
        return np.asarray(output)[:, : height * self.scale, : width * self.scale]


def _denoise(
    network: UNet, params: Params, y_t: jax.Array, gamma: jax.Array, cond: Conditioning
) -> jax.Array:
    return network.apply({"params": params}, y_t, gamma, cond)


_STATIC = ("mesh", "network", "schedule", "solver", "kind", "space", "scale")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _upscale(
    params: Params,
    images: jax.Array,
    key: Key,
    *,
    mesh: Mesh,
    network: UNet,
    schedule: NoiseSchedule,
    solver: Solver,
    kind: Kind,
    space: Space,
    scale: int,
) -> tuple[jax.Array, jax.Array]:
    # Each device works on its own rows: said of what comes out too, so that XLA cannot choose otherwise.
    cond = condition(to_unit(images), scale)
    whole = functools.partial(_denoise, network, params)
    denoiser = tiled(whole, tile=TILE, overlap=OVERLAP, stride=network.stride)
    shape = cond["upsampled"].shape
    samples = sample(
        denoiser, key, cond, shape=shape, schedule=schedule, solver=solver, kind=kind, space=space
    )
    output = jax.lax.with_sharding_constraint(to_uint8(samples.image), parallel.batch_sharding(mesh))
    return output, jnp.all(jnp.isfinite(samples.image))


def _bucket(side: int, unit: int) -> int:
    """The low-res side to pad to: a multiple of `unit`, in steps of 8 or of an eighth of the side at most."""
    step = max(unit, 8, 1 << max(0, side.bit_length() - 4))
    step = -(-step // unit) * unit
    return -(-side // step) * step


def init_params(network: UNet, key: Key) -> Params:
    """Fresh weights of a network, from the smallest input that it takes."""
    image = jnp.zeros((1, network.stride, network.stride, network.out_channels))
    cond: Conditioning = {"upsampled": image} if network.low_res else {}
    if network.num_classes:
        cond = {**cond, "label": jnp.zeros((1,), jnp.int32)}
    return network.init(key, image, jnp.full((1,), 0.5), cond)["params"]


def _check_params(network: UNet, params: Params, name: str) -> None:
    wanted = jax.eval_shape(lambda key: init_params(network, key), jax.random.key(0))
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (wanted, params))
    ]
    if shapes[0] != shapes[1]:
        wrong = min(path for path, _ in shapes[0].items() ^ shapes[1].items())
        raise UserError(
            f"the weights of model {name} are not those of the network in its config (they differ at {wrong}); "
            "export or train it again"
        )


def build_network(section: Mapping[str, Any]) -> UNet:
    """A UNet from its fields as plain values; lists are taken for tuples, as JSON has none."""
    return UNet(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
    )


def build_schedule(section: Mapping[str, Any]) -> NoiseSchedule:
    """The training schedule of a config's `diffusion` section."""
    steps, name = section["num_steps"], section["schedule"]
    if name == "cosine":
        return schedules.cosine(steps)
    ends = {"beta_start": section["beta_start"], "beta_end": section["beta_end"]}
    if name in ("linear", "quadratic"):
        return getattr(schedules, name)(steps, **ends)
    raise UserError(f"config.diffusion.schedule must be linear, quadratic or cosine, got {name!r}")


def build_space(section: Mapping[str, Any]) -> Space:
    """The space of a config's `diffusion` section."""
    if section["space"] == "image":
        return spaces.image()
    if section["space"] == "residual":
        return spaces.residual(section["residual_scale"])
    raise UserError(f"config.diffusion.space must be image or residual, got {section['space']!r}")


def from_config(config: Mapping[str, Any], params: Params, *, name: str) -> Model:
    """A model from weights and the config that a run or an export carries."""
    try:
        diffusion = config["diffusion"]
        network = build_network(config["model"])
        _check_params(network, params, name)
        return Model(
            name=name,
            network=network,
            params=jax.tree.map(jnp.asarray, params),  # to the device once, not at each use
            schedule=build_schedule(diffusion),
            space=build_space(diffusion),
            kind=diffusion["kind"],
            scale=config["data"]["scale"],
            steps=config["eval"]["steps"],
            solver=config["eval"]["solver"],
            config=config,
        )
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the config of model {name} does not fit this version of sr3_jax ({error}); use the version that wrote it"
        ) from None


def load(path_or_name: str | Path) -> Model:
    """A model from a workdir, an exported .safetensors file, or the name of a shipped one.

    Raises:
        UserError: there is no such model, or it can't be read; the sentence says what was looked for.
    """
    path = Path(path_or_name)
    shipped = SHIPPED / f"{path_or_name}.safetensors"
    if os.path.isdir(path):  # not path.is_dir(), which raises for a name that is too long
        if not (path / CONFIG_FILE).is_file():
            raise UserError(f"model folder {path} has no {CONFIG_FILE}; give a workdir of sr3 train")
        config = read_config(path)
        params, step = load_ema(path)
        return from_config(config, params, name=f"{path} at step {step}")
    if os.path.isfile(path):
        params, config = read_export(path)
        return from_config(config, params, name=path.name)
    if os.path.isfile(shipped):
        params, config = read_export(shipped)
        return from_config(config, params, name=str(path_or_name))
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.safetensors"))) or "none"
    raise UserError(
        f"no model {str(path_or_name)!r}: give a workdir, a .safetensors file, or a shipped name ({names})"
    )
