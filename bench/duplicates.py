"""Known near-duplicates among real images: which are found, and what else is taken for one.

    python -m bench duplicates FOLDER SOURCE... [--model M ...] [--most N] [--changed N]

FOLDER is new, or holds an earlier run: a folder for each SOURCE (a tar or a folder of images) with
its originals and, of some drawn at random, a copy for each kind of change, see `bench.copies`. They
are encoded with each M. Every .npy in the folder of a source is an encoder too, named by the file:
vectors that another program made in the order of `pictures.jsonl`. Each encoder is measured as it
is and `centred`: without the mean of the originals, divided by the length.

A store is the originals and one copy of each that was changed: of one kind for the row of a kind,
of any kind for `any` and for the curves. Mirrored copies count only in their own row. A pair of an
original and its copy is right, any other pair is wrong, although some originals look alike too.

    found, precision   share of the right pairs that a rule takes for near-duplicates, and the share
                       of its pairs that is right; precision falls with the size of a store
    wrong among        pairs of originals that the rule takes for near-duplicates, and the share of
                       the originals that are in one
    roc, ap            area under the ROC curve and average precision of all pairs in the order of a
                       score; `all` is every source and encoder in one order, each with equal weight

Within one store an order by cosine and one by the distance over the median distance are the same;
they differ in `all`. `best` is the threshold with the highest F1.
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
    drawn = np.random.default_rng(1).permutation(stored)[: duplicates.SAMPLE]
    return case.vectors_RD[drawn]


def pairs(case: Encoded, stored: Ints) -> tuple[Floats, Bools]:
    """Return the cosine of each pair of a store, and whether it is right."""
    vectors_ND, of_N = case.vectors_RD[stored], case.of_R[stored]
    places = np.triu_indices(len(stored), 1)
    cosines_P: Floats = (vectors_ND @ vectors_ND.T)[places]
    return cosines_P, of_N[places[0]] == of_N[places[1]]


def median_distance(sample_SD: Floats) -> float:
    """Return the median distance, 1 - cosine, of two rows."""
    return float(np.median(1 - (sample_SD @ sample_SD.T)[np.triu_indices(len(sample_SD), 1)]))


# Rules give a threshold of the cosine, from random vectors of a store.
RULES: dict[str, Callable[[Floats], float]] = {
    "search": duplicates.threshold,
    "cosine .96": lambda sample_SD: 0.96,
    "8 % of the median": lambda sample_SD: 1 - 0.08 * median_distance(sample_SD),
}
# Scores of pairs, from their cosines and random vectors of the store; higher is more alike.
SCORES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "cosine": lambda cosines, sample_SD: cosines,
    "distance / median": lambda cosines, sample_SD: (cosines - 1) / median_distance(sample_SD),
}


@dataclass(frozen=True)
class Curves:
    """All pairs in the order of a score."""

    roc: float
    ap: float
    best: float
    """The threshold of the score with the highest F1."""
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
            "roc": f"{self.roc:.5f}", "ap": f"{self.ap:.3f}", "best": f"{self.best:.4f}",
            "f1": f"{self.f1:.3f}",
        }  # fmt: skip


def by_rule(case: Encoded, kind: str) -> Iterator[dict[str, str]]:
    """Find the near-duplicates of a store by each rule."""
    stored = store(case, kind)
    cosines_P, right_P = pairs(case, stored)
    own_ND = case.vectors_RD[case.originals]
    for rule, threshold in RULES.items():
        least = threshold(sample(case, stored))
        is_taken_P = cosines_P >= least
        row = {"kind": kind, "rule": rule, "threshold": f"{least:.5f}"}
        row["found"] = told(is_taken_P[right_P])
        row["precision"] = told(right_P[is_taken_P])
        if kind == ANY:
            like_NN = np.triu(duplicates.are_duplicates(own_ND, own_ND, least), 1)
            share = (like_NN | like_NN.T).any(1).mean()
            row["wrong among"] = f"{int(like_NN.sum())} pairs, {share:.3f} of {len(own_ND)}"
        yield row


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
        for kind in (ANY, *copies.KINDS):
            for row in by_rule(case, kind):
                measure.append("duplicates", {**said, **row})
        stored = store(case, ANY)
        cosines_P, right_P = pairs(case, stored)
        for score, function in SCORES.items():
            scores_P = function(cosines_P, sample(case, stored)).astype(np.float64)
            weights_P = np.full(len(right_P), 1 / right_P.sum())
            pooled[score].append((scores_P, right_P, weights_P))
            curves = Curves.of(*pooled[score][-1])
            measure.append("duplicates", {**said, "score": score, **curves.row()})
    for score, parts in pooled.items():
        curves = Curves.of(*(np.concatenate(values) for values in zip(*parts, strict=True)))
        said = {"source": "all", "encoder": "all", "score": score}
        measure.append("duplicates", {**said, **curves.row()})
