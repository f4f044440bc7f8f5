"""A held-out set through bicubic interpolation and models: scores of every image, method by method.

Images of one size are worked through in batches, each by all methods; whatever is finished is kept by `outputs`
and not computed again. Several processes divide the images, and `evaluation_parts` puts together what they found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sr3_jax import __version__
from sr3_jax.data.sources import Source
from sr3_jax.evaluation import measures, scoring
from sr3_jax.evaluation.bench import Bench, Meters, Subject
from sr3_jax.evaluation.methods import Method, bicubic, by_sampling, fingerprint, labels, original, sampled
from sr3_jax.evaluation.outputs import Outputs
from sr3_jax.evaluation.parts import Evaluation, Item, Part, Row, SetMeter, combine
from sr3_jax.features.cache import KeptFeatures
from sr3_jax.features.statistics import Statistics
from sr3_jax.files import sha256_hex, unique_file_name
from sr3_jax.image_io.image_file import ImageError

__all__ = ["Evaluation", "Item", "Meters", "Method", "Part", "bicubic", "by_sampling", "count_outputs"]
__all__ += ["evaluate", "fingerprint", "labels", "measure_part", "original", "put_together", "sampled"]

_THREADS = 4
PLAIN = Meters(each=(measures.plain(),), spread=(measures.pixel_spread(),))

Loaded = tuple[Item, dict[str, Any]]


def evaluate(
    methods: Sequence[Method],
    source: Source,
    outputs: Path,
    *,
    meters: Meters = PLAIN,
    reference: Statistics | None = None,
    **options: Any,
) -> Evaluation:
    """All images of a source by every method, in this process alone: `measure_part`, whose options it takes.

    Args:
        reference: what the set's features are compared with, instead of those of the originals.

    Raises:
        UserError: nothing can be evaluated or written.
    """
    part = measure_part(methods, source, outputs, meters=meters, **options)
    return put_together([part], methods, source.name, outputs, meters=meters, reference=reference)


def measure_part(
    methods: Sequence[Method],
    source: Source,
    outputs: Path,
    *,
    meters: Meters = PLAIN,
    environment: Mapping[str, Any] | None = None,
    samples: int = 1,
    seed: int = 0,
    limit: int | None = None,
    crop: int | None = None,
    batch: int = 1,
    process: tuple[int, int] = (0, 1),
    on_output: Callable[[int], None] = lambda count: None,
) -> Part:
    """Upscale and score this process's images of a source by every method, outputs in the folder `outputs`.

    An output's key follows from the seed, the original's pixels and the sample's number: neither the other
    images nor the other methods change it.

    Args:
        environment: plain values besides the method's identity that outputs depend on, such as the hardware.
        samples: outputs of each image and model; bicubic has one.
        limit: the first so many images alone.
        crop: the centre of each alone, that many pixels squared.
        batch: outputs made at once, where images have one size.
        process: the number of this one and how many there are.
        on_output: called with the number of outputs found or made since its last call.

    Raises:
        UserError: something cannot be written, or a model's output is not finite.
    """
    # The version stands for the code between the weights and the outputs.
    around = {"seed": seed, "version": __version__, "batch": batch, **(environment or {})}
    features = None
    if meters.network is not None:
        features = KeptFeatures.of(outputs, meters.network.protocol, process=process[0])
    items: list[Item] = []
    failed: list[tuple[int, str]] = []
    with ThreadPoolExecutor(_THREADS, "write") as pool:
        benches = [
            Bench(
                method.run,
                method.scale,
                Outputs(outputs / method.folder, {**method.identity, **around}, process=process[0]),
                meters,
                samples=method.samples(samples),
                seed=seed,
                batch=batch,
                features=features,
                pool=pool,
                labelled=method.labelled,
            )
            for method in methods
        ]
        for group in _groups(source, limit=limit, crop=crop, batch=batch, process=process):
            if isinstance(group, tuple):
                failed.append(group)
                on_output(count_outputs(methods, images=1, samples=samples))
                continue
            items += [item for item, _ in group]
            by_scale: dict[int, list[Subject]] = {}
            for bench in benches:
                if bench.scale not in by_scale:
                    by_scale[bench.scale] = [_subject(*loaded, bench.scale, crop) for loaded in group]
                bench.work(by_scale[bench.scale])
                on_output(len(group) * bench.samples)
    rows = [Row(bench.scores, bench.outputs, bench.originals, bench.reused) for bench in benches]
    return Part(items, rows, failed)


def put_together(
    parts: Sequence[Part],
    methods: Sequence[Method],
    source: str,
    outputs: Path,
    *,
    meters: Meters = PLAIN,
    reference: Statistics | None = None,
) -> Evaluation:
    """The parts of all processes, whose features lie in the folder `outputs`. UserError if there is no image."""
    are_originals = [method.run is None for method in methods]
    return combine(
        parts, source, originals=are_originals, set_meter=set_meter(outputs, meters, reference=reference)
    )


def set_meter(outputs: Path, meters: Meters, *, reference: Statistics | None = None) -> SetMeter | None:
    """How the features in the folder `outputs` are compared; None if there is no network for it."""
    if meters.network is None:
        return None
    protocol = meters.network.protocol
    return SetMeter(KeptFeatures.of(outputs, protocol), protocol, meters.network.logits, reference)


def count_outputs(methods: Sequence[Method], *, images: int, samples: int) -> int:
    """How many outputs there are of so many images."""
    return images * sum(method.samples(samples) for method in methods)


def _subject(item: Item, loaded: Mapping[str, Any], scale: int, crop: int | None) -> Subject:
    image = scoring.original_at(loaded["image"], scale, crop)
    return Subject(item.name, image, sha256_hex(image), loaded.get("label", 0))


def _groups(
    source: Source, *, limit: int | None, crop: int | None, batch: int, process: tuple[int, int]
) -> Iterator[list[Loaded] | tuple[int, str]]:
    """Up to `batch` images of one size each, or the number of one that cannot be read, and why."""
    waiting: dict[tuple[int, int], list[Loaded]] = {}
    taken: set[str] = set()
    for index in range(min(len(source), limit or len(source))):
        name = unique_file_name(Path(source.file_name(index)).stem, taken)  # the same ones in all processes
        if index % process[1] != process[0]:
            continue
        try:
            loaded = source[index]
        except ImageError as error:
            yield index, str(error)
            continue
        height, width = loaded["image"].shape[:2]
        size = (crop, crop) if crop else (height, width)
        waiting.setdefault(size, []).append((Item(index, name, height, width), loaded))
        if len(waiting[size]) >= batch:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= 4 * batch:  # which bounds the memory
            yield waiting.pop(max(waiting, key=lambda of: len(waiting[of])))
    yield from waiting.values()
