"""The distributed top-K: score files in, the first K candidates of each class out, in ranges of classes.

Tasks stream the files through sieves (`pipeline.selection.topk`) and leave what passed in the object store, split by class
ranges ("buckets"); a task for each bucket then merges and finishes it. How far a sieve's thresholds are raised from
the start is a guess from a sample, and every task learns what the tasks before it proved. A guess is held against the
counts: where fewer than K passed, a second scan fetches what the guess held back. So the result is exact whatever the
sample, and what the workers hold together is about classes x K, not classes x K each.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cluster.progress import SILENT, Progress
from cluster.tasks import cpus, scatter
from pipeline.selection.table import Exclusions, Layout, Slice, blamed, deal, read, sample
from pipeline.selection.topk import (
    BYTES_PER_CANDIDATE,
    Account,
    Candidates,
    Float32,
    Int64,
    Sieve,
    Top,
    kth_scores,
    merge,
    split,
)

# isort: split
import numpy as np

Files = Sequence[tuple[str, int]]  # URIs and sizes

TASK_BYTES = (32 << 20, 1 << 30)  # of score files that one task reads, at least and at most
TASKS_PER_CPU = 4
SAMPLE_ROWS = (1 << 17, 1 << 21)  # at least and at most; between them, a share of the table
SAMPLE_SHARE = 1 / 32
SAMPLE_SLICES = 16


@dataclass(frozen=True)
class Request:
    """One selection to make of a score table.

    Attributes:
        classes_per_image: P, at most what the layout reads.
        quotas: int64 [C], K of each class.
        edges: class ids where the buckets begin, and C.
    """

    classes_per_image: int
    quotas: Int64
    edges: tuple[int, ...]


@dataclass(frozen=True)
class Note:
    """What a scan says of one request: its account, how many of each class passed (int64 [C]), and the thresholds
    (float32 [C]) that it ended with."""

    account: Account
    counts: Int64
    thresholds: Float32


@dataclass
class Reduced:
    """What became of one request: the account of its scans, and the notes and values of its finished buckets."""

    account: Account = field(default_factory=Account)
    notes: list[Any] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _Sift:
    """One request in one scan; `below` and `supplement` as in `Sieve`."""

    request: Request
    below: Float32 | None = None
    supplement: bool = False


@dataclass(frozen=True)
class Reduction:
    """A reduction of one score table for several requests.

    Attributes:
        files: URIs and sizes of the score files.
        layout: what they share.
        exclusions: images that are passed over.
        min_score: candidates below it (as float32) are passed over.
        memory: bytes that the tops of one scanning task may take.
        tasks: how many tasks scan; by default about four for each CPU.
        progress: counts images scanned.
    """

    files: Files
    layout: Layout
    exclusions: Exclusions | None = None
    min_score: float | None = None
    memory: int = 2 << 30
    tasks: int | None = None
    progress: Progress = SILENT

    def run(
        self, requests: Sequence[Request], finish: Callable[..., tuple[Any, Any]], ready: Callable[[], None]
    ) -> list[Reduced]:
        """Scans the table, as often as the memory limit makes it necessary, and finishes every bucket.

        Args:
            requests: at least one.
            finish: called in a Ray task with the number of a request, the number of a bucket, and the tops that hold
                the bucket's candidates; returns a note and a value, which stays in the object store.
            ready: called once, before the first bucket is finished: the scores can be read.
        """
        done = [Reduced() for _ in requests]
        floors = [np.full(self.layout.num_classes, self._floor, np.float32) for _ in requests]
        guesses = self._guess(requests, floors)
        passes = [self._passes(request, self.memory // len(requests)) for request in requests]
        for number in range(max(map(len, passes))):
            parts = [request[number] if number < len(request) else range(0) for request in passes]
            narrowed = [_narrowed(r, buckets) for r, buckets in zip(requests, parts, strict=True)]
            starts = [_within(guess, r) for guess, r in zip(guesses, narrowed, strict=True)]
            tops = self._scan([_Sift(r, supplement=number > 0) for r in narrowed], starts, done)
            if number == 0:
                ready()
            items = [(i, b, *tops[i][b - p.start]) for i, p in enumerate(parts) for b in p]
            for (i, note), (value,) in scatter(partial(_finish, finish), items, values=1):
                done[i].notes.append(note)
                done[i].values.append(value)
        return done

    @property
    def _floor(self) -> np.float32:
        return np.float32(-np.inf if self.min_score is None else self.min_score)

    @property
    def _rows(self) -> float:
        """Rows of the table, by the sizes of its files."""
        return sum(size for _, size in self.files) / self.layout.bytes_per_row

    def _passes(self, request: Request, memory: int) -> list[range]:
        """The request's buckets in runs whose tops fit in `memory`."""
        most = np.minimum(request.quotas, max(1.0, 1.5 * self._rows))
        scale = min(1.0, 1.5 * self._rows * request.classes_per_image / max(1.0, float(most.sum())))
        before = np.concatenate([[0.0], np.cumsum(most)])[list(request.edges)] * scale * BYTES_PER_CANDIDATE
        runs, first = [], 0
        for bucket in range(1, len(request.edges)):
            if bucket == len(request.edges) - 1 or before[bucket + 1] - before[first] > memory:
                runs.append(range(first, bucket))
                first = bucket
        return runs

    def _guess(self, requests: Sequence[Request], floors: list[Float32]) -> list[Float32]:
        """Thresholds that about twice K candidates of each class reach, by a sample spread over the table.

        Of a sample of the fraction f, the place f K holds the K-th score, give or take its Poisson error. Five times
        that error lower, the K-th score of nearly every class is above.
        """
        rows = int(min(max(self._rows * SAMPLE_SHARE, SAMPLE_ROWS[0]), SAMPLE_ROWS[1]))
        if self._rows < 8 * rows:
            return floors
        places = []
        for request in requests:
            expected = request.quotas * (rows / self._rows)
            places.append(np.ceil(expected + 5 * np.sqrt(expected) + 5).astype(np.int64))
        slices = sample(self.files, SAMPLE_SLICES, rows)
        whole = (0, self.layout.num_classes)
        sifts = [_Sift(Request(r.classes_per_image, p, whole)) for r, p in zip(requests, places, strict=True)]
        scan = partial(_scan, sifts, self.layout, self.exclusions, SILENT)
        tasks = max(1, min(int(cpus()), len(slices)))
        tops: list[list[Any]] = [[] for _ in requests]
        for _, found in scatter(scan, ((slices[i::tasks], floors) for i in range(tasks)), values=len(requests)):
            for one, top in zip(tops, found, strict=True):
                one.append(top)
        return [
            kth_scores(merge(_fetch(found), place), place, floor)
            for found, place, floor in zip(tops, places, floors, strict=True)
        ]

    def _scan(self, sifts: Sequence[_Sift], starts: list[Float32], done: list[Reduced]) -> list[list[list[Any]]]:
        """What passed of each request's buckets (references), after one scan, and a second one where `starts` fell
        short; adds to the accounts of `done`."""
        tops, counts = self._stream(sifts, starts, done, sifts[0].supplement)
        short = [
            (start > self._floor) & (start < np.inf) & (count < s.request.quotas)
            for s, start, count in zip(sifts, starts, counts, strict=True)
        ]
        if any(classes.any() for classes in short):
            again = [
                _Sift(s.request, np.where(classes, start, np.float32(-np.inf)), supplement=True)
                for s, start, classes in zip(sifts, starts, short, strict=True)
            ]
            lower = [np.where(classes, self._floor, np.float32(np.inf)) for classes in short]
            further, _ = self._stream(again, lower, done, True)
            for one, other in zip(tops, further, strict=True):
                for bucket, more in zip(one, other, strict=True):
                    bucket.extend(more)
        return tops

    def _stream(
        self, sifts: Sequence[_Sift], starts: list[Float32], done: list[Reduced], silent: bool
    ) -> tuple[list[list[list[Any]]], list[Int64]]:
        thresholds = list(starts)
        counts = [np.zeros(self.layout.num_classes, np.int64) for _ in sifts]
        tops: list[list[list[Any]]] = [[[] for _ in s.request.edges[1:]] for s in sifts]
        scan = partial(_scan, sifts, self.layout, self.exclusions, SILENT if silent else self.progress)
        orders = ((slices, list(thresholds)) for slices in deal(self.files, self._tasks))  # as they are by then
        values = sum(len(buckets) for buckets in tops)
        for notes, found in scatter(scan, orders, values=values):
            rest = iter(found)
            for i, note in enumerate(notes):
                thresholds[i] = np.maximum(thresholds[i], note.thresholds)
                counts[i] += note.counts
                done[i].account += note.account
                for bucket in tops[i]:
                    bucket.append(next(rest))
        return tops, counts

    @property
    def _tasks(self) -> int:
        if self.tasks is not None:
            return self.tasks
        total = sum(size for _, size in self.files)
        share = total / (TASKS_PER_CPU * cpus())
        return max(1, round(total / min(max(share, TASK_BYTES[0]), TASK_BYTES[1])))


def _narrowed(request: Request, buckets: range) -> Request:
    edges = request.edges[buckets.start : buckets.stop + 1] if buckets else ()
    return Request(request.classes_per_image, request.quotas, edges)


def _within(thresholds: Float32, request: Request) -> Float32:
    """`thresholds`, and infinity for classes that are not in the request's buckets."""
    limited = np.full_like(thresholds, np.inf)
    inside = slice(request.edges[0], request.edges[-1]) if request.edges else slice(0)
    limited[inside] = thresholds[inside]
    return limited


def _scan(
    sifts: Sequence[_Sift],
    layout: Layout,
    exclusions: Exclusions | None,
    progress: Progress,
    slices: Sequence[Slice],
    starts: Sequence[Float32],
) -> tuple[Any, ...]:
    """Runs in a Ray task: a note for each request, then the top of each bucket of each."""
    sieves = [
        Sieve(s.request.quotas, start, below=s.below, supplement=s.supplement)
        for s, start in zip(sifts, starts, strict=True)
    ]
    reading = slices[0].uri
    done, told = 0, time.monotonic()
    with blamed("scores", lambda: reading):
        for piece in slices:
            reading = piece.uri
            for batch in read(piece, layout, exclusions):
                for sift, sieve in zip(sifts, sieves, strict=True):
                    sieve.add(_best(batch, sift.request.classes_per_image))
                done += batch.images
                if time.monotonic() - told > 0.5:
                    progress.add(done=done)
                    done, told = 0, time.monotonic()
    progress.add(done=done)
    notes, tops = [], []
    for sift, sieve in zip(sifts, sieves, strict=True):
        top = sieve.top()
        counts = np.bincount(top.class_id, minlength=layout.num_classes)
        notes.append(Note(top.account, counts, sieve.thresholds))
        if sift.request.edges:
            tops += split(top, sift.request.edges)
    return notes, *tops


def _best(batch: Candidates, classes_per_image: int) -> Candidates:
    if classes_per_image == batch.scores.shape[1]:
        return batch
    ids, scores = batch.class_ids[:, :classes_per_image], batch.scores[:, :classes_per_image]
    return Candidates(batch.shard, batch.index, ids, scores, batch.images, batch.excluded)


def _finish(finish: Callable[..., tuple[Any, Any]], request: int, bucket: int, *tops: Top) -> tuple[Any, Any]:
    note, value = finish(request, bucket, *tops)
    return (request, note), value


def _fetch(references: Sequence[Any]) -> list[Top]:
    import ray

    found: list[Top] = ray.get(list(references))
    return found
