"""Choose the fastest index that reaches a recall target, by measurement: on samples, then on all.

N rows, M queries, D dimensions, K neighbours.

Every index spec that fits the memory is built over a sample of the rows, tuned to the recall target
on real queries, and timed. The fastest advance to a larger sample, and the best is built over all
rows. Its recall is then verified on held-out queries; if it falls short, more of the index is
searched, then the next best spec is built, and if none reaches the target every row is compared.
Nothing is assumed about the data: text queries are distributed differently from the images they
look for, so an index that finds neighbours of images may miss neighbours of texts.

Source: successive halving, Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and
Hyperparameter Optimization".
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np

from mmalign.arrays import Floats, Ints
from mmalign.index import approximate
from mmalign.index.approximate import Approximate, cluster
from mmalign.index.exact import Exact
from mmalign.index.measure import ALONE, HeldOut, Trial, in_turns, measure, prove, times, tune
from mmalign.index.quantizer import CoarseQuantizer
from mmalign.index.spec import KS, IndexSpec, OperatingPoint
from mmalign.index.vectors import VectorReader
from mmalign.memory import return_freed, return_large_blocks
from mmalign.progress import over, say

EXACT_ROWS = 50_000
"""Below this, comparing every row takes milliseconds and misses nothing."""
SPECS = (
    IndexSpec("ivf", "PQ/2x4fsr", density=1),
    IndexSpec("ivf", "PQ/4x4fsr", density=1),
    IndexSpec("ivf", "RaBitQfs1", density=1),
    IndexSpec("ivf", "RaBitQfs2", density=1),
    IndexSpec("hnsw", "SQ8", links=32),
)
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "ivf": ({"density": 2}, {"metric": "queries"}),
    "hnsw": ({"code": "SQfp16"},),
}
"""By kind: variants of the best spec of the first round, added to the second."""
# Rows of each round, tuning queries per round (and as many to measure), the share of specs that
# advance to the next round, and how many times slower than the best a spec may be to advance.
ROUNDS, ROUND_QUERIES, KEPT, SLOWER = (1 << 14, 1 << 16), 300, 0.3, 1.5
# Tuning queries over all rows. Modalities that do not decide the choice are tuned and measured with
# a quarter of their queries, as computing the exact neighbours takes longest.
TUNING, QUARTER = 1_000, 4
# Tuning targets a recall this far above the promised one, as recall on other queries is slightly
# lower.
MARGIN = 0.01


@dataclass(frozen=True)
class Queries:
    """Queries of one modality: some tune, the others are held out to measure; final."""

    tune_MD: Floats
    held_MD: Floats
    stored: bool = False
    """Whether they are vectors of the index: each then finds itself, which does not count."""
    groups_M: Ints | None = None
    """Image number of each held-out query; None if each is a group of its own."""

    @property
    def held(self) -> HeldOut:
        """The held-out queries."""
        return HeldOut(self.held_MD, self.groups_M)

    def fewer(self, part: int) -> "Queries":
        """Return at most `TUNING` / part tuning queries, and 1 / part of the held-out ones."""
        count = -(-len(self.held_MD) // part)
        groups_M = None if self.groups_M is None else self.groups_M[:count]
        tune_MD, held_MD = self.tune_MD[: TUNING // part], self.held_MD[:count]
        return replace(self, tune_MD=tune_MD, held_MD=held_MD, groups_M=groups_M)


@dataclass(frozen=True)
class Plan:
    """An index spec, built and tuned; final."""

    spec: IndexSpec
    index: Any = None
    """The FAISS index; None for exact search."""
    points: dict[str, list[OperatingPoint]] = field(default_factory=dict)
    """Search parameters by query modality, for ascending k."""
    kept: list[Trial] = field(default_factory=list)
    """The promised results: measured over all rows, on held-out queries."""
    tried: list[Trial] = field(default_factory=list)
    """All measurements of the rounds."""


def plan(
    vectors: VectorReader,
    asked: Mapping[str, Queries],
    recall: float,
    memory: float,
    share: float = 1.0,
) -> Plan:
    """Choose, build and tune an index.

    Args:
        vectors: The vectors to be searched.
        asked: Queries by modality; those of the first one decide which spec is chosen.
        recall: Share of the true ten nearest neighbours to be found, above 0 and at most 1.
        memory: Bytes that the index may hold, stored vectors not counted.
        share: This index's share of the memory for all indexes of a store.
    """
    if vectors.live < EXACT_ROWS or recall == 1:
        return Plan(IndexSpec("exact"))
    possible = [d for d in SPECS if d.divides(vectors.dim)]
    fitting = [d for d in possible if _bytes(d, vectors) <= memory]
    if not fitting:
        enough = math.ceil(min(_bytes(d, vectors) for d in possible) / share / 1e6)
        part = f" ({share:.0%} of --memory)" if share < 1 else ""
        say(
            f"no index of {vectors.live:,} vectors fits in {memory / 1e6:,.1f} MB{part}, so search "
            f"will be exact; --memory {enough}MB is enough for an index"
        )
        return Plan(IndexSpec("exact"))
    asked = {name: q for name, q in asked.items() if len(q.tune_MD) and len(q.held_MD)}
    if not asked:
        say("too few queries to tune and measure an index, so search will be exact")
        return Plan(IndexSpec("exact"))
    return_large_blocks()
    main = next(iter(asked))
    specs, tried = _rounds(fitting, vectors, main, asked[main], recall=recall, memory=memory)
    if not specs:
        near = max(tried, key=attrgetter("recall"))
        say(
            f"no index within {memory / 1e6:,.1f} MB reaches a recall of {recall:.1%}, so search "
            f"will be exact; the best was {near.design} with {near.recall:.1%}"
        )
        return Plan(IndexSpec("exact"), tried=tried)
    return_freed()
    true = _truths(vectors, _fewer(asked))
    return_freed()
    for spec in specs:
        built = _build_and_tune(spec, vectors, asked, true, recall)
        if built is not None:
            return replace(built, tried=tried)
        name = spec.name(vectors.live, vectors.dim)
        missed = f"{name} does not reach a recall of {recall:.1%} over all rows"
        say(f"{missed} on both tuning and held-out queries")
    say(f"no index reaches a recall of {recall:.1%} over all rows, so search will be exact")
    return Plan(IndexSpec("exact"), tried=tried)


def tuning_target(recall: float) -> float:
    """Recall to reach on tuning queries, so that held-out queries are likely to reach the target.

    >>> round(tuning_target(0.95), 4), round(tuning_target(0.99), 4)
    (0.96, 0.995)
    """
    return recall + min(MARGIN, (1 - recall) / 2)


def _bytes(spec: IndexSpec, vectors: VectorReader) -> float:
    return vectors.live * spec.bytes_per_vector(vectors.live, vectors.dim)


def _rounds(
    specs: list[IndexSpec],
    vectors: VectorReader,
    main: str,
    queries: Queries,
    *,
    recall: float,
    memory: float,
) -> tuple[list[IndexSpec], list[Trial]]:
    """Compare index specs on samples, the best of each round in the next.

    Returns:
        All specs that reached the recall, as the best on a sample may fall short over all rows:
        best first, those of the last round before the others. And all trials.
    """
    tried: list[Trial] = []
    ranked: list[IndexSpec] = []
    for number, rows in enumerate(ROUNDS):
        sample = VectorReader([vectors.gather(vectors.draw(rows, seed=rows))])
        tournament = _Tournament(sample, main, queries, recall)
        for spec in over(f"try {rows:,}", specs, len(specs), "designs"):
            tournament.enter(spec)
        results = tournament.results()
        tried += [trial for _, trial, _ in results]
        reached = [(trial.p50_ms, spec) for spec, trial, enough in results if enough]
        reached.sort(key=itemgetter(0))
        winners = [spec for _, spec in reached]
        ranked = winners + [spec for spec in ranked if spec not in winners]
        if not winners or rows >= vectors.live:
            break
        near = [spec for ms, spec in reached if ms <= SLOWER * reached[0][0]]
        specs = near[: math.ceil(KEPT * len(results))]
        if number == 0:
            variants = [replace(winners[0], **change) for change in VARIANTS[winners[0].kind]]
            specs += [spec for spec in variants if _bytes(spec, vectors) <= memory]
    return ranked, tried


class _Tournament:
    """One round: specs are built over the same sample and searched with the same queries; final."""

    def __init__(self, sample: VectorReader, main: str, queries: Queries, recall: float) -> None:
        self.sample = sample
        self.main, self.recall = main, recall
        self.queries = queries.tune_MD
        # Few queries are split in half; a single query is used for both.
        count = min(ROUND_QUERIES, max(1, len(self.queries) // 2))
        self.tuning, self.others = self.queries[:count], self.queries[-count:]
        both_MD = np.concatenate([self.tuning, self.others])
        true_MK = truth(self.sample, both_MD, KS[0])
        self.tuning_MK, self.others_MK = np.split(true_MK, [count])
        self.lists: dict[tuple[int, str], CoarseQuantizer] = {}
        self.entered: list[tuple[IndexSpec, Approximate, OperatingPoint, bool, dict[str, Any]]] = []

    def enter(self, spec: IndexSpec) -> None:
        """Build and tune an index."""
        started = time.perf_counter()
        key = (spec.density, spec.metric)
        if spec.kind == "ivf" and key not in self.lists:
            self.lists[key] = cluster(self.sample, spec, self.queries)
        built = approximate.build(self.sample, spec, self.lists.get(key), shown=False)
        build_s = time.perf_counter() - started
        index = Approximate(built, self.sample, {}, self.sample.total)
        point, reached = tune(index, self.tuning, self.tuning_MK, KS[0], self.recall)
        known = _known(spec, self.sample, built, build_s) | {"asked": self.main}
        self.entered.append((spec, index, point, reached, known))

    def results(self) -> list[tuple[IndexSpec, Trial, bool]]:
        """Measure all, in turns; return for each whether it reached the recall in tuning."""
        contestants = [(index, point) for _, index, point, _, _ in self.entered]
        timed = in_turns(contestants, self.others)
        found = []
        for entry, seconds_M in zip(self.entered, timed, strict=True):
            spec, index, point, reached, known = entry
            trial = measure(index, HeldOut(self.others), self.others_MK, point, seconds_M, **known)
            found.append((spec, trial, reached))
        return found


def _build_and_tune(
    spec: IndexSpec,
    vectors: VectorReader,
    asked: Mapping[str, Queries],
    true: Mapping[str, Ints],
    recall: float,
) -> Plan | None:
    """Build over all rows and tune for every modality; None if held-out recall falls short.

    The coarse quantizer is trained with all queries; fewer are used to tune and to measure.
    """
    started = time.perf_counter()
    lists = None
    if spec.kind == "ivf":
        lists = cluster(vectors, spec, next(iter(asked.values())).tune_MD)
    built = approximate.build(vectors, spec, lists)
    build_s = time.perf_counter() - started
    index = Approximate(built, vectors, {}, vectors.total)
    known = _known(spec, vectors, built, build_s)
    points: dict[str, list[OperatingPoint]] = {}
    kept: list[Trial] = []
    for name, queries in _fewer(asked).items():
        tuning_MK, held_MK = np.split(true[name], [len(queries.tune_MD)])
        points[name] = []
        for k in KS:
            # With more neighbours for each query, fewer queries are as informative.
            tuning = queries.tune_MD[: TUNING if k == KS[0] else ROUND_QUERIES]
            own = int(queries.stored)
            target = tuning_target(recall)
            start, reached = tune(index, tuning, tuning_MK[: len(tuning)], k, target)
            point = prove(index, queries.held, held_MK, start, recall, own=own) if reached else None
            if point is None:
                return None
            points[name].append(point)
            seconds_M = times(index, queries.held_MD[:ALONE], point)
            words = known | {"asked": name, "own": own}
            kept.append(measure(index, queries.held, held_MK, point, seconds_M, **words))
    return Plan(spec, built, points, kept)


def _fewer(asked: Mapping[str, Queries]) -> dict[str, Queries]:
    """Return the queries that tune and measure over all rows; most are of the first modality."""
    main = next(iter(asked))
    return {name: q.fewer(1 if name == main else QUARTER) for name, q in asked.items()}


def _truths(vectors: VectorReader, asked: Mapping[str, Queries]) -> dict[str, Ints]:
    """Return the true neighbours of the tuning and the held-out queries, by modality."""
    every = [q_MD for queries in asked.values() for q_MD in (queries.tune_MD, queries.held_MD)]
    # The nearest neighbour of a stored vector is itself.
    true_MK = truth(vectors, np.concatenate(every), KS[-1] + 1)
    ends = np.cumsum([len(q.tune_MD) + len(q.held_MD) for q in asked.values()])
    return {
        name: part_MK[:, int(queries.stored) :][:, : KS[-1]]
        for (name, queries), part_MK in zip(asked.items(), np.split(true_MK, ends), strict=False)
    }


def _known(spec: IndexSpec, vectors: VectorReader, built: Any, build_s: float) -> dict[str, Any]:
    return {
        "design": spec.name(vectors.live, vectors.dim),
        "rows": vectors.live,
        "bytes_per_vector": approximate.size(built) / vectors.live,
        "build_s": build_s,
    }


def truth(vectors: VectorReader, queries_MD: Floats, k: int) -> Ints:
    """Return the true neighbours among the live rows, shape (M, K)."""
    # A single search: coding the rows would take longer than it saves.
    exact = Exact(vectors.shards, coded_bytes=0)
    return exact.search(queries_MD, k, vectors.live_N)[1]
