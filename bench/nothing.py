"""Whether a search knows that a store holds nothing of what is asked.

    python -m bench nothing STORE ABSENT...

STORE has an index with a relevance that was calibrated on captions, and its model is at hand. Its
held-out captions are queries that are present; they are asked once more without their own image and
its near-duplicates. Phrases of the bank that captions name are present too, and those that no
caption names are absent; each half is rejected by thresholds that captions and the other half fit.
Each ABSENT is another store of the same model, whose captions are queries that are absent, or a
text file with one query per line; lines are encoded with the model of STORE.

Three signs decide: the rank of the relevance, the cosine of the best hit, and the largest step
between two neighbours among the ten best scores (autocut). Each has the threshold that rejects 3 %
of the captions or of the present phrases that fitted the relevance, whichever is lower; the
relevance is used as it is stored. A row for each language and sign. `short_auc` tells held-out
present phrases from each kind of absent queries, whatever the threshold; `without_image_auc` tells
captions from the same captions without their image, and `relevance_leads_by` compares its area with
that of the relevance.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import measure
from mmalign.arrays import Bools, Floats, Ints
from mmalign.index import describe
from mmalign.modality import TEXT, is_of_rows
from mmalign.search import calibrate, lexical, questions, relevance
from mmalign.search.lexical import Lexical
from mmalign.search.model import model_of
from mmalign.search.questions import Short
from mmalign.search.relevance import Doubles, Relevance, Scales, Signs
from mmalign.store import Store, open_store

TOP, RESAMPLES = 10, 1_000
PRESENT, ABSENT = "present phrases", "absent phrases"
# What each way rejects by, and orders captions by.
WAYS = {
    "relevance": ("ranks_M", "relevance_M"),
    "cosine": ("cosine_M", "cosine_M"),
    "jump": ("jump_M", "jump_M"),
}


@dataclass(frozen=True)
class Asked:
    """What each way to decide sees of some queries of one language; higher is more relevant."""

    ranks_M: Doubles
    relevance_M: Doubles
    cosine_M: Doubles
    jump_M: Doubles


def top_scores(store: Store, queries_MD: Floats, below_M: Doubles | None = None) -> Doubles:
    """Return the best scores of queries, (M, TOP): those up to `below_M`, if it is given."""
    main = next(filter(is_of_rows, store.modalities))
    rows_ND = np.concatenate(store.vectors(main)).astype(np.float32)
    if store.live is not None and store.is_single(main):
        rows_ND = rows_ND[store.live]
    scores_MN = queries_MD @ rows_ND.T
    if below_M is not None:
        scores_MN = np.where(scores_MN <= below_M[:, None] + 1e-4, scores_MN, -1)
    return -np.sort(-scores_MN, axis=1)[:, :TOP].astype(np.float64)


def seen(scales: Scales, signs: Signs, top_MK: Doubles, short_M: Bools) -> Asked:
    """Read the three signs of queries. The rank is given as a multiple of its threshold."""
    best_M, ranks_M = top_MK[:, 0], np.zeros(len(top_MK))
    for short in (False, True):
        scale = scales.of(short=short)
        multiple_M = relevance.ranks(scale, signs, best_M) / max(scale.unlikely, 1e-12)
        ranks_M = np.where(short_M == short, multiple_M, ranks_M)
    judged = calibrate.judge_each(scales, signs, best_M, short_M)
    return Asked(ranks_M, judged.relevance_K, best_M, -np.diff(top_MK, axis=1).min(axis=1))


def seen_of(
    known: Relevance, words: Lexical, texts: Sequence[str], queries_MD: Floats, top_MK: Doubles
) -> Asked:
    """Read the three signs of texts in one language."""
    scales = known.scales.get(relevance.language(texts[0])) or known.scales[relevance.ALL]
    unknown_M = unknown(known, words, texts)
    signs = relevance.signs_of(queries_MD, known.null_RD, known.bank_BD, unknown_M)
    return seen(scales, signs, top_MK, shortness(texts))


def unknown(
    known: Relevance, words: Lexical, texts: Sequence[str], without: Ints | None = None
) -> Doubles:
    """Return how much of what each text says is in no caption, as a search reads it."""
    shares = [words.unknown(t, without) if known.reads_words(t) else 0.0 for t in texts]
    return np.array(shares, np.float64)


def shortness(texts: Sequence[str]) -> Bools:
    """Return which texts are short."""
    return np.array([relevance.is_short(text) for text in texts], np.bool_)


def cuts(fitted: Sequence[Asked]) -> dict[str, float]:
    """Return below what each way rejects; each kind of the fitted queries counts."""
    cosine, jump = (
        float(min(np.quantile(getattr(kind, name), calibrate.REJECTED) for kind in fitted))
        for name in ("cosine_M", "jump_M")
    )
    return {"relevance": 1.0, "cosine": cosine, "jump": jump}


def absent_queries(store: Store, source: str) -> tuple[Floats, list[str]]:
    """Return the vectors and texts of queries: captions of a store, or the lines of a file."""
    if Path(source).is_dir():
        other = open_store(source)
        vectors_MD = np.concatenate(other.vectors(TEXT.name)).astype(np.float32)
        return vectors_MD, [text for captions in other.column("captions") for text in captions]
    lines = [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line]
    return model_of(store, None).encode_texts(lines), lines


def rows_of(
    name: str, least: dict[str, float], present: Asked, without: Asked, others: dict[str, Asked],
    halves: Sequence[tuple[dict[str, float], dict[str, Asked]]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare the three ways on the queries of one language."""
    rows = []
    known_M = np.isfinite(without.cosine_M)
    for way, (sign, order) in WAYS.items():
        orders = getattr(present, order), getattr(without, order)
        auc = calibrate.area(orders[0], orders[1][known_M])
        row: dict[str, Any] = {"language": name, "way": way}
        row["present_rejected"] = told(getattr(present, sign) < least[way])
        row["without_image_rejected"] = told(getattr(without, sign)[known_M] < least[way])
        row["without_image_auc"] = "{:.3f} ({:.3f}-{:.3f})".format(*auc)
        row["relevance_leads_by"] = lead(
            [(x[known_M], y[known_M]) for x, y in (
                (present.relevance_M, without.relevance_M), orders,
            )]
        )  # fmt: skip
        for source, asked in others.items():
            parts = [getattr(asked, sign) < least[way]]
            if source in (PRESENT, ABSENT):
                parts = [getattr(half[source], sign) < cut[way] for cut, half in halves]
            row[f"rejected {source}"] = told(np.concatenate(parts))
            if source != PRESENT and PRESENT in others:
                area = calibrate.area(getattr(others[PRESENT], sign), getattr(asked, sign))
                row[f"short_auc {source}"] = "{:.3f} ({:.3f}-{:.3f})".format(*area)
        rows.append(row)
    return rows


def lead(ways: Sequence[tuple[Doubles, Doubles]]) -> str:
    """Write how much larger the first area is than the second: 95 % over resampled queries."""
    rng, count = np.random.default_rng(0), len(ways[0][0])
    leads = []
    for _ in range(RESAMPLES):
        drawn_M = rng.integers(count, size=count)
        (one, _, _), (two, _, _) = (calibrate.area(x[drawn_M], y[drawn_M]) for x, y in ways)
        leads.append(one - two)
    return "{:.3f} to {:.3f}".format(*np.quantile(leads, [0.025, 0.975]))


def told(those_M: Bools) -> str:
    """Write a share with its interval."""
    low, high = calibrate.wilson(int(those_M.sum()), len(those_M))
    return f"{those_M.mean():.3f} ({low:.3f}-{high:.3f}) of {len(those_M)}" if len(those_M) else ""


def main(arguments: Sequence[str]) -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(prog="bench nothing")
    parser.add_argument("store")
    parser.add_argument("absent", nargs="+")
    options = parser.parse_args(arguments)
    store = open_store(options.store)
    folder = store.index_folder
    calibration = folder and relevance.load(folder, describe(folder), store.manifest.model.dim)
    words = lexical.open_lexical(store, None)
    found = questions.ask(store, words, lambda texts: model_of(store, None).encode_texts(texts))
    if not calibration or found is None:
        raise SystemExit(f"{options.store}: no relevance that was calibrated on captions")
    captions, short = found
    fitting_M = calibrate.fits(store)[captions.rows_M]
    sources = {Path(source).stem: absent_queries(store, source) for source in options.absent}
    for name in sorted(set(captions.languages_M)):
        members_M = np.array([other == name for other in captions.languages_M])
        fitting, held = captions.of(members_M & fitting_M), captions.of(members_M & ~fitting_M)
        top_MK = top_scores(store, fitting.queries_MD)
        known = None if short is None else short.spoken(name)

        def phrases_seen(scales: Scales, known: Short) -> dict[str, Asked]:
            top_MK, short_M = top_scores(store, known.queries_MD), shortness(known.texts_M)
            seen_M = seen(scales, known.signs, top_MK, short_M)
            kinds = {PRESENT: known.present_M, ABSENT: ~known.present_M}
            return {
                kind: Asked(*(values_M[of_kind_M] for values_M in vars(seen_M).values()))
                for kind, of_kind_M in kinds.items()
            }

        def limits(
            scales: Scales, known: Short | None, fitting: questions.Asked = fitting,
            top_MK: Doubles = top_MK,
        ) -> dict[str, float]:  # fmt: skip
            kinds = [seen(scales, fitting.signs, top_MK, fitting.short_M)]
            if known is not None and known.present_M.sum() >= calibrate.MIN_PRESENT:
                kinds.append(phrases_seen(scales, known)[PRESENT])
            return cuts(kinds)

        scales = calibration.scales.get(name) or calibration.scales[relevance.ALL]
        halves, others = [], {}
        if known is not None:
            others = phrases_seen(scales, known)
            for first_M in (known.first_M, ~known.first_M):
                half = known.of(first_M)
                fitted = calibrate.fit(fitting, half)
                halves.append((limits(fitted, half), phrases_seen(fitted, known.of(~first_M))))
        for source, (vectors_MD, texts) in sources.items():
            spoken = [i for i, text in enumerate(texts) if relevance.language(text) == name]
            if spoken:
                asked_MD, lines = vectors_MD[spoken], [texts[i] for i in spoken]
                others[source] = seen_of(
                    calibration, words, lines, asked_MD, top_scores(store, asked_MD)
                )
        top_MK = top_scores(store, held.queries_MD)
        present = seen(scales, held.signs, top_MK, held.short_M)
        top_MK = top_scores(store, held.queries_MD, held.absent_M)
        without = seen(scales, held.removed, top_MK, held.short_M)
        for row in rows_of(name, limits(scales, known), present, without, others, halves):
            measure.append("nothing", {"store": Path(options.store).stem, **row})
