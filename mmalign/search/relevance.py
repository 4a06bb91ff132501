"""How likely a hit is what was asked for, and whether a store holds anything like it at all.

A cosine says little by itself: texts of one style score higher against every image than texts of
another, and each model and store has a range of its own. Three signs are read instead, the first
two ranked among captions of the store and phrases that they name, which are known to be present:

    lift          how far a hit lies above the mean score of the query over random rows
    familiarity   how near the query is to captions of the store
    probability   a logistic of the score, of its lift in standard deviations and of its distance to
                  the query's .99 quantile, fitted on captions with and without their own image

A hit is unlikely if the familiarity of its query is lower than that of nearly all present queries,
or its own lift is far lower. Why these, and what else was tried: docs/decisions/0013-relevance.md.

Shapes: M queries, D dimensions, K hits, R random rows, B captions of the bank, Q quantiles.
"""

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    shortest: int = 0
    """Texts of fewer characters are never unlikely: the store tells of no query that is as short
    and present."""
    weights: tuple[float, ...] = ()
    """Of score, standardized lift and standardized tail, none below 0, and the constant; empty if
    not fitted."""


@dataclass(frozen=True)
class Signs:
    """What is read from one query or several, before any hit is looked at."""

    mean_M: Doubles
    """Mean of its scores over random rows."""
    deviation_M: Doubles
    high_M: Doubles
    """The .99 quantile of its scores over random rows."""
    familiarity_M: Doubles

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

    def __init__(self, null_RD: Halves, bank_BD: Halves, scales: Mapping[str, Scale]) -> None:
        """Take random vectors of the store, its captions (none: 0 rows), and a scale by language.

        The scale `ALL` is that of every language without one of its own.
        """
        self.null_RD = null_RD.astype(np.float32)
        self.bank_BD = bank_BD.astype(np.float32)
        self.scales = dict(scales)

    @property
    def on_captions(self) -> bool:
        """Whether it was calibrated on captions of the store."""
        return len(self.bank_BD) > 0

    def judge(self, query_D: Floats, scores_K: Floats, text: str) -> Judgement:
        """Judge hits by their scores, which may be in any order; `text` tells the language."""
        if not len(scores_K):
            return Judgement(np.zeros(0), ())
        signs = signs_of(query_D[None], self.null_RD, self.bank_BD)
        scale = self._scale(text)
        judged = judge(scale, signs, scores_K.astype(np.float64))
        levels = judged.levels_K
        if len(text) < scale.shortest:
            levels = tuple("maybe" if level == "unlikely" else level for level in levels)
        return Judgement(judged.relevance_K, levels, self.on_captions)

    def likely_score(self, query_D: Floats, text: str) -> float:
        """Return the lowest score at which a hit of a query is likely; infinity if none is."""
        signs, scale = signs_of(query_D[None], self.null_RD, self.bank_BD), self._scale(text)

        def is_likely(score: float) -> bool:
            return judge(scale, signs, np.array([score])).levels_K == ("likely",)

        low, high = -1.0, 1.0
        if not is_likely(high):
            return float("inf")
        # No sign falls while the score grows.
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if is_likely(middle) else (middle, high)
        return high

    def _scale(self, text: str) -> Scale:
        return self.scales.get(language(text)) or self.scales[ALL]


def judge(scale: Scale, signs: Signs, scores_K: Doubles) -> Judgement:
    """Judge hits of one query, or the best hit of each of M = K queries."""
    rank_K = ranks(scale, signs, scores_K)
    relevance_K = rank_K
    if scale.weights:
        # What nearly all present queries exceed is not relevant, whatever else speaks for it.
        share_K = np.minimum(1, rank_K / max(scale.unlikely, 1e-9))
        relevance_K = share_K * logistic(features(signs, scores_K) @ np.array(scale.weights))
    level_K = np.where(relevance_K >= scale.likely, 2, 1) * (rank_K >= scale.unlikely)
    return Judgement(relevance_K, tuple(LEVELS[level] for level in level_K.tolist()))


def language(text: str) -> str:
    """Return "zh" for a text with Chinese characters, "other" for all others.

    >>> language("a red dress"), language("红色的 dress")
    ('other', 'zh')
    """
    return "zh" if _HAN.search(text) else "other"


def signs_of(
    queries_MD: Floats, null_RD: Floats, bank_BD: Floats, foreign_MB: Bools | None = None
) -> Signs:
    """Read the signs of queries.

    Args:
        queries_MD: Unit vectors.
        null_RD: Vectors of random rows.
        bank_BD: Vectors of captions, none if B is 0.
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
        rank_K = np.minimum(lenient_K, _rank(scale.familiarity, signs.familiarity_M))
    return rank_K


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
        scales = {name: _scale_of(part["scale"]) for name, part in languages.items()}
        fits = all(v.dtype == np.float16 and v.shape[1:] == (dim,) for v in (null_RD, bank_BD))
        if not fits or not len(null_RD) or ALL not in scales:
            raise ValueError("not of this store")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise StoreError(f"{file}: relevance cannot be read: {error}") from None
    return Relevance(null_RD, bank_BD, scales)


def _scale_of(content: Mapping[str, Any]) -> Scale:
    lists = ("lift", "familiarity", "weights")
    lift, familiarity, weights = (tuple(map(float, content[name])) for name in lists)
    return Scale(
        lift, float(content["unlikely"]), float(content["likely"]), familiarity,
        int(content.get("shortest", 0)), weights,
    )  # fmt: skip


def to_json(scale: Scale) -> dict[str, Any]:
    """Return a scale as it stands in index.json, its numbers in six digits."""
    return {
        name: [float(f"{v:.6g}") for v in value] if isinstance(value, tuple) else value
        for name, value in asdict(scale).items()
    }
