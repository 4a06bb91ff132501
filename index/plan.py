"""Choose the fastest index that reaches a recall target, by measurement: on samples, then on all.

Shapes: N rows, M queries, D dimensions, K neighbours.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np

from mmalign.arrays import Floats, Ints
from mmalign.index import approximate
from mmalign.index.approximate import Approximate, cluster
from mmalign.index.exact import Exact
from mmalign.index.measure import (
    TIMED_HELD_OUT,
    HeldOut,
    Trial,
    measure,
    time_in_turns,
    time_queries,
    tune,
    widen_to_recall,
)
from mmalign.index.quantizer import CoarseQuantizer
from mmalign.index.spec import TUNED_KS, IndexSpec, OperatingPoint
from mmalign.index.vectors import VectorReader
from mmalign.memory import release_free_memory, release_large_blocks
from mmalign.progress import over, say

EXACT_ROWS = 50_000
"""Below this, comparing every row takes milliseconds and misses nothing."""
SPECS = (
    IndexSpec("ivf", "PQ/2x4fsr", lists_factor=1),
    IndexSpec("ivf", "PQ/4x4fsr", lists_factor=1),
    IndexSpec("ivf", "RaBitQfs1", lists_factor=1),
    IndexSpec("ivf", "RaBitQfs2", lists_factor=1),
    IndexSpec("hnsw", "SQ8", links=32),
)
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "ivf": ({"lists_factor": 2}, {"lists_factor": 4}, {"metric": "queries"}),
    "hnsw": ({"code": "SQfp16"},),
}
"""By kind: variants of the fastest spec of the first round, added to the second."""
# Rows of each round. Queries to tune in a round; as many others measure.
ROUND_ROWS, ROUND_QUERIES = (1 << 14, 1 << 16), 300
# At most this share of the specs advances to the next round. None does that is more than
# MAX_SLOWDOWN times slower than the best.
ADVANCING_SHARE, MAX_SLOWDOWN = 0.3, 1.5
# Of specs that are at most so many times slower than the best for the first query modality, the one
# that is fastest for the others is chosen.
EQUALLY_FAST = 1.15
# How many times faster another spec must be for a modality for it to be worth telling.
WORTH_TELLING = 1.5
# Queries to tune over all rows, of each modality. Fewer are not enough: their interval is wider, so
# more of the index is searched than the recall needs.
TUNING_QUERIES = 1_000
# Tuning targets a recall this far above the promised one, as recall on other queries is slightly
# lower.
MARGIN = 0.01


@dataclass(frozen=True)
class Queries:
    """Queries of one modality: some tune, the others are held out to measure."""

    tune_MD: Floats
    held_out_MD: Floats
    stored: bool = False
    """Whether they are vectors of the index: each then finds itself, which does not count."""
    held_out_image_ids_M: Ints | None = None
    """The image that each held-out query belongs to; None if no two belong to the same."""

    @property
    def held_out(self) -> HeldOut:
        """The held-out queries."""
        return HeldOut(self.held_out_MD, self.held_out_image_ids_M)


@dataclass(frozen=True)
class Plan:
    """An index spec, built and tuned."""

    spec: IndexSpec
    index: Any = None
    """The FAISS index; None for exact search."""
    points: dict[str, list[OperatingPoint]] = field(default_factory=dict)
    """Search parameters by query modality, for ascending k."""
    measured: list[Trial] = field(default_factory=list)
    """The promised results: measured over all rows, on held-out queries."""
    tried: list[Trial] = field(default_factory=list)
    """All measurements of the rounds."""


def plan(
    vectors: VectorReader,
    by_modality: Mapping[str, Queries],
    recall: float,
    memory: float,
    memory_share: float = 1.0,
) -> Plan:
    """Choose, build and tune an index.

    Args:
        vectors: The vectors to be searched.
        by_modality: Queries by modality; those of the first one decide which spec is chosen.
        recall: Share of the true ten nearest rows to be found, above 0 and at most 1.
        memory: Bytes that the index may hold, stored vectors not counted.
        memory_share: `memory` as a share of the memory for all indexes of a store.
    """
    if vectors.live < EXACT_ROWS or recall == 1:
        return Plan(IndexSpec("exact"))
    possible = [spec for spec in SPECS if spec.fits_dim(vectors.dim)]
    fitting = [spec for spec in possible if _bytes(spec, vectors) <= memory]
    if not fitting:
        smallest = min(_bytes(spec, vectors) for spec in possible)
        needed_mb = math.ceil(smallest / memory_share / 1e6)
        part = f" ({memory_share:.0%} of --memory)" if memory_share < 1 else ""
        say(
            f"no index of {vectors.live:,} vectors fits in {memory / 1e6:,.1f} MB{part}, so search "
            f"will be exact; --memory {needed_mb}MB is enough for an index"
        )
        return Plan(IndexSpec("exact"))
    by_modality = {
        name: q for name, q in by_modality.items() if len(q.tune_MD) and len(q.held_out_MD)
    }
    if not by_modality:
        say("too few queries to tune and measure an index, so search will be exact")
        return Plan(IndexSpec("exact"))
    release_large_blocks()
    specs, tried = _run_rounds(fitting, vectors, by_modality, recall=recall, memory=memory)
    if not specs:
        near = max(tried, key=attrgetter("recall"))
        say(
            f"no index within {memory / 1e6:,.1f} MB reaches a recall of {recall:.1%}, so search "
            f"will be exact; the best was {near.spec_name} with {near.recall:.1%}"
        )
        return Plan(IndexSpec("exact"), tried=tried)
    release_free_memory()
    true_rows = _true_by_modality(vectors, _tuning(by_modality))
    release_free_memory()
    for spec in specs:
        built = _build_and_tune(spec, vectors, by_modality, true_rows, recall)
        if built is not None:
            return replace(built, tried=tried)
        name = spec.name(vectors.live, vectors.dim)
        missed = f"{name} does not reach a recall of {recall:.1%} over all rows"
        say(f"{missed}: tuning queries or held-out queries fall short")
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


def _run_rounds(
    specs: list[IndexSpec],
    vectors: VectorReader,
    by_modality: Mapping[str, Queries],
    *,
    recall: float,
    memory: float,
) -> tuple[list[IndexSpec], list[Trial]]:
    """Compare index specs on samples; the best of each round are compared again in the next.

    Returns:
        The specs that reached the recall, best first: those of the last round, then the others. All
        are needed, as the best on a sample may fall short over all rows. And all trials.
    """
    tried: list[Trial] = []
    ranked: list[IndexSpec] = []
    finalists: list[_Result] = []
    for number, rows in enumerate(ROUND_ROWS):
        sample = vectors.sample(rows, seed=rows)
        tournament = _Tournament(sample, by_modality, recall)
        for spec in over(f"try {rows:,}", specs, len(specs), "specs"):
            tournament.enter(spec)
        results = tournament.results()
        tried += [trial for result in results for trial in result.trials]
        finalists = best_first([result for result in results if result.reached])
        winners = [result.spec for result in finalists]
        ranked = winners + [spec for spec in ranked if spec not in winners]
        if not winners or rows >= vectors.live:
            break
        specs = _advancing(finalists, len(results))
        if number == 0:
            fastest = min(finalists, key=attrgetter("main_ms")).spec
            variants = [replace(fastest, **change) for change in VARIANTS[fastest.kind]]
            specs += [
                spec for spec in variants if spec not in specs and _bytes(spec, vectors) <= memory
            ]
    _say_what_others_would_gain(finalists)
    return ranked, tried


@dataclass(frozen=True)
class _Result:
    """What a round measured of a spec."""

    spec: IndexSpec
    trials: list[Trial]
    """One for each query modality, the first one first."""
    reached: bool
    """Whether tuning reached the recall for all of them."""

    @property
    def main_ms(self) -> float:
        """Median latency of the queries of the first modality."""
        return self.trials[0].p50_ms

    @property
    def others_ms(self) -> float:
        """Sum of the median latencies of the other modalities."""
        return sum(trial.p50_ms for trial in self.trials[1:])


def best_first(results: Sequence[_Result]) -> list[_Result]:
    """Order the results of a round: equally fast for the first modality, then by the others."""
    if not results:
        return []
    limit = EQUALLY_FAST * min(result.main_ms for result in results)

    def cost(result: _Result) -> tuple[bool, float, float]:
        if result.main_ms <= limit:
            return False, result.others_ms, result.main_ms
        return True, result.main_ms, 0.0

    return sorted(results, key=cost)


def _advancing(finalists: Sequence[_Result], entered: int) -> list[IndexSpec]:
    """Return the specs that go on: the best, and the fastest for each other modality."""
    limit = MAX_SLOWDOWN * min(result.main_ms for result in finalists)
    fast_enough = [result.spec for result in finalists if result.main_ms <= limit]
    specs = fast_enough[: math.ceil(ADVANCING_SHARE * entered)]
    for number in range(1, len(finalists[0].trials)):
        fastest = min(finalists, key=lambda result: result.trials[number].p50_ms)
        if fastest.spec not in specs:
            specs.append(fastest.spec)
    return specs


def _say_what_others_would_gain(finalists: Sequence[_Result]) -> None:
    """Say where one index does not serve all query modalities well."""
    for number in range(1, len(finalists[0].trials) if finalists else 0):
        chosen, main = finalists[0].trials[number], finalists[0].trials[0]
        fastest = min(finalists, key=lambda result: result.trials[number].p50_ms)
        gain = chosen.p50_ms / fastest.trials[number].p50_ms
        if gain >= WORTH_TELLING:
            name = chosen.query_modality
            loss = fastest.main_ms / main.p50_ms
            say(
                f"one index does not serve all queries equally: on a sample, {name} queries are "
                f"{gain:.1f} times faster with {fastest.trials[number].spec_name}, but "
                f"{main.query_modality} queries {loss:.1f} times slower; --prefer {name} chooses "
                f"by {name} queries"
            )


class _Tournament:
    """One round: specs are built over the same sample and searched with the same queries."""

    def __init__(
        self, sample: VectorReader, by_modality: Mapping[str, Queries], recall: float
    ) -> None:
        self.sample = sample
        self.recall = recall
        self.main_MD = next(iter(by_modality.values())).tune_MD
        self.contests = {name: _Contest.of(sample, q) for name, q in by_modality.items()}
        self.quantizers: dict[tuple[int, str], CoarseQuantizer] = {}
        self.entries: list[tuple[IndexSpec, Approximate, dict[str, OperatingPoint], bool, float]]
        self.entries = []

    def enter(self, spec: IndexSpec) -> None:
        """Build an index, and tune it for each query modality."""
        started = time.perf_counter()
        key = (spec.lists_factor, spec.metric)
        if spec.kind == "ivf" and key not in self.quantizers:
            self.quantizers[key] = cluster(self.sample, spec, self.main_MD)
        built = approximate.build(self.sample, spec, self.quantizers.get(key), shown=False)
        build_s = time.perf_counter() - started
        index = Approximate(built, self.sample, {}, self.sample.total)
        tuned = {
            name: tune(index, contest.tuning_MD, contest.tuning_MK, TUNED_KS[0], self.recall)
            for name, contest in self.contests.items()
        }
        points = {name: point for name, (point, _) in tuned.items()}
        reached = all(reached for _, reached in tuned.values())
        self.entries.append((spec, index, points, reached, build_s))

    def results(self) -> list[_Result]:
        """Measure all, in turns."""
        seconds = {
            name: time_in_turns(
                [(index, points[name]) for _, index, points, _, _ in self.entries],
                contest.measuring_MD,
            )
            for name, contest in self.contests.items()
        }
        return [
            _Result(
                spec,
                [
                    measure(
                        index, HeldOut(contest.measuring_MD), contest.measuring_MK, points[name],
                        seconds[name][number], query_modality=name,
                        **_common_fields(spec, self.sample, index.faiss, build_s),
                    )
                    for name, contest in self.contests.items()
                ],
                reached,
            )
            for number, (spec, index, points, reached, build_s) in enumerate(self.entries)
        ]  # fmt: skip


@dataclass(frozen=True)
class _Contest:
    """Queries of one modality in a round, and their true neighbours in the sample.

    A query that is a stored vector finds itself where the sample has it, which makes recall a
    little higher: equally for all specs.
    """

    tuning_MD: Floats
    measuring_MD: Floats
    tuning_MK: Ints
    measuring_MK: Ints

    @classmethod
    def of(cls, sample: VectorReader, queries: Queries) -> "_Contest":
        """Find the true neighbours; a few queries are split in half, one is used for both."""
        count = min(ROUND_QUERIES, max(1, len(queries.tune_MD) // 2))
        tuning_MD, measuring_MD = queries.tune_MD[:count], queries.tune_MD[-count:]
        true_MK = true_neighbours(sample, np.concatenate([tuning_MD, measuring_MD]), TUNED_KS[0])
        return cls(tuning_MD, measuring_MD, *np.split(true_MK, [count]))


def _build_and_tune(
    spec: IndexSpec,
    vectors: VectorReader,
    by_modality: Mapping[str, Queries],
    true_rows: Mapping[str, Ints],
    recall: float,
) -> Plan | None:
    """Build over all rows and tune for every modality; None if held-out recall falls short.

    The coarse quantizer is trained with all tuning queries of the first modality, also those that
    `_tuning` leaves out.
    """
    started = time.perf_counter()
    quantizer = None
    if spec.kind == "ivf":
        quantizer = cluster(vectors, spec, next(iter(by_modality.values())).tune_MD)
    built = approximate.build(vectors, spec, quantizer)
    build_s = time.perf_counter() - started
    index = Approximate(built, vectors, {}, vectors.total)
    common = _common_fields(spec, vectors, built, build_s)
    points: dict[str, list[OperatingPoint]] = {}
    measured: list[Trial] = []
    for name, queries in _tuning(by_modality).items():
        tuning_MK, held_out_MK = np.split(true_rows[name], [len(queries.tune_MD)])
        points[name] = []
        for k in TUNED_KS:
            # For a larger k, each query gives more neighbours to estimate recall from, so fewer
            # queries are enough.
            tuning_MD = queries.tune_MD[: TUNING_QUERIES if k == TUNED_KS[0] else ROUND_QUERIES]
            self_matches = int(queries.stored)
            target = tuning_target(recall)
            start, reached = tune(index, tuning_MD, tuning_MK[: len(tuning_MD)], k, target)
            point = (
                widen_to_recall(
                    index, queries.held_out, held_out_MK, start, recall, self_matches=self_matches
                )
                if reached
                else None
            )
            if point is None:
                return None
            points[name].append(point)
            seconds_M = time_queries(index, queries.held_out_MD[:TIMED_HELD_OUT], point)
            fields = common | {"query_modality": name, "self_matches": self_matches}
            measured.append(
                measure(index, queries.held_out, held_out_MK, point, seconds_M, **fields)
            )
    return Plan(spec, built, points, measured)


def _tuning(by_modality: Mapping[str, Queries]) -> dict[str, Queries]:
    """Return the queries that tune and measure over all rows."""
    return {
        name: replace(queries, tune_MD=queries.tune_MD[:TUNING_QUERIES])
        for name, queries in by_modality.items()
    }


def _true_by_modality(vectors: VectorReader, by_modality: Mapping[str, Queries]) -> dict[str, Ints]:
    """Return the true neighbours of the tuning and the held-out queries, by modality."""
    all_MD = [
        q_MD for queries in by_modality.values() for q_MD in (queries.tune_MD, queries.held_out_MD)
    ]
    # The nearest neighbour of a stored vector is itself.
    true_MK = true_neighbours(vectors, np.concatenate(all_MD), TUNED_KS[-1] + 1)
    ends = np.cumsum([len(q.tune_MD) + len(q.held_out_MD) for q in by_modality.values()])
    return {
        name: part_MK[:, int(queries.stored) :][:, : TUNED_KS[-1]]
        for (name, queries), part_MK in zip(
            by_modality.items(), np.split(true_MK, ends), strict=False
        )
    }


def _common_fields(
    spec: IndexSpec, vectors: VectorReader, built: Any, build_s: float
) -> dict[str, Any]:
    return {
        "spec_name": spec.name(vectors.live, vectors.dim),
        "rows": vectors.live,
        "bytes_per_vector": approximate.serialized_bytes(built) / vectors.live,
        "build_s": build_s,
    }


def true_neighbours(vectors: VectorReader, queries_MD: Floats, k: int) -> Ints:
    """Return the true neighbours among the live rows: the best vector of each, shape (M, K)."""
    # No codes: they make searches faster, but take longer to compute than this one search.
    exact = Exact(vectors.shards, max_code_bytes=0, owners=vectors.owners)
    return exact.search(queries_MD, k, vectors.live_N)[1]
