"""More like these, less like those, on drawn scenes whose content is known.

    python -m bench feedback FOLDER

FOLDER is new, or holds the model and the store of an earlier run, see `bench.drawn`. Asked for is
one attribute A in words; of its nearest scenes, the first three that also have B are given as more,
and the first three with A and without B as less. `A and B` is the share of the ten best scenes that
have both, `A` of those that have A, each with the 95 % interval over resampled queries. Scenes that
were given count nowhere. Wrong examples are scenes drawn at random, as somebody may give whose
mind is elsewhere: then `A` tells what is left of the query.

    as asked       without examples
    gate DEGREES   with examples, and the query turned so far at most; 180 is no gate
    published      Rocchio's weights .75 and .15, with the gate
    plain sum      the same as a sum of the vectors as they are, without a gate
    examples only  more and less without the words

`turned` is by how much examples turned the query at the median without a gate, in degrees.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from bench import measure
from bench.combine import TOP, VALUES, attribute, told
from bench.drawn import LANGUAGES, Asked, Drawn, parser, world
from mmalign.arrays import Bools, Floats, Ints
from mmalign.items import unit_vector
from mmalign.search import feedback
from mmalign.search.feedback import turned
from mmalign.search.searched import Searched
from mmalign.search.snapshot import Snapshot

GIVEN, DEPTH = 3, 300
GATES = (20.0, 30.0, 45.0, 180.0)
# Of more and less, as published for words.
PUBLISHED = 0.75, 0.15


@dataclass(frozen=True)
class Case:
    """A query with the examples that somebody gives."""

    query_D: Floats
    more: Ints
    less: Ints
    has_a_N: Bools
    has_b_N: Bools


def cases(scenes: Drawn, language: str, *, wrong: bool) -> list[Case]:
    """Make a case of each A and B that are not of one kind, or are two of one kind."""
    rng = np.random.default_rng(5)
    asked = [(name, value) for name, values in VALUES.items() for value in values]
    texts = [attribute(name, value, language) for name, value in asked]
    vectors_MD = scenes.encoder.encode(texts)
    has = {part: scenes.truth(Asked((part,)).within) for part in asked}
    made = []
    for (a, query_D), b in product(zip(asked, vectors_MD, strict=True), asked):
        if a == b:
            continue
        near = np.argsort(-(scenes.vectors_ND @ query_D), kind="stable")[:DEPTH]
        more = near[has[a][near] & has[b][near]][:GIVEN]
        less = near[has[a][near] & ~has[b][near]][:GIVEN]
        if min(len(more), len(less)) < GIVEN:
            continue
        if wrong:
            more, less = np.split(rng.choice(len(scenes.ids), 2 * GIVEN, replace=False), 2)
        made.append(Case(query_D, more, less, has[a], has[b]))
    return made


def best(scenes: Drawn, case: Case, vector_D: Floats) -> Ints:
    """Return the ten best scenes that were not given."""
    scores_N = scenes.vectors_ND @ vector_D
    scores_N[np.concatenate([case.more, case.less])] = -np.inf
    return np.argsort(-scores_N, kind="stable")[:TOP]


def with_examples(
    scenes: Drawn, case: Case, sample_RD: Floats, gate: float, weights: tuple[float, float]
) -> Floats:
    """Return the query turned by its examples under a gate."""
    feedback.GATE, (feedback.MORE, feedback.LESS) = gate, weights
    more_ED, less_ED = scenes.vectors_ND[case.more], scenes.vectors_ND[case.less]
    return turned(case.query_D, more_ED, less_ED, sample_RD)


def main(arguments: Sequence[str]) -> None:
    """Run and record."""
    options: argparse.Namespace = parser("feedback").parse_args(arguments)
    scenes = world(options)
    measure_all(scenes, Searched([Snapshot(scenes.store)]).sample(None))


def measure_all(scenes: Drawn, sample_RD: Floats) -> None:
    """Record a row for each language, kind of examples and way."""
    gate, weights = feedback.GATE, (feedback.MORE, feedback.LESS)
    vectors_ND = scenes.vectors_ND

    def plain(case: Case) -> Floats:
        more, less = PUBLISHED
        examples_D: Floats = more * vectors_ND[case.more].mean(0)
        examples_D -= less * vectors_ND[case.less].mean(0)
        return case.query_D + examples_D

    def only(case: Case) -> Floats:
        mean_D = unit_vector(vectors_ND[case.more].mean(0), vectors_ND.shape[1])
        words = replace(case, query_D=mean_D, more=case.more[:0])
        return with_examples(scenes, words, sample_RD, gate, weights)

    def under(gate: float, weights: tuple[float, float]) -> Callable[[Case], Floats]:
        return lambda case: with_examples(scenes, case, sample_RD, gate, weights)

    ways: dict[str, Callable[[Case], Floats]] = {"as asked": lambda case: case.query_D}
    ways |= {f"gate {most:.0f}": under(most, weights) for most in GATES}
    ways |= {"published": under(gate, PUBLISHED), "plain sum": plain, "examples only": only}
    for language, wrong in product(LANGUAGES, (False, True)):
        made = cases(scenes, language, wrong=wrong)
        centred_RD = sample_RD - sample_RD.mean(0)
        angles = [
            np.degrees(np.arccos(np.corrcoef(centred_RD @ case.query_D, centred_RD @ new_D)[0, 1]))
            for case in made
            for new_D in [under(180, weights)(case)]
        ]
        for way, vector_of in ways.items():
            found = [best(scenes, case, vector_of(case)) for case in made]
            both = [(c.has_a_N & c.has_b_N)[f].mean() for c, f in zip(made, found, strict=True)]
            first = [c.has_a_N[f].mean() for c, f in zip(made, found, strict=True)]
            measure.append("feedback", {
                "language": language, "examples": "random" if wrong else "right", "way": way,
                "queries": str(len(made)), "A and B": told(np.array(both)),
                "A": told(np.array(first)), "turned": f"{np.median(angles):.0f}",
            })  # fmt: skip
    feedback.GATE, (feedback.MORE, feedback.LESS) = gate, weights
