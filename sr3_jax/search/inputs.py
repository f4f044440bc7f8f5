"""What a schedule search looks at: crops of two sets of images, and what is measured of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sr3_jax.data.crops import Crops, crops_of, halves
from sr3_jax.data.sources import Source, open_source, squares
from sr3_jax.errors import UserError
from sr3_jax.evaluation import measures
from sr3_jax.evaluation.measures import Measure
from sr3_jax.features.lpips import LEAST_SIDE, load_lpips
from sr3_jax.features.substitute import AlexNetFeatures
from sr3_jax.image_ops import degrade, to_uint8, to_unit
from sr3_jax.inference.model import Model
from sr3_jax.metrics import WINDOW
from sr3_jax.search.scores import LEAST_FRECHET

BATCH = 8
CROPS = {"frechet": 128}  # by metric; 32 for the others


def open_crops(
    model: Model,
    data: str,
    eval_data: str | None,
    *,
    metric: str,
    crop: int,
    count: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[tuple[Crops, Crops], int]:
    """The crops to search on and those to see on what it is worth, and the batch that divides both.

    Args:
        data, eval_data: names of sources; without the second the images of the first are shared, by turns.
        count: crops of each; None for as many as the metric needs.
        limit: only the first so many images of `data`.

    Raises:
        UserError: there are too few, or the crop does not fit.
    """
    if crop % model.scale or crop < WINDOW + 2 * model.scale:
        least = -(-(WINDOW + 2 * model.scale) // model.scale) * model.scale
        raise UserError(f"--crop={crop} must be a multiple of the scale, {model.scale}, and at least {least}")
    section = model.config["data"]
    square, shrink = section["framing"] == "square", section["shrink"]

    def opened(name: str) -> Source:
        side = crop * shrink
        return squares(open_source(name, cache_mb=0), side) if square else open_source(name, min_side=side)

    first = opened(data)
    images = range(min(len(first), limit or len(first)))
    if eval_data:
        second = opened(eval_data)
        numbers = list(images), list(range(len(second)))
    else:
        second, numbers = first, halves(len(images))
        if not numbers[1]:
            raise UserError(
                f"{data} has one image to use, and none to see on what the search is worth: give --eval-data"
            )
    count = count or CROPS.get(metric, 32)
    found = [
        shrunk(crops_of(source, of, crop=crop * shrink, count=count, seed=seed), shrink)
        for source, of in zip((first, second), numbers, strict=True)
    ]
    fewest = min(len(one.images) for one in found)
    if metric == "frechet" and fewest < LEAST_FRECHET:
        raise UserError(
            f"--metric=frechet needs {LEAST_FRECHET} crops to search on and as many to see on, got {fewest}: give a "
            "smaller --crop, more --crops or more images"
        )
    batch = min(BATCH, fewest)
    return (found[0].whole_batches(batch), found[1].whole_batches(batch)), batch


def shrunk(crops: Crops, factor: int) -> Crops:
    """The crops as a stage of a cascade was trained to make them (`config.data.shrink`)."""
    if factor == 1:
        return crops
    return replace(crops, images=np.asarray(to_uint8(degrade(to_unit(crops.images), factor))))


def open_measures(metric: str, crop: int) -> tuple[list[Measure], AlexNetFeatures | None]:
    """What is measured of every output, and AlexNet's features where the metric needs them.

    Raises:
        UserError: the metric needs what is not installed, or larger crops.
    """
    if metric == "lpips" and crop < LEAST_SIDE:
        raise UserError(
            f"--metric=lpips needs a --crop of {LEAST_SIDE} pixels at least, got {crop}: name another"
        )
    try:
        lpips = load_lpips()
    except UserError as error:
        if metric not in ("lpips", "frechet"):
            return [measures.plain()], None
        raise UserError(f"{error}, or name another --metric than {metric}") from error
    found = [measures.plain(), *([measures.perceptual(lpips)] if crop >= LEAST_SIDE else [])]
    return found, AlexNetFeatures(lpips) if metric == "frechet" else None
