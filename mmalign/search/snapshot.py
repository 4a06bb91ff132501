"""One generation of a store with its indexes, open for search; it never changes.

Shapes: N vectors of one modality, M queries, D dimensions, K rows.
"""

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mmalign import modality as modalities
from mmalign.arrays import Bools, Floats, Ints
from mmalign.errors import StoreError, UsageError, nearest, shell_command
from mmalign.index import Exact, Index, Owners, VectorReader, describe, open_index
from mmalign.progress import say
from mmalign.search import fusion, lexical
from mmalign.search.filters import as_sql
from mmalign.search.fusion import Fused
from mmalign.search.lexical import Lexical, Matches, Postings
from mmalign.search.query import Selection
from mmalign.search.relevance import Judgement, Relevance, load
from mmalign.store import Store
from mmalign.store.phrases import with_phrases
from mmalign.store.where import where as rows_where

# Each phrase reads all captions, and what `where` may take is limited too.
MOST_FILTERS = 8


@dataclass(frozen=True)
class Hit:
    """One result of a search."""

    rank: int
    """Starts at 1; skipped results (`offset`) count."""
    id: str
    score: float
    """Cosine similarity of the query and the best vector of the row; 0 if the query has no item to
    compare rows with."""
    uri: str
    captions: tuple[str, ...]
    row: int
    """Number of the row in the store."""
    caption: str | None = None
    """The best caption of the row, if captions were searched."""
    position: tuple[float, ...] | None = None
    """Where in its item the best vector is: the number of the caption, start and end in seconds, or
    left, top, right and bottom in shares of the sides. None if it stands for the whole item."""
    meta: dict[str, Any] | None = None
    """Metadata of the row, on request."""
    thumbnail: bytes | None = None
    """A small WebP picture, on request; empty if the store has none."""
    relevance: float | None = None
    """How relevant it is, from 0 to 1; None unless texts were asked of an index with a
    calibration, see `mmalign.search.relevance`."""
    level: str | None = None
    """That in a word: "likely", "maybe" or "unlikely"."""
    words: float | None = None
    """How well the captions match the words of the query: BM25, 0 if they have none of them. None
    unless `lexical` was asked. Like the score, it has no meaning beyond its query."""
    found_by: str | None = None
    """What found it: "vectors", "words" or "both"; None unless `lexical` was asked."""
    like: tuple[str, ...] | None = None
    """The ids of its near-duplicates, which are no hits of their own; None unless `group` was
    asked."""
    store: str | None = None
    """The store that has the row, if several were searched."""


class Snapshot:
    """Store and indexes of one generation. Safe to use from many threads.

    All shards are opened immediately, so that a later generation may remove their files.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        store.open_all()
        self._indexes: dict[tuple[str, bool], Index] = {}
        self._relevance: list[Relevance | None] = []
        self._kept: list[Postings | None] = []
        self._lexical: list[Lexical] = []
        # Reading all captions takes seconds, during which queries without words go on.
        self._lexical_lock = threading.Lock()
        self._lock = threading.Lock()

    def find(
        self, vectors_MD: Floats, k: int, *, kind: str, to: str, exact: bool,
        allowed_N: Bools | None,
    ) -> tuple[Floats, Ints]:  # fmt: skip
        """Return scores and vector numbers (M, K) of the nearest rows; -1 if there are fewer.

        Each row comes once, with its best vector. A damaged index is reported once; from then on
        every row is compared.

        Args:
            vectors_MD: Query vectors of unit norm.
            k: Number of rows.
            kind: Modality of the queries, which decides the operating point of the index.
            to: Modality of the vectors to search.
            exact: Compare every row.
            allowed_N: Which vectors may be found; None for all.
        """
        index = self._index(to, exact)
        try:
            return index.search(vectors_MD, k, allowed_N, query_modality=kind)
        except StoreError as error:
            if exact:
                raise
            index = self._replace_damaged_index(to, index, error)
            return index.search(vectors_MD, k, allowed_N, query_modality=kind)

    @property
    def relevance(self) -> Relevance | None:
        """The calibration that belongs to the index; None if there is none, or it is damaged."""
        with self._lock:
            if not self._relevance:
                self._relevance.append(self._load_relevance())
            return self._relevance[0]

    def _load_relevance(self) -> Relevance | None:
        folder = self.store.index_folder
        if folder is None:
            return None
        try:
            return load(folder, describe(folder), self.store.manifest.model.dim)
        except StoreError as error:
            remedy = shell_command("index", self.store.path)
            say(f"warning: {error}; hits have no relevance; run {remedy}")
            return None

    def judge(
        self, vector_D: Floats, scores_K: Floats, to: str, text: str | None
    ) -> Judgement | None:
        """Judge the hits of a text; None if nothing is calibrated for them."""
        if not text or to != self.main or self.relevance is None:
            return None
        return self.relevance.judge(vector_D, scores_K, text, self._unknown(self.relevance, text))

    def _unknown(self, relevance: Relevance, text: str) -> float:
        """Return how much of what a text says is in no caption, see `Lexical.unknown`."""
        if not relevance.reads_words(text):
            return 0.0
        kept = self._kept_words()
        # Captions of rows that came after the index are only read for words that it does not have.
        if kept is not None and not Lexical([kept]).unknown(text):
            return 0.0
        return self.lexical.unknown(text)

    @property
    def lexical(self) -> Lexical:
        """The words of all captions: those of the index, and of rows that came after it."""
        kept = self._kept_words()
        with self._lexical_lock:
            if not self._lexical:
                self._lexical.append(lexical.open_lexical(self.store, kept))
            return self._lexical[0]

    def _kept_words(self) -> Postings | None:
        """Return the words that the index keeps; None if there is none, or they are damaged."""
        with self._lock:
            if not self._kept:
                self._kept.append(self._load_words())
            return self._kept[0]

    def _load_words(self) -> Postings | None:
        folder = self.store.index_folder
        if folder is None:
            return None
        try:
            return lexical.load(folder, describe(folder))
        except StoreError as error:
            self._warn_of_words(error)
            return None

    def _warn_of_words(self, error: StoreError) -> None:
        remedy = shell_command("index", self.store.path)
        say(f"warning: {error}; the captions are read instead; run {remedy}")

    def match(self, text: str) -> Matches:
        """Score all rows by the words of a text. A damaged index is reported once."""
        opened = self.lexical
        try:
            return opened.match(text)
        except StoreError as error:
            with self._lexical_lock:
                if self._lexical[0] is opened:
                    self._warn_of_words(error)
                    self._lexical[0] = lexical.open_lexical(self.store, None)
            return self.lexical.match(text)

    def fuse(
        self, vector_D: Floats, near: tuple[Floats, Ints], to: str, matches: Matches,
        selected_N: Bools | None,
    ) -> Fused:  # fmt: skip
        """Fuse what is near to a query with what has its words.

        Args:
            vector_D: Unit vector of the query.
            near: Scores and vector numbers (K,) of the nearest rows; -1 if there are fewer.
            to: Modality of the vectors.
            matches: Of the words of the query.
            selected_N: Which rows may be found; None for all.
        """
        is_found_K = near[1] >= 0
        scores_K, numbers_K = near[0][is_found_K], near[1][is_found_K]
        rows_K = self.rows_of(numbers_K, to)
        allowed_N = self.store.live if selected_N is None else self._live_of(selected_N)
        rows_W = np.sort(fusion.best_rows(matches, allowed_N, len(near[0])))
        numbers_V, owners_V = self._vectors_with(rows_W, to)
        vectors_VD = VectorReader(self.store.vectors(to)).gather(numbers_V)
        worded = fusion.best_vectors(vector_D, vectors_VD.astype(np.float32), numbers_V, owners_V)
        return fusion.fuse((scores_K, numbers_K, rows_K), worded, matches)

    def vectors_of(self, rows_K: Ints) -> Floats:
        """Return a unit vector for each row (K, D), the mean of those of the main modality.

        It is zero for a row without any. Each row is given once.
        """
        numbers_V, owners_V = self._vectors_with(rows_K, self.main)
        vectors_VD = VectorReader(self.store.vectors(self.main)).gather(numbers_V)
        starts_U = np.flatnonzero(np.diff(owners_V, prepend=-1))
        sums_UD = np.add.reduceat(vectors_VD.astype(np.float32), starts_U)
        means_KD = np.zeros((len(rows_K), self.store.manifest.model.dim), np.float32)
        means_KD[np.isin(rows_K, owners_V)] = sums_UD / np.maximum(
            np.linalg.norm(sums_UD, axis=1, keepdims=True), 1e-9
        )
        return means_KD

    def random_rows(self, count: int) -> Ints:
        """Return the numbers of random rows with vectors of the main modality, ascending."""
        reader = VectorReader(self.store.vectors(self.main), self._live_vectors(self.main))
        return np.unique(self.rows_of(reader.sample_rows(count, seed=3), self.main))

    def random_vectors(self, to: str, count: int) -> Floats:
        """Return random vectors of a modality, (R, D); fewer than `count` if there are fewer."""
        reader = VectorReader(self.store.vectors(to), self._live_vectors(to))
        return reader.gather(reader.sample_rows(count, seed=3)).astype(np.float32)

    def _vectors_with(self, rows_W: Ints, to: str) -> tuple[Ints, Ints]:
        """Return the numbers of all vectors of rows, and the row of each."""
        owners_N = self.owners(to)
        if owners_N is None:
            return rows_W, rows_W
        first_W, end_W = (np.searchsorted(owners_N, rows_W, side) for side in ("left", "right"))
        counts_W = end_W - first_W
        owners_V = np.repeat(rows_W, counts_W)
        before_W = np.cumsum(counts_W) - counts_W
        return np.arange(len(owners_V)) + np.repeat(first_W - before_W, counts_W), owners_V

    def rows_of(self, numbers_K: Ints, to: str) -> Ints:
        """Return the row of each vector."""
        owners_N = self.owners(to)
        return numbers_K if owners_N is None else owners_N[numbers_K]

    def selected(self, selection: Selection, elsewhere: Iterable[str] = ()) -> Bools | None:
        """Return which rows (N,) are selected, deleted ones perhaps too; None for all.

        Args:
            selection: Filters and phrases.
            elsewhere: Fields that other stores of the same search have; no row has them here.

        Raises:
            UsageError: A filter names no field, or does not fit it, or there are too many.
        """
        count = len(selection.conditions) + len(selection.phrases)
        if count > MOST_FILTERS:
            told = f"the query has {count} filters and phrases"
            raise UsageError(f"{told}; at most {MOST_FILTERS} are allowed: write --where")
        expressions = [] if selection.where is None else [selection.where]
        if selection.conditions:
            kinds = dict.fromkeys(elsewhere, "none") | self.store.fields
            expressions.append(as_sql(selection.conditions, kinds))
        if not (expressions or selection.phrases):
            return None
        selected_N = np.ones(self.store.manifest.physical_rows, np.bool_)
        for expression in expressions:
            holds_N = np.zeros(len(selected_N), np.bool_)
            holds_N[rows_where(self.store, expression)] = True
            selected_N &= holds_N
        if selection.phrases:
            selected_N &= with_phrases(self.store, selection.phrases)
        return selected_N

    def allowed(self, to: str, selected_N: Bools | None) -> Bools | None:
        """Return which vectors may be found: those of live rows that are selected; None for all."""
        if selected_N is None:
            return self._live_vectors(to)
        return self._of_vectors(self._live_of(selected_N), to)

    def _live_of(self, selected_N: Bools) -> Bools:
        return selected_N if self.store.live is None else selected_N & self.store.live

    def _live_vectors(self, to: str) -> Bools | None:
        """Return which vectors of a modality are those of live rows; None if all are."""
        live_N = self.store.live
        if live_N is None:
            return None
        if to not in self._live:
            self._live[to] = self._of_vectors(live_N, to)
        return self._live[to]

    def _of_vectors(self, mask: Bools, to: str) -> Bools:
        """Turn a mask of the rows into one of the vectors."""
        owners_N = self.owners(to)
        return mask if owners_N is None else mask[owners_N]

    def owners(self, to: str) -> Ints | None:
        """Return the row of each vector; None if each row has one."""
        return None if self.store.is_single(to) else self.store.owners(to)

    @cached_property
    def main(self) -> str:
        """The modality that is searched if the query does not say which."""
        names = self.store.modalities
        return next(filter(modalities.is_of_rows, names), names[0])

    def target(self, to: str | None) -> str:
        """Return the modality to search.

        Raises:
            UsageError: The store has no vectors of it.
        """
        if to is None:
            return self.main
        if to not in self.store.modalities:
            known = nearest(to, self.store.modalities)
            raise UsageError(f"{self.store.path}: no {to!r} vectors to search: {known}")
        return to

    @cached_property
    def _live(self) -> dict[str, Bools]:
        return {}

    def hits(
        self,
        scores_K: Floats,
        numbers_K: Ints,
        to: str,
        *,
        first: int,
        extra: Sequence[str],
        judged: Judgement | None = None,
    ) -> list[Hit]:
        """Read the rows of the vectors that were found.

        Args:
            scores_K: Scores, best first.
            numbers_K: Vector numbers; -1 means none.
            to: Modality of the vectors.
            first: Rank of the first one.
            extra: Columns to read in addition to those of every hit: "meta", "thumbnail".
            judged: The relevance of each.
        """
        found = numbers_K >= 0
        numbers = numbers_K[found]
        owners = self.rows_of(numbers, to)
        positions: list[tuple[float, ...] | None] = [None] * len(numbers)
        if self.store.manifest.model.positions[to]:
            positions = [tuple(p) for p in self.store.positions(to, numbers).tolist()]
        modality = modalities.find(to)
        column = modality.column if modality else ""
        scores = scores_K[found].tolist()
        return self._read_hits(
            scores, positions, owners, column, first=first, extra=extra, judged=judged
        )

    def count(self, selected_N: Bools | None) -> int:
        """Return how many rows are selected; None for all."""
        if selected_N is None:
            return len(self.store)
        return int(np.count_nonzero(self._live_of(selected_N)))

    def listed(
        self, selected_N: Bools | None, *, first: int, k: int, extra: Sequence[str]
    ) -> list[Hit]:
        """Read k of the selected rows in the order of the store, as hits with the score 0.

        Args:
            selected_N: The rows; None for all.
            first: Rank of the first one.
            k: Number of rows at most.
            extra: See `hits`.
        """
        every = self.store.manifest.physical_rows
        selected_N = np.ones(every, np.bool_) if selected_N is None else selected_N
        rows = np.flatnonzero(self._live_of(selected_N))[first - 1 : first - 1 + k]
        nowhere = [None] * len(rows)
        return self._read_hits([0.0] * len(rows), nowhere, rows, "", first=first, extra=extra)

    def _read_hits(
        self,
        scores: Sequence[float],
        positions: Sequence[tuple[float, ...] | None],
        owners: Ints,
        column: str,
        *,
        first: int,
        extra: Sequence[str],
        judged: Judgement | None = None,
    ) -> list[Hit]:
        """Read rows as hits; a position counts in a column, or in none if that is empty."""
        rows = self.store.rows(owners, ("id", "uri", "captions", *extra))
        hits = []
        for rank, (score, position, owner, row) in enumerate(
            zip(scores, positions, owners.tolist(), rows, strict=True),
            start=first,
        ):
            captions = tuple(row["captions"])
            more: dict[str, Any] = {name: row[name] for name in extra} | {"position": position}
            if column and position is not None:
                more["caption"] = row[column][int(position[0])]
            if judged is not None:
                at = rank - first
                more |= {"relevance": float(judged.relevance_K[at]), "level": judged.levels_K[at]}
            if "meta" in more:
                more["meta"] = json.loads(more["meta"])
            hits.append(Hit(rank, row["id"], score, row["uri"], captions, owner, **more))
        return hits

    def describe_index(self) -> dict[str, Any]:
        """Return kind, rows and measured recall of the index over the main modality."""
        folder = self.store.index_folder
        if folder is None:
            return {"kind": "exact", "rows": len(self.store), "recall": 1.0}
        entry = describe(folder)["modalities"][self.main]
        description = {key: entry[key] for key in ("kind", "rows", "recall")}
        return {**description, "design": entry["name"], "name": folder.name}

    def _index(self, to: str, exact: bool) -> Index:
        """Open the index of one modality, once for all threads."""
        opened = self._indexes.get((to, exact))
        if opened is not None:
            return opened
        with self._lock:
            if (to, exact) not in self._indexes:
                shards = self.store.vectors(to)
                if not len(self.store) or not sum(len(s) for s in shards):
                    raise StoreError(f"{self.store.path}: the store has no {to} vectors to search")
                folder = None if exact else self.store.index_folder
                try:
                    self._indexes[to, exact] = open_index(folder, to, shards, self.owners(to))
                except StoreError as error:
                    if exact:
                        raise
                    self._indexes[to, exact] = self._compare_every_row(to, error)
            return self._indexes[to, exact]

    def _replace_damaged_index(self, to: str, damaged: Index, error: StoreError) -> Index:
        with self._lock:
            # If many threads find the damage, only one reports it.
            if self._indexes[to, False] is damaged:
                self._indexes[to, False] = self._compare_every_row(to, error)
            return self._indexes[to, False]

    def _compare_every_row(self, to: str, error: StoreError) -> Index:
        repair = f"; run {shell_command('repair', self.store.path)}"
        remedy = "" if "run `" in str(error) else repair  # or the error names its own
        say(f"warning: {self.store.path}: {error}; exact search is used instead{remedy}")
        return Exact(self.store.vectors(to), owners=Owners.of(self.owners(to)))
