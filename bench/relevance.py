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
the kind that has the lower values is rejected; the relevance has one for short queries and one for
others). They are also shown with the threshold that rejects
5 % of the present combinations, which no store knows. Areas under the ROC curve are those of the
stored relevance, of the rank by which it rejects, and of the other two. Once a scene is gone, its
query can only be told from before if it came first: `first hit right` is that share, for captions
their recall@1, and the areas are given for those queries by themselves too.

The search itself is asked too: it also spares texts that nobody can judge.

Then the same for a store of the same scenes with short captions beside the complete one, and for
one without captions. For stores of other data: `bench nothing`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench import measure
from bench.drawn import LANGUAGES, Drawn, combinations, parser, world
from bench.nothing import WAYS, Asked, cuts, lead, seen, seen_of, shortness, told, unknown
from mmalign import Searcher
from mmalign.arrays import Bools, Floats, Ints
from mmalign.index import VectorReader, describe
from mmalign.search import calibrate, lexical, questions, relevance
from mmalign.search.lexical import Lexical
from mmalign.search.phrases import every_phrase
from mmalign.search.questions import Short
from mmalign.search.relevance import Doubles, Relevance, Signs

TOP = 10
FOREIGN = 300
KINDS = {"en": "other", "zh": "zh"}
ORDERS = {"relevance": "relevance_M", "rank": "ranks_M", "cosine": "cosine_M", "jump": "jump_M"}
# What each kind of absent queries is told from, and which are the same queries.
PRESENT_OF = {
    "removed": "present",
    "foreign": "present",
    "files": "present",
    "captions without image": "captions",
}
PAIRED = ("removed", "captions without image")
# Phrases of the bank name these too.
DRAWN_THINGS = ("star", "moon", "heart", "星", "月", "心", "cross", "square", "圆")


def top_of(scores_MN: Floats) -> Doubles:
    """Return the best scores, (M, TOP), best first."""
    return -np.sort(-scores_MN, axis=1)[:, :TOP].astype(np.float64)


def combination_signs(
    world: Drawn, known: Relevance, words: Lexical, fit_MN: Bools, texts: Sequence[str],
    queries_MD: Floats,
) -> tuple[Signs, Doubles]:  # fmt: skip
    """Read signs and best scores of queries, each asked of the scenes that do not fit it.

    Random rows, captions and words of scenes that fit are left out too, as if none had been stored.
    """
    null_rows_R, bank_rows_B = sampled_rows(world, known)
    signs = [
        relevance.signs_of(
            query_D[None],
            known.null_RD[~fit_N[null_rows_R]],
            known.bank_BD[~fit_N[bank_rows_B]],
            unknown(known, words, [text], np.flatnonzero(fit_N)),
        )
        for text, query_D, fit_N in zip(texts, queries_MD, fit_MN, strict=True)
    ]
    scores_MN = np.where(fit_MN, -1, queries_MD @ world.vectors_ND.T)
    return Signs.joined(signs), top_of(scores_MN)


def sampled_rows(world: Drawn, known: Relevance) -> tuple[Ints, Ints]:
    """Return the row of each random vector and of each caption that the relevance compares with.

    They are stored without their rows, so they are drawn once more and compared.
    """
    images = VectorReader(world.store.vectors("image"))
    null_rows_R = images.sample_rows(questions.NULL_ROWS, seed=3)
    pairs = [(images.gather(null_rows_R), known.null_RD)]
    bank_rows_B = null_rows_R[:0]
    if known.on_captions:
        owners = world.store.owners("text")
        texts = VectorReader(world.store.vectors("text"), None, owners)
        drawn_T = texts.sample_rows(questions.BANK + questions.ASKED, seed=4)
        numbers_B = np.random.default_rng(4).permutation(drawn_T)[-questions.BANK :]
        pairs.append((texts.gather(numbers_B), known.bank_BD))
        bank_rows_B = owners[numbers_B]
    if not all(np.array_equal(drawn, stored) for drawn, stored in pairs):
        raise SystemExit("the relevance was calibrated on other rows: index the store again")
    return null_rows_R, bank_rows_B


def relevance_of(world: Drawn) -> Relevance:
    """Return the relevance of the index of a store."""
    folder = world.store.index_folder
    known = folder and relevance.load(folder, describe(folder), world.store.manifest.model.dim)
    if not known:
        raise SystemExit("the store has no relevance")
    return known


def foreign(language: str) -> list[str]:
    """Return phrases of things that are not drawn."""
    every = every_phrase(KINDS[language])
    bank = [p.text for p in every if not any(word in p.text for word in DRAWN_THINGS)]
    chosen = np.random.default_rng(3).permutation(len(bank))[:FOREIGN]
    return [bank[i] for i in chosen.tolist()]


def areas(present: Asked, absent: Asked, *, paired: bool) -> dict[str, str]:
    """Compare the areas of all orders: each, and the lead of the relevance over it."""
    row, own = {}, (present.relevance_M, absent.relevance_M)
    for name, order in ORDERS.items():
        pair = getattr(present, order), getattr(absent, order)
        row[f"auc {name}"] = "{:.3f} ({:.3f}-{:.3f})".format(*calibrate.area(*pair))
        if name != "relevance" and paired:
            row[f"lead over {name}"] = lead([own, pair])
    return row


def some(asked: Asked, chosen_M: Bools) -> Asked:
    """Return some of the queries."""
    return Asked(*(values_M[chosen_M] for values_M in vars(asked).values()))


def append_rows(
    name: str, language: str, kinds: Mapping[str, Asked], least: dict[str, float],
    first: Mapping[str, Bools],
) -> None:  # fmt: skip
    """Record the shares that each way rejects, and the areas.

    Args:
        name: Of the store.
        language: Of the queries.
        kinds: What was seen of each kind of queries.
        least: Below what each way rejects; a way may have no threshold.
        first: For "present" and "captions", which queries have a first hit that is right.
    """
    said = {"store": name, "language": language}
    free = {
        way: float(np.quantile(getattr(kinds["present"], sign), relevance.MAX_ERROR))
        for way, (sign, _) in WAYS.items()
    }
    for threshold, limits in (("calibrated", least), ("5 % of the present", free)):
        for way in limits:
            row = {**said, "what": way, "threshold": threshold}
            for kind, asked in kinds.items():
                row[f"{kind} rejected"] = told(getattr(asked, WAYS[way][0]) < limits[way])
            measure.append("relevance", row)
    for kind, absent in kinds.items():
        other = PRESENT_OF.get(kind)
        if other is None:
            continue
        present, paired = kinds[other], kind in PAIRED
        right = {"first hit right": told(first[other])}
        row = {**said, "what": f"{other} against {kind}", **right}
        measure.append("relevance", {**row, **areas(present, absent, paired=paired)})
        if paired and first[other].any():
            pair = some(present, first[other]), some(absent, first[other])
            row = {**said, "what": f"{other} against {kind}, first hit right"}
            measure.append("relevance", {**row, **areas(*pair, paired=True)})


def found_nothing(searcher: Searcher, texts_of: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Ask the search itself, and return the share of each kind for which it finds nothing."""
    return {
        f"{kind} rejected": told(
            np.array([searcher.search(t).nothing_found is True for t in texts])
        )
        for kind, texts in texts_of.items()
        if texts
    }


def of_captions(
    name: str, world: Drawn, known: Relevance, calibrating: tuple[questions.Asked, Short | None],
    language: str,
) -> tuple[dict[str, Asked], Bools, dict[str, float]]:  # fmt: skip
    """Ask held-out captions, and find the thresholds that the others and short queries give.

    Returns:
        What was seen of captions with their image and without, which of them find it first, and
        below what each way rejects.
    """
    kind = KINDS[language]
    scales = known.scales.get(kind) or known.scales[relevance.ALL]
    captions, short = calibrating
    own_M = np.array([spoken == kind for spoken in captions.languages_M])
    own_M &= np.isfinite(captions.absent_M)
    fit_M = calibrate.fits(world.store)[captions.rows_M]
    fitting, held = captions.of(own_M & fit_M), captions.of(own_M & ~fit_M)
    scores_MN = held.queries_MD @ world.vectors_ND.T
    below_MN = np.where(scores_MN <= held.absent_M[:, None] + 1e-4, scores_MN, -1)
    shown = {
        "captions": seen(scales, held.signs, top_of(scores_MN), held.short_M),
        "captions without image": seen(scales, held.removed, top_of(below_MN), held.short_M),
    }
    fitting_top = top_of(fitting.queries_MD @ world.vectors_ND.T)
    fitted = [seen(scales, fitting.signs, fitting_top, fitting.short_M)]
    spoken = None if short is None else short.spoken(kind)
    chosen = None if spoken is None else spoken.of(spoken.present_M)
    count = 0 if chosen is None else len(chosen.texts_M)
    if chosen is not None and count >= calibrate.MIN_PRESENT:
        short_top = top_of(chosen.queries_MD @ world.vectors_ND.T)
        fitted.append(seen(scales, chosen.signs, short_top, np.ones(count, np.bool_)))
    print(f"{name}, {language}: {count} short queries are known to be present")
    return shown, scores_MN.argmax(1) == held.rows_M, cuts(fitted)


def measure_store(name: str, world: Drawn, files: Sequence[str]) -> None:
    """Ask one store everything."""
    known, encode = relevance_of(world), world.encoder.encode_texts
    words = lexical.open_lexical(world.store, None)
    searcher = Searcher(world.store, world.encoder)
    calibrating = questions.ask(world.store, words, encode) if known.on_captions else None
    combined = [*combinations("colour", "shape"), *combinations("texture", "shape")]
    combined += combinations("colour", "texture", "shape")
    fit_MN = np.stack([world.truth(c.within) for c in combined])
    if not fit_MN.any(axis=1).all():
        raise SystemExit("a combination is in no scene: draw more with --held-out")
    lines = [text for file in files for text in Path(file).read_text("utf-8").splitlines() if text]
    for language in LANGUAGES:
        kind = KINDS[language]
        scales = known.scales.get(kind) or known.scales[relevance.ALL]
        least = {"relevance": 1.0}
        texts = [c.text(language) for c in combined]
        queries_MD = encode(texts)
        scores_MN = queries_MD @ world.vectors_ND.T
        removed = combination_signs(world, known, words, fit_MN, texts, queries_MD)
        kinds = {
            "present": seen_of(known, words, texts, queries_MD, top_of(scores_MN)),
            "removed": seen(scales, *removed, shortness(texts)),
        }
        first = {"present": fit_MN[np.arange(len(combined)), scores_MN.argmax(1)]}
        others = {"foreign": foreign(language)}
        others["files"] = [line for line in lines if relevance.language(line) == kind]
        for label, lines_of in others.items():
            if lines_of:
                vectors_MD = encode(lines_of)
                found = top_of(vectors_MD @ world.vectors_ND.T)
                kinds[label] = seen_of(known, words, lines_of, vectors_MD, found)
        if calibrating is not None:
            shown, right, least = of_captions(name, world, known, calibrating, language)
            kinds |= shown
            first["captions"] = right
        append_rows(name, language, kinds, least, first)
        row = {"store": name, "language": language, "what": "the search", "threshold": "calibrated"}
        texts_of = {"present": texts, **others}
        measure.append("relevance", {**row, **found_nothing(searcher, texts_of)})


def main(arguments: Sequence[str]) -> None:
    """Run and record."""
    words = parser("relevance")
    words.add_argument("--absent", nargs="*", default=[], metavar="FILE")
    options = words.parse_args(arguments)
    scenes = world(options)
    measure_store("complete captions", scenes, options.absent)
    measure_store("short captions", scenes.captioned("short"), options.absent)
    measure_store("no captions", scenes.captioned("none"), options.absent)
