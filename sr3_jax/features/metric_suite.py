"""The metrics of an evaluation: which ones are computed, by what functions and networks.

An evaluation computes `ImageMetrics` of each output, `SampleMetrics` of all samples of one input, and metrics of the
whole set from the features of one network. Shape legend: B batch, H x W the ground truth, h x w its low-res image,
s the scale, S samples of one input, K classes. Images are uint8 NumPy arrays.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sr3_jax import metrics
from sr3_jax.degradations import PRESETS
from sr3_jax.errors import UserError
from sr3_jax.features.classifiers import Classifier, correct, load_classifier
from sr3_jax.features.lpips import BAND, LARGE, LEAST_SIDE, Lpips, load_lpips
from sr3_jax.features.networks import Network, open_network
from sr3_jax.features.statistics import Statistics, load_statistics
from sr3_jax.files import sha256_hex
from sr3_jax.image_ops import pad_batch, to_uint8, to_unit, upsample

REVISION = 2  # of the functions in sr3_jax.metrics; cached values of another revision are computed again
MIN_CLASSES_TOP5 = 10  # with fewer classes top-5 accuracy says little

Columns = Mapping[str, np.ndarray]


class Batch(NamedTuple):
    """Outputs [B,H,W,3], their ground truth [B,H,W,3] and low-res images [B,h,w,3], and labels int [B] (or zeros)."""

    outputs: np.ndarray
    ground_truth: np.ndarray
    low_res: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class ImageMetrics:
    """Metrics that are computed together, for each output on its own.

    Attributes:
        key: identifies the computation; cached values of another key are not reused.
        compute: batch -> {metric: float [B]}.
        min_side: pixels; smaller images are skipped.
        uses_labels: `compute` uses the labels.
        of_ground_truth: the metrics are also defined for the ground truth itself, as an upper bound.
    """

    key: str
    compute: Callable[[Batch], Columns]
    min_side: int = 0
    uses_labels: bool = False
    of_ground_truth: bool = False

    def key_for(self, label: int) -> str:
        """The cache key of its values for an image with this label."""
        return f"{self.key} label {label}" if self.uses_labels else self.key

    def supports(self, image: np.ndarray) -> bool:
        """Whether an image [H,W,3] is large enough."""
        return min(image.shape[:2]) >= self.min_side


@dataclass(frozen=True, eq=False)
class SampleMetrics:
    """Metrics of all samples of one input; `compute` takes them as [S,H,W,3] with S >= 2."""

    key: str
    compute: Callable[[np.ndarray], Mapping[str, float]]
    min_side: int = 0


@dataclass(frozen=True, eq=False)
class MetricSuite:
    """The metrics of an evaluation.

    Attributes:
        image, samples: computed for each output, and for the samples of each input.
        network: its features give the metrics of the set; None for none.
        lpips, classifier: the networks of `image`; None if they are not used.
        reference: statistics to compare the set with; None for those of the ground truth.
        reference_features: features [N,F] of the reference, with the logits of the network; None where only statistics
            are known, which do not suffice for KID.
        reference_name: the file or the data source of the reference.
        omitted: sentences that say which metrics are missing and why.
    """

    image: tuple[ImageMetrics, ...] = ()
    samples: tuple[SampleMetrics, ...] = ()
    network: Network | None = None
    lpips: Lpips | None = None
    classifier: Classifier | None = None
    reference: Statistics | None = None
    reference_features: np.ndarray | None = None
    reference_name: str = ""
    omitted: tuple[str, ...] = ()

    @property
    def of_ground_truth(self) -> bool:
        """Whether some metric is defined for the ground truth itself."""
        return self.network is not None or any(group.of_ground_truth for group in self.image)

    def feature_keys(self, pixels: str, image: np.ndarray) -> list[str]:
        """The keys of the features of an image with this hash: the hash itself, or one key per patch."""
        patches = len(self.network.patches(image)) if self.network else 1
        return feature_keys(pixels, patches)


def open_suite(
    *,
    features: str | None = None,
    classifier: str | None = None,
    labeled: bool = False,
    patch: int = 0,
    reference: Path | None = None,
    batch_size: int = 1,
) -> MetricSuite:
    """The metrics that are available.

    Args:
        features: the network of the metrics of the set, as `open_network` takes it.
        classifier: as `load_classifier` takes it; None for no accuracy.
        labeled: whether the images have labels.
        patch: side in pixels of the squares whose features are compared in larger images; 0: whole images.
        reference: a file of statistics to compare with, instead of those of the ground truth.

    Raises:
        UserError: a requested network is not available, or the reference was made with another network.
    """
    omitted = []
    lpips = None
    try:
        lpips = load_lpips()
    except UserError as error:
        omitted.append(f"LPIPS is omitted: {error}.")
    opened = load_classifier(classifier) if classifier else None
    network = open_network(features, lpips=lpips, classifier=opened)
    if patch and network is not None:
        network = network.in_patches(patch)
    if opened is not None and not labeled:
        omitted.append(f"Accuracy is omitted: the images have no labels for {opened.name}.")
    image = [standard_metrics()]
    image += [lpips_metric(lpips)] if lpips else []
    image += [accuracy(opened)] if opened is not None and labeled else []
    samples = [pixel_diversity()]
    samples += [lpips_diversity(lpips, batch_size=batch_size)] if lpips else []
    return MetricSuite(
        tuple(image),
        tuple(samples),
        network,
        lpips,
        opened,
        reference=_open_reference(reference, network) if reference else None,
        reference_name=str(reference or ""),
        omitted=tuple(omitted),
    )


def standard_metrics() -> ImageMetrics:
    """The metrics that need no network: PSNR, SSIM, both in luma too, consistency and mean color error."""

    def compute(batch: Batch) -> Columns:
        scale = batch.outputs.shape[1] // batch.low_res.shape[1]
        if batch.outputs.shape[1] * batch.outputs.shape[2] > LARGE:
            return _standard_by_bands(batch, scale)
        return jax.device_get(_standard_metrics(*batch[:3], scale=scale))

    return ImageMetrics(f"standard {REVISION}", compute)


def lpips_metric(lpips: Lpips) -> ImageMetrics:
    """LPIPS to the ground truth."""

    def compute(batch: Batch) -> Columns:
        return {"lpips": np.asarray(lpips.distance(batch.outputs, batch.ground_truth))}

    return ImageMetrics(f"lpips {lpips.sha256}", compute, min_side=LEAST_SIDE)


def accuracy(classifier: Classifier) -> ImageMetrics:
    """100 if the label is the classifier's most likely class, or among the five most likely ones, else 0."""

    def compute(batch: Batch) -> Columns:
        logits = classifier.logits(batch.outputs)
        tops = {"top1": 1, "top5": 5} if logits.shape[1] >= MIN_CLASSES_TOP5 else {"top1": 1}
        return {name: 100.0 * correct(logits, batch.labels, top=top) for name, top in tops.items()}

    least = getattr(classifier, "least_side", 0)
    key = f"accuracy {classifier.sha256}"
    return ImageMetrics(key, compute, min_side=least, uses_labels=True, of_ground_truth=True)


def pixel_diversity() -> SampleMetrics:
    """Standard deviation over samples (n - 1) in levels of 255, averaged over pixels and channels."""

    def compute(samples: np.ndarray) -> Mapping[str, float]:
        return {"diversity": float(np.std(samples.astype(np.float32), axis=0, ddof=1).mean(dtype=np.float64))}

    return SampleMetrics("diversity 1", compute)


def lpips_diversity(lpips: Lpips, *, batch_size: int = 1) -> SampleMetrics:
    """Mean LPIPS over all pairs of samples of one input, `batch_size` pairs at a time."""

    def compute(samples: np.ndarray) -> Mapping[str, float]:
        pairs = list(itertools.combinations(range(len(samples)), 2))
        found: list[float] = []
        for start in range(0, len(pairs), batch_size):
            chunk = pairs[start : start + batch_size]
            a, b = (stack_padded([samples[pair[side]] for pair in chunk], batch_size) for side in (0, 1))
            found += np.asarray(lpips.distance(a, b))[: len(chunk)].tolist()
        return {"diversity_lpips": float(np.mean(found))}

    return SampleMetrics(f"diversity lpips {lpips.sha256}", compute, min_side=LEAST_SIDE)


def feature_keys(pixels: str, patches: int) -> list[str]:
    """The keys of an image's features: the hash of its pixels, or one key for each of several patches."""
    return [pixels] if patches == 1 else [sha256_hex({pixels: patch}) for patch in range(patches)]


# ---- Low-res image and bicubic interpolation


def least_side(scales: Sequence[int]) -> int:
    """The shortest side in pixels for which all metrics are defined at all of these scales."""
    sides = [scale * -(-(metrics.WINDOW + 2 * scale) // scale) for scale in scales]
    return max([math.lcm(*scales), *sides])


def low_res_of(
    ground_truth: np.ndarray, scale: int, *, degradation: str = "clean", seeds: np.ndarray | None = None
) -> np.ndarray:
    """The low-res images uint8 [B,h,w,3] of ground truth uint8 [B,H,W,3].

    Args:
        degradation: 'clean' (bicubic), 'photo' or 'wild', see `degradations.PRESETS`.
        seeds: uint32 [B] of a random degradation.
    """
    if seeds is None:
        seeds = np.zeros(len(ground_truth), np.uint32)
    return np.asarray(_low_res(ground_truth, seeds, scale=scale, degradation=degradation))


def bicubic_of(low_res: np.ndarray, scale: int) -> np.ndarray:
    """Bicubic interpolation of uint8 [B,h,w,3] to uint8 [B,s*h,s*w,3]."""
    return np.asarray(_bicubic(low_res, scale=scale))


def stack_padded(arrays: Sequence[np.ndarray | np.generic], batch_size: int) -> np.ndarray:
    """Arrays of one shape as [batch_size,...], padded with copies of the last: another shape would recompile."""
    return pad_batch(np.stack(arrays), batch_size)


@functools.partial(jax.jit, static_argnames=("scale", "degradation"))
def _low_res(ground_truth: jax.Array, seeds: jax.Array, *, scale: int, degradation: str) -> jax.Array:
    keys = jax.vmap(jax.random.key)(seeds)
    return to_uint8(PRESETS[degradation].apply(keys, to_unit(ground_truth), scale))


@functools.partial(jax.jit, static_argnames="scale")
def _bicubic(low_res: jax.Array, *, scale: int) -> jax.Array:
    return to_uint8(upsample(to_unit(low_res), scale))


@functools.partial(jax.jit, static_argnames="scale")
def _standard_metrics(
    output: jax.Array, ground_truth: jax.Array, low_res: jax.Array, *, scale: int
) -> dict[str, jax.Array]:
    return {
        "psnr": metrics.psnr(output, ground_truth),
        "ssim": metrics.ssim(output, ground_truth),
        "psnr_luma": metrics.psnr_luma(output, ground_truth, crop=scale),
        "ssim_luma": metrics.ssim_luma(output, ground_truth, crop=scale),
        "consistency": metrics.consistency(output, low_res),
        "mean_color_error": metrics.mean_color_error(output, low_res),
    }


def _standard_by_bands(batch: Batch, scale: int) -> Columns:
    """`_standard_metrics` of large images, one band of rows after the other; equal to it but for rounding."""
    outputs, truth, low_res, _ = batch
    height, width = outputs.shape[1:3]
    size = max(1, BAND // width // scale) * scale
    found = _pixel_metrics(outputs, truth, size, luma=False)
    inner = slice(scale, -scale)
    found |= _pixel_metrics(outputs[:, inner, inner], truth[:, inner, inner], size, luma=True)

    def inconsistency(rows: slice) -> jax.Array:
        # The kernel of the downsampling reaches 2 low-res pixels to either side.
        first, last = max(0, rows.start - 2 * scale), min(height, rows.stop + 2 * scale)
        kept = ((rows.start - first) // scale, (rows.stop - first) // scale)
        return metrics.consistency(
            outputs[:, first:last], low_res[:, first // scale : last // scale], rows=kept
        )

    found["consistency"] = _mean_of_bands(height, size, 0, inconsistency)
    shift = outputs.mean(axis=(1, 2), dtype=np.float64) - low_res.mean(axis=(1, 2), dtype=np.float64)
    return found | {"mean_color_error": np.abs(shift).max(axis=1)}


def _pixel_metrics(a: np.ndarray, b: np.ndarray, size: int, *, luma: bool) -> dict[str, np.ndarray]:
    """PSNR and SSIM in RGB or luma, from bands of `size` rows."""
    suffix = "_luma" if luma else ""
    psnr, ssim = (metrics.psnr_luma, metrics.ssim_luma) if luma else (metrics.psnr, metrics.ssim)
    options = {"crop": 0} if luma else {}

    def error(rows: slice) -> np.ndarray:
        return 10.0 ** (-0.1 * np.asarray(psnr(a[:, rows], b[:, rows], **options), np.float64))

    windows = a.shape[1] - metrics.WINDOW + 1
    with np.errstate(divide="ignore"):
        decibels = -10.0 * np.log10(_mean_of_bands(a.shape[1], size, 0, error))
    return {
        f"psnr{suffix}": decibels,
        f"ssim{suffix}": _mean_of_bands(
            windows, size, metrics.WINDOW - 1, lambda rows: ssim(a[:, rows], b[:, rows], **options)
        ),
    }


def _mean_of_bands(
    count: int, size: int, overlap: int, mean_of: Callable[[slice], jax.Array | np.ndarray]
) -> np.ndarray:
    """The mean [B] over `count` rows of a metric whose mean over `size` rows needs `overlap` more."""
    total = np.zeros(())
    for top in range(0, count, size):
        rows = min(size, count - top)
        total = total + np.asarray(mean_of(slice(top, top + rows + overlap)), np.float64) * rows
    return total / count


def _open_reference(path: Path, network: Network | None) -> Statistics:
    if network is None:
        raise UserError(f"reference={path} needs the network it was made with: set features")
    statistics = load_statistics(path)
    if statistics.protocol != network.protocol:
        raise UserError(
            f"reference={path} was made with {statistics.protocol.network}, weights "
            f"{statistics.protocol.weights_sha256[:12]}, not with {network.protocol.network}, "
            f"{network.protocol.weights_sha256[:12]}: use the features it was made with"
        )
    return statistics
