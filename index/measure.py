"""How well an index finds, how fast, and with which parameters it does so best.

M queries, K neighbours, R candidates.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from mmalign.index.approximate import Approximate
from mmalign.index.spec import Floats, Ints, Point

# Candidates that a sweep looks at: so many times the neighbours wanted, and never more than that.
DEEPEST, MOST_CANDIDATES = 40, 2_000
DEEPER = 1.3
# Breadths are doubled until one is enough; from the half of it they grow in steps.
NARROWEST, STEP = 4, 2**0.25
# A sweep ends when so many steps in a row were slower than the best.
WORSE = 2
# Queries that are timed alone: while tuning, and at the end.
TIMED, ALONE = 64, 300
# Queries that one index answers before it is the turn of the next.
TURN = 50


@dataclass(frozen=True)
class Trial:
    """One measured way to search."""

    design: str
    """By its name in FAISS's factory."""
    rows: int
    asked: str
    """Modality of the queries."""
    point: Point
    queries: int
    recall: float
    """Share of the true k nearest neighbours that were found, on queries that tuned nothing."""
    low: float
    high: float
    """Confidence interval of 95 % of the recall, over queries."""
    p50_ms: float
    p99_ms: float
    """Of one query at a time."""
    qps: float
    """Queries a second, many at once."""
    bytes_per_vector: float
    build_s: float


def neighbour_recall(found_MK: Ints, true_MK: Ints) -> Floats:
    """Share of the true nearest neighbours that an approximate search found, by query.

    >>> neighbour_recall(np.array([[1, 2]]), np.array([[2, 3]])).tolist()
    [0.5]
    """
    both = (found_MK[:, :, None] == true_MK[:, None, :]) & (true_MK[:, None, :] >= 0)
    return both.any(axis=1).sum(axis=1) / np.maximum((true_MK >= 0).sum(axis=1), 1)  # type: ignore[no-any-return]


def interval(shares_M: Floats, widths: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a mean over queries; 1.96 standard errors hold 95 %.

    Where all shares are equal, one query in three may still have been otherwise ("rule of three").
    """
    count = max(len(shares_M), 1)
    half = max(widths * float(np.std(shares_M)) / count**0.5, 1.5 / count)
    mean = float(np.mean(shares_M))
    return max(0.0, mean - half), min(1.0, mean + half)


def places(rows_MR: Ints, true_MK: Ints) -> Ints:
    """Where each true neighbour stands among the candidates, shape (M, K); R where it does not."""
    depth = rows_MR.shape[1]
    out = np.full(true_MK.shape, depth)
    for m, (rows_R, true_K) in enumerate(zip(rows_MR, true_MK, strict=True)):
        order = np.argsort(rows_R)
        at = np.minimum(np.searchsorted(rows_R, true_K, sorter=order), depth - 1)
        found = rows_R[order[at]] == true_K
        out[m, found] = order[at[found]]
    return out


def tune(
    index: Approximate, queries_MD: Floats, true_MK: Ints, k: int, wanted: float
) -> tuple[Point, bool]:
    """Find the fastest parameters that find the wanted share of the k nearest neighbours.

    A breadth needs the more candidates the fewer of the neighbours it has among the first ones; one
    search tells how many. What then is fastest is timed, one query at a time.

    Returns:
        The parameters, and True; or those that find most, and False, where even the whole index
        does not find enough, as its codes are too coarse.
    """
    deepest = min(DEEPEST * k, index.held, MOST_CANDIDATES)

    @cache
    def sufficient(breadth: int) -> Point | None:
        """With the fewest candidates that hold the wanted share."""
        rows_MR = index.candidates(queries_MD, Point(k, breadth, deepest))
        places_MK = places(rows_MR, true_MK[:, :k])
        enough = (c for c in depths(k, deepest) if (places_MK < c).mean() >= wanted)
        return next((Point(k, breadth, c) for c in enough), None)

    most = index.breadest
    enough = next((b for b in breadths(NARROWEST, most, 2) if sufficient(b)), None)
    if enough is None:
        return Point(k, most, deepest), False
    best: Point | None = None
    fastest, worse = np.inf, 0
    for breadth in breadths(max(NARROWEST, enough // 2), most, STEP):
        point = sufficient(breadth)
        if point is None:
            continue
        seconds = float(np.median(times(index, queries_MD[:TIMED], point)))
        if seconds < fastest:
            best, fastest, worse = point, seconds, 0
        else:
            worse += 1
        if worse == WORSE or point.candidates == k:
            break
    assert best
    return best, True


def breadths(least: int, most: int, step: float) -> list[int]:
    """Breadths worth trying, each so many times the one before.

    >>> breadths(4, 20, 1.3), breadths(4, 3, 2)
    ([4, 5, 7, 9, 11, 15, 19, 20], [3])
    """
    count = 1 + max(0, math.ceil(math.log(most / least, step)))
    steps = dict.fromkeys(round(least * step**i) for i in range(count))
    return [s for s in steps if s < most] + [most]


def depths(k: int, deepest: int) -> list[int]:
    """Numbers of candidates worth trying for k neighbours."""
    steps = [round(k * DEEPER**i) for i in range(20)]
    return [s for s in steps if s < deepest] + [deepest]


def times(index: Approximate, queries_MD: Floats, point: Point) -> Floats:
    """Seconds that each query takes, one at a time, shape (M,)."""
    index.search_at(queries_MD[:1], point)
    out = []
    for m in range(len(queries_MD)):
        started = time.perf_counter()
        index.search_at(queries_MD[m : m + 1], point)
        out.append(time.perf_counter() - started)
    return np.array(out)


def in_turns(contestants: Sequence[tuple[Approximate, Point]], queries_MD: Floats) -> list[Floats]:
    """Seconds that each query takes each contestant, one at a time.

    They take turns, so that whatever else the machine does slows all of them alike.
    """
    parts: list[list[Floats]] = [[] for _ in contestants]
    for first in range(0, len(queries_MD), TURN):
        for (index, point), own in zip(contestants, parts, strict=True):
            own.append(times(index, queries_MD[first : first + TURN], point))
    return [np.concatenate(own) for own in parts]


def measure(
    index: Approximate,
    queries_MD: Floats,
    true_MK: Ints,
    point: Point,
    seconds_M: Floats,
    *,
    own: int = 0,
    **known: Any,
) -> Trial:
    """Measure one way to search on queries that tuned nothing.

    Args:
        index: Built and tuned.
        queries_MD: The queries.
        true_MK: Their true neighbours, at least as many as the point is for.
        point: Parameters of the search.
        seconds_M: What `times` or `in_turns` say of some of the queries.
        own: Rows that each query finds beside them and that are none: itself, if it is stored.
        known: The rest of a `Trial`.
    """
    index.search_at(queries_MD[:1], point)
    started = time.perf_counter()
    found_MK = index.search_at(queries_MD, replace(point, k=point.k + own))[1]
    batch_s = time.perf_counter() - started
    shares_M = neighbour_recall(found_MK, true_MK[:, : point.k])
    low, high = interval(shares_M)
    return Trial(
        point=point,
        queries=len(queries_MD),
        recall=float(shares_M.mean()),
        low=low,
        high=high,
        p50_ms=1_000 * float(np.quantile(seconds_M, 0.5)),
        p99_ms=1_000 * float(np.quantile(seconds_M, 0.99)),
        qps=len(queries_MD) / batch_s,
        **known,
    )
