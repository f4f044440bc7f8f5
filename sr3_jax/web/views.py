"""What the page shows of outputs: views next to the input, the spread of samples, the consistency; and their HTML.

Arrays are opened as memory maps and read in strips or crops, so memory does not depend on the size of an output. Shape
legend: h x w the input, H x W the output.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from sr3_jax.image_io.errors import printable
from sr3_jax.metrics import METRICS
from sr3_jax.web.jobs import Output, Progress

FIT, CROP = 1280, (1024, 768)  # pixels: longer side of a whole image, width and height of a crop
_BICUBIC = PillowImage.Resampling.BICUBIC


def compare(output: Output, *, zoom: int, x: float, y: float) -> str:
    """HTML of the input, enlarged by bicubic, next to the output behind a movable divider.

    Args:
        zoom: 0 for the whole image; otherwise pixels of the screen per pixel of the output.
        x, y: center of the crop, 0 to 1; not used for the whole image.
    """
    before, after = pair(output, zoom=zoom, x=x, y=y)
    height, width = after.shape[:2]
    name = html.escape(printable(output.source.name))
    encode = _jpeg if zoom == 0 else _png
    size = f"width:{width * zoom}px" if zoom else f"aspect-ratio:{width}/{height};max-width:{width}px"
    label = "Divider between the enlarged input on the left and the output on the right, percent"
    return (
        f'<div class="sr3-compare sr3-zoom{zoom}" style="--at:50%">'
        f'<div class="sr3-pane" tabindex="{0 if zoom else -1}" role="group" aria-label="Comparison">'
        f'<div class="sr3-stack" style="{size}">'
        f'<img src="{encode(after)}" alt="Output: {name}, upscaled" draggable="false">'
        f'<img class="sr3-before" src="{encode(before)}" alt="Input: {name}, enlarged by bicubic" draggable="false">'
        '<span class="sr3-line" aria-hidden="true"></span></div></div>'
        f'<input type="range" class="sr3-divider" min="0" max="100" step="0.5" value="50" aria-label="{label}" '
        "oninput=\"this.parentNode.style.setProperty('--at',this.value+'%')\">"
        '<div class="sr3-ends" aria-hidden="true"><span>input, bicubic</span><span>output</span></div></div>'
    )


def pair(output: Output, *, zoom: int, x: float = 0.5, y: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """(input enlarged by bicubic, output), uint8 of one size: whole but reduced, or a crop of the output's pixels."""
    low_res, pixels = _open(output.low_res), _open(output.pixels)
    height, width = pixels.shape[:2]
    small = PillowImage.fromarray(np.asarray(low_res))
    if zoom == 0:
        after = reduced(pixels, FIT)
        return np.asarray(small.resize(after.shape[1::-1], _BICUBIC)), after
    spans = []
    for center, side, most in ((x, width, CROP[0]), (y, height, CROP[1])):
        length = min(side, most)
        first = round(min(max(center * side - length / 2, 0), side - length))
        spans.append((first, first + length))
    (left, right), (top, bottom) = spans
    ratio = low_res.shape[1] / width, low_res.shape[0] / height
    box = (left * ratio[0], top * ratio[1], right * ratio[0], bottom * ratio[1])
    before = small.resize((right - left, bottom - top), _BICUBIC, box=box)
    return np.asarray(before), np.asarray(pixels[top:bottom, left:right])


def reduced(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H,W,3] shrunk by means over the smallest squares that bring its longer side to at most `side`."""
    every = -(-max(image.shape[:2]) // side)
    if every == 1:
        return np.asarray(image)
    rows = [
        np.asarray(PillowImage.fromarray(np.asarray(image[top : top + 16 * every])).reduce(every))
        for top in range(0, len(image), 16 * every)
    ]
    return np.concatenate(rows)


def spread(outputs: Sequence[Output]) -> tuple[np.ndarray, float]:
    """The standard deviation (n - 1) over samples of one input, in levels of 255.

    Returns:
        float32 [H',W'], averaged over channels and reduced as `reduced` does; and its mean over all pixels, which is
        the metric 'diversity' of an evaluation.
    """
    arrays = [_open(output.pixels) for output in outputs]
    height, width = arrays[0].shape[:2]
    every = -(-max(height, width) // FIT)
    strips, total = [], 0.0
    for top in range(0, height, 16 * every):
        stack = np.stack([array[top : top + 16 * every] for array in arrays]).astype(np.float32)
        deviation = stack.std(axis=0, ddof=1).mean(axis=-1)
        total += float(deviation.sum(dtype=np.float64))
        strips.append(np.asarray(PillowImage.fromarray(deviation).reduce(every)))
    return np.concatenate(strips), total / (height * width)


_COLORS = np.array(  # from dark to light, so that it also reads in gray
    [(13, 8, 45), (84, 20, 106), (161, 42, 94), (224, 87, 58), (249, 158, 40), (250, 240, 160)], np.float32
)


def spread_view(outputs: Sequence[Output]) -> str:
    """HTML of the spread: its map, the scale of its colors, and its mean."""
    deviation, mean = spread(outputs)
    top = max(1.0, float(np.quantile(deviation, 0.995)))
    place = np.clip(deviation / top, 0, 1) * (len(_COLORS) - 1)
    channels = [np.interp(place, np.arange(len(_COLORS)), _COLORS[:, c]) for c in range(3)]
    stops = ",".join(f"rgb({r:.0f},{g:.0f},{b:.0f})" for r, g, b in _COLORS)
    heading = METRICS["diversity"].heading
    return (
        f'<figure class="sr3-spread"><img src="{_jpeg(np.stack(channels, -1).round().astype(np.uint8))}" '
        f'alt="Map of the spread of {len(outputs)} samples: bright where the model is unsure">'
        f'<figcaption><span>0</span><span class="sr3-scale" style="background:linear-gradient(90deg,{stops})"></span>'
        f"<span>{top:.0f}</span> levels of 255: standard deviation over {len(outputs)} samples at each pixel, mean "
        f"({heading}) {mean:.2f}. Bright is where the model invents.</figcaption></figure>"
    )


def facts(output: Output) -> str:
    """HTML of what is known about an output."""
    height, width = _open(output.pixels).shape[:2]
    small = _open(output.low_res).shape
    value = output.consistency
    rows = [
        ("file", f"{printable(output.target.name)} ({output.target.stat().st_size / 1e6:.2f} MB)"),
        ("size", f"{small[1]} x {small[0]} to {width} x {height} pixels"),
        ("model", f"{output.request.model}, seed {output.request.seed}"),
        ("time", f"{output.seconds:.1f} s"),
    ]
    if value is not None:
        metric = METRICS["consistency"]
        how = "1e-5; 0 if the output, shrunk, is exactly the input"
        rows.append(("consistency", f"{metric.format(value)} ({how})"))
    rows += [("note", note) for note in output.notes]
    cells = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows)
    return f'<dl class="sr3-facts">{cells}</dl>'


def progress_bar(progress: Progress, seconds: float) -> str:
    """HTML of a running request."""
    percent = round(100 * progress.fraction)
    text = html.escape(progress.text)
    return (
        f'<div class="sr3-progress"><div role="progressbar" aria-label="Upscaling" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{percent}" aria-valuetext="{percent} percent, {text}">'
        f'<span style="width:{percent}%"></span></div>'
        f"<p>{text} <span class='sr3-time'>{percent} %, {seconds:.0f} s</span></p></div>"
    )


def preview(image: np.ndarray) -> str:
    """HTML of the image so far, uint8 [H,W,3]."""
    return f'<img class="sr3-preview" src="{_jpeg(image, 80)}" alt="Preview of the image so far">'


def message(text: str, *, failures: Sequence[tuple[str, str]] = ()) -> str:
    """HTML of the end of a request: a sentence, and the files that failed with the reasons that the command gives."""
    items = "".join(
        f"<li><b>{html.escape(printable(name))}</b>: {html.escape(reason)}</li>" for name, reason in failures
    )
    failed = f'<ul class="sr3-failed" role="alert">{items}</ul>' if items else ""
    return f'<div class="sr3-message"><p role="status">{html.escape(text)}</p>{failed}</div>'


def thumbnails(outputs: Sequence[Output]) -> Iterator[tuple[np.ndarray, str]]:
    """A small image and a caption for each output."""
    for output in outputs:
        yield (
            reduced(_open(output.pixels), 320),
            f"{printable(output.source.name)}, seed {output.request.seed}",
        )


def _open(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _jpeg(image: np.ndarray, quality: int = 92) -> str:
    return _data_url(image, "jpeg", quality=quality)


def _png(image: np.ndarray) -> str:
    return _data_url(image, "png", compress_level=1)


def _data_url(image: np.ndarray, kind: str, **options: int) -> str:
    file = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(image)).save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
