"""Rows by the words of their captions: an inverted index, scored by BM25.

    captions -> words -> for each word the rows that have it, and how often

It is kept as arrays beside the other files of an index and memory-mapped. Words are kept as hashes.
Rows that came later are read into memory. Why these are arrays of our own and no tables of SQLite:
docs/decisions/0015-lexical.md.

Shapes: N rows, T different words, P pairs of a word and a row that has it.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign.arrays import Bools, Floats, Ints
from mmalign.errors import StoreError
from mmalign.search.words import asked_words, indexed_words, said_by
from mmalign.store import Store

# BM25: how soon more of the same word stops to count, and how much long captions are discounted.
K1, B = 1.2, 0.75
TYPES = {
    "terms": np.dtype("<u8"),
    "ends": np.dtype("<i8"),
    "rows": np.dtype("<u4"),
    "counts": np.dtype("u1"),
    "lengths": np.dtype("<u4"),
}


@dataclass(frozen=True)
class Postings:
    """The words of consecutive rows."""

    terms: NDArray[np.uint64]
    """Hashes of the words, ascending (T,)."""
    ends: Ints
    """Where the rows of each word end (T,)."""
    rows: NDArray[np.uint32]
    """Numbers of rows, ascending for each word (P,)."""
    counts: NDArray[np.uint8]
    """How often the row has the word, at most 255 (P,)."""
    lengths: NDArray[np.uint32]
    """How many words each row has (N,)."""

    def of(self, term: int) -> slice:
        """Return where the rows of a word are; an empty slice if no row has it."""
        at = int(np.searchsorted(self.terms, np.uint64(term)))
        if at == len(self.terms) or int(self.terms[at]) != term:
            return slice(0, 0)
        return slice(int(self.ends[at - 1]) if at else 0, int(self.ends[at]))


@dataclass(frozen=True)
class Matches:
    """What the words of a query find."""

    scores_N: Floats
    """BM25; 0 for a row that has none of the words."""
    complete_N: Bools
    """Which rows have each of them."""


class Lexical:
    """The words of all rows of a store. Safe to use from many threads."""

    def __init__(self, parts: Sequence[Postings]) -> None:
        """Take the words of consecutive ranges of rows, in their order."""
        self.parts = [part for part in parts if len(part.lengths)]
        self.rows = sum(len(part.lengths) for part in self.parts)
        total = sum(int(part.lengths.sum(dtype=np.int64)) for part in self.parts)
        self._mean = max(1.0, total / max(1, self.rows))

    def unknown(self, text: str, without: Ints | None = None) -> float:
        """Return how much of what a text says is in no caption, from 0 to 1: 0 without words.

        Words count by their rarity, so "a", "on" and "the" hardly do.

        Args:
            text: A query.
            without: Numbers of rows whose captions do not count; None for none.
        """
        weights = {True: 0.0, False: 0.0}
        for word, shown_by in said_by(text).items():
            known = any(self._having(other, without) for other in shown_by)
            weights[known] += _rarity(self.rows, self._having(word, without))
        return weights[False] / (sum(weights.values()) or 1.0)

    def _having(self, word: str, without: Ints | None) -> int:
        """Count the rows that have a word."""
        term = hash_of(word)
        count = first = 0
        for part in self.parts:
            at = part.of(term)
            count += at.stop - at.start
            if without is not None and at.stop > at.start:
                rows, wanted = part.rows[at], without - first
                places = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
                count -= int(np.count_nonzero(rows[places] == wanted))
            first += len(part.lengths)
        return count

    def match(self, text: str) -> Matches:
        """Score the rows (N,), deleted ones too, by the words of a text.

        Raises:
            StoreError: The index names rows that do not exist.
        """
        terms = [hash_of(word) for word in asked_words(text)]
        scores_N = np.zeros(self.rows, np.float32)
        matched_N = np.zeros(self.rows, np.uint32)
        found = [[part.of(term) for part in self.parts] for term in terms]
        for slices in found:
            having = sum(at.stop - at.start for at in slices)
            rarity = _rarity(self.rows, having)
            first = 0
            for part, at in zip(self.parts, slices, strict=True):
                rows = part.rows[at]
                if len(rows) and int(rows.max()) >= len(part.lengths):
                    raise StoreError("the index of words names rows that do not exist")
                counts = part.counts[at].astype(np.float32)
                length = np.float32(K1) * (
                    np.float32(1 - B) + np.float32(B / self._mean) * part.lengths[rows]
                ).astype(np.float32)
                scores_N[first + rows.astype(np.int64)] += np.float32(rarity * (K1 + 1)) * (
                    counts / (counts + length)
                )
                matched_N[first + rows.astype(np.int64)] += 1
                first += len(part.lengths)
        return Matches(scores_N, (matched_N == len(terms)) & (len(terms) > 0))


def _rarity(rows: int, having: int) -> float:
    """Return how much a word tells that so many of all rows have."""
    return float(np.log1p((rows - having + 0.5) / (having + 0.5)))


def postings(captions: Iterator[Sequence[str]]) -> Postings:
    """Read the words of rows, given as the captions of each."""
    numbers: dict[str, int] = {}
    # Numbers of words, row after row; lengths tell whose they are.
    words, lengths = array("I"), array("I")
    for row in captions:
        before = len(words)
        for caption in row:
            words.extend([numbers.setdefault(w, len(numbers)) for w in indexed_words(caption)])
        lengths.append(len(words) - before)
    lengths_N = np.array(lengths, np.uint32)
    hashes = np.array([hash_of(word) for word in numbers], np.uint64)
    order = np.argsort(hashes)
    rank = np.empty(len(order), np.uint64)
    rank[order] = np.arange(len(order), dtype=np.uint64)
    pairs = rank[np.frombuffer(words, np.uint32)] if len(words) else np.zeros(0, np.uint64)
    pairs <<= np.uint64(32)
    pairs |= np.repeat(np.arange(len(lengths_N), dtype=np.uint64), lengths_N)
    pairs.sort()
    is_first = np.ones(len(pairs), np.bool_)
    is_first[1:] = pairs[1:] != pairs[:-1]
    starts = np.flatnonzero(is_first)
    counts = np.diff(starts, append=len(pairs))
    pairs = pairs[starts]
    ends = np.searchsorted(pairs >> np.uint64(32), np.arange(len(order)), side="right")
    return Postings(
        hashes[order],
        ends.astype(np.int64),
        (pairs & np.uint64(0xFFFFFFFF)).astype(np.uint32),
        np.minimum(counts, 255).astype(np.uint8),
        lengths_N,
    )


def captions_of(store: Store, first: int = 0) -> Iterator[Sequence[str]]:
    """Yield the captions of each row, deleted ones too, from a row on."""
    wanted = np.arange(first, store.manifest.physical_rows) if first else None
    for batch in store.batches(("captions",), wanted):
        yield from batch.column(0).to_pylist()


def save(folder: Path, found: Postings) -> None:
    """Write the words of rows into the folder of an index."""
    for name, kind in TYPES.items():
        with open(_file(folder, name), "wb") as file:
            np.save(file, getattr(found, name).astype(kind, copy=False), allow_pickle=False)


def load(folder: Path, content: dict[str, Any]) -> Postings | None:
    """Map the words of an index into memory; None if it has none.

    Args:
        folder: The folder of the index.
        content: Its index.json.

    Raises:
        StoreError: A file is missing or damaged.
    """
    if content.get("lexical") is None:
        return None
    arrays: dict[str, Any] = {}
    for name, kind in TYPES.items():
        file = _file(folder, name)
        try:
            if file.stat().st_size != content["bytes"][file.name]:
                raise ValueError("not of the size in index.json")
            arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError) as error:
            raise StoreError(f"{file}: damaged: {error}") from None
        if arrays[name].dtype != kind or arrays[name].ndim != 1:
            raise StoreError(f"{file}: damaged: not an array of {kind}")
    found = Postings(**arrays)
    ends = found.ends
    fits = len(found.rows) == len(found.counts) and len(ends) == len(found.terms) > 0
    if not (fits and ends[0] >= 0 and ends[-1] == len(found.rows) and (np.diff(ends) >= 0).all()):
        raise StoreError(f"{_file(folder, 'ends')}: damaged: the arrays do not belong together")
    return found


def open_lexical(store: Store, kept: Postings | None) -> Lexical:
    """Return the words of all rows: those of an index, and of the rows that came after it.

    Raises:
        StoreError: The index has more rows than the store.
    """
    covered = 0 if kept is None else len(kept.lengths)
    if covered > store.manifest.physical_rows:
        raise StoreError(f"{store.path}: the index of words has more rows than the store")
    later = [postings(captions_of(store, covered))]
    return Lexical([*([] if kept is None else [kept]), *later])


def _file(folder: Path, name: str) -> Path:
    return folder / f"lexical.{name}.npy"


def hash_of(word: str) -> int:
    """Return the 64-bit hash that stands for a word."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest())
