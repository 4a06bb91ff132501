"""`mmalign search`: a text or an image in, the nearest images or captions of a store out.

    query -> encoder -> index finds rows -> store gives the rows

M queries, D dimensions, K neighbours.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmalign import modality
from mmalign.errors import (
    DataError,
    IdentityError,
    ModelError,
    StoreError,
    UsageError,
    shell_command,
)
from mmalign.index import Exact, Index, describe, open_index
from mmalign.model import Encoder, load_model
from mmalign.progress import say
from mmalign.store import Store, open_store
from mmalign.store.where import where as rows_where

Target = Literal["image", "text"]
Query = str | Path | bytes
"""A text; an image file; or an encoded image."""


@dataclass(frozen=True)
class Hit:
    """One result of a search."""

    rank: int
    id: str
    score: float
    """Cosine of the query and what was found."""
    uri: str
    captions: tuple[str, ...]
    row: int
    """Number of the row in the store."""
    caption: str | None = None
    """The caption that was found, where captions were searched."""


@dataclass(frozen=True)
class _Goal:
    """Among which vectors to search, and how."""

    to: Target
    exact: bool
    allowed_N: NDArray[np.bool_] | None


class Searcher:
    """A store and the model it was made with, ready for queries, also of many threads; final.

    >>> Searcher.open("photos.store").search("a dog on a beach", k=3)  # doctest: +SKIP
    """

    def __init__(self, store: Store, encoder: Encoder) -> None:
        """Join a store and an encoder.

        Raises:
            IdentityError: The store holds embeddings of another model.
        """
        held = store.manifest.model.identity
        if encoder.identity != held:
            why = (
                encoder.former_fault(held) or "search with the model that embedded, or embed again"
            )
            raise IdentityError(
                f"{store.path} holds embeddings of {held}, the model is {encoder.identity}: {why}"
            )
        self.store = store
        self.encoder = encoder
        self._indexes: dict[tuple[Target, bool], Index] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, model: str | Path | None = None) -> "Searcher":
        """Open a store with the model named in it, or with one given (moved since, say)."""
        store = open_store(path)
        source = str(model or store.manifest.model.source)
        needed = store.manifest.model.identity
        try:
            # A run that was trained further since keeps the weights that made this store.
            encoder = load_model(source, needed)
        except ModelError as error:
            raise type(error)(
                f"{error}; {path} needs {needed}: if that lies elsewhere, name it by --model "
                "(Python: Searcher.open(store, model))"
            ) from error
        return cls(store, encoder)

    def search(
        self,
        query: Query,
        k: int = 10,
        *,
        to: Target = "image",
        exact: bool = False,
        where: str | None = None,
    ) -> list[Hit]:
        """Find the k nearest images, or captions, of a text or an image file.

        Args:
            query: A str is always a text, never opened as a file; a `Path` is an image file, bytes
                are an encoded image.
            k: Results wanted; fewer where the store has fewer.
            to: Search among "image" or "text" vectors.
            exact: Compare every row, whatever index there is.
            where: Only rows for which this SQL is true, see `store.where`.

        Raises:
            UsageError: The query is empty, is of another type, or names no file.
            DataError: The image cannot be read or decoded.
        """
        return self.search_many([query], k, to=to, exact=exact, where=where)[0]

    def search_many(
        self,
        queries: Sequence[Query],
        k: int = 10,
        *,
        to: Target = "image",
        exact: bool = False,
        where: str | None = None,
    ) -> list[list[Hit]]:
        """Answer several queries at once; see `search`."""
        if k < 1:
            raise UsageError(f"k={k} must be at least 1")
        if isinstance(queries, str | bytes):
            raise UsageError("search_many takes a list of queries; search takes one")
        if not queries:
            return []
        goal = _Goal(to, exact, self._allowed(to, where))
        hits: dict[int, list[Hit]] = {}
        for asked, numbers in _by_modality(queries).items():
            vectors_MD = np.concatenate([self.encode(queries[number]) for number in numbers])
            found = self._find(vectors_MD, k, asked, goal)
            for number, scores_K, rows_K in zip(numbers, *found, strict=True):
                hits[number] = self._hits(scores_K, rows_K, to)
        return [hits[number] for number in range(len(queries))]

    def encode(self, query: Query) -> NDArray[np.float32]:
        """Embed one query to a (1, D) unit vector; see `search`."""
        kinds = modality.of(self.encoder)
        if isinstance(query, str):
            text = _checked_text(query)
            if self.encoder.tokenizer.cut([text]):
                model = self.encoder.name
                say(f"warning: the query is longer than {model} reads: its end is left out")
            return kinds["text"].encode([text])
        content, name = (query, "bytes") if isinstance(query, bytes) else (_read(query), query)
        try:
            item = kinds["image"].decode(content)
        except DataError as error:
            raise DataError(f"{name}: cannot search by this image: {error}") from None
        return kinds["image"].encode(kinds["image"].batch([item]))

    def describe_index(self) -> dict[str, Any]:
        """Return kind, rows and measured recall of the store's index, by modality."""
        folder = self.store.index_folder
        if folder is None:
            return {"kind": "exact", "rows": len(self.store), "recall": 1.0}
        part = describe(folder)["modalities"]["image"]
        kept = {key: part[key] for key in ("kind", "rows", "recall")}
        return {**kept, "design": part["name"], "name": folder.name}

    def _find(
        self, vectors_MD: NDArray[np.float32], k: int, asked: Target, goal: _Goal
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Search by the index; where that is damaged, say so and compare every row from then on."""
        index = self._index(goal.to, goal.exact)
        try:
            return index.search(vectors_MD, k, goal.allowed_N, asked=asked)
        except StoreError as error:
            if goal.exact:
                raise
            index = self._without_index(goal.to, index, error)
            return index.search(vectors_MD, k, goal.allowed_N, asked=asked)

    def _index(self, to: Target, exact: bool) -> Index:
        """Open vectors and index of one modality once, whichever thread asks first."""
        with self._lock:
            if (to, exact) not in self._indexes:
                shards = self.store.vectors(to)
                if not len(self.store) or not sum(len(s) for s in shards):
                    what = "rows" if to == "image" else "captions"
                    raise StoreError(f"{self.store.path}: the store has no {what} to search")
                folder = None if exact else self.store.index_folder
                try:
                    self._indexes[to, exact] = open_index(folder, to, shards)
                except StoreError as error:
                    if exact:
                        raise
                    self._indexes[to, exact] = self._every_row(to, error)
            return self._indexes[to, exact]

    def _without_index(self, to: Target, damaged: Index, error: StoreError) -> Index:
        with self._lock:
            # Of many threads that met the damage, one says so.
            if self._indexes[to, False] is damaged:
                self._indexes[to, False] = self._every_row(to, error)
            return self._indexes[to, False]

    def _every_row(self, to: Target, error: StoreError) -> Index:
        remedy = shell_command("repair", self.store.path)
        say(f"warning: {self.store.path}: {error}; every row is compared; {remedy}")
        return Exact(self.store.vectors(to))

    def _allowed(self, to: Target, where: str | None) -> NDArray[np.bool_] | None:
        """Which vectors may be found: those of rows that are not deleted, and of those wanted."""
        allowed_N = self.store.live
        if where is not None:
            allowed_N = np.zeros(self.store.manifest.physical_rows, np.bool_)
            allowed_N[rows_where(self.store, where)] = True
        if allowed_N is None or to == "image":
            return allowed_N
        return allowed_N[self.store.caption_owners]

    def _hits(self, scores_K: NDArray[Any], rows_K: NDArray[Any], to: Target) -> list[Hit]:
        found = rows_K >= 0
        numbers = rows_K[found]
        owners = self.store.caption_owners[numbers] if to == "text" else numbers
        rows = self.store.rows(owners.tolist(), ("id", "uri", "captions"))
        hits = []
        for rank, (score, number, owner, row) in enumerate(
            zip(scores_K[found], numbers, owners, rows, strict=True), start=1
        ):
            caption = None
            if to == "text":
                first = int(np.searchsorted(self.store.caption_owners, owner))
                caption = row["captions"][int(number) - first]
            captions = tuple(row["captions"])
            hits.append(
                Hit(rank, row["id"], float(score), row["uri"], captions, int(owner), caption)
            )
        return hits


def _by_modality(queries: Sequence[Query]) -> dict[Target, list[int]]:
    """Numbers of the queries of each modality, as each has search parameters of its own."""
    numbers: dict[Target, list[int]] = {}
    for number, query in enumerate(queries):
        if not isinstance(query, str | Path | bytes):
            raise UsageError(
                f"a query is a text (str), an image file (Path) or an encoded image (bytes), "
                f"not {type(query).__name__}"
            )
        numbers.setdefault("text" if isinstance(query, str) else "image", []).append(number)
    return numbers


def _checked_text(query: str) -> str:
    if not query.strip():
        raise UsageError("the query is empty")
    try:
        query.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the query is not UTF-8: {query!a}") from None
    return query


def _read(file: Path) -> bytes:
    """Read an image file that a query names; anything but a regular file would block, or worse."""
    try:
        if not file.exists():
            raise UsageError(f"{file}: no such image file")
        if not file.is_file():
            raise UsageError(f"{file}: cannot search by this image: not a regular file")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: cannot search by this image: {reason}") from None
