"""Queries that are encoded, answered from one generation of a store.

Shapes: M queries, G queries of one group, D dimensions, K candidates, N rows of the store.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import overload

import numpy as np

from mmalign.arrays import Bools, Floats, Ints
from mmalign.search.diversity import candidates, diverse_order
from mmalign.search.duplicates import MOST, groups
from mmalign.search.exclusion import Excluded, left_out
from mmalign.search.fusion import depth
from mmalign.search.query import Query, Selection
from mmalign.search.snapshot import Hit, Snapshot


@dataclass(frozen=True)
class Hits(Sequence[Hit]):
    """The hits of one query, best first."""

    query: Query = field(compare=False)
    hits: tuple[Hit, ...] = ()
    nothing_found: bool | None = None
    """Whether no row is relevant: the best hit is unlikely, or there is none; None if relevance is
    not known, or rows were listed. The nearest rows are hits all the same."""

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Hit]: ...
    def __getitem__(self, index: int | slice) -> Hit | Sequence[Hit]:
        return self.hits[index]


def answers(
    snapshot: Snapshot,
    queries: Sequence[Query],
    vectors_MD: Floats,
    excluded: Mapping[int, list[Excluded]],
    *,
    extra: Sequence[str],
    elsewhere: Iterable[str] = (),
) -> list[Hits]:
    """Answer queries that are encoded.

    Args:
        snapshot: What is searched.
        queries: The queries.
        vectors_MD: Their vectors, see `encode_queries`.
        excluded: The excluded items of queries, see `encode_queries`.
        extra: Columns to read, see `Snapshot.hits`.
        elsewhere: Fields that only other stores have, see `Snapshot.selected`.
    """
    selections = {query.selection for query in queries}
    selected = {s: snapshot.selected(s, elsewhere) for s in selections}
    found: dict[int, Hits] = {}
    for asked, numbers in _group_by_search(queries, snapshot).items():
        vectors_GD = vectors_MD[numbers] if asked.by_vector else None
        selected_N = selected[asked.selection]
        if asked.excluding is not None:
            query_D = None if vectors_GD is None else vectors_GD[0]
            left_out_N = left_out(snapshot, excluded[asked.excluding], query_D, asked.to)
            selected_N = ~left_out_N if selected_N is None else selected_N & ~left_out_N
        group = [queries[number] for number in numbers]
        hits = _found(snapshot, asked, group, vectors_GD, selected_N, extra=extra)
        found |= zip(numbers, hits, strict=True)
    return [found[number] for number in range(len(queries))]


def _text_of(query: Query) -> str | None:
    """Return the words of a query, if relevance is known for it: texts, none of them subtracted."""
    items = [(item, weight) for item, weight in query.items if isinstance(item, str) and weight > 0]
    return " ".join(item for item, _ in items) if len(items) == len(query.items) else None


@dataclass(frozen=True)
class _Asked:
    """What queries that are searched in one call have in common."""

    to: str
    selection: Selection
    exact: bool
    kind: str
    wanted: int
    by_vector: bool
    excluding: int | None
    """The number of a query that excludes items, which is searched alone."""


def _found(
    snapshot: Snapshot,
    asked: _Asked,
    queries: Sequence[Query],
    vectors_MD: Floats | None,
    selected_N: Bools | None,
    *,
    extra: Sequence[str],
) -> list[Hits]:
    """Answer queries that can be searched in one call.

    Args:
        snapshot: What is searched.
        asked: What they have in common.
        queries: The queries.
        vectors_MD: Their vectors; None if they have no items, then rows are listed.
        selected_N: Which rows may be found; None for all.
        extra: Columns to read, see `Snapshot.hits`.
    """
    if vectors_MD is None:
        return [_listed(snapshot, q, selected_N, extra) for q in queries]
    scores_MK, numbers_MK = snapshot.find(
        vectors_MD, asked.wanted, kind=asked.kind, to=asked.to, exact=asked.exact,
        allowed_N=snapshot.allowed(asked.to, selected_N),
    )  # fmt: skip
    return [
        _answer(
            snapshot, asked, q, vector_D, (scores_K, numbers_K), selected_N=selected_N, extra=extra
        )
        for q, vector_D, scores_K, numbers_K in zip(
            queries, vectors_MD, scores_MK, numbers_MK, strict=True
        )
    ]


def _answer(
    snapshot: Snapshot,
    asked: _Asked,
    query: Query,
    vector_D: Floats,
    near: tuple[Floats, Ints],
    *,
    selected_N: Bools | None,
    extra: Sequence[str],
) -> Hits:
    """Choose the hits of one query from what is near to it, or has its words.

    Something is found as well if a row has all the words. If there are too few groups of
    near-duplicates, more of the nearest rows are looked at.
    """
    to = asked.to
    is_found_K = near[1] >= 0
    scores_K, numbers_K = near[0][is_found_K], near[1][is_found_K]
    is_all = len(numbers_K) < asked.wanted
    fused = None
    if query.lexical:
        matches = snapshot.match(query.words)
        fused = snapshot.fuse(vector_D, near, to, matches, selected_N)
        scores_K, numbers_K = fused.scores_K, fused.numbers_K
    rows_K = snapshot.rows_of(numbers_K, to)
    order, first_K = _arranged(snapshot, query, scores_K, rows_K)
    too_few = query.group and len(np.unique(first_K)) < _chosen_from(query)
    if too_few and not is_all and asked.wanted < MOST:
        wider = replace(asked, wanted=min(4 * asked.wanted, MOST))
        return _found(snapshot, wider, [query], vector_D[None], selected_N, extra=extra)[0]
    judged = snapshot.judge(vector_D, scores_K, to, _text_of(query))
    nothing = None if len(scores_K) else True
    if judged and judged.is_calibrated:
        nothing = judged.nothing
        if fused:
            nothing = all(level == "unlikely" for level in judged.levels_K) and not fused.complete
    page = order[query.offset : query.offset + query.k]
    hits = snapshot.hits(
        scores_K[page], numbers_K[page], to, first=query.offset + 1, extra=extra,
        judged=judged and judged.of(page),
    )  # fmt: skip
    if fused:
        told = zip(hits, page.tolist(), strict=True)
        hits = [
            replace(hit, words=float(fused.words_K[i]), found_by=fused.found_by_K[i])
            for hit, i in told
        ]
    if query.group:
        likes = [rows_K[np.flatnonzero(first_K == place)[1:]] for place in page.tolist()]
        others = snapshot.store.rows(np.concatenate([*likes, rows_K[:0]]), ("id",))
        ids = (row["id"] for row in others)
        hits = [
            replace(hit, like=tuple(islice(ids, len(like_L))))
            for hit, like_L in zip(hits, likes, strict=True)
        ]
    return Hits(query, tuple(hits), nothing)


def _arranged(
    snapshot: Snapshot, query: Query, scores_K: Floats, rows_K: Ints
) -> tuple[Ints, Ints]:
    """Return the candidates that are hits, in their order, and the first of each one's group."""
    every_K = first_K = order = np.arange(len(rows_K))
    if not (query.group or query.diversity):
        return order, first_K
    vectors_KD = snapshot.vectors_of(rows_K)
    if query.group:
        first_K = groups(vectors_KD, snapshot.duplicate_threshold)
        order = np.flatnonzero(first_K == every_K)
    if query.diversity:
        count = query.k + query.offset
        chosen = diverse_order(scores_K[order], vectors_KD[order], query.diversity, count)
        order = order[chosen]
    return order, first_K


def _listed(
    snapshot: Snapshot, query: Query, selected_N: Bools | None, extra: Sequence[str]
) -> Hits:
    """List rows, of which none is nearer than another; the first page tells whether there are."""
    hits = snapshot.listed(selected_N, first=query.offset + 1, k=query.k, extra=extra)
    any_row = hits or snapshot.listed(selected_N, first=1, k=1, extra=())
    return Hits(query, tuple(hits), None if any_row else True)


def _group_by_search(queries: Sequence[Query], snapshot: Snapshot) -> dict[_Asked, list[int]]:
    """Group the numbers of queries that can be searched in one call."""
    groups: dict[_Asked, list[int]] = {}
    for number, q in enumerate(queries):
        asked = _Asked(
            snapshot.target(q.to), q.selection, q.exact, q.kind or snapshot.main,
            _wanted(q),
            by_vector=bool(q.items), excluding=number if q.excluded else None,
        )  # fmt: skip
        groups.setdefault(asked, []).append(number)
    return groups


def _chosen_from(query: Query) -> int:
    """Return how many rows, or groups of them, the hits of a query are chosen from."""
    wanted = query.k + query.offset
    return candidates(wanted) if query.diversity else wanted


def _wanted(query: Query) -> int:
    """Return how many of the nearest rows are looked at, at first."""
    wanted = _chosen_from(query)
    return depth(wanted) if query.lexical or query.group else wanted
