"""One method at work on images of one size: its outputs are found or made, then measured.

Shape legend: B batch, H x W an original, h x w its low-res image, s the scale, S samples. A batch is always full,
with copies if need be: another shape is another program, which may round differently.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import numpy as np

from sr3_jax.evaluation import scoring
from sr3_jax.evaluation.measures import Measure, SpreadMeasure, filled
from sr3_jax.evaluation.outputs import Kept, Outputs, Record, Scores
from sr3_jax.features.cache import KeptFeatures
from sr3_jax.features.networks import Network
from sr3_jax.files import sha256_hex
from sr3_jax.types import Key

LONG = 60.0  # seconds
_PATCHES = 8  # whose features are computed at once, at least

Run = Callable[[np.ndarray, Key, np.ndarray], np.ndarray]
"""(low_res uint8 [B,h,w,3], keys [B], labels int [B], zeros where there are none) -> uint8 [B,s*h,s*w,3]."""
Place = tuple[int, int]  # of an output: the subject's, and the sample's number


@dataclass(frozen=True)
class Meters:
    """What is measured: of each output, of all samples of an input together, and of the set by a network's features."""

    each: tuple[Measure, ...] = ()
    spread: tuple[SpreadMeasure, ...] = ()
    network: Network | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """An image to be made again: its original uint8 [H,W,3] at the method's scale, and the original's digest."""

    name: str
    original: np.ndarray
    about: str
    label: int


class Bench:
    """Outputs of one method, image by image.

    Attributes:
        scores: of each image {name: one value a sample, or one of all samples}, in the order of work.
        outputs, originals: of each image the keys of the features of its first output, and of its original: one, or
            one a patch.
        reused: how many outputs were there already.
    """

    def __init__(
        self,
        run: Run | None,
        scale: int,
        store: Outputs,
        meters: Meters,
        *,
        samples: int,
        seed: int,
        batch: int,
        features: KeptFeatures | None,
        pool: ThreadPoolExecutor,
        labelled: bool = False,
    ) -> None:
        self.scores: list[dict[str, list[float]]] = []
        self.outputs: list[list[str]] = []
        self.originals: list[list[str]] = []
        self.reused = 0
        self.samples, self.scale = samples, scale
        each = tuple(one for one in meters.each if run or one.of_originals)
        self._run, self._store, self._meters = run, store, replace(meters, each=each)
        self._features, self._pool = features, pool
        self._seed, self._batch, self._labelled = seed, batch, labelled
        self._compiled: set[tuple[int, ...]] = set()

    def work(self, subjects: Sequence[Subject]) -> None:
        """Find or make, and measure, all samples of up to B images of one size."""
        places = [(at, sample) for at in range(len(subjects)) for sample in range(self.samples)]
        found: dict[Place, Kept] = {}
        fresh: dict[Place, np.ndarray] = {}
        for at, sample in places:
            kept = self._store.find(subjects[at].name, sample, self._from(subjects[at]))
            if kept is not None:
                found[at, sample] = kept
        self.reused += len(found) if self._run else 0
        for chunk in self._chunks([place for place in places if place not in found]):
            images, seconds = self._make(subjects, chunk)
            fresh |= zip(chunk, images, strict=False)
            found |= {place: Kept(sha256_hex(fresh[place]), None, seconds, {}) for place in chunk}
            self._measure(subjects, chunk, images, found, new=True)
        stale = [
            (at, sample) for at, sample in places
            if self._lacks(subjects[at], found[at, sample])
            or (sample == 0 and self._unseen(subjects[at], found[at, 0].output))
        ]  # fmt: skip
        for chunk in self._chunks(stale):
            for at, sample in chunk:
                fresh[at, sample] = self._image(subjects[at], sample)
            images = filled([fresh[place] for place in chunk], self._batch)
            self._measure(subjects, chunk, images, found, new=False)
        self._see_originals(subjects)
        for at, subject in enumerate(subjects):
            together = [found[at, sample] for sample in range(self.samples)]
            of = [self._flat(subject, kept) for kept in together]
            row = {name: [scores[name] for scores in of] for name in of[0]}
            if self.samples > 1:
                row |= {name: [value] for name, value in self._spread(subject, at, together, fresh).items()}
            self.scores.append(row)
            self.outputs.append(self._feature_keys(subject, together[0].output))
            self.originals.append(self._feature_keys(subject, subject.about))

    def _chunks(self, places: Sequence[Place]) -> Iterator[Sequence[Place]]:
        for start in range(0, len(places), self._batch):
            yield places[start : start + self._batch]

    def _wanted(self, subject: Subject) -> Iterator[tuple[str, Measure]]:
        """The measures that fit an image, by their keys."""
        for one in self._meters.each:
            if one.fits(subject.original):
                yield one.key_for(subject.label), one

    def _lacks(self, subject: Subject, kept: Kept) -> bool:
        return any(key not in kept.measures for key, _ in self._wanted(subject))

    def _feature_keys(self, subject: Subject, output: str) -> list[str]:
        """The keys of an output's features: its digest, or one for each patch."""
        network = self._meters.network
        count = 1 if network is None else len(network.patches(subject.original))
        return [output] if count == 1 else [sha256_hex({output: patch}) for patch in range(count)]

    def _unseen(self, subject: Subject, output: str) -> bool:
        """Whether the features of an output are wanted and not known."""
        network = self._meters.network
        if network is None or self._features is None or min(subject.original.shape[:2]) < network.least_side:
            return False
        return bool(self._features.missing(self._feature_keys(subject, output)))

    def _from(self, subject: Subject) -> str:
        """What an output is made from; where it depends on the label, an output of another label is another."""
        return f"{subject.about} label {subject.label}" if self._labelled else subject.about

    def _image(self, subject: Subject, sample: int) -> np.ndarray:
        return subject.original if self._run is None else self._store.read(subject.name, sample)

    def _make(self, subjects: Sequence[Subject], chunk: Sequence[Place]) -> tuple[np.ndarray, float | None]:
        """Outputs [B,H,W,3] of a chunk, filled up, and the seconds of each."""
        originals = filled([subjects[at].original for at, _ in chunk], self._batch)
        if self._run is None:
            return originals, None
        low_res = scoring.low_res_of(originals, self.scale)
        about = filled([np.uint32(int(subjects[at].about[:8], 16)) for at, _ in chunk], self._batch)
        numbers = filled([np.uint32(sample) for _, sample in chunk], self._batch)
        keys = _keys(np.uint32(self._seed), about, numbers)
        labels = filled([np.int64(subjects[at].label) for at, _ in chunk], self._batch)
        images, seconds = timed(self._run, low_res, keys, labels, warm=low_res.shape in self._compiled)
        self._compiled.add(low_res.shape)
        return images, seconds / self._batch

    def _measure(
        self,
        subjects: Sequence[Subject],
        chunk: Sequence[Place],
        images: np.ndarray,
        found: dict[Place, Kept],
        *,
        new: bool,
    ) -> None:
        """Add what lacks to `found` of a chunk with outputs [B,H,W,3], and keep it."""
        of = [subjects[at] for at, _ in chunk]
        lacking = [{key: one for key, one in self._wanted(subject) if key not in found[place].measures}
                   for subject, place in zip(of, chunk, strict=True)]  # fmt: skip
        added: list[dict[str, Scores]] = [{} for _ in chunk]
        wanted = {one for ones in lacking for one in ones.values()}
        if wanted:
            originals = filled([subject.original for subject in of], self._batch)
            low_res = scoring.low_res_of(originals, self.scale)
            labels = filled([np.int64(subject.label) for subject in of], self._batch)
            for measure in wanted:
                columns = measure.run(images, originals, low_res, labels)
                for at, ones in enumerate(lacking):
                    for key in [key for key, one in ones.items() if one is measure]:
                        added[at][key] = {name: float(column[at]) for name, column in columns.items()}
        self._see([
            (image, self._feature_keys(subject, found[place].output))
            for image, subject, place in zip(images, of, chunk, strict=False)
            if place[1] == 0 and self._unseen(subject, found[place].output)
        ])  # fmt: skip
        records = []
        for subject, place, measures, image in zip(of, chunk, added, images, strict=False):
            found[place] = replace(found[place], measures={**found[place].measures, **measures})
            if new or measures:
                output = image if new and self._run else None
                records.append(Record(subject.name, place[1], self._from(subject), output, found[place]))
        if records:
            self._store.keep(records, map=self._pool.map)

    def _see(self, seen: Sequence[tuple[np.ndarray, Sequence[str]]]) -> None:
        """Keep the features of images [H,W,3] of one size under their keys, one a patch."""
        if not seen or self._meters.network is None or self._features is None:
            return
        network = self._meters.network
        patches = {
            key: patch
            for image, keys in seen
            for key, patch in zip(keys, network.patches(image), strict=True)
        }
        keys = list(patches)
        size = max(self._batch, _PATCHES if network.patch else 1)
        for start in range(0, len(keys), size):
            some = keys[start : start + size]
            features = network.run(filled([patches[key] for key in some], size))
            self._features.add(some, features[: len(some)])

    def _see_originals(self, subjects: Sequence[Subject]) -> None:
        """The features of the originals, with which the outputs' are compared."""
        self._see([
            (subject.original, self._feature_keys(subject, subject.about))
            for subject in subjects
            if self._unseen(subject, subject.about)
        ])  # fmt: skip

    def _flat(self, subject: Subject, kept: Kept) -> Scores:
        scores = {
            name: value for key, _ in self._wanted(subject) for name, value in kept.measures[key].items()
        }
        return scores if kept.seconds is None else scores | {"seconds": kept.seconds}

    def _spread(
        self, subject: Subject, at: int, together: Sequence[Kept], fresh: Mapping[Place, np.ndarray]
    ) -> Scores:
        """The scores of all samples of one image, kept as those of sample -S."""
        wanted = [one for one in self._meters.spread if min(subject.original.shape[:2]) >= one.least_side]
        joined = sha256_hex({"samples": [kept.output for kept in together]})
        number = -len(together)
        known = self._store.find(subject.name, number, self._from(subject), output=joined)
        before = dict(known.measures) if known else {}
        lacking = [one for one in wanted if one.key not in before]
        if lacking:
            images = np.stack([
                fresh[at, sample] if (at, sample) in fresh else self._image(subject, sample)
                for sample in range(len(together))
            ])  # fmt: skip
            before |= {one.key: dict(one.run(images)) for one in lacking}
            kept = Kept(joined, None, None, before)
            self._store.keep([Record(subject.name, number, self._from(subject), None, kept)])
        return {name: value for one in wanted for name, value in before[one.key].items()}


def timed(
    run: Run, low_res: np.ndarray, keys: Key, labels: np.ndarray, *, warm: bool
) -> tuple[np.ndarray, float]:
    """The outputs, and the seconds that they take once compiled.

    The first call of a size compiles. It is made twice, and the second is timed: nothing else tells the two
    parts apart on every backend. A call of more than LONG seconds is not repeated, since the compiler's few
    seconds are a small part of it. Sizes that were seen before cost one call.
    """
    start = time.perf_counter()
    output = run(low_res, jax.random.clone(keys), labels)
    seconds = time.perf_counter() - start
    if not warm and seconds < LONG:
        start = time.perf_counter()
        run(low_res, keys, labels)
        seconds = time.perf_counter() - start
    return output, seconds


@jax.jit
def _keys(seed: jax.Array, originals: jax.Array, samples: jax.Array) -> Key:
    """The keys [B] of outputs, from the seed, what the original is and the sample's number."""

    def key(original: jax.Array, sample: jax.Array) -> Key:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), original), sample)

    return jax.vmap(key)(originals, samples)
