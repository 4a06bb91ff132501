"""Search a store by texts, images, vectors and rows.

    query -> encoder -> index finds rows -> store reads the rows

Shapes: M queries, D dimensions, K rows, N rows of the store.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.arrays import Floats
from mmalign.encoding.items import encode_items, mean_vector
from mmalign.encoding.modalities import is_model_of
from mmalign.errors import UsageError
from mmalign.items import Row, kind_of, unit_vector
from mmalign.modality import is_of_rows
from mmalign.model import Encoder
from mmalign.progress import say
from mmalign.search.answers import Hits, answers
from mmalign.search.combine import combined
from mmalign.search.exclusion import SUBTRACTED
from mmalign.search.feedback import turned
from mmalign.search.model import model_of, require_model_of
from mmalign.search.query import Query, as_query
from mmalign.search.searched import Searched
from mmalign.search.snapshot import Hit, Snapshot
from mmalign.store import Store, open_store

__all__ = ["Hit", "Hits", "Query", "Searcher"]


@dataclass(frozen=True)
class _Current:
    """What is searched, and the encoder of its space; replaced as a whole."""

    encoder: Encoder
    searched: Searched

    @property
    def snapshot(self) -> Snapshot:
        """Return the one generation."""
        return self.searched.snapshots[0]


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
        self._current = _Current(encoder, Searched([Snapshot(store)]))
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
            self._current = _Current(encoder, Searched([Snapshot(newest)]))
            return True

    def search(
        self,
        query: Any = None,
        k: int | None = None,
        *,
        more: Sequence[Any] | None = None,
        less: Sequence[Any] | None = None,
        to: str | None = None,
        offset: int | None = None,
        where: str | None = None,
        exact: bool | None = None,
        lexical: bool | None = None,
        diversity: float | None = None,
        group: bool | None = None,
        meta: bool = False,
        thumbnails: bool = False,
    ) -> Hits:
        """Find the k rows whose images, or other vectors, are nearest to an item.

        A row with several vectors comes once, by its best.

        Args:
            query: A text, an image, a vector or a `Row`, see `mmalign.items`: a str is always a
                text. Or a `Query`, also one read by `Query.parse`; the other arguments replace its
                fields. None with examples alone.
            k: Number of rows, by default 10; fewer if the store has fewer.
            more: Examples of what is looked for, as `Row`, image or vector: they turn the query,
                but not far, see `mmalign.search.feedback`. Rows named so are no hits.
            less: Examples of what is not.
            to: The modality to search: "text" for the captions; by default the main one of the
                store, as a rule "image".
            offset: Results to skip at the start, by default none.
            where: Only rows for which this SQL is true, see `store.where`.
            exact: Compare every row, even if there is an index.
            lexical: Also find rows whose captions have words of the query, see
                `mmalign.search.fusion`.
            diversity: From 0, the nearest rows, to 1, rows as unlike each other as may be, see
                `mmalign.search.diversity`.
            group: Near-duplicates are one hit, `Hit.like` names the others; `k` and `offset` count
                these hits.
            meta: Read the metadata of each hit.
            thumbnails: Read the thumbnail of each hit.

        Raises:
            ItemError: The query has an unsupported type; also a `TypeError`.
            UsageError: It is empty, names a missing file or row, or an option is invalid.
            DataError: The image cannot be read or decoded.
            VectorError: The vector has another number of dimensions, or is not finite.
        """
        parsed = as_query(
            query, k=k, more=more, less=less, to=to, offset=offset, where=where, exact=exact,
            lexical=lexical, diversity=diversity, group=group,
        )  # fmt: skip
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
        diversity: float | None = None,
        group: bool | None = None,
        meta: bool = False,
        thumbnails: bool = False,
    ) -> list[Hits]:
        """Answer several queries at once, encoded in batches; see `search`."""
        if isinstance(queries, str | bytes | Query):
            raise UsageError("search_many takes a list of queries; search takes one")
        parsed = [
            as_query(
                query,
                k=k,
                to=to,
                offset=offset,
                where=where,
                exact=exact,
                lexical=lexical,
                diversity=diversity,
                group=group,
            )
            for query in queries
        ]
        return self._answer(parsed, meta=meta, thumbnails=thumbnails)

    def encode(self, queries: Sequence[Any]) -> Floats:
        """Return the unit vectors of a list of queries, (M, D); see `search`."""
        if isinstance(queries, str | bytes | Query):
            raise UsageError("encode takes a list of queries: encode([query])")
        parsed = [as_query(query) for query in queries]
        if not all(query.is_ranked for query in parsed):
            raise UsageError("a query without items and examples has no vector")
        current = self._current
        vectors_MD, _ = self.encode_queries(parsed, current.encoder, current.searched)
        return _with_examples(parsed, vectors_MD, current.encoder, current.searched)

    def describe_index(self) -> dict[str, Any]:
        """Return kind, rows and measured recall of the index over the images."""
        return self._current.snapshot.describe_index()

    def _answer(self, queries: Sequence[Query], *, meta: bool, thumbnails: bool) -> list[Hits]:
        current = self._current  # the same for the whole answer, even if `refresh` is called
        return self.answers_of(
            queries, current.encoder, current.searched, meta=meta, thumbnails=thumbnails
        )

    @classmethod
    def answers_of(
        cls,
        queries: Sequence[Query],
        encoder: Encoder,
        searched: Searched,
        *,
        meta: bool,
        thumbnails: bool,
    ) -> list[Hits]:
        """Encode and answer queries, see `search`."""
        vectors_MD, excluded = cls.encode_queries(queries, encoder, searched)
        vectors_MD = _with_examples(queries, vectors_MD, encoder, searched)
        extra = ("meta",) * meta + ("thumbnail",) * thumbnails
        return answers(searched, queries, vectors_MD, excluded, extra=extra)

    @staticmethod
    def encode_queries(
        queries: Sequence[Query], encoder: Encoder, searched: Searched
    ) -> tuple[Floats, dict[int, list[Floats]]]:
        """Encode all items of all queries in batches, and combine them, see `combine`.

        A `Row` is looked for in the stores, in their order.

        Returns:
            The vectors (M, D), zero for a query without items, and the vectors of the excluded
            items of each query that has some; these are also subtracted from its vector.
        """
        parts = [
            (number, item, weight)
            for number, query in enumerate(queries)
            for item, weight in (*query.items, *((item, -SUBTRACTED) for item in query.excluded))
        ]
        stores = [snapshot.store for snapshot in searched.snapshots]
        items = [
            _vector_of(item, stores) if isinstance(item, Row) else item for _, item, _ in parts
        ]
        texts: list[str] = [item for item in items if isinstance(item, str)]
        vectors_ED = np.array(encode_items(encoder, items))
        truncated = len(encoder.tokenizer.cut(texts)) if texts else 0
        if truncated:
            what = "the query is" if len(queries) == 1 else f"{truncated} queries are"
            it = "it was" if len(queries) == 1 else "they were"
            say(f"warning: {what} longer than {encoder.name} can read: {it} truncated")
        vectors_MD = np.zeros((len(queries), encoder.dim), np.float32)
        excluded: dict[int, list[Floats]] = {}
        first = 0
        for number, query in enumerate(queries):
            of = slice(first, first + len(query.items) + len(query.excluded))
            first = of.stop
            if query.excluded:
                excluded[number] = list(vectors_ED[of][len(query.items) :])
            if query.items:
                vectors_MD[number] = combined(
                    vectors_ED[of],
                    [weight for *_, weight in parts[of]],
                    [_kind_of(item, searched) for _, item, _ in parts[of]],
                    partial(searched.sample, query.to),
                )
        return vectors_MD, excluded


def _with_examples(
    queries: Sequence[Query], vectors_MD: Floats, encoder: Encoder, searched: Searched
) -> Floats:
    """Return the vectors of queries turned by their examples, see `feedback.turned`.

    Without items, the mean of the examples of what is looked for is the query.
    """
    stores = [snapshot.store for snapshot in searched.snapshots]
    parts = [
        (number, side, _vector_of(item, stores) if isinstance(item, Row) else item)
        for number, query in enumerate(queries)
        for side, items in (("more", query.more), ("less", query.less))
        for item in items
    ]
    if not parts:
        return vectors_MD
    vectors_ED = encode_items(encoder, [item for *_, item in parts])
    turned_MD = vectors_MD.copy()
    for number in {number for number, *_ in parts}:
        query = queries[number]
        more_ED, less_ED = (
            np.array([
                vector_D for (of, name, _), vector_D in zip(parts, vectors_ED, strict=True)
                if (of, name) == (number, side)
            ])
            for side in ("more", "less")
        )  # fmt: skip
        query_D = vectors_MD[number]
        if not query.items:
            query_D, more_ED = mean_vector(more_ED), more_ED[:0]
        turned_D = turned(query_D, more_ED, less_ED, searched.sample(query.to))
        turned_MD[number] = unit_vector(turned_D, encoder.dim)
    return turned_MD


def _kind_of(item: Any, searched: Searched) -> str:
    """Return the modality of an item; that of a row is the main one."""
    kind = kind_of(item)
    return searched.snapshots[0].main if kind == "row" else kind


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
