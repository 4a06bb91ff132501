"""Recall and latency of an index, and the fastest search parameters that reach a recall.

Shapes: M queries, K neighbours, R candidates.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from mmalign.arrays import Floats, Ints
from mmalign.index.approximate import Approximate
from mmalign.index.spec import OperatingPoint

# Maximum candidates of a sweep: as a multiple of the neighbours wanted, and in total. Both count
# rows: where a row has several vectors, there are as many times more candidates.
MAX_CANDIDATES_PER_K, MAX_CANDIDATES = 40, 2_000
CANDIDATES_STEP = 1.3
# nprobe or efSearch is doubled until it suffices; the sweep starts at half of that, and grows by
# NPROBE_OR_EF_STEP.
MIN_NPROBE_OR_EF, NPROBE_OR_EF_STEP = 4, 2**0.25
# A sweep ends after this many consecutive steps that were slower than the best.
MAX_WORSE_STEPS = 2
# Queries that are timed one by one: while tuning, and at the end.
TIMED_IN_TUNING, TIMED_HELD_OUT = 64, 300
# Bootstrap resamples for a confidence interval.
BOOTSTRAP_RESAMPLES = 1_000
# Queries that one index answers before the next takes its turn.
QUERIES_PER_TURN = 50


@dataclass(frozen=True)
class HeldOut:
    """Held-out queries: not used for tuning, only to measure its result."""

    queries_MD: Floats
    image_ids_M: Ints | None = None
    """Image number of each query; None if each query is a group of its own."""


@dataclass(frozen=True)
class Trial:
    """One measured way to search."""

    spec_name: str
    """See `IndexSpec.name`."""
    rows: int
    query_modality: str
    point: OperatingPoint
    queries: int
    recall: float
    """Share of the true k nearest rows that were found, on held-out queries."""
    low: float
    high: float
    """95 % confidence interval of the recall, over the images of the queries."""
    p50_ms: float
    p99_ms: float
    """Latency of one query at a time."""
    qps: float
    """Queries per second, in a batch."""
    bytes_per_vector: float
    build_s: float


def neighbour_recall(found_MK: Ints, true_MK: Ints) -> Floats:
    """Return the share of the true nearest neighbours that a search found, for each query.

    >>> neighbour_recall(np.array([[1, 2]]), np.array([[2, 3]])).tolist()
    [0.5]
    """
    matches = (found_MK[:, :, None] == true_MK[:, None, :]) & (true_MK[:, None, :] >= 0)
    return matches.any(axis=1).sum(axis=1) / np.maximum((true_MK >= 0).sum(axis=1), 1)  # type: ignore[no-any-return]


def row_recall(index: Approximate, found_MK: Ints, true_MK: Ints) -> Floats:
    """Return the share of the true nearest rows that a search found, for each query.

    Args:
        index: It knows the row of each vector.
        found_MK: Vector numbers, no two of one row.
        true_MK: Likewise.
    """
    return neighbour_recall(index.vectors.rows_of(found_MK), index.vectors.rows_of(true_MK))


def interval(recall_M: Floats, image_ids_M: Ints | None = None) -> tuple[float, float]:
    """Compute the 95 % confidence interval of a mean over queries by a cluster bootstrap.

    Captions of one image find, or miss, the same neighbours: treated as independent, they give too
    narrow an interval. If all shares are equal, resampling shows no error, so the interval extends
    at least 1.5 / groups to each side of the mean.

    Args:
        recall_M: Recall of each query.
        image_ids_M: The image of each query; without it, each query is a group of its own.

    Source: the cluster bootstrap, Field and Welsh 2007, "Bootstrapping clustered data".
    """
    image_ids_M = np.arange(len(recall_M)) if image_ids_M is None else image_ids_M
    image_ids_M = np.unique(image_ids_M, return_inverse=True)[1]
    sizes_G, sums_G = np.bincount(image_ids_M), np.bincount(image_ids_M, weights=recall_M)
    count = max(len(sizes_G), 1)
    counts_BG = np.random.default_rng(0).multinomial(
        count, np.full(count, 1 / count), BOOTSTRAP_RESAMPLES
    )
    mean_B = (counts_BG @ sums_G) / (counts_BG @ sizes_G)
    mean, margin = float(np.mean(recall_M)), 1.5 / count
    low, high = np.quantile(mean_B, [0.025, 0.975])
    return max(0.0, min(float(low), mean - margin)), min(1.0, max(float(high), mean + margin))


def candidate_ranks(rows_MR: Ints, true_MK: Ints) -> Ints:
    """Return the rank of each true neighbour among the candidates, (M, K); R if it is missing."""
    candidates = rows_MR.shape[1]
    out = np.full(true_MK.shape, candidates)
    for m, (rows_R, true_K) in enumerate(zip(rows_MR, true_MK, strict=True)):
        order = np.argsort(rows_R)
        at = np.minimum(np.searchsorted(rows_R, true_K, sorter=order), candidates - 1)
        found = rows_R[order[at]] == true_K
        out[m, found] = order[at[found]]
    return out


def tune(
    index: Approximate, queries_MD: Floats, true_MK: Ints, k: int, target_recall: float
) -> tuple[OperatingPoint, bool]:
    """Find the fastest parameters that reach the wanted recall of the k nearest neighbours.

    For each nprobe or efSearch, one search shows how many candidates the recall requires. The
    resulting parameters are timed, one query at a time. Neighbours are rows: one counts as found
    if its best vector is a candidate, so recall by row is at least that high.

    Returns:
        The parameters, and True; or those with the highest recall, and False, if even the whole
        index falls short, as its codes are too coarse.
    """
    max_candidates = _max_candidates(index, k)

    @cache
    def sufficient(nprobe_or_ef: int) -> OperatingPoint | None:
        """Return the point with the fewest candidates that reach the wanted recall."""
        rows_MR = index.candidates(queries_MD, OperatingPoint(k, nprobe_or_ef, max_candidates))
        ranks_MK = candidate_ranks(rows_MR, true_MK[:, :k])
        enough = (
            c for c in candidate_counts(k, max_candidates) if (ranks_MK < c).mean() >= target_recall
        )
        return next((OperatingPoint(k, nprobe_or_ef, c) for c in enough), None)

    max_nprobe_or_ef = index.max_nprobe_or_ef
    first_sufficient = next(
        (n for n in geometric_steps(MIN_NPROBE_OR_EF, max_nprobe_or_ef, 2) if sufficient(n)),
        None,
    )
    if first_sufficient is None:
        return OperatingPoint(k, max_nprobe_or_ef, max_candidates), False
    best: OperatingPoint | None = None
    fastest, slower_steps = np.inf, 0
    for nprobe_or_ef in geometric_steps(
        max(MIN_NPROBE_OR_EF, first_sufficient // 2), max_nprobe_or_ef, NPROBE_OR_EF_STEP
    ):
        point = sufficient(nprobe_or_ef)
        if point is None:
            continue
        seconds = float(np.median(time_queries(index, queries_MD[:TIMED_IN_TUNING], point)))
        if seconds < fastest:
            best, fastest, slower_steps = point, seconds, 0
        else:
            slower_steps += 1
        if slower_steps == MAX_WORSE_STEPS or point.candidates == k:
            break
    assert best
    return best, True


def widen_to_recall(
    index: Approximate,
    held_out: HeldOut,
    true_MK: Ints,
    point: OperatingPoint,
    target_recall: float,
    *,
    self_matches: int = 0,
) -> OperatingPoint | None:
    """Widen the search until held-out queries reach the promised recall.

    The lower bound of the confidence interval must reach it. If the queries are too few for that
    even at a recall of 1, the mean recall must reach it.

    Args:
        index: Built and tuned.
        held_out: Held-out queries.
        true_MK: Their true neighbours.
        point: Where to start.
        target_recall: The promised recall.
        self_matches: See `measure`.

    Returns:
        The first parameters that reach it, or None if even the widest do not.
    """
    max_candidates = max(point.candidates, _max_candidates(index, point.k))
    low_if_perfect = interval(np.ones(len(held_out.queries_MD), np.float32), held_out.image_ids_M)[
        0
    ]
    while True:
        found_MK = index.search_at(held_out.queries_MD, replace(point, k=point.k + self_matches))[1]
        recall_M = row_recall(index, found_MK, true_MK[:, : point.k])
        low = (
            interval(recall_M, held_out.image_ids_M)[0]
            if low_if_perfect >= target_recall
            else recall_M.mean()
        )
        if low >= target_recall:
            return point
        wider = OperatingPoint(
            point.k,
            min(
                math.ceil(point.nprobe_or_ef * NPROBE_OR_EF_STEP),
                max(point.nprobe_or_ef, index.max_nprobe_or_ef),
            ),
            min(math.ceil(point.candidates * CANDIDATES_STEP), max_candidates),
        )
        if wider == point:
            return None
        point = wider


def geometric_steps(first: int, last: int, step: float) -> list[int]:
    """List the values of nprobe or efSearch to try, each `step` times the one before.

    >>> geometric_steps(4, 20, 1.3), geometric_steps(4, 3, 2)
    ([4, 5, 7, 9, 11, 15, 19, 20], [3])
    """
    count = 1 + max(0, math.ceil(math.log(last / first, step)))
    steps = dict.fromkeys(round(first * step**i) for i in range(count))
    return [s for s in steps if s < last] + [last]


def _max_candidates(index: Approximate, k: int) -> int:
    """Return the largest number of candidates worth trying."""
    per_row = index.vectors.per_row
    most = min(MAX_CANDIDATES_PER_K * k, MAX_CANDIDATES)
    return min(math.ceil(per_row * most), index.indexed)


def candidate_counts(k: int, max_candidates: int) -> list[int]:
    """List the numbers of candidates to try for k neighbours."""
    steps = [round(k * CANDIDATES_STEP**i) for i in range(20)]
    return [s for s in steps if s < max_candidates] + [max_candidates]


def time_queries(index: Approximate, queries_MD: Floats, point: OperatingPoint) -> Floats:
    """Measure the seconds that each query takes, one at a time, shape (M,)."""
    index.search_at(queries_MD[:1], point)
    out = []
    for m in range(len(queries_MD)):
        started = time.perf_counter()
        index.search_at(queries_MD[m : m + 1], point)
        out.append(time.perf_counter() - started)
    return np.array(out)


def time_in_turns(
    contestants: Sequence[tuple[Approximate, OperatingPoint]], queries_MD: Floats
) -> list[Floats]:
    """Measure the seconds that each contestant takes for each query, one at a time.

    The contestants take turns, so that other load on the machine slows all of them equally.
    """
    parts: list[list[Floats]] = [[] for _ in contestants]
    for first in range(0, len(queries_MD), QUERIES_PER_TURN):
        for (index, point), seconds in zip(contestants, parts, strict=True):
            seconds.append(time_queries(index, queries_MD[first : first + QUERIES_PER_TURN], point))
    return [np.concatenate(seconds) for seconds in parts]


def measure(
    index: Approximate,
    held_out: HeldOut,
    true_MK: Ints,
    point: OperatingPoint,
    seconds_M: Floats,
    *,
    self_matches: int = 0,
    **trial_fields: Any,
) -> Trial:
    """Measure one way to search on held-out queries.

    Args:
        index: Built and tuned.
        held_out: The queries.
        true_MK: Their true neighbours, at least `point.k` of each.
        point: Parameters of the search.
        seconds_M: The result of `time_queries` or `time_in_turns` for some of the queries.
        self_matches: 1 if the queries are stored vectors, as each then finds itself, which does not
            count.
        trial_fields: The other fields of a `Trial`.
    """
    queries_MD = held_out.queries_MD
    index.search_at(queries_MD[:1], point)
    started = time.perf_counter()
    found_MK = index.search_at(queries_MD, replace(point, k=point.k + self_matches))[1]
    batch_s = time.perf_counter() - started
    recall_M = row_recall(index, found_MK, true_MK[:, : point.k])
    low, high = interval(recall_M, held_out.image_ids_M)
    return Trial(
        point=point,
        queries=len(queries_MD),
        recall=float(recall_M.mean()),
        low=low,
        high=high,
        p50_ms=1_000 * float(np.quantile(seconds_M, 0.5)),
        p99_ms=1_000 * float(np.quantile(seconds_M, 0.99)),
        qps=len(queries_MD) / batch_s,
        **trial_fields,
    )
