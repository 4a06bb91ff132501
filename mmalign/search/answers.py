"""Queries that are encoded, answered from one generation of a store.

Shapes: M queries, G queries of one group, D dimensions, K candidates, N rows of the store.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from mmalign.arrays import Bools, Floats
from mmalign.search.diversity import candidates, diverse_order
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
        _answer(snapshot, q, vector_D, near, to=asked.to, selected_N=selected_N, extra=extra)
        for q, vector_D, *near in zip(queries, vectors_MD, scores_MK, numbers_MK, strict=True)
    ]


def _answer(
    snapshot: Snapshot,
    query: Query,
    vector_D: Floats,
    near: Sequence[Any],
    *,
    to: str,
    selected_N: Bools | None,
    extra: Sequence[str],
) -> Hits:
    """Choose the hits of one query from what is near to it, or has its words.

    Something is found as well if a row has all the words.
    """
    scores_K, numbers_K = (values_K[near[1] >= 0] for values_K in near)
    fused = None
    if query.lexical:
        matches = snapshot.match(query.words)
        fused = snapshot.fuse(vector_D, (near[0], near[1]), to, matches, selected_N)
        scores_K, numbers_K = fused.scores_K, fused.numbers_K
    judged = snapshot.judge(vector_D, scores_K, to, _text_of(query))
    nothing = None if len(scores_K) else True
    if fused and judged:
        nothing = all(level == "unlikely" for level in judged.levels_K) and not fused.complete
    elif judged:
        nothing = judged.nothing
    order = np.arange(len(scores_K))
    if query.diversity:
        vectors_KD = snapshot.vectors_of(snapshot.rows_of(numbers_K, to))
        order = diverse_order(scores_K, vectors_KD, query.diversity, query.k + query.offset)
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
    return Hits(query, tuple(hits), nothing)


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


def _wanted(query: Query) -> int:
    """Return how many of the nearest rows are looked at."""
    wanted = query.k + query.offset
    if query.diversity:
        return candidates(wanted)
    return depth(wanted) if query.lexical else wanted
