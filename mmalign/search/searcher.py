"""Search a store by texts, images, vectors and rows.

    query -> encoder -> index finds rows -> store reads the rows

Shapes: M queries, D dimensions, K rows, N rows of the store.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from mmalign.arrays import Bools, Floats, Ints
from mmalign.encoding.items import encode_items, mean_vector
from mmalign.encoding.modalities import is_model_of
from mmalign.errors import UsageError, VectorError
from mmalign.items import Row, unit_vector
from mmalign.modality import is_of_rows
from mmalign.model import Encoder
from mmalign.progress import say
from mmalign.search.exclusion import Excluded, left_out
from mmalign.search.fusion import depth
from mmalign.search.model import model_of, require_model_of
from mmalign.search.query import Query, Selection, as_query
from mmalign.search.snapshot import Hit, Snapshot
from mmalign.store import Store, open_store

__all__ = ["Hit", "Hits", "Query", "Searcher"]


@dataclass(frozen=True)
class _Current:
    """What is searched, and the encoder of its space; replaced as a whole."""

    encoder: Encoder
    snapshot: Snapshot


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


class Searcher:
    """A store and the model it was made with, ready for queries from many threads.

    It searches the newest generation of the store at the time it was opened, until `refresh` is
    called.

    >>> Searcher.open("photos.store").search("a dog on a beach", k=3)  # doctest: +SKIP
    """

    def __init__(self, store: Store, encoder: Encoder) -> None:
        """Combine a store and an encoder.

        Raises:
            IdentityError: The store holds embeddings of another model.
            StoreError: A shard of the store is missing or damaged.
        """
        require_model_of(store, encoder)
        self._current = _Current(encoder, Snapshot(store))
        self._refreshing = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, model: str | Path | None = None) -> "Searcher":
        """Open a store with the model named in it, or with a given one (if it was moved)."""
        store = open_store(path)
        return cls(store, model_of(store, model))

    @property
    def store(self) -> Store:
        """Return the generation that is searched."""
        return self._current.snapshot.store

    @property
    def encoder(self) -> Encoder:
        """Return the encoder of the space that is searched."""
        return self._current.encoder

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields of the metadata: `Query.parse(text, fields=searcher.fields)`."""
        return tuple(self.store.fields)

    def refresh(self) -> bool:
        """Switch to the newest generation of the store; return whether there was a newer one.

        If the store has another model now, that one is loaded. Searches in progress finish in the
        generation that they started with, and with its model.

        Raises:
            StoreError: The store cannot be read; the previous generation stays in use.
            ModelError: Its new model is not found; the previous generation stays in use.
        """
        with self._refreshing:
            newest, encoder = open_store(self.store.path), self.encoder
            if newest.manifest == self.store.manifest:
                return False
            if not is_model_of(encoder, newest.manifest.model):
                encoder = model_of(newest)
            self._current = _Current(encoder, Snapshot(newest))
            return True

    def search(
        self,
        query: Any,
        k: int | None = None,
        *,
        to: str | None = None,
        offset: int | None = None,
        where: str | None = None,
        exact: bool | None = None,
        lexical: bool | None = None,
        meta: bool = False,
        thumbnails: bool = False,
    ) -> Hits:
        """Find the k rows whose images, or other vectors, are nearest to an item.

        A row with several vectors comes once, by its best.

        Args:
            query: A text, an image, a vector or a `Row`, see `mmalign.items`: a str is always a
                text. Or a `Query`, also one read by `Query.parse`; the other arguments replace its
                fields.
            k: Number of rows, by default 10; fewer if the store has fewer.
            to: The modality to search: "text" for the captions; by default the main one of the
                store, as a rule "image".
            offset: Results to skip at the start, by default none.
            where: Only rows for which this SQL is true, see `store.where`.
            exact: Compare every row, even if there is an index.
            lexical: Also find rows whose captions have words of the query, see
                `mmalign.search.fusion`.
            meta: Read the metadata of each hit.
            thumbnails: Read the thumbnail of each hit.

        Raises:
            ItemError: The query has an unsupported type; also a `TypeError`.
            UsageError: It is empty, names a missing file or row, or an option is invalid.
            DataError: The image cannot be read or decoded.
            VectorError: The vector has another number of dimensions, or is not finite.
        """
        parsed = as_query(
            query, k=k, to=to, offset=offset, where=where, exact=exact, lexical=lexical
        )
        return self._answer([parsed], meta=meta, thumbnails=thumbnails)[0]

    def search_many(
        self,
        queries: Sequence[Any],
        k: int | None = None,
        *,
        to: str | None = None,
        offset: int | None = None,
        where: str | None = None,
        exact: bool | None = None,
        lexical: bool | None = None,
        meta: bool = False,
        thumbnails: bool = False,
    ) -> list[Hits]:
        """Answer several queries at once, encoded in batches; see `search`."""
        if isinstance(queries, str | bytes | Query):
            raise UsageError("search_many takes a list of queries; search takes one")
        parsed = [
            as_query(query, k=k, to=to, offset=offset, where=where, exact=exact, lexical=lexical)
            for query in queries
        ]
        return self._answer(parsed, meta=meta, thumbnails=thumbnails)

    def encode(self, queries: Sequence[Any]) -> Floats:
        """Return the unit vectors of a list of queries, (M, D); see `search`."""
        if isinstance(queries, str | bytes | Query):
            raise UsageError("encode takes a list of queries: encode([query])")
        parsed = [as_query(query) for query in queries]
        if not all(query.items for query in parsed):
            raise UsageError("a query without items has no vector")
        return self.encode_queries(parsed, self.encoder, [self.store])[0]

    def describe_index(self) -> dict[str, Any]:
        """Return kind, rows and measured recall of the index over the images."""
        return self._current.snapshot.describe_index()

    def _answer(self, queries: Sequence[Query], *, meta: bool, thumbnails: bool) -> list[Hits]:
        current = self._current  # the same for the whole answer, even if `refresh` is called
        vectors_MD, excluded = self.encode_queries(
            queries, current.encoder, [current.snapshot.store]
        )
        extra = ("meta",) * meta + ("thumbnail",) * thumbnails
        return self.answers(current.snapshot, queries, vectors_MD, excluded, extra=extra)

    @staticmethod
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
        answers: dict[int, Hits] = {}
        for asked, numbers in _group_by_search(queries, snapshot).items():
            vectors_GD = vectors_MD[numbers] if asked.by_vector else None
            selected_N = selected[asked.selection]
            if asked.excluding is not None:
                query_D = None if vectors_GD is None else vectors_GD[0]
                left_out_N = left_out(snapshot, excluded[asked.excluding], query_D, asked.to)
                selected_N = ~left_out_N if selected_N is None else selected_N & ~left_out_N
            group = [queries[number] for number in numbers]
            found = _found(snapshot, asked, group, vectors_GD, selected_N, extra=extra)
            answers |= zip(numbers, found, strict=True)
        return [answers[number] for number in range(len(queries))]

    @staticmethod
    def encode_queries(
        queries: Sequence[Query], encoder: Encoder, stores: Sequence[Store]
    ) -> tuple[Floats, dict[int, list[Excluded]]]:
        """Encode all items of all queries in batches, and sum them by weight for each query.

        A `Row` is looked for in the stores, in their order.

        Returns:
            The vectors (M, D), zero for a query without items, and the excluded items of each
            query that has some.
        """
        parts = [(number, *pair) for number, q in enumerate(queries) for pair in q.items]
        left = [(number, item) for number, q in enumerate(queries) for item in q.excluded]
        items = [
            _vector_of(item, stores) if isinstance(item, Row) else item
            for item in (*(item for _, item, _ in parts), *(item for _, item in left))
        ]
        texts: list[str] = [item for item in items if isinstance(item, str)]
        vectors = encode_items(encoder, items)
        truncated = len(encoder.tokenizer.cut(texts)) if texts else 0
        if truncated:
            what = "the query is" if len(queries) == 1 else f"{truncated} queries are"
            it = "it was" if len(queries) == 1 else "they were"
            say(f"warning: {what} longer than {encoder.name} can read: {it} truncated")
        vectors_MD = np.zeros((len(queries), encoder.dim), np.float32)
        for (number, _, weight), vector_D in zip(parts, vectors, strict=False):
            is_single_item = len(queries[number].items) == 1 and weight == 1
            vectors_MD[number] += vector_D if is_single_item else np.float32(weight) * vector_D
        for number, query in enumerate(queries):
            if len(query.items) > 1 or (query.items and query.items[0][1] != 1):
                if not vectors_MD[number].any():
                    raise VectorError("the items of the query cancel out: give them other weights")
                vectors_MD[number] = unit_vector(vectors_MD[number], encoder.dim)
        excluded: dict[int, list[Excluded]] = {}
        for (number, item), vector_D in zip(left, vectors[len(parts) :], strict=True):
            words = item if isinstance(item, str) else None
            excluded.setdefault(number, []).append((words, vector_D))
        return vectors_MD, excluded


def _text_of(query: Query) -> str | None:
    """Return the words of a query, if relevance is known for it: texts, none of them subtracted."""
    items = [(item, weight) for item, weight in query.items if isinstance(item, str) and weight > 0]
    return " ".join(item for item, _ in items) if len(items) == len(query.items) else None


def _vector_of(row: Row, stores: Sequence[Store]) -> Floats:
    for store in stores:
        number = int(store.find([row.id])[0]) if len(store) else -1
        if number >= 0:
            break
    else:
        places = ", ".join(str(store.path) for store in stores)
        raise UsageError(f"{places}: no row has the id {row.id!r}")
    # What the row is, rather than what is said of it.
    for modality in sorted(store.modalities, key=is_of_rows, reverse=True):
        vectors_VD = store.vectors_of(modality, number)
        if len(vectors_VD):
            return mean_vector(vectors_VD)
    raise UsageError(f"{store.path}: the row {row.id!r} has no vector to search by")


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
    answers = []
    for q, vector_D, scores_K, numbers_K in zip(
        queries, vectors_MD, scores_MK, numbers_MK, strict=True
    ):
        if q.lexical:
            answers.append(_found_with_words(
                snapshot, q, vector_D, (scores_K, numbers_K), to=asked.to, selected_N=selected_N,
                extra=extra,
            ))  # fmt: skip
            continue
        page, found_K = slice(q.offset, None), scores_K[numbers_K >= 0]
        judged = snapshot.judge(vector_D, found_K, asked.to, _text_of(q))
        hits = snapshot.hits(
            scores_K[page], numbers_K[page], asked.to, first=q.offset + 1, extra=extra,
            judged=judged and judged.after(q.offset),
        )  # fmt: skip
        nothing = judged.nothing if judged else None if len(found_K) else True
        answers.append(Hits(q, tuple(hits), nothing))
    return answers


def _found_with_words(
    snapshot: Snapshot,
    query: Query,
    vector_D: Floats,
    near: tuple[Floats, Ints],
    *,
    to: str,
    selected_N: Bools | None,
    extra: Sequence[str],
) -> Hits:
    """Fuse what is near to one query with what has its words.

    Something is found as well if a row has all the words.
    """
    matches = snapshot.match(query.words)
    fused = snapshot.fuse(vector_D, near, to, matches, selected_N)
    judged = snapshot.judge(vector_D, fused.scores_K, to, _text_of(query))
    nothing = None if len(fused.scores_K) else True
    if judged:
        nothing = all(level == "unlikely" for level in judged.levels_K) and not fused.complete
    fused = fused.cut(slice(query.offset, query.offset + query.k))
    hits = snapshot.hits(
        fused.scores_K, fused.numbers_K, to, first=query.offset + 1, extra=extra,
        judged=judged and judged.after(query.offset),
    )  # fmt: skip
    told = zip(hits, fused.words_K.tolist(), fused.found_by_K, strict=True)
    return Hits(query, tuple(replace(h, words=w, found_by=by) for h, w, by in told), nothing)


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
            depth(q.k + q.offset) if q.lexical else q.k + q.offset,
            by_vector=bool(q.items), excluding=number if q.excluded else None,
        )  # fmt: skip
        groups.setdefault(asked, []).append(number)
    return groups
