"""How likely a hit is what was asked for, and whether a store holds anything like it at all.

A cosine says little by itself: texts of one style score higher against every image than texts of
another, and each model and store has a range of its own. Three signs are read instead, the first
two ranked among captions of the store and phrases that they name, which are known to be present:

    lift          how far a hit lies above the mean score of the query over random rows
    familiarity   how near the query is to captions of the store, and how much of what it says
                  no caption says in the same words
    probability   a logistic of the score, of its lift in standard deviations and of its distance to
                  the query's .99 quantile, fitted on captions with and without their own image

A hit is unlikely if the familiarity of its query is lower than that of nearly all present queries,
or its own lift is far lower. Short texts and longer ones score differently, so each are ranked
among their own. Why these, and what else was tried: docs/decisions/0013-relevance.md.

Shapes: M queries, D dimensions, K hits, R random rows, B captions of the bank, Q quantiles.
"""

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign import files
from mmalign.arrays import Bools, Floats, Halves, Ints
from mmalign.errors import StoreError

Doubles = NDArray[np.float64]

FILE = "relevance.npz"
LEVELS = ("unlikely", "maybe", "likely")
# Captions of the bank that familiarity is the mean cosine with.
NEAREST = 10
QUANTILES = 401
# Texts of at most so many characters are short: words that people type rather than sentences.
SHORT = {"other": 24, "zh": 8}
# The rank of a text none of whose words is in any caption is divided by one more than this: it is
# unlikely if half of the present queries are more familiar, instead of nearly all of them.
STRANGENESS = 15
# How many times the rank of the lift counts beside that of familiarity, which tells more of a
# query; the lift tells the hits of one query apart.
LENIENCE = 6
# The aim: at most this share of the captions is rejected though present, and at most this share of
# the best hits is likely once the images of the caption and of similar captions are gone.
MAX_ERROR = 0.05
ALL = "all"
# Han characters, as in Chinese texts.
_HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")


@dataclass(frozen=True)
class Scale:
    """How the signs of queries in one language are read."""

    lift: tuple[float, ...]
    """Quantiles of the lift of the best hits of present queries, from the lowest to the highest."""
    unlikely: float
    """A hit whose rank among the present queries, from 0 to 1, is below this is unlikely."""
    likely: float
    """A hit of at least this relevance is likely, unless it is unlikely."""
    familiarity: tuple[float, ...] = ()
    """Quantiles of that of present queries; empty if the store has no captions."""
    known: tuple[float, ...] = ()
    """Quantiles of the rank of their familiarity, once it is lower for unknown words; likewise."""
    weights: tuple[float, ...] = ()
    """Of score, standardized lift and standardized tail, none below 0, and the constant; empty if
    not fitted."""


@dataclass(frozen=True)
class Scales:
    """How queries in one language are read: those as long as sentences, and short ones.

    Where a store tells of no present query of one kind, the scale of the other is used, and none of
    them is unlikely.
    """

    long: Scale | None
    short: Scale | None

    def of(self, *, short: bool) -> Scale:
        """Return the scale of one kind of queries."""
        own, other = (self.short, self.long) if short else (self.long, self.short)
        scale = own or other
        assert scale is not None
        return scale if own else replace(scale, unlikely=0.0)


@dataclass(frozen=True)
class Signs:
    """What is read from one query or several, before any hit is looked at."""

    mean_M: Doubles
    """Mean of its scores over random rows."""
    deviation_M: Doubles
    high_M: Doubles
    """The .99 quantile of its scores over random rows."""
    familiarity_M: Doubles
    unknown_M: Doubles
    """How much of what it says is in no caption, 0 to 1, see `Lexical.unknown`."""

    def of(self, chosen_M: Bools) -> "Signs":
        """Return those of some queries."""
        return Signs(*(values_M[chosen_M] for values_M in vars(self).values()))

    @classmethod
    def joined(cls, parts: Sequence["Signs"]) -> "Signs":
        """Return the signs of several groups of queries as those of one."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True)
class Judgement:
    """What is said of the hits of one query."""

    relevance_K: Doubles
    """From 0 to 1."""
    levels_K: tuple[str, ...]
    """Each of `LEVELS`."""
    is_calibrated: bool = True
    """False: the store has no captions, so that nobody knows what a low rank means."""

    @property
    def nothing(self) -> bool:
        """Whether the first hit is unlikely, or there is none."""
        return self.levels_K[:1] in ((), LEVELS[:1])

    def of(self, places_P: Ints) -> "Judgement":
        """Return what is said of some of the hits."""
        levels = tuple(self.levels_K[place] for place in places_P.tolist())
        return Judgement(self.relevance_K[places_P], levels, self.is_calibrated)


class Relevance:
    """The calibration of a store and its model. Safe to use from many threads."""

    def __init__(self, null_RD: Halves, bank_BD: Halves, scales: Mapping[str, Scales]) -> None:
        """Take random vectors of the store, its captions (none: 0 rows), and scales by language.

        Those of `ALL` are for every language without its own.
        """
        self.null_RD = null_RD.astype(np.float32)
        self.bank_BD = bank_BD.astype(np.float32)
        self.scales = dict(scales)

    @property
    def on_captions(self) -> bool:
        """Whether it was calibrated on captions of the store."""
        return len(self.bank_BD) > 0

    def reads_words(self, text: str) -> bool:
        """Return whether it counts if captions have the words of a text: some have its language."""
        return self.on_captions and language(text) in self.scales

    def judge(
        self, query_D: Floats, scores_K: Floats, text: str, unknown: float = 0.0
    ) -> Judgement:
        """Judge hits by their scores, which may be in any order.

        Args:
            query_D: The vector of a text.
            scores_K: Scores of the hits.
            text: Its language and length tell the scale.
            unknown: How much of what it says is in no caption; 0 if it does not `reads_words`.
        """
        if not len(scores_K):
            return Judgement(np.zeros(0), ())
        signs = self._signs(query_D, unknown)
        judged = judge(self._scale(text), signs, scores_K.astype(np.float64))
        return Judgement(judged.relevance_K, judged.levels_K, self.on_captions)

    def _scale(self, text: str) -> Scale:
        scales = self.scales.get(language(text)) or self.scales[ALL]
        return scales.of(short=is_short(text))

    def _signs(self, query_D: Floats, unknown: float) -> Signs:
        unknown_M = np.array([unknown], np.float64)
        return signs_of(query_D[None], self.null_RD, self.bank_BD, unknown_M)


def judge(scale: Scale, signs: Signs, scores_K: Doubles) -> Judgement:
    """Judge hits of one query, or the best hit of each of M = K queries."""
    rank_K = ranks(scale, signs, scores_K)
    if scale.weights:
        value_K = logistic(features(signs, scores_K) @ np.array(scale.weights))
    else:
        value_K = (rank_K + _rank(scale.lift, scores_K - signs.mean_M)) / 2
    # What nearly all present queries exceed is not relevant, whatever else speaks for it.
    relevance_K = value_K * np.minimum(1, rank_K / max(scale.unlikely, 1e-9))
    level_K = np.where(relevance_K >= scale.likely, 2, 1) * (rank_K >= scale.unlikely)
    return Judgement(relevance_K, tuple(LEVELS[level] for level in level_K.tolist()))


def language(text: str) -> str:
    """Return "zh" for a text with Chinese characters, "other" for all others.

    >>> language("a red dress"), language("红色的 dress")
    ('other', 'zh')
    """
    return "zh" if _HAN.search(text) else "other"


def is_short(text: str) -> bool:
    """Return whether a text is short, of a few words.

    >>> is_short("a red dress"), is_short("a woman in a red dress on a beach"), is_short("红裙子")
    (True, False, True)
    """
    return len(text) <= SHORT[language(text)]


def signs_of(
    queries_MD: Floats,
    null_RD: Floats,
    bank_BD: Floats,
    unknown_M: Doubles,
    foreign_MB: Bools | None = None,
) -> Signs:
    """Read the signs of queries.

    Args:
        queries_MD: Unit vectors.
        null_RD: Vectors of random rows.
        bank_BD: Vectors of captions, none if B is 0.
        unknown_M: How much of what each says is in no caption.
        foreign_MB: Which captions may be compared; None for all.
    """
    scores_MR = queries_MD @ null_RD.T
    # A partition is several times faster than np.quantile.
    at = min(len(null_RD) - 1, int(0.99 * len(null_RD)))
    near_M = np.zeros(len(queries_MD))
    if len(bank_BD):
        near_MB = queries_MD @ bank_BD.T
        if foreign_MB is not None:
            near_MB = np.where(foreign_MB, near_MB, -1)
        count = min(NEAREST, len(bank_BD))
        near_M = np.partition(near_MB, -count, axis=1)[:, -count:].mean(1, dtype=np.float64)
    return Signs(
        scores_MR.mean(1, dtype=np.float64),
        scores_MR.std(1, dtype=np.float64) + 1e-6,
        np.partition(scores_MR, at, axis=1)[:, at].astype(np.float64),
        near_M,
        unknown_M,
    )


def features(signs: Signs, scores_K: Doubles) -> Doubles:
    """Return what the logistic reads of hits, (K, 4): of M = K queries, or of one query."""
    lift_K = (scores_K - signs.mean_M) / signs.deviation_M
    tail_K = (scores_K - signs.high_M) / signs.deviation_M
    return np.stack([scores_K, lift_K, tail_K, np.ones_like(scores_K)], axis=1)


def ranks(scale: Scale, signs: Signs, scores_K: Doubles) -> Doubles:
    """Return the lower rank of both signs of each hit among those of present queries, 0 to 1."""
    rank_K = _rank(scale.lift, scores_K - signs.mean_M)
    if scale.familiarity:
        lenient_K = np.minimum(1, LENIENCE * rank_K)
        rank_K = np.minimum(lenient_K, _rank(scale.known, known_ranks(scale, signs)))
    return rank_K


def known_ranks(scale: Scale, signs: Signs) -> Doubles:
    """Return the rank of the familiarity of queries, lower the more of their words are unknown."""
    familiar_M = _rank(scale.familiarity, signs.familiarity_M)
    return familiar_M / (1 + STRANGENESS * signs.unknown_M)


def _rank(quantiles_Q: tuple[float, ...], values_K: Doubles) -> Doubles:
    """Rank values, strictly increasing: beyond the quantiles as an exponential falls."""
    low, high = quantiles_Q[0], quantiles_Q[-1]
    step = 1 / (len(quantiles_Q) - 1)
    spread = max(high - low, 1e-6)
    inside_K = np.interp(values_K, quantiles_Q, np.linspace(step, 1 - step, len(quantiles_Q)))
    below_K = step * np.exp(np.minimum(0, (values_K - low) / spread))
    above_K = 1 - step * np.exp(np.minimum(0, (high - values_K) / spread))
    return np.where(values_K < low, below_K, np.where(values_K > high, above_K, inside_K))


def logistic(margins: Doubles) -> Doubles:
    """Return probabilities of margins."""
    return 0.5 * (1 + np.tanh(margins / 2))


def save(folder: Path, null_RD: Halves, bank_BD: Halves) -> None:
    """Write the vectors of a calibration into the folder of an index."""
    content = io.BytesIO()
    np.savez(content, null=null_RD, bank=bank_BD)
    files.write_bytes(folder / FILE, content.getvalue())


def load(folder: Path, content: Mapping[str, Any], dim: int) -> Relevance | None:
    """Read a calibration back; None if the index has none.

    Args:
        folder: The folder of the index.
        content: Its index.json.
        dim: Dimensions of the vectors of the store.

    Raises:
        StoreError: It is damaged, or does not fit the store.
    """
    if not content.get("relevance"):
        return None
    file = folder / FILE
    try:
        if files.sha256(file) != content["sha256"][FILE]:
            raise ValueError("its content does not match its hash")
        with np.load(file, allow_pickle=False) as arrays:
            null_RD, bank_BD = arrays["null"], arrays["bank"]
        languages = content["relevance"]["languages"]
        if any("long" not in part for part in languages.values()):
            raise ValueError("calibrated by an earlier version")
        scales = {
            name: Scales(*(_scale_of(part[kind]) for kind in ("long", "short")))
            for name, part in languages.items()
        }
        fits = all(v.dtype == np.float16 and v.shape[1:] == (dim,) for v in (null_RD, bank_BD))
        known = ALL in scales and all(part.long or part.short for part in scales.values())
        if not fits or not len(null_RD) or not known:
            raise ValueError("not of this store")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise StoreError(f"{file}: relevance cannot be read: {error}") from None
    return Relevance(null_RD, bank_BD, scales)


def _scale_of(content: Mapping[str, Any] | None) -> Scale | None:
    if content is None:
        return None
    lists = ("lift", "familiarity", "known", "weights")
    lift, familiarity, known, weights = (tuple(map(float, content[name])) for name in lists)
    return Scale(
        lift, float(content["unlikely"]), float(content["likely"]), familiarity, known, weights
    )


def to_json(scale: Scale | None) -> dict[str, Any] | None:
    """Return a scale as it stands in index.json, its numbers in six digits."""
    return (
        None
        if scale is None
        else {
            name: [float(f"{v:.6g}") for v in value] if isinstance(value, tuple) else value
            for name, value in asdict(scale).items()
        }
    )
