"""Several stores of one space, searched as one.

A query is encoded once. Each store answers from its own index and calibration, and the answers are
merged: cosines of one space compare. A row is one of its store: rows of the same id are two.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmalign.encoding.modalities import is_model_of
from mmalign.errors import IdentityError, UsageError
from mmalign.model import Encoder
from mmalign.search.answers import Hits
from mmalign.search.model import model_of
from mmalign.search.query import Query, as_query
from mmalign.search.searched import Searched
from mmalign.search.searcher import Searcher
from mmalign.search.snapshot import Snapshot
from mmalign.store import Store, open_store


@dataclass(frozen=True)
class _Current:
    encoder: Encoder
    snapshots: tuple[Snapshot, ...]

    @cached_property
    def searched(self) -> Searched:
        """What is searched; made once, as it keeps what it draws at random."""
        return Searched(self.snapshots, named=True)


class MultiSearcher:
    """Stores of one space and its model, ready for queries from many threads; final.

    >>> MultiSearcher.open(["a.store", "b.store"]).search("a dog on a beach")  # doctest: +SKIP
    """

    def __init__(self, stores: Sequence[Store], encoder: Encoder) -> None:
        """Combine stores and an encoder.

        Raises:
            UsageError: There is no store, or one is given twice.
            IdentityError: A store holds embeddings of another model.
            StoreError: A shard is missing or damaged.
        """
        if not stores:
            raise UsageError("no store to search")
        places = [store.path.resolve() for store in stores]
        for number, place in enumerate(places):
            if place in places[:number]:
                raise UsageError(f"{stores[number].path} is given twice")
        _require_one_space(stores, encoder)
        self._current = _Current(encoder, tuple(map(Snapshot, stores)))
        self._refreshing = threading.Lock()

    @classmethod
    def open(cls, paths: Sequence[str | Path], model: str | Path | None = None) -> "MultiSearcher":
        """Open stores with the model named in the first, or with a given one."""
        if isinstance(paths, str | Path):
            raise UsageError("MultiSearcher.open takes a list of stores; Searcher.open takes one")
        stores = [open_store(path) for path in paths]
        if not stores:
            raise UsageError("no store to search")
        return cls(stores, model_of(stores[0], model))

    @property
    def stores(self) -> tuple[Store, ...]:
        """Return the generations that are searched."""
        return tuple(snapshot.store for snapshot in self._current.snapshots)

    @property
    def encoder(self) -> Encoder:
        """Return the encoder of the space that is searched."""
        return self._current.encoder

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields of the metadata that any of the stores has."""
        return tuple(dict.fromkeys(name for store in self.stores for name in store.fields))

    def refresh(self) -> bool:
        """Switch to the newest generation of each store; return whether one was newer.

        Raises:
            StoreError: A store cannot be read; all previous generations stay in use.
            IdentityError: A store has another model now than the others; likewise.
        """
        with self._refreshing:
            current = self._current
            stores = [open_store(store.path) for store in self.stores]
            snapshots = tuple(
                old if old.store.manifest == new.manifest else Snapshot(new)
                for old, new in zip(current.snapshots, stores, strict=True)
            )
            if snapshots == current.snapshots:
                return False
            encoder = current.encoder
            if not is_model_of(encoder, stores[0].manifest.model):
                encoder = model_of(stores[0])
            _require_one_space(stores, encoder)
            self._current = _Current(encoder, snapshots)
            return True

    def search(
        self, query: Any = None, k: int | None = None, *, meta: bool = False,
        thumbnails: bool = False, **options: Any,
    ) -> Hits:  # fmt: skip
        """Find the k nearest rows of all stores; `Hit.store` names the store of each.

        Filters by fields that only some stores have hold for no row of the others. SQL (`where`)
        has to be valid in each store.

        Args:
            query: See `Searcher.search`.
            k: Likewise.
            meta: Likewise.
            thumbnails: Likewise.
            options: `more`, `less`, `to`, `offset`, `where`, `exact`, `lexical`, `diversity` and
                `group`, likewise.
        """
        return self.search_many([query], k, meta=meta, thumbnails=thumbnails, **options)[0]

    def search_many(
        self, queries: Sequence[Any], k: int | None = None, *, meta: bool = False,
        thumbnails: bool = False, **options: Any,
    ) -> list[Hits]:  # fmt: skip
        """Answer several queries at once, encoded in batches; see `search`."""
        if isinstance(queries, str | bytes | Query):
            raise UsageError("search_many takes a list of queries; search takes one")
        current = self._current
        asked = [as_query(query, k=k, **options) for query in queries]
        return Searcher.answers_of(
            asked, current.encoder, current.searched, meta=meta, thumbnails=thumbnails
        )


def _require_one_space(stores: Sequence[Store], encoder: Encoder) -> None:
    for store in stores:
        card = store.manifest.model
        if not is_model_of(encoder, card):
            raise IdentityError(
                f"{store.path} holds embeddings of {card.identity}, the model is {encoder.space}: "
                "stores are searched together only if one model made them; search them one by one, "
                "or embed again"
            )
