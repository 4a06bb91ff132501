"""Queries of several parts, where the drawing tells what they should find.

    python -m bench combine FOLDER

FOLDER is new, or holds the model and the store of an earlier run, see `bench.drawn`. What counts is
precision@10: the share of the ten best scenes that are right, with the 95 % interval over resampled
queries, in English and Chinese. A and B are two shapes, two colours, or a colour and a texture.

    one         one attribute in words, which tells how well the model knows it
    both        A + B: a scene has both. Beside "A and B" in words, and A alone
    one group   colour + shape: a group of the scene has both. Beside "a red star" in words
    without     A - B and A ! B: a scene has A and not B. Beside "A without B" in words, and A alone
    picture     a picture - "red" + "blue", - "a star" + "a heart": a group has the new value and
                the other one of colour and shape of a group of the picture. Beside the picture
                alone, the picture + "blue", the picture + the new group in words, and these words
                and "blue" alone

`lead` is that over the last way of its kind: A, or the picture, alone. `chance` is the share of all
scenes that is right. `unwanted` is the share of the ten best scenes that have B; `unwanted left
out` is the share of the scenes with B that `!` leaves out, `others left out` that of all others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from bench import measure
from bench.drawn import LANGUAGES, Asked, Drawn, parser, world
from mmalign.arrays import Bools
from mmalign.data.scenes import COLOURS, SHAPES, TEXTURES, Scene
from mmalign.search.exclusion import left_out
from mmalign.search.query import Query
from mmalign.search.relevance import Doubles
from mmalign.search.searched import Searched
from mmalign.search.searcher import Searcher
from mmalign.search.snapshot import Snapshot

TOP, PICTURES, RESAMPLES = 10, 200, 1_000
VALUES = {"colour": tuple(COLOURS), "shape": tuple(SHAPES), "texture": tuple(TEXTURES)}
AND = {"en": "{} and {}", "zh": "{}和{}"}
WITHOUT = {"en": "{} without {}", "zh": "没有{1}的{0}"}


@dataclass(frozen=True)
class Case:
    """What is asked for, in several ways."""

    kind: str
    ways: Mapping[str, str]
    """Queries in the query language."""
    right_N: Bools
    """Which scenes are right."""
    picture: str = ""
    """The id of the row that is asked with and does not count as found."""
    unwanted_N: Bools | None = None
    """Which scenes have what is asked to be left out."""


def attribute(name: str, value: str, language: str) -> str:
    """Say one attribute: `red`, `a star`, `红色`."""
    if name != "shape":
        word = COLOURS[value][0] if name == "colour" else TEXTURES[value]
        return word.en if language == "en" else word.zh
    return Asked(((name, value),)).text(language)


def singles(world: Drawn, language: str) -> Iterator[Case]:
    """Ask for one attribute."""
    for name, values in VALUES.items():
        for value in values:
            right_N = world.truth(Asked(((name, value),)).within)
            yield Case(f"one {name}", {"words": attribute(name, value, language)}, right_N)


def pairs(world: Drawn, language: str) -> Iterator[Case]:
    """Ask for two shapes or colours, in either order, and for a shape or colour without another."""
    for first, second in (("colour", "colour"), ("shape", "shape"), ("colour", "texture")):
        for one, two in product(VALUES[first], VALUES[second]):
            if one == two:
                continue
            has_one_N, has_two_N = (
                world.truth(Asked((part,)).within) for part in ((first, one), (second, two))
            )
            a, b = attribute(first, one, language), attribute(second, two, language)
            if first == second:
                ways = {"A + B": f"{a} + {b}", "words": AND[language].format(a, b), "A": a}
                yield Case(f"both, {first}s", ways, has_one_N & has_two_N)
            ways = {
                "A - B": f"{a} - {b}",
                "A - 0.5:B": f"{a} - 0.5:{b}",
                "A ! B": f"{a} ! {b}",
                "words": WITHOUT[language].format(a, b),
                "A": a,
            }
            kind = f"without, {first} and {second}"
            yield Case(kind, ways, has_one_N & ~has_two_N, unwanted_N=has_two_N)


def groups(world: Drawn, language: str) -> Iterator[Case]:
    """Ask for a group of a colour and a shape."""
    for colour in COLOURS:
        for shape in SHAPES:
            asked = Asked((("colour", colour), ("shape", shape)))
            parts = [attribute(name, value, language) for name, value in asked.parts]
            ways = {"A + B": " + ".join(parts), "words": asked.text(language), "A": parts[0]}
            yield Case("one group", ways, world.truth(asked.within))


def is_plain(scene: Scene) -> bool:
    """Whether the groups of a scene share neither colour nor shape."""
    return scene.first.colour != scene.second.colour and scene.first.shape != scene.second.shape


def pictures(world: Drawn, language: str) -> Iterator[Case]:
    """Ask for pictures with a changed colour or shape of one group."""
    rng = np.random.default_rng(2)
    plain = [number for number, scene in enumerate(world.scenes_N) if is_plain(scene)]
    for number in rng.permutation(plain)[:PICTURES].tolist():
        scene, row = world.scenes_N[number], f"row:{world.ids[number]}"
        for name in ("colour", "shape"):
            values = VALUES[name]
            old, other = (getattr(group, name) for group in (scene.first, scene.second))
            new = str(rng.choice([value for value in values if value not in (old, other)]))
            group = replace(scene.first, **{name: new})
            asked = Asked((("colour", group.colour), ("shape", group.shape)))
            from_, to = (attribute(name, value, language) for value in (old, new))
            words = asked.text(language)
            ways = {
                "picture - old + new": f"{row} - {from_} + {to}",
                "picture + new": f"{row} + {to}",
                "picture + words": f"{row} + {words}",
                "new": to,
                "words": words,
                "picture": row,
            }
            yield Case(f"picture, {name}", ways, world.truth(asked.within), world.ids[number])


def ten_best(searcher: Searcher, world: Drawn, way: str, cases: Sequence[Case]) -> list[list[int]]:
    """Return the numbers of the ten best scenes of each case."""
    number_of = {row_id: number for number, row_id in enumerate(world.ids)}
    queries = [Query.parse(case.ways[way]) for case in cases]
    found = searcher.search_many(queries, k=TOP + 1, exact=True)
    return [
        [number_of[hit.id] for hit in hits if hit.id != case.picture][:TOP]
        for case, hits in zip(cases, found, strict=True)
    ]


def left_out_of(world: Drawn, cases: Sequence[Case]) -> dict[str, str]:
    """Measure what `!` leaves out: of the scenes with what is not wanted, and of the others."""
    searched, shares = Searched([Snapshot(world.store)]), []
    (snapshot,) = searched.snapshots
    for case in cases:
        assert case.unwanted_N is not None
        query = Query.parse(case.ways["A ! B"])
        _, excluded = Searcher.encode_queries([query], world.encoder, searched)
        out_N = left_out(snapshot, excluded[0], snapshot.main)
        shares.append((out_N[case.unwanted_N].mean(), out_N[~case.unwanted_N].mean()))
    unwanted_M, others_M = np.array(shares).T
    return {"unwanted left out": told(unwanted_M), "others left out": told(others_M)}


def told(values_M: Doubles) -> str:
    """Write a mean with its interval."""
    drawn_SM = np.random.default_rng(0).integers(len(values_M), size=(RESAMPLES, len(values_M)))
    low, high = np.quantile(values_M[drawn_SM].mean(1), [0.025, 0.975])
    return f"{values_M.mean():.3f} ({low:.3f}-{high:.3f})"


def measure_cases(language: str, world: Drawn, cases: Sequence[Case]) -> None:
    """Record a row for each kind and way."""
    searcher = Searcher(world.store, world.encoder)
    for kind in dict.fromkeys(case.kind for case in cases):
        chosen = [case for case in cases if case.kind == kind]
        fewest = min(int(case.right_N.sum()) for case in chosen)
        if fewest < TOP:
            raise SystemExit(f"{kind}: {fewest} scenes are right: draw more with --held-out")
        best = {way: ten_best(searcher, world, way, chosen) for way in chosen[0].ways}
        found = {
            way: np.array([c.right_N[ten].sum() / TOP for c, ten in zip(chosen, tens, strict=True)])
            for way, tens in best.items()
        }
        # The last way is the one without the second part.
        *_, plain_M = found.values()
        for way, shares_M in found.items():
            row = {"language": language, "asked": kind, "way": way}
            row |= {"queries": str(len(chosen)), "precision@10": told(shares_M)}
            row["lead"] = told(shares_M - plain_M)
            row["chance"] = f"{np.mean([case.right_N.mean() for case in chosen]):.3f}"
            unwanted = [
                case.unwanted_N[ten].sum() / TOP
                for case, ten in zip(chosen, best[way], strict=True)
                if case.unwanted_N is not None
            ]
            if unwanted:
                row["unwanted"] = told(np.array(unwanted))
            if way == "A ! B":
                row |= left_out_of(world, chosen)
            measure.append("combine", row)


def main(arguments: Sequence[str]) -> None:
    """Run and record."""
    scenes = world(parser("combine").parse_args(arguments))
    for language in LANGUAGES:
        cases = [*singles(scenes, language), *pairs(scenes, language), *groups(scenes, language)]
        measure_cases(language, scenes, [*cases, *pictures(scenes, language)])
