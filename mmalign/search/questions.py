"""What calibrates the relevance of a store: its own captions and short phrases, asked of its rows.

A caption is a query whose image is known to be in the store. With this image, its near-duplicates
and all images of the same caption left out, it is a query that nothing may answer. One caption of
a row is used in each language, so that intervals hold. Phrases of the bank that captions name are
short queries that are present; those of things that no caption names count as absent.

Shapes: N vectors, M captions or phrases, D dimensions, K nearest, B captions of the bank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmalign.arrays import Bools, Floats, Halves, Ints
from mmalign.index import Exact, VectorReader
from mmalign.modality import TEXT, is_of_rows
from mmalign.search import relevance
from mmalign.search.duplicates import SAMPLE, Usual, are_duplicates
from mmalign.search.lexical import Lexical
from mmalign.search.phrases import LANGUAGES, told_by
from mmalign.search.relevance import ALL, Doubles, Signs
from mmalign.store import Store

# Random rows, captions that familiarity compares with, and captions that are asked.
NULL_ROWS, BANK, ASKED = 2_048, 2_048, 2_000
# With fewer rows nothing is calibrated; with fewer captions, the store counts as one without.
MIN_ROWS = MIN_CAPTIONS = 100
# Phrases of each language that are present, and as many that are absent.
PHRASES = 300
# With fewer present ones and short captions, others are cut out of captions.
MIN_PHRASES = 30
# Present are phrases that captions of so many rows name: fewer may name them in passing.
NAMED_BY = 3
# Rows whose captions tell what is present.
READ_ROWS = 20_000
# Of a caption's nearest rows, so many are looked at for the best that is not its own.
NEAREST = 64
# Share of the captions of a store that count as similar to a query.
SIMILAR = 0.05
PRODUCT_QUERIES = 256


@dataclass(frozen=True)
class Asked:
    """Captions that were asked, and the best hits they had."""

    queries_MD: Floats
    rows_M: Ints
    languages_M: list[str]
    short_M: Bools
    """Whether each `is_short`."""
    signs: Signs
    present_M: Doubles
    """Score of the best hit."""
    absent_M: Doubles
    """Score of the best hit once the images of the caption are left out; NaN if none is known."""
    other_M: Doubles
    """Score of the best hit that no similar caption describes either, or more."""
    removed: Signs
    """Signs without captions of the images that were left out."""

    def of(self, chosen_M: Bools) -> "Asked":
        """Return some of the captions."""
        return Asked(
            self.queries_MD[chosen_M],
            self.rows_M[chosen_M],
            [name for name, chosen in zip(self.languages_M, chosen_M, strict=True) if chosen],
            self.short_M[chosen_M],
            self.signs.of(chosen_M),
            self.present_M[chosen_M],
            self.absent_M[chosen_M],
            self.other_M[chosen_M],
            self.removed.of(chosen_M),
        )


@dataclass(frozen=True)
class Short:
    """Phrases that were asked, and whether the captions say that the store holds them."""

    texts_M: list[str]
    queries_MD: Floats
    signs: Signs
    best_M: Doubles
    """Score of the best hit."""
    present_M: Bools
    first_M: Bools
    """Those of half of the things: each half is measured by what the other half fits."""

    def spoken(self, name: str) -> "Short":
        """Return the phrases in one language, or in `ALL`."""
        return self.of(np.array([name in (ALL, relevance.language(t)) for t in self.texts_M]))

    def of(self, chosen_M: Bools) -> "Short":
        """Return some of the phrases."""
        return Short(
            [text for text, chosen in zip(self.texts_M, chosen_M, strict=True) if chosen],
            self.queries_MD[chosen_M],
            self.signs.of(chosen_M),
            self.best_M[chosen_M],
            self.present_M[chosen_M],
            self.first_M[chosen_M],
        )


@dataclass(frozen=True)
class Searched:
    """The vectors that captions and phrases are asked of."""

    store: Store
    main: str
    vectors: VectorReader
    exact: Exact
    null_RD: Halves
    words: Lexical

    def rows_of(self, numbers_MK: Ints) -> Ints:
        """Return the row of each vector; -1 stays -1."""
        rows_MK = _rows_of(self.store, self.main, np.maximum(numbers_MK, 0))
        return np.where(numbers_MK < 0, -1, rows_MK)

    def first_vectors(self, rows_M: Ints) -> Floats:
        """Return the first vector of each row, all of which have one."""
        single = self.store.is_single(self.main)
        numbers_M = rows_M if single else np.searchsorted(self.store.owners(self.main), rows_M)
        return self.vectors.gather(numbers_M).astype(np.float32)


@dataclass(frozen=True)
class Bank:
    """Captions that familiarity compares with, the row of each, and all captions of the store."""

    vectors_BD: Halves
    rows_B: Ints
    texts: VectorReader
    owners_N: Ints

    def nearest(self, query_D: Floats, rows_K: Ints) -> Floats:
        """Return for each row the cosine of its caption that is nearest to a query; -1 if none."""
        first_K = np.searchsorted(self.owners_N, rows_K)
        sizes_K = np.searchsorted(self.owners_N, rows_K, side="right") - first_K
        places = np.repeat(np.arange(len(rows_K)), sizes_K)
        starts = np.repeat(first_K - (np.cumsum(sizes_K) - sizes_K), sizes_K)
        vectors = self.texts.gather(np.arange(len(places)) + starts).astype(np.float32)
        nearest_K = np.full(len(rows_K), -1, np.float32)
        np.maximum.at(nearest_K, places, vectors @ query_D)
        return nearest_K


def ask(
    store: Store, words: Lexical, encode_texts: Callable[[Sequence[str]], Floats]
) -> tuple[Asked, Short | None] | None:
    """Ask what calibrates a store; None if it has too few rows or captions."""
    searched = searched_of(store, words)
    found = None if searched is None else ask_captions(searched)
    if searched is None or found is None:
        return None
    asked, bank = found
    return asked, ask_phrases(searched, bank, encode_texts)


def _reader(store: Store, modality: str) -> VectorReader:
    owners_N = None if store.is_single(modality) else store.owners(modality)
    live_N = store.live
    if live_N is not None and owners_N is not None:
        live_N = live_N[owners_N]
    return VectorReader(store.vectors(modality), live_N, owners_N)


def searched_of(store: Store, words: Lexical) -> Searched | None:
    """Return what is searched; None if it has too few rows."""
    main = next(filter(is_of_rows, store.modalities), None)
    if main is None or len(store) < MIN_ROWS:
        return None
    vectors = _reader(store, main)
    if vectors.live < MIN_ROWS:
        return None
    null_RD = vectors.gather(vectors.sample_rows(NULL_ROWS, seed=3))
    exact = Exact(vectors.shards, owners=vectors.owners)
    return Searched(store, main, vectors, exact, null_RD, words)


def ask_captions(searched: Searched) -> tuple[Asked, Bank] | None:
    """Draw captions and ask them; None if there are too few."""
    store = searched.store
    if TEXT.name not in store.modalities:
        return None
    texts = _reader(store, TEXT.name)
    if not texts.live:
        return None
    numbers_M = np.random.default_rng(4).permutation(texts.sample_rows(BANK + ASKED, seed=4))
    rows_M = _rows_of(store, TEXT.name, numbers_M)
    shown_M = np.isin(rows_M, searched.rows_of(np.arange(searched.vectors.total)))
    numbers_M, rows_M = numbers_M[shown_M], rows_M[shown_M]
    words = _captions(store, numbers_M, rows_M)
    chosen = _one_each(rows_M, words)
    if len(np.unique(rows_M[chosen])) < MIN_CAPTIONS:
        return None
    bank = Bank(texts.gather(numbers_M[-BANK:]), rows_M[-BANK:], texts, store.owners(TEXT.name))
    queries_MD = texts.gather(numbers_M[chosen]).astype(np.float32)
    asked = _ask(searched, bank, queries_MD, rows_M[chosen], [words[i] for i in chosen])
    return asked, bank


@dataclass(frozen=True)
class _Told:
    """A short query, and whether captions tell that the store holds what it asks for."""

    text: str
    thing: str
    is_present: bool
    row: int = -1
    """The row that it was cut out of; -1 for a phrase of the bank."""


def ask_phrases(
    searched: Searched, bank: Bank, encode_texts: Callable[[Sequence[str]], Floats]
) -> Short | None:
    """Ask short queries of which captions tell whether the store holds them; None without any.

    They are phrases of the bank. Where captions name too few of them, as in a store of one narrow
    subject, and hardly any is short, runs of words cut out of captions are present too.
    """
    rng = np.random.default_rng(6)
    drawn: list[_Told] = []
    captions, rows = _some_captions(searched.store)
    spoken = [relevance.language(text) for text in captions]
    for name in LANGUAGES:
        chosen = [i for i, other in enumerate(spoken) if other == name]
        if len(chosen) >= MIN_CAPTIONS:
            texts, owners = [captions[i] for i in chosen], [rows[i] for i in chosen]
            drawn += _told(texts, owners, name, rng)
    if not drawn:
        return None
    texts = [told.text for told in drawn]
    things = sorted({told.thing for told in drawn})
    first = dict(zip(things, rng.random(len(things)) < 0.5, strict=True))
    vectors_MD = encode_texts(texts)
    scores_M1 = searched.exact.search(vectors_MD, 1, searched.vectors.live_N)[0]
    null_RD, bank_BD = (v.astype(np.float32) for v in (searched.null_RD, bank.vectors_BD))
    rows_M = np.array([told.row for told in drawn])
    unknown_M = np.array(
        [searched.words.unknown(told.text, rows_M[m : m + 1]) for m, told in enumerate(drawn)]
    )
    signs = [
        relevance.signs_of(
            vectors_MD[i], null_RD, bank_BD, unknown_M[i], bank.rows_B != rows_M[i, None]
        )
        for i in parts_of(len(texts))
    ]
    return Short(
        texts,
        vectors_MD,
        Signs.joined(signs),
        scores_M1[:, 0].astype(np.float64),
        np.array([told.is_present for told in drawn], np.bool_),
        np.array([first[told.thing] for told in drawn], np.bool_),
    )


def _told(
    captions: Sequence[str], rows: Sequence[int], language: str, rng: np.random.Generator
) -> list[_Told]:
    """Draw short queries in one language that captions tell of."""
    drawn = []
    for every, is_present in zip(
        told_by(captions, language, rows, NAMED_BY), (True, False), strict=True
    ):
        bank = [phrase for phrase in every if relevance.is_short(phrase.text)]
        chosen = rng.permutation(len(bank))[:PHRASES].tolist()
        drawn += [_Told(bank[i].text, bank[i].thing, is_present) for i in chosen]
    known = sum(told.is_present for told in drawn) + sum(map(relevance.is_short, captions))
    if known < MIN_PHRASES:
        first = np.unique(rows, return_index=True)[1]
        chosen = rng.permutation(first)[:PHRASES].tolist()
        runs = [(run_of(captions[i], language, rng), rows[i]) for i in chosen]
        drawn += [_Told(text, text, True, row) for text, row in runs if text]
    return drawn


def run_of(caption: str, language: str, rng: np.random.Generator) -> str:
    """Cut some consecutive words or Chinese characters out of a caption."""
    between, least, most = ("", 2, 6) if language == "zh" else (" ", 1, 4)
    units = list("".join(caption.split())) if language == "zh" else caption.split()
    count = min(int(rng.integers(least, most + 1)), len(units))
    start = int(rng.integers(len(units) - count + 1)) if units else 0
    text = between.join(units[start : start + count]).strip(".,;:!?。，；：！？")
    return text if relevance.is_short(text) else ""


def _some_captions(store: Store) -> tuple[list[str], list[int]]:
    """Return captions of random rows, and the row of each."""
    live_N = np.ones(store.manifest.physical_rows, np.bool_) if store.live is None else store.live
    numbers = np.sort(np.random.default_rng(7).permutation(np.flatnonzero(live_N))[:READ_ROWS])
    read = zip(numbers.tolist(), store.rows(numbers, ("captions",)), strict=True)
    pairs = [(text, number) for number, row in read for text in row["captions"]]
    return [text for text, _ in pairs], [number for _, number in pairs]


def _captions(store: Store, numbers_M: Ints, rows_M: Ints) -> list[str]:
    """Return the texts of text vectors."""
    places_M = store.positions(TEXT.name, numbers_M)[:, 0].astype(np.int64)
    read = store.rows(rows_M, ("captions",))
    return [row["captions"][place] for row, place in zip(read, places_M.tolist(), strict=True)]


def _one_each(rows_M: Ints, words: Sequence[str]) -> Ints:
    """Choose one caption of each row and language, `ASKED` at most."""
    first: dict[tuple[int, str], int] = {}
    for i, (row, text) in enumerate(zip(rows_M.tolist(), words, strict=True)):
        first.setdefault((row, relevance.language(text)), i)
    return np.array(list(first.values())[:ASKED], np.int64)


def _ask(
    searched: Searched, bank: Bank, queries_MD: Floats, rows_M: Ints, words: Sequence[str]
) -> Asked:
    """Ask captions, with their own images and without."""
    vectors = searched.vectors
    scores_MK, numbers_MK = searched.exact.search(queries_MD, NEAREST, vectors.live_N)
    found_MK = searched.rows_of(numbers_MK)
    unique = np.unique(found_MK[found_MK >= 0])
    captions = (frozenset(row["captions"]) for row in searched.store.rows(unique, ("captions",)))
    captions_of = dict(zip(unique.tolist(), captions, strict=True))
    own_MD = searched.first_vectors(rows_M)
    bank_BD = bank.vectors_BD.astype(np.float32)
    absent_M, other_M = np.full((2, len(words)), np.nan)
    # They are in the order of their rows.
    step = max(1, len(searched.null_RD) // SAMPLE)
    usual = Usual(searched.null_RD[::step].astype(np.float32))
    own_reach_M = usual.reach(own_MD)
    gone: list[Ints] = []
    unknown_M, unknown_without_M = np.zeros((2, len(words)))
    for m, text in enumerate(words):
        found_K = found_MK[m][found_MK[m] >= 0]
        nearest_KD = vectors.gather(numbers_MK[m][: len(found_K)]).astype(np.float32)
        same_K = np.array([text in captions_of[row] for row in found_K.tolist()], np.bool_)
        like_K = are_duplicates(
            nearest_KD, own_MD[m : m + 1], usual.reach(nearest_KD), own_reach_M[m : m + 1]
        )[:, 0]
        out_K = like_K | same_K | (found_K == rows_M[m])
        similar = np.quantile(bank_BD @ queries_MD[m], 1 - SIMILAR)
        kin_K = out_K | (bank.nearest(queries_MD[m], found_K) >= similar)
        # If all that were looked at are similar, the best of the others is no better than the last.
        other_M[m] = scores_MK[m][len(found_K) - 1]
        for scores_M, left_out_K in ((absent_M, out_K), (other_M, kin_K)):
            if not left_out_K.all():
                scores_M[m] = scores_MK[m][np.argmin(left_out_K)]
        gone.append(np.unique(np.append(found_K[out_K], rows_M[m])))
        unknown_M[m] = searched.words.unknown(text, rows_M[m : m + 1])
        unknown_without_M[m] = searched.words.unknown(text, gone[m])
    null_RD = searched.null_RD.astype(np.float32)
    signs: list[Signs] = []
    removed: list[Signs] = []
    for part in parts_of(len(words)):
        foreign_MB = bank.rows_B[None] != rows_M[part, None]
        without_MB = np.stack([~np.isin(bank.rows_B, gone[m]) for m in part])
        for out, unknown, kept_MB in (
            (signs, unknown_M, foreign_MB), (removed, unknown_without_M, without_MB),
        ):  # fmt: skip
            out.append(
                relevance.signs_of(queries_MD[part], null_RD, bank_BD, unknown[part], kept_MB)
            )
    languages_M = [relevance.language(text) for text in words]
    best_M = scores_MK[:, 0].astype(np.float64)
    short_M = np.array([relevance.is_short(text) for text in words], np.bool_)
    return Asked(
        queries_MD, rows_M, languages_M, short_M, Signs.joined(signs), best_M, absent_M, other_M,
        Signs.joined(removed),
    )  # fmt: skip


def _rows_of(store: Store, modality: str, numbers: Ints) -> Ints:
    """Return the row of each vector."""
    return numbers if store.is_single(modality) else store.owners(modality)[numbers]


def parts_of(count: int) -> Iterator[Ints]:
    """Split so many queries into parts that are compared at once."""
    for start in range(0, count, PRODUCT_QUERIES):
        yield np.arange(start, min(count, start + PRODUCT_QUERIES))
