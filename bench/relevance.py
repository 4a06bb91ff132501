"""Whether a search knows that nothing is there, where the drawing tells what is there.

    python -m bench relevance FOLDER [--absent FILE ...] [--minutes M]

FOLDER is new, or holds the model and the store of an earlier run, see `bench.drawn`. Queries, in
English and Chinese:

    present     combinations of two or three attributes, asked of all scenes
    removed     the same, asked of the scenes without those that fit
    foreign     phrases of the bank, of things that are not drawn, and lines of --absent
    captions    held-out captions; and the same without their own image

Ways to reject: the relevance as it is stored, a cosine of the best hit, and the largest step among
ten scores, each with a threshold from the captions and phrases that calibrate the store (3 % of
the kind that has the lower values is rejected). The cutoffs are also shown with the threshold that
rejects 5 % of the present combinations, which no store knows. Then the same for a store without
captions. For stores of other data: `bench nothing`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench import measure
from bench.drawn import LANGUAGES, Drawn, combinations, drawn
from bench.drawn import Asked as Combination
from bench.nothing import WAYS, Asked, cuts, lead, seen, told
from mmalign.arrays import Bools, Floats, Ints
from mmalign.index import describe
from mmalign.search import calibrate, relevance
from mmalign.search.phrases import every_phrase
from mmalign.search.relevance import Doubles, Relevance, Signs

TOP = 10
FOREIGN = 300
# Phrases of the bank name these too.
DRAWN_THINGS = ("star", "moon", "heart", "星", "月", "心", "cross", "square", "圆")


def top_of(scores_MN: Floats) -> Doubles:
    """Return the best scores, (M, TOP), best first."""
    return -np.sort(-scores_MN, axis=1)[:, :TOP].astype(np.float64)


def combination_signs(
    world: Drawn, known: Relevance, asked: Sequence[Combination], queries_MD: Floats,
    bank_rows_B: Ints, *, removed: bool,
) -> tuple[Signs, Doubles]:  # fmt: skip
    """Read signs and best scores of combinations, with the scenes that fit or without them."""
    scores_MN = queries_MD @ world.vectors_ND.T
    allowed_MB = None
    if removed:
        fit_MN = np.stack([world.truth(c.within) for c in asked])
        scores_MN = np.where(fit_MN, -1, scores_MN)
        allowed_MB = ~fit_MN[:, bank_rows_B] if len(bank_rows_B) else None
    signs = relevance.signs_of(queries_MD, known.null_RD, known.bank_BD, allowed_MB)
    return signs, top_of(scores_MN)


def bank_rows(world: Drawn, known: Relevance) -> Ints:
    """Return the row of each caption of the bank, which is stored without it."""
    if not len(known.bank_BD):
        return np.zeros(0, np.int64)
    texts_TD = np.concatenate(world.store.vectors("text")).astype(np.float32)
    nearest_B = np.concatenate(
        [(part @ texts_TD.T).argmax(1) for part in np.array_split(known.bank_BD, 16)]
    )
    rows_B: Ints = world.store.owners("text")[nearest_B]
    return rows_B


def relevance_of(world: Drawn) -> Relevance:
    """Return the relevance of the index of a store."""
    folder = world.store.index_folder
    known = folder and relevance.load(folder, describe(folder), world.store.manifest.model.dim)
    if not known:
        raise SystemExit("the store has no relevance")
    return known


def first_is_right(world: Drawn, asked: Sequence[Combination], queries_MD: Floats) -> Bools:
    """Whether the best hit of each combination fits it."""
    best_M = (queries_MD @ world.vectors_ND.T).argmax(1)
    return np.array(
        [c.within(world.scenes_N[best]) for c, best in zip(asked, best_M.tolist(), strict=True)]
    )


def foreign(language: str) -> list[str]:
    """Return phrases of things that are not drawn."""
    kind = {"en": "other", "zh": "zh"}[language]
    bank = [p.text for p in every_phrase(kind) if not any(word in p.text for word in DRAWN_THINGS)]
    chosen = np.random.default_rng(3).permutation(len(bank))[:FOREIGN]
    return [bank[i] for i in chosen.tolist()]


def areas(present: Asked, absent: Asked, paired: bool) -> dict[str, str]:
    """Compare the areas of all ways: each, and the lead of the relevance over it."""
    row = {}
    own = present.ranks_M, absent.ranks_M
    for way, (sign, _) in WAYS.items():
        pair = getattr(present, sign), getattr(absent, sign)
        row[f"auc {way}"] = "{:.3f} ({:.3f}-{:.3f})".format(*calibrate.area(*pair))
        if way != "relevance" and paired:
            row[f"lead over {way}"] = lead([own, pair])
    return row


def rows_for(
    name: str, language: str, kinds: Mapping[str, Asked], least: dict[str, float], right: float
) -> None:
    """Print and record the shares that each way rejects, and the areas."""
    present = kinds["present"]
    free = {
        way: float(np.quantile(getattr(present, sign), relevance.MAX_ERROR))
        for way, (sign, _) in WAYS.items()
    }
    for way, (sign, _) in WAYS.items():
        for threshold, limits in (("calibrated", least), ("5 % of the present", free)):
            if way not in limits:
                continue
            row = {"store": name, "language": language, "way": way, "threshold": threshold}
            for kind, asked in kinds.items():
                row[f"{kind} rejected"] = told(getattr(asked, sign) < limits[way])
            measure.append("relevance", row)
    for kind in [k for k in kinds if k not in ("present", "captions")]:
        other = "captions" if kind == "captions without image" else "present"
        if other in kinds:
            row = areas(kinds[other], kinds[kind], len(kinds[other].cosine_M) == len(
                kinds[kind].cosine_M
            ))  # fmt: skip
            row = {"store": name, "language": language, "way": f"{other} against {kind}", **row}
            row["first hit right"] = f"{right:.3f}" if other == "present" else ""
            measure.append("relevance", row)


def measure_store(name: str, world: Drawn, files: Sequence[str]) -> None:
    """Ask one store everything."""
    known, encode = relevance_of(world), world.encoder.encode_texts
    found = calibrate.ask(world.store, encode) if known.on_captions else None
    asked = [*combinations("colour", "shape"), *combinations("texture", "shape")]
    asked += combinations("colour", "texture", "shape")
    rows_B = bank_rows(world, known)
    lines = [text for file in files for text in Path(file).read_text("utf-8").splitlines() if text]
    for language in LANGUAGES:
        kind = {"en": "other", "zh": "zh"}[language]
        scale = known.scales.get(kind) or known.scales[relevance.ALL]
        queries_MD = encode([c.text(language) for c in asked])
        kinds = {
            label: seen(
                scale,
                *combination_signs(world, known, asked, queries_MD, rows_B, removed=removed),
            )
            for label, removed in (("present", False), ("removed", True))
        }
        others = {"foreign": foreign(language)}
        others["files"] = [line for line in lines if relevance.language(line) == kind]
        for label, texts in others.items():
            if texts:
                vectors_MD = encode(texts)
                signs = relevance.signs_of(vectors_MD, known.null_RD, known.bank_BD)
                kinds[label] = seen(scale, signs, top_of(vectors_MD @ world.vectors_ND.T))
        least = {"relevance": scale.unlikely}
        if found is not None:
            captions, short = found
            own_M = np.array([spoken == kind for spoken in captions.languages_M])
            fit_M = calibrate.fits(world.store)[captions.rows_M]
            fitting, held = captions.of(own_M & fit_M), captions.of(own_M & ~fit_M)
            tops = top_of(held.queries_MD @ world.vectors_ND.T)
            kinds["captions"] = seen(scale, held.signs, tops)
            scores_MN = held.queries_MD @ world.vectors_ND.T
            below_MN = np.where(scores_MN <= held.absent_M[:, None] + 1e-4, scores_MN, -1)
            kinds["captions without image"] = seen(scale, held.removed, top_of(below_MN))
            fitted = [seen(scale, fitting.signs, top_of(fitting.queries_MD @ world.vectors_ND.T))]
            spoken = None if short is None else short.spoken(kind)
            chosen = None if spoken is None else spoken.of(spoken.present_M)
            if chosen is not None and len(chosen.texts_M) >= calibrate.MIN_PHRASES:
                phrases_top = top_of(chosen.queries_MD @ world.vectors_ND.T)
                fitted.append(seen(scale, chosen.signs, phrases_top))
            least = cuts(scale, fitted)
        right = float(first_is_right(world, asked, queries_MD).mean())
        rows_for(name, language, kinds, least, right)


def main(arguments: Sequence[str]) -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(prog="bench relevance")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--absent", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--minutes", type=float, default=6.5)
    parser.add_argument("--scenes", type=int, default=9_000)
    parser.add_argument("--held-out", type=int, default=3_000)
    options = parser.parse_args(arguments)
    world = drawn(
        options.folder, minutes=options.minutes, scenes=options.scenes, held_out=options.held_out
    )
    measure_store("drawn", world, options.absent)
    measure_store("drawn, without captions", world.without_captions(), options.absent)
