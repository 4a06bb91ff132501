"""The relevance of a store is calibrated: on its own captions, or on phrases where it has none.

Short queries and long ones score differently, so each have a scale. Captions as long as sentences
fit the one; short captions and phrases of the bank that captions name fit the other. Half of the
rows fit, the others measure; see `questions.py`.

Shapes: M captions or phrases, D dimensions, F signs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmalign.arrays import Bools, Floats, Halves
from mmalign.errors import ModelError
from mmalign.progress import say
from mmalign.search import relevance
from mmalign.search.lexical import Lexical
from mmalign.search.phrases import phrases
from mmalign.search.questions import (
    MIN_CAPTIONS,
    Asked,
    Bank,
    Searched,
    Short,
    ask_captions,
    ask_phrases,
    parts_of,
    searched_of,
)
from mmalign.search.relevance import (
    ALL,
    MAX_ERROR,
    QUANTILES,
    Doubles,
    Judgement,
    Scale,
    Scales,
    Signs,
)
from mmalign.store import Store

# With fewer present queries of one length, no query of that length is rejected.
MIN_PRESENT = 30
# Ranks among phrases that a store without captions goes by; most phrases are of nothing in it.
UNLIKELY_RANK, LIKELY_RANK = 0.5, 0.95
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


def calibrate(
    store: Store, words: Lexical, encode_texts: Callable[[Sequence[str]], Floats]
) -> Calibration | None:
    """Calibrate relevance over the main modality of a store; None if it has too few rows.

    Args:
        store: The store.
        words: The words of its captions.
        encode_texts: Encodes phrases.

    Raises:
        ModelError: Phrases cannot be encoded, and there are too few captions.
    """
    searched = searched_of(store, words)
    if searched is None:
        return None
    found = ask_captions(searched)
    if found is None:
        return _on_phrases(searched, encode_texts)
    asked, bank = found
    try:
        short = ask_phrases(searched, bank, encode_texts)
    except ModelError as error:
        say(f"warning: phrases cannot be encoded, so few short queries are rejected: {error}")
        short = None
    return _on_captions(searched, asked, bank, short)


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
        for kind in ("long", "short"):
            if part[kind] is None:
                parts[-1] += f"; {kind} texts are never rejected"
    return f"relevance: {'; '.join(parts) if parts else content['how']}"


def _on_captions(searched: Searched, asked: Asked, bank: Bank, short: Short | None) -> Calibration:
    fitting_M = fits(searched.store)[asked.rows_M]
    languages = {ALL: np.ones(len(asked.rows_M), np.bool_)}
    for name in sorted(set(asked.languages_M)):
        members_M = np.array([other == name for other in asked.languages_M])
        if min((members_M & fitting_M).sum(), (members_M & ~fitting_M).sum()) >= MIN_CAPTIONS:
            languages[name] = members_M
    content: dict[str, Any] = {"how": "calibrated on captions", "languages": {}}
    for name, members_M in languages.items():
        known = None if short is None else short.spoken(name)
        fitting = asked.of(members_M & fitting_M)
        scales = fit(fitting, known)
        measured = _measure(scales, asked.of(members_M & ~fitting_M))
        if known is not None:
            measured["phrases"] = _measure_phrases(fitting, known)
        kinds = {kind: relevance.to_json(getattr(scales, kind)) for kind in ("long", "short")}
        content["languages"][name] = {**measured, **kinds}
    return Calibration(searched.null_RD, bank.vectors_BD, content)


def fit(asked: Asked, short: Short | None) -> Scales:
    """Fit the scales of one language: thresholds keep `MAX_ERROR` on what fits them."""
    long = _fit_long(asked.of(~asked.short_M))
    scales = Scales(long, _fit_short(asked.of(asked.short_M), short))
    # So few captions that only all of them together are enough.
    return scales if scales.long or scales.short else Scales(_fit_long(asked), None)


def _fit_long(asked: Asked) -> Scale | None:
    """Fit the scale of captions; None if there are too few."""
    if len(asked.rows_M) < MIN_PRESENT:
        return None
    known_M = ~np.isnan(asked.absent_M)
    present_MF = relevance.features(asked.signs, asked.present_M)
    absent_MF = relevance.features(asked.removed, asked.absent_M)[known_M]
    return _with_thresholds(
        _scale([(asked.signs, asked.present_M)], logistic_weights(present_MF, absent_MF)),
        [(asked.signs, asked.present_M)],
        [(asked.removed, asked.other_M)],
    )


def _fit_short(asked: Asked, short: Short | None) -> Scale | None:
    """Fit the scale of short captions and phrases, which count the same; None if there are too few.

    Without a logistic: one that captions fit orders short queries worse than their ranks do.
    """
    present, absent = [(asked.signs, asked.present_M)], [(asked.removed, asked.other_M)]
    if short is not None:
        for kinds, of_kind_M in ((present, short.present_M), (absent, ~short.present_M)):
            phrases = short.of(of_kind_M)
            kinds.append((phrases.signs, phrases.best_M))
    present = [(signs, best_M) for signs, best_M in present if len(best_M) >= MIN_PRESENT]
    return _with_thresholds(_scale(present), present, absent) if present else None


_Kinds = Sequence[tuple[Signs, Doubles]]
"""Signs and best scores of several kinds of queries."""


def _scale(present: _Kinds, weights: tuple[float, ...] = ()) -> Scale:
    """Return a scale without thresholds."""
    lift = _quantiles_of_all([best_M - signs.mean_M for signs, best_M in present])
    familiarity = _quantiles_of_all([signs.familiarity_M for signs, _ in present])
    scale = Scale(lift, 0.0, 0.0, familiarity, weights=weights)
    known = [relevance.known_ranks(scale, signs) for signs, _ in present]
    return replace(scale, known=_quantiles_of_all(known))


def _with_thresholds(scale: Scale, present: _Kinds, absent: _Kinds) -> Scale:
    """Set the thresholds that reject `REJECTED` of any kind, and find `MAX_ERROR` likely."""
    lowest = [np.quantile(relevance.ranks(scale, *kind), REJECTED) for kind in present]
    scale = replace(scale, unlikely=float(min(lowest)))
    highest = [
        np.quantile(relevance.judge(scale, *kind).relevance_K, 1 - MAX_ERROR)
        for kind in absent
        if len(kind[1])
    ]
    return replace(scale, likely=float(max(highest, default=1.0)))


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


def _measure(scales: Scales, asked: Asked) -> dict[str, Any]:
    """Measure scales on captions that did not fit them."""
    known_M = ~np.isnan(asked.absent_M)
    absent = asked.of(known_M)
    present = judge_each(scales, asked.signs, asked.present_M, asked.short_M)
    unlike = judge_each(scales, asked.removed, asked.other_M, asked.short_M)
    without = judge_each(scales, absent.removed, absent.absent_M, absent.short_M)
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


def judge_each(scales: Scales, signs: Signs, best_M: Doubles, short_M: Bools) -> Judgement:
    """Judge the best hit of each of several queries, by the scale of its length."""
    by_kind = [relevance.judge(scales.of(short=kind), signs, best_M) for kind in (False, True)]
    relevance_M = np.where(short_M, by_kind[1].relevance_K, by_kind[0].relevance_K)
    levels_2M = np.array([judged.levels_K for judged in by_kind])
    return Judgement(relevance_M, tuple(np.where(short_M, levels_2M[1], levels_2M[0]).tolist()))


def _measure_phrases(asked: Asked, short: Short) -> dict[str, Any]:
    """Measure phrases, each by a scale that the captions and the other half of the things fit."""
    rejected_M = np.zeros(len(short.texts_M), np.bool_)
    for fitting_M in (short.first_M, ~short.first_M):
        others = short.of(~fitting_M)
        scale = fit(asked, short.of(fitting_M)).of(short=True)
        judged = relevance.judge(scale, others.signs, others.best_M)
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


def _on_phrases(searched: Searched, encode_texts: Callable[[Sequence[str]], Floats]) -> Calibration:
    """Rank hits among those of phrases; nobody knows which of these are present."""
    bank = [phrase.text for phrase in phrases()]
    vectors = encode_texts(bank)
    found_M1 = searched.exact.search(vectors, 1, searched.vectors.live_N)[0]
    best_M = found_M1[:, 0].astype(np.float64)
    null_RD = searched.null_RD.astype(np.float32)
    none_BD = null_RD[:0]
    known_M = np.zeros(len(bank))
    parts = [
        relevance.signs_of(vectors[i], null_RD, none_BD, known_M[i]) for i in parts_of(len(bank))
    ]
    lift_M = best_M - Signs.joined(parts).mean_M
    spoken = np.array([relevance.language(text) for text in bank])
    members = {ALL: np.ones(len(bank), np.bool_)}
    members |= {name: spoken == name for name in sorted(set(spoken.tolist()))}
    scales = {
        name: Scale(quantiles(lift_M[chosen]), UNLIKELY_RANK, LIKELY_RANK)
        for name, chosen in members.items()
    }
    languages = {
        name: {"long": relevance.to_json(scale), "short": relevance.to_json(scale)}
        for name, scale in scales.items()
    }
    return Calibration(
        searched.null_RD, searched.null_RD[:0], {"how": UNCALIBRATED, "languages": languages}
    )


UNCALIBRATED = "uncalibrated: no captions"
