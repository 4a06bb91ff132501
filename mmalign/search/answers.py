"""Queries that are encoded, answered from one generation of one store or several.

Shapes: M queries, G queries of one group, D dimensions, J candidates of all stores, N rows of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np

from mmalign.arrays import Bools, Floats, Ints
from mmalign.progress import say
from mmalign.search.candidates import Candidates, Joined
from mmalign.search.diversity import candidates, diverse_order
from mmalign.search.duplicates import MOST, groups
from mmalign.search.exclusion import left_out
from mmalign.search.fusion import depth
from mmalign.search.query import Query, Selection
from mmalign.search.searched import Searched
from mmalign.search.snapshot import Hit


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
    searched: Searched,
    queries: Sequence[Query],
    vectors_MD: Floats,
    excluded: Mapping[int, Sequence[Floats]],
    *,
    extra: Sequence[str],
) -> list[Hits]:
    """Answer queries that are encoded.

    Args:
        searched: What is searched.
        queries: The queries.
        vectors_MD: Their vectors, see `encode_queries`.
        excluded: The excluded items of queries, see `encode_queries`.
        extra: Columns to read, see `Snapshot.hits`.
    """
    selections = {query.selection: searched.fields for query in queries}
    selected = {
        selection: [snapshot.selected(selection, fields) for snapshot in searched.snapshots]
        for selection, fields in selections.items()
    }
    found: dict[int, Hits] = {}
    for asked, numbers in _group_by_search(queries).items():
        group, vectors_GD = [queries[number] for number in numbers], vectors_MD[numbers]
        masks = selected[asked.selection]
        if asked.alone is not None:
            (query,) = group
            masks = _without(searched, query, excluded.get(asked.alone, ()), masks)
        if asked.is_ranked:
            hits = _found(searched, asked, group, vectors_GD, masks, extra=extra)
        else:
            hits = [_listed(searched, query, masks, extra) for query in group]
        found |= zip(numbers, hits, strict=True)
    return [found[number] for number in range(len(queries))]


@dataclass(frozen=True)
class _Asked:
    """What queries that are searched in one call have in common."""

    to: str | None
    selection: Selection
    exact: bool
    kind: str | None
    wanted: int
    is_ranked: bool
    alone: int | None
    """The number of a query that leaves out rows of its own, which is searched alone."""


def _without(
    searched: Searched,
    query: Query,
    excluded: Sequence[Floats],
    masks: Sequence[Bools | None],
) -> list[Bools | None]:
    """Return which rows of each store are selected and neither excluded nor examples."""
    kept: list[Bools | None] = []
    for snapshot, mask_N in zip(searched.snapshots, masks, strict=True):
        left_out_N = left_out(snapshot, excluded, snapshot.target(query.to))
        if query.examples and len(snapshot.store):
            numbers = snapshot.store.find(query.examples)
            left_out_N[numbers[numbers >= 0]] = True
        kept.append(~left_out_N if mask_N is None else mask_N & ~left_out_N)
    if excluded and not _count(searched, kept) and (count := _count(searched, masks)):
        rows = "the only row" if count == 1 else f"all {count} rows"
        say(f"warning: what follows ! leaves out {rows} that the query selects: leave out less")
    return kept


def _count(searched: Searched, masks: Sequence[Bools | None]) -> int:
    pairs = zip(searched.snapshots, masks, strict=True)
    return sum(snapshot.count(mask_N) for snapshot, mask_N in pairs)


def _found(
    searched: Searched,
    asked: _Asked,
    queries: Sequence[Query],
    vectors_MD: Floats,
    masks: Sequence[Bools | None],
    *,
    extra: Sequence[str],
) -> list[Hits]:
    """Answer queries that can be searched in one call.

    Args:
        searched: What is searched.
        asked: What they have in common.
        queries: The queries.
        vectors_MD: Their vectors.
        masks: Which rows (N,) of each store may be found; None for all.
        extra: Columns to read, see `Snapshot.hits`.
    """
    parts: list[list[Candidates]] = [[] for _ in queries]
    for snapshot, mask_N in zip(searched.snapshots, masks, strict=True):
        to = snapshot.target(asked.to)
        scores_MK, numbers_MK = snapshot.find(
            vectors_MD, asked.wanted, kind=asked.kind or snapshot.main, to=to, exact=asked.exact,
            allowed_N=snapshot.allowed(to, mask_N),
        )  # fmt: skip
        for i, query in enumerate(queries):
            near = scores_MK[i], numbers_MK[i]
            parts[i].append(
                Candidates.of(snapshot, query, vectors_MD[i], near, to=to, selected_N=mask_N)
            )
    found = []
    for i, query in enumerate(queries):
        hits = _answer(searched, asked, query, parts[i], extra)
        if hits is None:
            wider = replace(asked, wanted=min(4 * asked.wanted, MOST))
            (hits,) = _found(searched, wider, [query], vectors_MD[i : i + 1], masks, extra=extra)
        found.append(hits)
    return found


def _answer(
    searched: Searched,
    asked: _Asked,
    query: Query,
    parts: Sequence[Candidates],
    extra: Sequence[str],
) -> Hits | None:
    """Choose the hits of one query; None if more of the nearest rows have to be looked at.

    More are looked at if there are too few groups of near-duplicates.
    """
    joined = Joined.of(parts, asked.wanted)
    order, first_J = _arranged(searched, query, joined)
    is_all = sum(part.near for part in parts) < asked.wanted
    too_few = query.group and len(np.unique(first_J)) < _chosen_from(query)
    if too_few and not is_all and asked.wanted < MOST:
        return None
    page = order[query.offset : query.offset + query.k]
    hits = joined.hits(page, first=query.offset + 1, extra=extra, named=searched.named)
    if query.group:
        likes = joined.ids([np.flatnonzero(first_J == place)[1:] for place in page.tolist()])
        hits = [replace(hit, like=like) for hit, like in zip(hits, likes, strict=True)]
    return Hits(query, tuple(hits), joined.nothing_found)


def _arranged(searched: Searched, query: Query, joined: Joined) -> tuple[Ints, Ints]:
    """Return the candidates that are hits, in their order, and the first of each one's group."""
    every_J = first_J = order = np.arange(len(joined.part_J))
    if not (query.group or query.diversity):
        return order, first_J
    vectors_JD = joined.vectors_JD
    if query.group:
        first_J = groups(vectors_JD, searched.usual.reach(vectors_JD))
        order = np.flatnonzero(first_J == every_J)
    if query.diversity:
        count = query.k + query.offset
        scores_J = joined.scores_J[order]
        order = order[diverse_order(scores_J, vectors_JD[order], query.diversity, count)]
    return order, first_J


def _listed(
    searched: Searched, query: Query, masks: Sequence[Bools | None], extra: Sequence[str]
) -> Hits:
    """List rows, of which none is nearer than another, store after store."""
    hits: list[Hit] = []
    before = 0
    for snapshot, mask_N in zip(searched.snapshots, masks, strict=True):
        first = max(0, query.offset - before) + 1
        listed = snapshot.listed(mask_N, first=first, k=query.k - len(hits), extra=extra)
        if searched.named:
            listed = [replace(hit, store=str(snapshot.store.path)) for hit in listed]
        hits += listed
        before += snapshot.count(mask_N)
    ranks = range(query.offset + 1, query.offset + 1 + len(hits))
    ranked = (replace(hit, rank=rank) for hit, rank in zip(hits, ranks, strict=True))
    return Hits(query, tuple(ranked), None if before else True)


def _group_by_search(queries: Sequence[Query]) -> dict[_Asked, list[int]]:
    """Group the numbers of queries that can be searched in one call."""
    groups: dict[_Asked, list[int]] = {}
    for number, q in enumerate(queries):
        asked = _Asked(
            q.to, q.selection, q.exact, q.kind, _wanted(q), q.is_ranked,
            alone=number if q.excluded or q.examples else None,
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
