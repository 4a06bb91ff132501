"""Known near-duplicates among real images: which are found, and what else is taken for one.

    python -m bench duplicates FOLDER SOURCE... [--model M ...] [--most N] [--changed N]

FOLDER is new, or holds an earlier run: a folder for each SOURCE (a tar or a folder of images) with
its originals and, of some drawn at random, a copy for each kind of change, see `bench.copies`. They
are encoded with each M. Every .npy in the folder of a source is an encoder too, named by the file:
vectors that another program made in the order of `pictures.jsonl`. Each encoder is measured as it
is and `centred`: without the mean of the originals, divided by the length.

A store is the originals and one copy of each that was changed: of one kind for the columns of that
kind, else of any kind but mirrored. A pair of an original and its copy is right, any other pair is
wrong, although some originals look alike too.

    reach              up to which distance rows are near-duplicates, the median of all rows
    found, precision   share of the right pairs that a rule takes for near-duplicates, and the share
                       of its pairs that is right; precision falls with the size of a store
    wrong among        pairs of originals that the rule takes for near-duplicates, and how many
                       originals are in one
    roc, ap            area under the ROC curve and average precision of all pairs in the order of a
                       score; `all` is every source and encoder in one order, each with equal weight

Scores are the distance, 1 - cosine, over 1, the median of distances, the 1 % quantile of them, and
the shorter usual distance of both rows, see `mmalign.search.duplicates`. Within one store the first
three give the same order; they differ in `all`. `best` is the distance over it with the highest F1.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import copies, measure
from bench.copies import Encoded
from bench.nothing import told
from mmalign.arrays import Bools, Floats, Ints
from mmalign.search import duplicates
from mmalign.search.relevance import Doubles

ANY = "any"


def store(case: Encoded, kind: str) -> Ints:
    """Return the numbers of the originals and of one copy of each that was changed."""
    copied = case.of_kind(kind)
    if kind == ANY:
        mirrored = case.of_kind(copies.MIRRORED)
        every = np.setdiff1d(np.arange(len(case.pictures)), [*case.originals, *mirrored])
        drawn = np.random.default_rng(0).permutation(every)
        copied = np.sort(drawn[np.unique(case.of_R[drawn], return_index=True)[1]])
    return np.concatenate([case.originals, copied])


def sample(case: Encoded, stored: Ints) -> Floats:
    """Return random vectors of a store, as a search takes them."""
    vectors_SD: Floats = case.vectors_RD[np.random.default_rng(1).permutation(stored)]
    return vectors_SD[: duplicates.SAMPLE]


@dataclass(frozen=True)
class Pairs:
    """All pairs of rows of a store."""

    cosines_P: Floats
    right_P: Bools
    first_P: Ints
    second_P: Ints

    @classmethod
    def of(cls, case: Encoded, stored: Ints) -> "Pairs":
        """Compare the rows of a store."""
        vectors_ND, of_N = case.vectors_RD[stored], case.of_R[stored]
        first_P, second_P = np.triu_indices(len(stored), 1)
        cosines_P: Floats = (vectors_ND @ vectors_ND.T)[first_P, second_P]
        return cls(cosines_P, of_N[first_P] == of_N[second_P], first_P, second_P)

    def over(self, reach_N: Floats) -> Floats:
        """Return the distance of each over the shorter reach of its two rows."""
        shorter_P = np.minimum(reach_N[self.first_P], reach_N[self.second_P])
        return np.asarray((1 - self.cosines_P) / shorter_P, np.float32)


def quantile(sample_SD: Floats, share: float) -> float:
    """Return a quantile of the distances, 1 - cosine, of pairs of rows."""
    places = np.triu_indices(len(sample_SD), 1)
    return float(np.quantile((1 - sample_SD @ sample_SD.T)[places], share))


def same(reach: Callable[[Floats], float]) -> Callable[[Floats, Floats], Floats]:
    """Return a rule that takes the same distance for all rows."""
    return lambda vectors_ND, sample_SD: np.full(len(vectors_ND), reach(sample_SD), np.float32)


# How far the near-duplicates of each row lie at most, from the rows and random ones of the store.
RULES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "search": lambda vectors_ND, sample_SD: duplicates.Usual(sample_SD).reach(vectors_ND),
    "cosine .96": same(lambda sample_SD: 0.04),
    "8 % of the median": same(lambda sample_SD: 0.08 * quantile(sample_SD, 0.5)),
    "both, as before": same(lambda sample_SD: min(0.04, 0.08 * quantile(sample_SD, 0.5))),
    "25 % of the nearest hundredth": same(lambda sample_SD: 0.25 * quantile(sample_SD, 0.01)),
}
# Scores are distances over these; the lower, the more alike.
SCORES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "cosine": same(lambda sample_SD: 1),
    "median": same(lambda sample_SD: quantile(sample_SD, 0.5)),
    "nearest hundredth": same(lambda sample_SD: quantile(sample_SD, 0.01)),
    "usual": lambda vectors_ND, sample_SD: (
        RULES["search"](vectors_ND, sample_SD) / duplicates.SHARE
    ),
}


@dataclass(frozen=True)
class Curves:
    """All pairs in the order of a score."""

    roc: float
    ap: float
    best: float
    """The least score that the highest F1 takes."""
    f1: float

    @classmethod
    def of(cls, scores_P: Doubles, right_P: Bools, weights_P: Doubles) -> "Curves":
        """Measure; pairs with equal scores are taken together."""
        order = np.argsort(-scores_P, kind="stable")
        scores_P, weights_P, right_P = scores_P[order], weights_P[order], right_P[order]
        is_last_P = np.append(np.diff(scores_P) != 0, True)
        found = np.cumsum(weights_P * right_P)[is_last_P]
        wrong = np.cumsum(weights_P * ~right_P)[is_last_P]
        recall, precision = found / found[-1], found / (found + wrong)
        f1 = 2 * recall * precision / np.maximum(recall + precision, 1e-12)
        roc = np.trapezoid(np.append(0, recall), np.append(0, wrong / wrong[-1]))
        ap = np.sum(np.diff(recall, prepend=0) * precision)
        at = int(f1.argmax())
        return cls(float(roc), float(ap), float(scores_P[is_last_P][at]), float(f1[at]))

    def row(self) -> dict[str, str]:
        """Return what is recorded."""
        return {
            "roc": f"{self.roc:.5f}", "ap": f"{self.ap:.3f}", "best": f"{-self.best:.4f}",
            "f1": f"{self.f1:.3f}",
        }  # fmt: skip


def by_rule(case: Encoded) -> Iterator[dict[str, str]]:
    """Find the near-duplicates of a store of each kind by each rule."""
    rows: dict[str, dict[str, str]] = {rule: {"rule": rule} for rule in RULES}
    originals = len(case.originals)
    for kind in (ANY, *copies.KINDS):
        stored = store(case, kind)
        pairs, vectors_ND = Pairs.of(case, stored), case.vectors_RD[stored]
        for rule, reach in RULES.items():
            reach_N = reach(vectors_ND, sample(case, stored))
            is_taken_P = pairs.over(reach_N) <= 1
            found_P, right_P = is_taken_P[pairs.right_P], pairs.right_P[is_taken_P]
            if kind != ANY:
                rows[rule][f"found, {kind}"] = f"{found_P.mean():.3f}"
                rows[rule][f"precision, {kind}"] = f"{right_P.mean():.3f}" if len(right_P) else ""
                continue
            is_wrong_P = is_taken_P & ~pairs.right_P & (pairs.second_P < originals)
            among = np.union1d(pairs.first_P[is_wrong_P], pairs.second_P[is_wrong_P])
            rows[rule] |= {
                "reach": f"{np.median(reach_N):.5f}",
                "found": told(found_P),
                "precision": told(right_P),
                "wrong among": f"{is_wrong_P.sum()} pairs, {len(among)} of {originals}",
            }
    yield from rows.values()


def main(arguments: Sequence[str]) -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(prog="bench duplicates")
    parser.add_argument("folder", type=Path)
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--model", action="append", default=[], metavar="M")
    parser.add_argument("--most", type=int, default=1_000, help="originals of a source")
    parser.add_argument("--changed", type=int, default=150, help="originals that are copied")
    options = parser.parse_args(arguments)
    size = options.most, options.changed
    every = [
        case
        for source in options.sources
        for case in copies.encoded(options.folder, source, options.model, *size)
    ]
    pooled: dict[str, list[tuple[Doubles, Bools, Doubles]]] = {score: [] for score in SCORES}
    for case in every:
        said = {"source": case.source, "encoder": case.encoder}
        for row in by_rule(case):
            measure.append("duplicates", {**said, **row})
        stored = store(case, ANY)
        pairs, vectors_ND = Pairs.of(case, stored), case.vectors_RD[stored]
        for score, over in SCORES.items():
            scores_P = -pairs.over(over(vectors_ND, sample(case, stored))).astype(np.float64)
            weights_P = np.full(len(scores_P), 1 / pairs.right_P.sum())
            pooled[score].append((scores_P, pairs.right_P, weights_P))
            curves = Curves.of(*pooled[score][-1])
            measure.append("duplicates", {**said, "score": score, **curves.row()})
    for score, parts in pooled.items():
        curves = Curves.of(*(np.concatenate(values) for values in zip(*parts, strict=True)))
        said = {"source": "all", "encoder": "all", "score": score}
        measure.append("duplicates", {**said, **curves.row()})
