"""A trained model: network, weights, noise schedule and sampling settings as one value, ready to upscale.

Shape legend: B batch, h x w the low-res image, s the scale, C = 3 channels.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image as PillowImage

from sr3_jax.config.build import Stage
from sr3_jax.diffusion.process import Prediction
from sr3_jax.diffusion.schedule import NoiseSchedule
from sr3_jax.diffusion.space import Space
from sr3_jax.distributed import sharding
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import (
    DecodedImage,
    ImageError,
    from_pillow,
    read_image,
    to_pillow,
    visible_rgb,
    with_pixels,
)
from sr3_jax.inference import upscaling
from sr3_jax.inference.batching import BatchRunner, upscale_each
from sr3_jax.inference.program import OnStep, generate_jit, program_arguments, run_program
from sr3_jax.inference.tiling import DEFAULT_TILE, Tiling, tile_image
from sr3_jax.inference.upscaling import seed_keys
from sr3_jax.nn.unet import Network, apply_unet
from sr3_jax.numerics import fixed_numerics
from sr3_jax.sampling import Sampling
from sr3_jax.storage import as_path
from sr3_jax.types import Denoiser, Key, Params


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A network with its weights and everything that sampling needs. Make one with `sr3_jax.load`.

    Attributes:
        name: where it was loaded from.
        network: the U-Net.
        params: float32 weights (the exponential moving average of training).
        schedule: the training noise schedule.
        space: the diffused variable.
        prediction: what the network predicts: 'eps', 'v' or 'y0'.
        scale: s, the super-resolution factor; 1 for an unconditional model.
        sampling: the settings used where none are given: those stored next to the model, else its config's.
        config: the config it was trained with, as plain values.
        label: the class of every image for which no label is given; None for none.
        on_step: see `watched`; None in a model that was loaded.
    """

    name: str
    network: Network
    params: Params
    schedule: NoiseSchedule
    space: Space
    prediction: Prediction
    scale: int
    sampling: Sampling
    config: Mapping[str, Any]
    label: int | None = None
    on_step: OnStep | None = None
    _copies: dict[Mesh, Params] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        task = f"{self.scale}x" if self.network.low_res else "unconditional"
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params)) / 1e6
        how = self.sampling.words
        return f"Model({self.name!r}, {task}, {count:.1f} M parameters, {how})"

    @property
    def stage(self) -> Stage:
        """Its place in a cascade: name, image size and scale."""
        section = self.config["stage"]
        return Stage(section["name"], section["size"], self.scale if self.network.low_res else None)

    def denoiser(self) -> Denoiser:
        """The network with its weights bound, as `sr3_jax.diffusion.sample` takes it."""
        return functools.partial(apply_unet, self.network, self.params)

    @overload
    def upscale(
        self,
        image: np.ndarray | jax.Array,
        seed: int | Key = 0,
        *,
        steps: int | None = None,
        solver: str | None = None,
        sampling: Sampling | None = None,
        labels: np.ndarray | None = None,
        tile: int | None = None,
        outscale: float | None = None,
    ) -> np.ndarray: ...

    @overload
    def upscale(
        self,
        image: PillowImage.Image | str | os.PathLike[str],
        seed: int | Key = 0,
        *,
        steps: int | None = None,
        solver: str | None = None,
        sampling: Sampling | None = None,
        labels: np.ndarray | None = None,
        tile: int | None = None,
        outscale: float | None = None,
    ) -> PillowImage.Image: ...

    def upscale(
        self,
        image: PillowImage.Image | str | os.PathLike[str] | np.ndarray | jax.Array,
        seed: int | Key = 0,
        *,
        steps: int | None = None,
        solver: str | None = None,
        sampling: Sampling | None = None,
        labels: np.ndarray | None = None,
        tile: int | None = None,
        outscale: float | None = None,
    ) -> np.ndarray | PillowImage.Image:
        """Upscale an image or a batch of images by the model's scale, or by `outscale`.

        Any size works: an image above the training size is padded by its edge pixels to one of a few sizes, so that
        images of many sizes compile a few times only, and is processed in overlapping tiles where it is large. A batch
        is divided among the devices of this process.

        Args:
            image: a PIL image or the path of an image file (alpha, grayscale and metadata are kept: EXIF,
                XMP, ICC profile, resolution and comment, in the `info` of the result), or
                uint8 RGB [h,w,3] or [B,h,w,3].
            seed: the same seed gives the same output. An int, and then each image of a batch gets the noise that it
                would get if upscaled by itself; or a `jax.random` key for the batch, or [B] keys.
            steps: number of sampling steps; None for the model's own.
            solver: 'ancestral', 'ddpm', 'ddim', 'dpmpp_2m', 'heun' or 'MODULE:FUNCTION'; None for the model's own. With
                other steps or another solver than the model's own, the solver's default grid is used
                (`Sampling.override`).
            sampling: all settings of the sampler; None for the model's own.
            labels: [B] class labels, for a class-conditional model.
            tile: maximum side of a tile in pixels of the low-res image, for less memory; None for the default. It does
                not change the output beyond rounding.
            outscale: enlarge by this factor, 1 to 64, instead of s: the model is applied as often as needed, with noise
                of its own each time, and a Lanczos filter shrinks the result to round(outscale * side).

        Returns:
            A PIL image for a PIL image or a path; else uint8 [s*h,s*w,3] or [B,s*h,s*w,3].

        Raises:
            UserError: the image cannot be read; `steps`, `solver`, `labels`, `sampling` or `outscale` do not fit this
                model.
            ValueError: an array that is not uint8 RGB.
            OutOfMemory: a batch of images or tiles needs more memory than is free; it is a UserError and a MemoryError.
            FloatingPointError: the network's output is not finite.
        """
        options: dict[str, Any] = {
            "sampling": (self.sampling if sampling is None else sampling).override(
                steps=steps, solver=solver
            ),
            "labels": labels,
            "tile": tile,
            "outscale": outscale,
        }
        if isinstance(image, PillowImage.Image | str | os.PathLike):
            decoded = (
                from_pillow(image) if isinstance(image, PillowImage.Image) else read_image(as_path(image))
            )
            output = upscaling.upscale_batch(self, visible_rgb(decoded)[None], seed, **options)[0]
            return to_pillow(with_pixels(decoded, output))
        images = np.asarray(image)
        batched = images.ndim == 4
        if images.ndim not in (3, 4) or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"image must be uint8 [h,w,3] or [B,h,w,3], got {images.dtype} {images.shape}")
        output = upscaling.upscale_batch(self, images if batched else images[None], seed, **options)
        return output if batched else output[0]

    def upscale_many(
        self,
        images: Iterable[PillowImage.Image | str | os.PathLike[str] | np.ndarray],
        seed: int = 0,
        *,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
        outscale: float | None = None,
    ) -> Iterator[PillowImage.Image | np.ndarray]:
        """Upscale a stream of images, for programs that keep a device busy.

        Images are read ahead in threads while the device computes, and those of similar size share batches. At most a
        few batches are in memory.

        Args:
            images: PIL images, paths, or uint8 [h,w,3], of any sizes.
            seed: each image gets the noise that `upscale` would give it.
            sampling: settings of the sampler; None for the model's own.
            batch_size: images or tiles per batch; None for the number of devices.
            tile, outscale: as for `upscale`.

        Yields:
            The outputs in order: PIL images for PIL images and paths, uint8 [s*h,s*w,3] for arrays.

        Raises:
            UserError: an image cannot be read, when its turn comes; `sampling` or `outscale` do not fit this model.
        """

        def read(image: Any) -> DecodedImage:
            if isinstance(image, PillowImage.Image):
                return from_pillow(image)
            if isinstance(image, str | os.PathLike):
                return read_image(as_path(image))
            pixels = np.asarray(image)
            if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
                raise ImageError(f"image must be uint8 [h,w,3], got {pixels.dtype} {pixels.shape}")
            return DecodedImage(rgb=pixels)

        size = batch_size or jax.local_device_count()
        runner = BatchRunner(
            self, sampling=sampling, seed=seed, batch_size=size, tile=tile, outscale=outscale
        )
        results = upscale_each(runner, images, read, batch_size=size)
        for image, decoded, output in results:
            is_file = isinstance(image, PillowImage.Image | str | os.PathLike)
            yield to_pillow(with_pixels(decoded, output)) if is_file else output

    def tiling(self, height: int, width: int, *, tile: int | None = None) -> Tiling:
        """How an image of this size is divided into tiles.

        Args:
            height, width: in pixels of the low-res image.
            tile: maximum side of a tile in pixels of the low-res image; None for the default.

        Raises:
            UserError: the model takes no low-res image; `tile` is too small.
        """
        if not self.network.low_res:
            raise UserError(
                f"model {self.name} is unconditional (config.model.low_res is false): use sr3 generate"
            )
        data = self.config["data"]
        return tile_image(
            height,
            width,
            most=DEFAULT_TILE // self.scale if tile is None else tile,
            stride=self.network.stride,
            scale=self.scale,
            exact=int(1.5 * data["crop"] / data["shrink"] / self.scale),  # as large as in training
        )

    def upscale_bands(
        self,
        image: np.ndarray,
        seed: int | Key = 0,
        *,
        sampling: Sampling | None = None,
        label: int | np.ndarray | None = None,
        tile: int | None = None,
        batch_size: int | None = None,
        on_tiles: Callable[[int], object] = lambda count: None,
    ) -> Iterator[np.ndarray]:
        """Upscale a large image from top to bottom; memory depends on the size of a tile, not on that of the image.

        Args:
            image: uint8 [h,w,3].
            seed: an int or one key.
            sampling: settings of the sampler; None for the model's own.
            label: the class of the image, for a class-conditional model.
            tile: maximum side of a tile in pixels of the low-res image; None for the default.
            batch_size: tiles per batch; None for the number of devices.
            on_tiles: called with the number of tiles that were finished since the last call.

        Yields:
            uint8 [*,s*w,3], the next rows of the output.
        """
        return upscaling.upscale_bands(
            self,
            image,
            seed_keys(seed, 1).reshape(()),
            sampling=self.sampling if sampling is None else sampling,
            label=label,
            tile=tile,
            batch_size=batch_size,
            on_tiles=on_tiles,
        )

    def with_dtype(self, dtype: str) -> Model:
        """The model with activations of this type: 'float32', or 'bfloat16' for less memory and time on accelerators.

        Raises:
            UserError: another type.
        """
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype must be float32 or bfloat16, got {dtype!r}")
        return replace(self, network=self.network.clone(dtype=dtype))

    def watched(self, on_step: OnStep | None) -> Model:
        """The model with a function that is called after each step of the sampler, for progress and previews.

        The loop over the steps then runs on the host, one call of the device per step. The outputs stay the same.

        Args:
            on_step: gets the number of steps done, the number of all steps of this batch, and y_t as images, uint8
                [B,s*h,s*w,3], padding included. An exception that it raises ends the sampling. None for no calls.
        """
        return replace(self, on_step=on_step)

    @fixed_numerics()
    def compile(
        self, shape: tuple[int, ...], *, labels: np.ndarray | None = None, sampling: Sampling | None = None
    ) -> None:
        """Compile the sampling program ahead of time, without running it.

        `upscale` of images of this shape then only runs the program, if it is called with [B] keys (or an int seed),
        the same sampling, and labels if they are given here.

        Args:
            shape: [B,h,w,3] of the low-res images.
            labels: [B] class labels of any value; None for none.
            sampling: settings of the sampler; None for the model's own.
        """
        chosen = self.sampling if sampling is None else sampling
        plan = self.tiling(*shape[1:3])
        count = shape[0] if plan.count == 1 else jax.local_device_count()
        arguments, settings = program_arguments(
            self,
            upscaling.output_shape(self, plan, count),
            images=np.zeros((count, plan.rows.size, plan.columns.size, 3), np.uint8),
            labels=self.label_array(None if labels is None else np.resize(labels, count), count),
            key=seed_keys(0, count),
            sampling=chosen,
            origins=np.zeros((count, 2), np.int32),
        )
        generate_jit.lower(*arguments, **settings).compile()  # jit finds the result in its cache

    @fixed_numerics()
    def generate(
        self,
        count: int,
        seed: int | Key = 0,
        *,
        labels: np.ndarray | None = None,
        size: int | None = None,
        sampling: Sampling | None = None,
    ) -> np.ndarray:
        """Generate images from noise with an unconditional or class-conditional base model.

        Args:
            count: number of images.
            seed: an int or a `jax.random` key, for the batch; or [count] keys, which make each image independent of
                its batch.
            labels: [count] class labels; None for none.
            size: height and width in pixels; None for the training size.
            sampling: settings of the sampler; None for the model's own.

        Returns:
            uint8 [count,size,size,3].

        Raises:
            UserError: the model needs a low-res image; `labels`, `size` or `sampling` do not fit it.
            FloatingPointError: the network's output is not finite.
        """
        if self.network.low_res:
            raise UserError(f"model {self.name} upscales low-res images: use sr3 upscale")
        data = self.config["data"]
        side = (self.stage.size or data["crop"] // data["shrink"]) if size is None else size
        if side < 1 or side % self.network.stride:
            raise UserError(
                f"size must be a multiple of {self.network.stride} for model {self.name}, got {side}"
            )
        shape = (count, side, side, self.network.out_channels)
        chosen = self.sampling if sampling is None else sampling
        self.check(chosen, labels=labels, count=count)
        key = jax.random.key(seed) if isinstance(seed, int) else seed
        return run_program(
            self,
            shape,
            images=None,
            labels=self.label_array(labels, count),
            key=key,
            sampling=chosen,
            origins=None,
        )

    def check(self, sampling: Sampling, *, labels: np.ndarray | None, count: int) -> None:
        """Check that the model can be sampled with these settings and labels of `count` images.

        Raises:
            UserError: it cannot.
        """
        self.label_array(labels, count)
        sampling.grid(self.schedule)
        guidance, strength = sampling.guidance, sampling.augment
        if sampling.make_solver().compiled.learned and not self.network.learned_variance:
            raise UserError(
                f"solver {sampling.solver} needs a model that predicts its variance, which {self.name} does not: use "
                "solver ancestral"
            )
        if guidance != 1 and not (self.network.num_classes and self.config["data"]["label_dropout"]):
            raise UserError(
                f"guidance={guidance:g} needs a model trained with config.data.label_dropout above 0, which "
                f"{self.name} was not: use guidance=1"
            )
        if sampling.back_projection and not self.network.low_res:
            raise UserError(
                f"back_projection={sampling.back_projection} needs a low-res image, which {self.name} does not take: "
                "use back_projection=0"
            )
        if strength and not self.network.augment:
            raise UserError(
                f"augment={strength:g} needs a model trained with config.model.augment, which {self.name} was not: "
                "use augment=0, or a model such as photo_4x_robust"
            )

    def label_array(self, labels: np.ndarray | None, count: int) -> np.ndarray | None:
        """Labels as the network takes them: int32 [count], the label 'none' where none are given; None without classes.

        Raises:
            UserError: labels that the network needs are missing, out of range or not wanted.
        """
        classes = self.network.num_classes
        if not classes:
            if labels is not None or self.label is not None:
                raise UserError(f"model {self.name} was trained without labels: omit labels")
            return None
        if labels is None and self.label is not None:
            labels = np.full(count, self.label)
        if labels is None:
            if not self.config["data"]["label_dropout"]:
                raise UserError(
                    f"model {self.name} is class-conditional and was trained without label dropout: give the label of "
                    f"each image, 0 to {classes - 1} (--label or --labels)"
                )
            return np.full(count, classes, np.int32)
        labels = np.asarray(labels)
        if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels must be {count} integers, got {labels.dtype} {labels.shape}")
        if count and (labels.min() < 0 or labels.max() >= classes):
            wrong = int(labels[(labels < 0) | (labels >= classes)][0])
            raise UserError(f"labels of model {self.name} must be from 0 to {classes - 1}, got {wrong}")
        return labels.astype(np.int32)

    def params_on(self, mesh: Mesh) -> Params:
        """The weights on every device of a mesh, copied there once."""
        if mesh.size == 1:
            return self.params
        if mesh not in self._copies:
            self._copies[mesh] = jax.device_put(self.params, sharding.replicated(mesh))
        return self._copies[mesh]
