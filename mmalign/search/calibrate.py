"""The relevance of a store is calibrated: on its own captions, or on phrases where it has none.

Captions are long. Phrases of the bank that captions name are short queries of which it is known
that the store holds them; with them, short queries are rejected as seldom as captions.

A caption is a query whose image is known to be in the store. With this image, its near-duplicates
and all images of the same caption left out, it is a query that nothing may answer. One caption of
a row is used in each language, so that intervals hold; half of the rows fit, the others measure.

Shapes: N vectors, M captions or phrases, D dimensions, K nearest, B captions of the bank, F signs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmalign.arrays import Bools, Floats, Halves, Ints
from mmalign.errors import ModelError
from mmalign.index import Exact, VectorReader
from mmalign.modality import TEXT, is_of_rows
from mmalign.progress import say
from mmalign.search import relevance
from mmalign.search.duplicates import are_duplicates, threshold
from mmalign.search.phrases import LANGUAGES, Phrase, phrases, told_by
from mmalign.search.relevance import ALL, MAX_ERROR, QUANTILES, Doubles, Scale, Signs
from mmalign.store import Store

# Random rows, captions that familiarity compares with, and captions that are asked.
NULL_ROWS, BANK, ASKED = 2_048, 2_048, 2_000
# With fewer rows nothing is calibrated; with fewer captions, the store counts as one without.
MIN_ROWS = MIN_CAPTIONS = 100
# Phrases of each language that are present, and as many that are absent. With fewer present ones
# that fit, short queries are read as captions are.
PHRASES, MIN_PHRASES = 300, 30
# Rows whose captions tell what is present.
READ_ROWS = 20_000
# Of a caption's nearest rows, so many are looked at for the best that is not its own.
NEAREST = 64
# Share of the captions of a store that count as similar to a query.
SIMILAR = 0.05
# Ranks among phrases that a store without captions goes by; most phrases are of nothing in it.
UNLIKELY_RANK, LIKELY_RANK = 0.5, 0.95
PRODUCT_QUERIES = 256
# Share of the fitting captions, and of the fitting phrases, that is rejected: a little below
# `MAX_ERROR`, so that as a rule the others stay below it.
REJECTED = 0.03
Z = 1.96


@dataclass(frozen=True)
class Calibration:
    """What is kept of a store: vectors for the file, and what index.json says of them."""

    null_RD: Halves
    bank_BD: Halves
    content: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """Captions that were asked, and the best hits they had."""

    queries_MD: Floats
    rows_M: Ints
    languages_M: list[str]
    lengths_M: Ints
    """Characters of each."""
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
            self.lengths_M[chosen_M],
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
class _Searched:
    """The vectors that captions and phrases are asked of."""

    store: Store
    main: str
    vectors: VectorReader
    exact: Exact
    null_RD: Halves

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
class _Bank:
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


def calibrate(store: Store, encode_texts: Callable[[Sequence[str]], Floats]) -> Calibration | None:
    """Calibrate relevance over the main modality of a store; None if it has too few rows.

    Args:
        store: The store.
        encode_texts: Encodes phrases.

    Raises:
        ModelError: Phrases cannot be encoded, and there are too few captions.
    """
    searched = _searched(store)
    if searched is None:
        return None
    found = _ask_captions(searched)
    if found is None:
        return _on_phrases(searched, encode_texts)
    asked, bank = found
    try:
        short = _ask_phrases(searched, bank.vectors_BD, encode_texts)
    except ModelError as error:
        say(f"warning: short queries are never rejected, as phrases cannot be encoded: {error}")
        short = None
    return _on_captions(searched, asked, bank, short)


def ask(
    store: Store, encode_texts: Callable[[Sequence[str]], Floats]
) -> tuple[Asked, Short | None] | None:
    """Ask what calibrates a store; None if it has too few rows or captions."""
    searched = _searched(store)
    found = None if searched is None else _ask_captions(searched)
    if searched is None or found is None:
        return None
    asked, bank = found
    return asked, _ask_phrases(searched, bank.vectors_BD, encode_texts)


def fits(store: Store) -> Bools:
    """Return whose captions fit the scales; those of the other rows measure them."""
    return np.random.default_rng(5).random(store.manifest.physical_rows) < 0.5


def wilson(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    >>> [round(bound, 3) for bound in wilson(5, 100)]
    [0.022, 0.112]
    """
    if not total:
        return 0.0, 1.0
    share, weight = count / total, Z**2 / total
    centre = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def area(present: Doubles, absent: Doubles) -> tuple[float, float, float]:
    """Return the area under the ROC curve and its 95 % interval.

    Source: Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve".
    """
    if not len(present) or not len(absent):
        return 0.5, 0.0, 1.0
    ordered = np.sort(absent)
    below = np.searchsorted(ordered, present, side="left")
    upto = np.searchsorted(ordered, present, side="right")
    a = float((below + upto).mean() / 2 / len(absent))
    n, m = len(present), len(absent)
    spread = (n - 1) * (a / (2 - a) - a * a) + (m - 1) * (2 * a * a / (1 + a) - a * a)
    half = Z * math.sqrt(max(0.0, a * (1 - a) + spread) / (n * m))
    return a, max(0.0, a - half), min(1.0, a + half)


def summary(content: dict[str, Any]) -> str:
    """Return one line of what was measured."""
    parts = []
    for name, part in content["languages"].items():
        if "rejected" not in part:
            continue
        wrong, low, high = (part["rejected"][key] for key in ("share", "low", "high"))
        auc = part["auc"]
        who = "" if name == ALL else f"{name}: "
        parts.append(
            f"{who}{wrong:.1%} of {part['captions']} held-out captions rejected though present "
            f"({low:.1%} to {high:.1%}), area under the ROC curve without their image "
            f"{auc['area']:.2f} ({auc['low']:.2f} to {auc['high']:.2f})"
        )
        for kind, told in part.get("phrases", {}).items():
            if told["phrases"]:
                share = told["rejected"]["share"]
                parts[-1] += f", {share:.1%} of {told['phrases']} {kind} phrases rejected"
        if shortest := part["scale"]["shortest"]:
            parts[-1] += f"; texts of less than {shortest} characters are never rejected"
    return f"relevance: {'; '.join(parts) if parts else content['how']}"


def _reader(store: Store, modality: str) -> VectorReader:
    owners_N = None if store.is_single(modality) else store.owners(modality)
    live_N = store.live
    if live_N is not None and owners_N is not None:
        live_N = live_N[owners_N]
    return VectorReader(store.vectors(modality), live_N, owners_N)


def _searched(store: Store) -> _Searched | None:
    """Return what is searched; None if it has too few rows."""
    main = next(filter(is_of_rows, store.modalities), None)
    if main is None or len(store) < MIN_ROWS:
        return None
    vectors = _reader(store, main)
    if vectors.live < MIN_ROWS:
        return None
    null_RD = vectors.gather(vectors.sample_rows(NULL_ROWS, seed=3))
    exact = Exact(vectors.shards, owners=vectors.owners)
    return _Searched(store, main, vectors, exact, null_RD)


def _ask_captions(searched: _Searched) -> tuple[Asked, _Bank] | None:
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
    bank = _Bank(texts.gather(numbers_M[-BANK:]), rows_M[-BANK:], texts, store.owners(TEXT.name))
    queries_MD = texts.gather(numbers_M[chosen]).astype(np.float32)
    asked = _ask(searched, bank, queries_MD, rows_M[chosen], [words[i] for i in chosen])
    return asked, bank


def _ask_phrases(
    searched: _Searched, bank_BD: Halves, encode_texts: Callable[[Sequence[str]], Floats]
) -> Short | None:
    """Ask phrases of which captions tell whether the store holds them; None if there are none."""
    rng = np.random.default_rng(6)
    drawn: list[tuple[Phrase, bool]] = []
    captions = _some_captions(searched.store)
    for name in LANGUAGES:
        texts = [text for text in captions if relevance.language(text) == name]
        if len(texts) < MIN_CAPTIONS:
            continue
        for bank, present in zip(told_by(texts, name), (True, False), strict=True):
            chosen = rng.permutation(len(bank))[:PHRASES].tolist()
            drawn += [(bank[i], present) for i in chosen]
    if not drawn:
        return None
    texts = [phrase.text for phrase, _ in drawn]
    things = sorted({phrase.thing for phrase, _ in drawn})
    first = dict(zip(things, rng.random(len(things)) < 0.5, strict=True))
    vectors_MD = encode_texts(texts)
    scores_M1 = searched.exact.search(vectors_MD, 1, searched.vectors.live_N)[0]
    null_RD, captions_BD = (v.astype(np.float32) for v in (searched.null_RD, bank_BD))
    signs = [relevance.signs_of(vectors_MD[i], null_RD, captions_BD) for i in _parts(len(texts))]
    return Short(
        texts,
        vectors_MD,
        Signs.joined(signs),
        scores_M1[:, 0].astype(np.float64),
        np.array([present for _, present in drawn], np.bool_),
        np.array([first[phrase.thing] for phrase, _ in drawn], np.bool_),
    )


def _some_captions(store: Store) -> list[str]:
    live_N = np.ones(store.manifest.physical_rows, np.bool_) if store.live is None else store.live
    rows = np.random.default_rng(7).permutation(np.flatnonzero(live_N))[:READ_ROWS]
    return [t for row in store.rows(np.sort(rows), ("captions",)) for t in row["captions"]]


def _on_captions(
    searched: _Searched, asked: Asked, bank: _Bank, short: Short | None
) -> Calibration:
    fitting_M = fits(searched.store)[asked.rows_M]
    languages = {ALL: np.ones(len(asked.rows_M), np.bool_)}
    for name in sorted(set(asked.languages_M)):
        members_M = np.array([other == name for other in asked.languages_M])
        if min((members_M & fitting_M).sum(), (members_M & ~fitting_M).sum()) >= MIN_CAPTIONS:
            languages[name] = members_M
    content: dict[str, Any] = {"how": "calibrated on captions", "languages": {}}
    for name, members_M in languages.items():
        known = None if short is None else short.spoken(name)
        scale = fit(asked.of(members_M & fitting_M), known)
        measured = _measure(scale, asked.of(members_M & ~fitting_M))
        if known is not None:
            measured["phrases"] = _measure_phrases(asked.of(members_M & fitting_M), known)
        content["languages"][name] = {**measured, "scale": relevance.to_json(scale)}
    return Calibration(searched.null_RD, bank.vectors_BD, content)


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
    searched: _Searched, bank: _Bank, queries_MD: Floats, rows_M: Ints, words: Sequence[str]
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
    least = threshold(searched.null_RD.astype(np.float32))
    gone: list[list[int]] = []
    for m, text in enumerate(words):
        found_K = found_MK[m][found_MK[m] >= 0]
        nearest_KD = vectors.gather(numbers_MK[m][: len(found_K)]).astype(np.float32)
        same_K = np.array([text in captions_of[row] for row in found_K.tolist()], np.bool_)
        like_K = are_duplicates(nearest_KD, own_MD[m : m + 1], least)[:, 0]
        out_K = like_K | same_K | (found_K == rows_M[m])
        similar = np.quantile(bank_BD @ queries_MD[m], 1 - SIMILAR)
        kin_K = out_K | (bank.nearest(queries_MD[m], found_K) >= similar)
        # If all that were looked at are similar, the best of the others is no better than the last.
        other_M[m] = scores_MK[m][len(found_K) - 1]
        for scores_M, left_out_K in ((absent_M, out_K), (other_M, kin_K)):
            if not left_out_K.all():
                scores_M[m] = scores_MK[m][np.argmin(left_out_K)]
        gone.append([int(rows_M[m]), *found_K[out_K].tolist()])
    null_RD = searched.null_RD.astype(np.float32)
    signs, removed = [], []
    for part in _parts(len(words)):
        foreign_MB = bank.rows_B[None] != rows_M[part, None]
        signs.append(relevance.signs_of(queries_MD[part], null_RD, bank_BD, foreign_MB))
        without_MB = np.stack([~np.isin(bank.rows_B, gone[m]) for m in part])
        removed.append(relevance.signs_of(queries_MD[part], null_RD, bank_BD, without_MB))
    languages_M = [relevance.language(text) for text in words]
    best_M = scores_MK[:, 0].astype(np.float64)
    lengths_M = np.array([len(text) for text in words])
    return Asked(
        queries_MD, rows_M, languages_M, lengths_M, Signs.joined(signs), best_M, absent_M, other_M,
        Signs.joined(removed),
    )  # fmt: skip


def _rows_of(store: Store, modality: str, numbers: Ints) -> Ints:
    """Return the row of each vector."""
    return numbers if store.is_single(modality) else store.owners(modality)[numbers]


def _parts(count: int) -> Iterator[Ints]:
    for start in range(0, count, PRODUCT_QUERIES):
        yield np.arange(start, min(count, start + PRODUCT_QUERIES))


def fit(asked: Asked, short: Short | None) -> Scale:
    """Fit a scale: its thresholds keep `MAX_ERROR` on the queries that they are fitted on.

    Captions count as much as short phrases that are present, if there are enough of those. If not,
    nobody knows how texts score that are much shorter than captions, and none of them is rejected.
    """
    known_M = ~np.isnan(asked.absent_M)
    present_MF = relevance.features(asked.signs, asked.present_M)
    absent_MF = relevance.features(asked.removed, asked.absent_M)[known_M]
    kinds = [(asked.signs, asked.present_M)]
    chosen = None if short is None else short.of(short.present_M)
    if chosen is not None and len(chosen.texts_M) >= MIN_PHRASES:
        kinds.append((chosen.signs, chosen.best_M))
    scale = Scale(
        lift=_quantiles_of_all([best_M - signs.mean_M for signs, best_M in kinds]),
        unlikely=0.0,
        likely=0.0,
        familiarity=_quantiles_of_all([signs.familiarity_M for signs, _ in kinds]),
        weights=logistic_weights(present_MF, absent_MF),
    )
    if len(kinds) == 1:
        scale = replace(scale, shortest=int(np.quantile(asked.lengths_M, MAX_ERROR) / 2))
    lowest = [np.quantile(relevance.ranks(scale, *kind), REJECTED) for kind in kinds]
    scale = replace(scale, unlikely=float(min(lowest)))
    judged = relevance.judge(scale, asked.removed, asked.other_M)
    return replace(scale, likely=float(np.quantile(judged.relevance_K, 1 - MAX_ERROR)))


def _quantiles_of_all(kinds: Sequence[Doubles]) -> tuple[float, ...]:
    """Return the quantiles of several kinds of queries that count the same, however many."""
    return quantiles(np.concatenate([quantiles(values_M) for values_M in kinds]))


def quantiles(values: Doubles) -> tuple[float, ...]:
    """Return the quantiles that ranks are read from."""
    return tuple(np.quantile(values, np.linspace(0, 1, QUANTILES)).tolist())


def logistic_weights(present_MF: Doubles, absent_MF: Doubles) -> tuple[float, ...]:
    """Fit a logistic regression whose weights are not negative, except that of the last column.

    Newton's steps on standardized signs with a small penalty; a sign whose weight falls below zero
    is left out, the most negative first, so that relevance never falls as a score rises.
    """
    signs_MF = np.concatenate([present_MF, absent_MF])[:, :-1]
    truth_M = np.r_[np.ones(len(present_MF)), np.zeros(len(absent_MF))]
    mean_F, deviation_F = signs_MF.mean(0), signs_MF.std(0) + 1e-9
    columns_MF = np.c_[(signs_MF - mean_F) / deviation_F, np.ones(len(signs_MF))]
    used = list(range(columns_MF.shape[1]))
    while True:
        weights_F = np.zeros(columns_MF.shape[1])
        weights_F[used] = _newton(columns_MF[:, used], truth_M)
        worst = int(np.argmin(weights_F[:-1]))
        if weights_F[worst] >= 0:
            break
        used.remove(worst)
    slopes_F = weights_F[:-1] / deviation_F
    return (*slopes_F.tolist(), float(weights_F[-1] - slopes_F @ mean_F))


def _newton(columns_MF: Doubles, truth_M: Doubles) -> Doubles:
    weights_F = np.zeros(columns_MF.shape[1])
    penalty = np.eye(len(weights_F))
    for _ in range(30):
        likely_M = relevance.logistic(columns_MF @ weights_F)
        curve = (columns_MF * (likely_M * (1 - likely_M))[:, None]).T @ columns_MF + penalty
        weights_F -= np.linalg.solve(curve, columns_MF.T @ (likely_M - truth_M) + weights_F)
    return weights_F


def _measure(scale: Scale, asked: Asked) -> dict[str, Any]:
    """Measure a scale on captions that did not fit it."""
    known_M = ~np.isnan(asked.absent_M)
    absent = asked.of(known_M)
    present = relevance.judge(scale, asked.signs, asked.present_M)
    unlike = relevance.judge(scale, asked.removed, asked.other_M)
    without = relevance.judge(scale, absent.removed, absent.absent_M)
    a, low, high = area(present.relevance_K, without.relevance_K)
    return {
        "captions": len(asked.rows_M),
        "rejected": _share([level == "unlikely" for level in present.levels_K]),
        "likely": _share([level == "likely" for level in present.levels_K]),
        "without_image": {
            "captions": int(known_M.sum()),
            "accepted": _share([level != "unlikely" for level in without.levels_K]),
            "likely": _share([level == "likely" for level in without.levels_K]),
        },
        "without_similar": {
            "captions": len(asked.rows_M),
            "likely": _share([level == "likely" for level in unlike.levels_K]),
        },
        "auc": {"area": round(a, 4), "low": round(low, 4), "high": round(high, 4)},
    }


def _measure_phrases(asked: Asked, short: Short) -> dict[str, Any]:
    """Measure phrases, each by a scale that the captions and the other half of the things fit."""
    rejected_M = np.zeros(len(short.texts_M), np.bool_)
    for fitting_M in (short.first_M, ~short.first_M):
        others = short.of(~fitting_M)
        judged = relevance.judge(fit(asked, short.of(fitting_M)), others.signs, others.best_M)
        rejected_M[~fitting_M] = [level == "unlikely" for level in judged.levels_K]
    parts = {"present": rejected_M[short.present_M], "absent": rejected_M[~short.present_M]}
    return {
        name: {"phrases": len(part), "rejected": _share(part.tolist())}
        for name, part in parts.items()
    }


def _share(these: Sequence[bool]) -> dict[str, float]:
    low, high = wilson(sum(these), len(these))
    share = sum(these) / max(len(these), 1)
    return {"share": round(share, 4), "low": round(low, 4), "high": round(high, 4)}


def _on_phrases(
    searched: _Searched, encode_texts: Callable[[Sequence[str]], Floats]
) -> Calibration:
    """Rank hits among those of phrases; nobody knows which of these are present."""
    bank = [phrase.text for phrase in phrases()]
    vectors = encode_texts(bank)
    found_M1 = searched.exact.search(vectors, 1, searched.vectors.live_N)[0]
    best_M = found_M1[:, 0].astype(np.float64)
    null_RD = searched.null_RD.astype(np.float32)
    none_BD = null_RD[:0]
    parts = [relevance.signs_of(vectors[i], null_RD, none_BD) for i in _parts(len(bank))]
    lift_M = best_M - Signs.joined(parts).mean_M
    spoken = np.array([relevance.language(text) for text in bank])
    members = {ALL: np.ones(len(bank), np.bool_)}
    members |= {name: spoken == name for name in sorted(set(spoken.tolist()))}
    scales = {
        name: Scale(quantiles(lift_M[chosen]), UNLIKELY_RANK, LIKELY_RANK)
        for name, chosen in members.items()
    }
    languages = {name: {"scale": relevance.to_json(scale)} for name, scale in scales.items()}
    return Calibration(
        searched.null_RD, searched.null_RD[:0], {"how": UNCALIBRATED, "languages": languages}
    )


UNCALIBRATED = "uncalibrated: no captions"
