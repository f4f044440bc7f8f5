"""A trained model as one value: network, weights, schedule and space, ready to upscale.

Shape legend: B batch, h x w the low-res picture, s the scale, C = 3 channels.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from sr3_jax.diffusion.process import Kind
from sr3_jax.diffusion.sampler import sample
from sr3_jax.diffusion.schedule import NoiseSchedule
from sr3_jax.diffusion.solvers import Solver, with_coefficients
from sr3_jax.diffusion.space import Space
from sr3_jax.diffusion.tiling import tiled
from sr3_jax.images import to_uint8, to_unit
from sr3_jax.nn.unet import UNet
from sr3_jax.parts import build_network as build_network
from sr3_jax.parts import build_schedule as build_schedule
from sr3_jax.parts import build_space as build_space
from sr3_jax.sampling import SOLVERS as SOLVERS
from sr3_jax.sampling import Sampling, find_stored
from sr3_jax.sampling import inference_grid as inference_grid
from sr3_jax.sampling import solver_named as solver_named
from sr3_jax.train.examples import condition

SHIPPED = Path(__file__).parent / "models"
TILE, OVERLAP = 1024, 64  # high-res pixels; about 1 GB of activations at the shipped model's width


@dataclass(frozen=True, eq=False)
class Model:
    """A network with weights and all that its use needs.

    Attributes:
        name: where it came from.
        params: float32 weights (the moving average of training).
        scale: s, the super-resolution factor.
        sampling: the sampler used when none is asked for: what was stored beside the model, else its config's.
        config: the config it was trained with, as plain values.
    """

    name: str
    network: UNet
    params: Params
    schedule: NoiseSchedule
    space: Space
    kind: Kind
    scale: int
    sampling: Sampling
    config: Mapping[str, Any]
    _copies: dict[Mesh, Params] = field(default_factory=dict, init=False, repr=False)

    @property
    def steps(self) -> int:
        """N of the sampler used when none is asked for."""
        return self.sampling.steps

    @property
    def solver(self) -> str:
        """The solver used when none is asked for."""
        return self.sampling.solver

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
        sampling: Sampling | None = None,
    ) -> np.ndarray:
        """uint8 [B,h,w,3] -> uint8 [B,s*h,s*w,3], one draw from p(y0 | x) each.

        A batch is shared by the devices of this process. Any size: the picture is padded by its edge pixels to one
        of a few sizes, so that a folder of many sizes compiles a few times, and worked through in tiles where it is
        large.

        Args:
            key: one key, or [B] keys, which make each output independent of its batch.
            steps: N of the sampler; None for that of `sampling`.
            solver: 'ancestral', 'ddim', 'dpmpp_2m' or 'heun'; None for that of `sampling`. Steps or a solver other
                than those of `sampling` are sampled on the solver's own grid (see `Sampling.asked`).
            sampling: the whole sampler; None for the model's own.

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
        chosen = (self.sampling if sampling is None else sampling).asked(steps=steps, solver=solver)
        mesh = parallel.mesh_for_batch(len(images))
        params = self._on(mesh)
        output, finite = _upscale(
            params,
            jax.device_put(padded, parallel.batch_sharding(mesh)),
            jax.device_put(key, parallel.batch_sharding(mesh) if key.ndim else parallel.replicated(mesh)),
            jax.device_put(chosen.coefficients(self.schedule), parallel.replicated(mesh)),
            mesh=mesh,
            network=self.network,
            solver=chosen.program,
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


_STATIC = ("mesh", "network", "solver", "kind", "space", "scale")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _upscale(
    params: Params,
    images: jax.Array,
    key: Key,
    table: Any,
    *,
    mesh: Mesh,
    network: UNet,
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
    # All grids of one length share this program: the solver has its coefficients from the table, and of the
    # schedule only the length counts.
    any_grid = schedules.linear(len(jax.tree.leaves(table)[0]))
    solver = with_coefficients(solver, table)
    samples = sample(
        denoiser, key, cond, shape=shape, schedule=any_grid, solver=solver, kind=kind, space=space
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
            sampling=Sampling(config["eval"]["solver"], config["eval"]["steps"]),
            config=config,
        )
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the config of model {name} does not fit this version of sr3_jax ({error}); use the version that wrote it"
        ) from None


def locate(path_or_name: str | Path) -> Path:
    """The workdir or .safetensors file of a model that is given so or by its shipped name.

    Raises:
        UserError: there is no such model; the sentence says what was looked for.
    """
    for path in (Path(path_or_name), SHIPPED / f"{path_or_name}.safetensors"):
        if os.path.isdir(path) or os.path.isfile(path):  # path.is_dir() raises for a name that is too long
            return path
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.safetensors"))) or "none"
    raise UserError(
        f"no model {str(path_or_name)!r}: give a workdir, a .safetensors file, or a shipped name ({names})"
    )


def load(path_or_name: str | Path) -> Model:
    """A model from a workdir, an exported .safetensors file, or the name of a shipped one.

    Its sampling is what `sr3 search-schedule` stored beside it, if that is for these weights.

    Raises:
        UserError: there is no such model, or it can't be read; the sentence says what was looked for.
    """
    path = locate(path_or_name)
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise UserError(f"model folder {path} has no {CONFIG_FILE}; give a workdir of sr3 train")
        config = read_config(path)
        params, step = load_ema(path)
        name = f"{path} at step {step}"
    else:
        params, config = read_export(path)
        name = path.name if os.path.isfile(path_or_name) else str(path_or_name)
    model = from_config(config, params, name=name)
    found = find_stored(path, own=model.sampling, params=model.params, config=config, name=name)
    return replace(model, sampling=found)
