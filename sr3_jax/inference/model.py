"""A trained model as one value: network, weights, schedule and space, ready to upscale.

Shape legend: B batch, h x w the low-res image, s the scale, C = 3 channels.
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

from sr3_jax.config.build import (
    Stage,
    build_augmentation,
    build_network,
    build_schedule,
    build_space,
    check_params,
)
from sr3_jax.diffusion.process import Prediction
from sr3_jax.diffusion.schedule import NoiseSchedule
from sr3_jax.diffusion.space import Space
from sr3_jax.distributed import sharding
from sr3_jax.errors import UserError
from sr3_jax.inference.program import apply, bucket, generate_jit
from sr3_jax.nn.unet import UNet
from sr3_jax.sampling import Sampling, find_stored
from sr3_jax.train.checkpoints import CONFIG_FILE, load_ema, read_config, read_export
from sr3_jax.types import Denoiser, Key, Params

SHIPPED = Path(__file__).parent / "models"


@dataclass(frozen=True, eq=False)
class Model:
    """A network with weights and all that its use needs.

    Attributes:
        name: where it came from.
        params: float32 weights (the moving average of training).
        scale: s, the super-resolution factor; 1 where there is no low-res image.
        sampling: the sampler used when none is asked for: what was stored beside the model, else its config's.
        config: the config it was trained with, as plain values.
    """

    name: str
    network: UNet
    params: Params
    schedule: NoiseSchedule
    space: Space
    prediction: Prediction
    scale: int
    sampling: Sampling
    config: Mapping[str, Any]
    _copies: dict[Mesh, Params] = field(default_factory=dict, init=False, repr=False)

    @property
    def stage(self) -> Stage:
        """What it makes, and of what."""
        section = self.config.get("stage", {"name": "", "size": 0})
        return Stage(section["name"], section["size"], self.scale if self.network.low_res else None)

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
            self._copies[mesh] = jax.device_put(self.params, sharding.replicated(mesh))
        return self._copies[mesh]

    def denoiser(self) -> Denoiser:
        """The network with its weights, as the diffusion core takes it."""
        return functools.partial(apply, self.network, self.params)

    def upscale(
        self,
        images: np.ndarray | jax.Array,
        key: Key,
        *,
        labels: np.ndarray | None = None,
        steps: int | None = None,
        solver: str | None = None,
        sampling: Sampling | None = None,
    ) -> np.ndarray:
        """uint8 [B,h,w,3] -> uint8 [B,s*h,s*w,3], one draw from p(y0 | x) each.

        A batch is shared by the devices of this process. Any size: one above the training's is padded by edge
        pixels to one of a few, so that a folder of many sizes compiles a few times, and tiled where it is large.

        Args:
            key: one key, or [B] keys, which make each output independent of its batch.
            labels: [B] of images that have a class; None: they have none.
            steps: N of the sampler; None for that of `sampling`.
            solver: 'ancestral', 'ddim', 'dpmpp_2m' or 'heun'; None for that of `sampling`. Steps or a solver other
                than those of `sampling` are sampled on the solver's own grid (see `Sampling.asked`).
            sampling: the whole sampler; None for the model's own.

        Raises:
            UserError: `steps`, `solver`, `labels` or `sampling` is not for this model.
            ValueError: the images are not uint8 [B,h,w,3].
            FloatingPointError: the network's output is not finite: a black image is never returned for one.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [B,h,w,3], got {images.dtype} {images.shape}")
        if not self.network.low_res:
            raise UserError(
                f"model {self.name} takes no image (config.model.low_res is false): use sr3 generate"
            )
        height, width = images.shape[1:3]
        unit = self.network.stride // math.gcd(self.network.stride, self.scale)
        data = self.config["data"]
        exact = int(1.5 * data["crop"] / data.get("shrink", 1) / self.scale)  # as large as in training
        padding = [(0, bucket(side, unit, exact=exact) - side) for side in (height, width)]
        padded = np.pad(images, ((0, 0), *padding, (0, 0)), mode="edge")
        chosen = (self.sampling if sampling is None else sampling).asked(steps=steps, solver=solver)
        shape = (len(images), *(side * self.scale for side in padded.shape[1:3]), self.network.out_channels)
        self.check(chosen, labels=labels, count=len(images))
        output = self._generate(shape, padded, self._labels(labels, len(images)), key, chosen)
        return output[:, : height * self.scale, : width * self.scale]

    def generate(
        self,
        count: int,
        key: Key,
        *,
        labels: np.ndarray | None = None,
        size: int | None = None,
        sampling: Sampling | None = None,
    ) -> np.ndarray:
        """uint8 [count,size,size,3] generate_jit from noise alone, by a base stage of a cascade.

        Args:
            key: one key, or [count] keys, which make each image independent of its batch.
            labels: [count], the class of each; None: of any.
            size: side in pixels; None for that of its training.
            sampling: the sampler; None for the model's own.

        Raises:
            UserError: the model needs a low-res image; `labels`, `size` or `sampling` is not for it.
            FloatingPointError: the network's output is not finite.
        """
        if self.network.low_res:
            raise UserError(f"model {self.name} makes large images of small ones: use sr3 upscale")
        data = self.config["data"]
        side = (self.stage.size or data["crop"] // data.get("shrink", 1)) if size is None else size
        if side < 1 or side % self.network.stride:
            raise UserError(
                f"size must be a multiple of {self.network.stride} for model {self.name}, got {side}"
            )
        shape = (count, side, side, self.network.out_channels)
        chosen = self.sampling if sampling is None else sampling
        self.check(chosen, labels=labels, count=count)
        return self._generate(shape, None, self._labels(labels, count), key, chosen)

    def check(self, sampling: Sampling, *, labels: np.ndarray | None, count: int) -> None:
        """That the model can be sampled so, with these labels of `count` images; UserError if not."""
        self._labels(labels, count)
        sampling.grid(self.schedule)
        guidance, strength = sampling.guidance, sampling.augment
        if guidance != 1 and not (self.network.num_classes and self.config["data"].get("label_dropout")):
            what = "config.data.label_dropout in training"
            raise UserError(f"guidance={guidance:g} needs {what}, which {self.name} lacked")
        if strength and not self.network.augment:
            raise UserError(
                f"augment={strength:g} needs config.model.augment in training, which {self.name} lacked"
            )

    def _labels(self, labels: np.ndarray | None, count: int) -> np.ndarray | None:
        """[count] int32 for the network, 'no label' where none are given; UserError if it cannot do without."""
        classes = self.network.num_classes
        if not classes:
            if labels is not None:
                raise UserError(f"model {self.name} was trained without labels: give none")
            return None
        if labels is None:
            if not self.config["data"].get("label_dropout"):
                raise UserError(
                    f"model {self.name} needs the class of each image, 0 to {classes - 1}: give labels, or use a "
                    "model trained with config.data.label_dropout above 0 or config.model.num_classes=0"
                )
            return np.full(count, classes, np.int32)
        labels = np.asarray(labels)
        if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels must be {count} whole numbers, got {labels.dtype} {labels.shape}")
        if count and (labels.min() < 0 or labels.max() >= classes):
            wrong = int(labels[(labels < 0) | (labels >= classes)][0])
            raise UserError(f"label {wrong} is none of model {self.name}: its classes are 0 to {classes - 1}")
        return labels.astype(np.int32)

    def _generate(
        self,
        shape: tuple[int, int, int, int],
        images: np.ndarray | None,
        labels: np.ndarray | None,
        key: Key,
        sampling: Sampling,
    ) -> np.ndarray:
        guidance, strength = sampling.guidance, sampling.augment
        mesh = sharding.mesh_for_batch(shape[0])
        rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        output, finite = generate_jit(
            self._on(mesh),
            {
                name: jax.device_put(value, rows)
                for name, value in (("image", images), ("label", labels))
                if value is not None
            },
            jax.device_put(key, rows if key.ndim else everywhere),
            jax.device_put(sampling.coefficients(self.schedule), everywhere),
            None if guidance == 1 else jax.device_put(np.float32(guidance), everywhere),
            None if not strength else jax.device_put(np.float32(strength), everywhere),
            shape=shape,
            mesh=mesh,
            network=self.network,
            solver=sampling.program,
            prediction=self.prediction,
            space=self.space,
            scale=self.scale,
            augmentation=build_augmentation(self.config["data"]) if strength else None,
        )
        if not finite:
            raise FloatingPointError(
                f"model {self.name} gave values that are not finite; try other steps or another solver, and float32"
            )
        return np.asarray(output)


def from_config(config: Mapping[str, Any], params: Params, *, name: str) -> Model:
    """A model from weights and the config that a run or an export carries."""
    try:
        diffusion = config["diffusion"]
        network = build_network(config["model"])
        check_params(network, params, name)
        return Model(
            name=name,
            network=network,
            params=jax.tree.map(jnp.asarray, params),  # to the device once, not at each use
            schedule=build_schedule(diffusion),
            space=build_space(diffusion),
            prediction=diffusion["prediction"],
            scale=config["data"]["scale"],
            sampling=Sampling(config["sampling"]["solver"], config["sampling"]["steps"]),
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
