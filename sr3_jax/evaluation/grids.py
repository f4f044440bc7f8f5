"""Image grids of an evaluation: which images are shown, and which part of them.

Shape legend: P images, H height, W width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from sr3_jax.data.sources import Source
from sr3_jax.evaluation.methods import Method, bicubic
from sr3_jax.evaluation.metric_suite import crop_ground_truth, low_res_of
from sr3_jax.evaluation.outputs import output_path
from sr3_jax.evaluation.results import EvaluatedImage, Part
from sr3_jax.image_io.grid import image_grid
from sr3_jax.image_io.image_file import DecodedImage, read_rgb, write_image
from sr3_jax.metrics import METRICS

MAX_WHOLE = 256  # pixels; of larger images a window is shown at full size
WINDOW = 192


def write_grids(
    folder: Path, part: Part, methods: Sequence[Method], source: Source, *, crop: int | None
) -> list[Path]:
    """Write grid.png: the worst, median and best image by PSNR of the first model, for every model.

    Each model is shown with its `representative` method, which also ranks the images of the first model. A model with
    several solvers or numbers of steps also gets grid_LABEL.png with all of them.
    """
    groups = methods_by_model(methods)
    shown = [representative(methods, indices) for indices in groups.values()]
    psnr = np.array([np.mean(image.results[shown[0]].metrics["psnr"]) for image in part.images])
    cases = select_images(psnr)
    files = {"grid.png": shown}
    files |= {f"grid_{name}.png": indices for name, indices in groups.items() if len(indices) > 1}
    written = []
    for file, indices in files.items():
        group = [methods[index] for index in indices]
        scales = list(dict.fromkeys(method.scale for method in group))
        inputs = [
            ("low-res", "bicubic") if len(scales) == 1 else (f"low-res {s}x", f"bicubic {s}x") for s in scales
        ]
        columns = [*itertools.chain(*inputs), *(method.title for method in group), "ground truth"]
        rows = {}
        for case, place in cases.items():
            image = part.images[place]
            title = f"{case}:\n{image.name}\n{METRICS['psnr'].format(float(psnr[place]))} dB"
            rows[title] = _cells(folder / "outputs", image, group, scales, source, crop)
        pixels = image_grid(list(rows.values()), column_titles=columns, row_titles=list(rows))
        write_image(folder / file, DecodedImage(pixels))
        written.append(folder / file)
    return written


def methods_by_model(methods: Sequence[Method]) -> dict[str, list[int]]:
    """The indices of each model's methods."""
    groups: dict[str, list[int]] = {}
    for index, method in enumerate(methods):
        if method.nfe:
            groups.setdefault(method.name, []).append(index)
    return groups


def representative(methods: Sequence[Method], indices: Sequence[int]) -> int:
    """The method that represents a model: its default sampler, else the first one with the most steps."""
    return max(indices, key=lambda index: (methods[index].own, methods[index].steps or 0))


def select_images(psnr: np.ndarray) -> dict[str, int]:
    """{'worst', 'median', 'best'} -> index by psnr [P]; only worst and best of two, 'only' of one."""
    order = np.argsort(psnr, kind="stable")
    cases = {"worst": int(order[0]), "median": int(order[(len(order) - 1) // 2]), "best": int(order[-1])}
    if len(order) == 1:
        return {"only": cases["worst"]}
    return cases if len(order) > 2 else {name: cases[name] for name in ("worst", "best")}


def detail_window(ground_truth: np.ndarray, bicubic: np.ndarray, *, multiple: int) -> tuple[slice, slice]:
    """The rows and columns to show of an image uint8 [H,W,3]: all of a small one, else WINDOW x WINDOW.

    The window is where the squared error of bicubic interpolation is largest, i.e. where methods can differ: the
    finest structure of the image rather than its strongest edge. It starts and ends at multiples of `multiple`, so
    that it corresponds to a window of the low-res image.
    """
    height, width = ground_truth.shape[:2]
    if max(height, width) <= MAX_WHOLE:
        return slice(0, height), slice(0, width)
    rows, columns = (min(WINDOW, side) // multiple for side in (height, width))  # of the window, in blocks
    rows, columns = max(1, rows), max(1, columns)
    error = np.square(ground_truth.astype(np.float64) - bicubic).sum(axis=2)
    error = error[: height // multiple * multiple, : width // multiple * multiple]
    blocks = error.reshape(height // multiple, multiple, width // multiple, multiple).sum(axis=(1, 3))
    sums = sliding_window_view(blocks, rows, axis=0).sum(axis=-1)
    sums = sliding_window_view(sums, columns, axis=1).sum(axis=-1)
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return (
        slice(int(top) * multiple, int(top + rows) * multiple),
        slice(int(left) * multiple, int(left + columns) * multiple),
    )


def grid_row(
    ground_truth: np.ndarray,
    low_res: Mapping[int, np.ndarray],
    bicubic: Mapping[int, np.ndarray],
    outputs: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """The cells of one image, all showing the same window.

    They are the low-res image and bicubic interpolation at each scale, the outputs and the ground truth. All images
    are uint8 [H,W,3]; their sizes may differ but share the top left corner. `low_res` and `bicubic` are by scale.
    """
    multiple = math.lcm(*low_res)
    images = [ground_truth, *bicubic.values(), *outputs]
    height, width = (min(image.shape[axis] for image in images) for axis in (0, 1))
    height, width = height // multiple * multiple, width // multiple * multiple
    first = next(iter(bicubic.values()))
    rows, columns = detail_window(ground_truth[:height, :width], first[:height, :width], multiple=multiple)
    cells = []
    for scale, small in low_res.items():
        window = [slice(side.start // scale, side.stop // scale) for side in (rows, columns)]
        cells += [small[window[0], window[1]], bicubic[scale][rows, columns]]
    return [*cells, *(output[rows, columns] for output in outputs), ground_truth[rows, columns]]


def _cells(
    outputs: Path,
    image: EvaluatedImage,
    methods: Sequence[Method],
    scales: Sequence[int],
    source: Source,
    crop: int | None,
) -> list[np.ndarray]:
    whole = source[image.index]["image"]
    ground_truth = {scale: crop_ground_truth(whole, scale, crop) for scale in scales}
    low_res = {scale: low_res_of(truth[None], scale)[0] for scale, truth in ground_truth.items()}

    def output(method: Method) -> np.ndarray:
        return read_rgb(output_path(outputs / method.folder, image.name, 0))

    return grid_row(
        ground_truth[scales[0]],
        low_res,
        {scale: output(bicubic(scale)) for scale in scales},
        [output(method) for method in methods],
    )
