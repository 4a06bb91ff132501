"""The ten best of a store of real images, 30 % of them near-duplicates: how many differ, and fit.

    python -m bench diversity FOLDER SOURCE... --truth KEY [--texts FILE] [--model M ...]

FOLDER, SOURCE, M and files of vectors are those of `bench duplicates`. A store is the originals and
three copies of some, drawn at random with their kinds (none is mirrored), until 30 % of its rows
are copies. Originals without copies are held out as queries; a row is right if its field KEY of
the metadata (a text or a list of texts) has a value of the query's. Texts, a word a line, are
queries too if an encoder knows their vectors (M, or ENCODER.texts beside ENCODER.npy, which
`numpy.save` writes to an open file); there a row is right if one of its captions has the word. In
the recorded rows these are frequent words of the captions, and their vectors a ridge regression
(weight 3) from the Universal Sentence Encoder, multilingual, to the features of the image, fitted
on 3,000 images of `flickr8k-train` and the mean of three captions of each.

    distinct     originals among the ten best
    precision    share of the ten best that is right
    over WAY     by how much the precision is higher than that of another way; copies of what is
                 nearest are more often right than what comes in their place, so that even true
                 groups are a bit below plain search

    true groups                      as many originals, by what is known of the copies
    group, diversity W, group + W    as a search answers
    MMR W, N                         (1 - W) * cosine - W * highest cosine with those before it,
                                     without scaling, among the N nearest rows, as others do it

All ways answer the same queries in one run. 95 % intervals are over resampled queries.
"""

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bench import copies, measure
from bench.combine import told
from bench.copies import Picture
from mmalign.arrays import Bools, Floats, Ints
from mmalign.search.answers import answers
from mmalign.search.query import Query
from mmalign.search.relevance import Doubles
from mmalign.search.searched import Searched
from mmalign.search.snapshot import Snapshot
from mmalign.store import ModelCard, Row, Writer, open_store, pair_vectors

TOP, QUERIES, EACH, SHARE = 10, 150, 3, 0.3
# A query has so many right originals, or it is not asked.
FEWEST = 20
WEIGHTS = (0.1, 0.2, 0.25, 0.33, 0.5)
CANDIDATES = (TOP, 10 * TOP)


@dataclass(frozen=True)
class World:
    """A store of pictures, and queries of which it is known what fits."""

    searched: Searched
    vectors_ND: Floats
    of_N: Ints
    """The original of each row."""
    queries_MD: Floats
    right_MN: Bools


def divided(pictures: Sequence[Picture]) -> tuple[Ints, Ints]:
    """Return the numbers of the pictures that are stored, and of those held out as queries."""
    rng = np.random.default_rng(2)
    copied = rng.permutation(np.unique([p.of for p in pictures if p.kind != copies.ORIGINAL]))
    originals = [n for n, p in enumerate(pictures) if p.kind == copies.ORIGINAL]
    whole = rng.permutation(np.setdiff1d(originals, copied))
    held_out = min(QUERIES, len(whole) // 2)
    kept = np.concatenate([whole[held_out:], copied])
    groups = round(SHARE / (1 - SHARE) * len(kept) / EACH)
    if groups > len(copied):
        raise SystemExit(f"{groups} originals with copies are needed, not {len(copied)}: --changed")
    chosen = [kept]
    for of in copied[:groups].tolist():
        own = [
            n for n, p in enumerate(pictures)
            if p.of == of and p.kind not in (copies.ORIGINAL, copies.MIRRORED)
        ]  # fmt: skip
        chosen.append(rng.permutation(own)[:EACH])
    return np.sort(np.concatenate(chosen)), np.sort(whole[:held_out])


def values(picture: Picture, key: str) -> set[str]:
    """Return the values of a field."""
    value = picture.meta.get(key, ())
    return {value} if isinstance(value, str) else set(value)


def shares(picture: Picture, key: str, own: set[str]) -> bool:
    """Whether a field has one of these values."""
    return bool(own & values(picture, key))


def has_word(picture: Picture, word: str) -> bool:
    """Whether a caption has a word, or its plural."""
    return any(re.search(rf"\b{word}(s|es)?\b", text.casefold()) for text in picture.captions)


def stored(path: Path, vectors_ND: Floats) -> Searched:
    """Write a store of vectors and open it."""
    card = ModelCard("outside", "outside", vectors_ND.shape[1])
    with Writer(path, card, len(vectors_ND)) as writer:
        for number, vector_D in enumerate(vectors_ND):
            pair = pair_vectors(vector_D, vectors_ND[:0])
            writer.add(Row(f"{number}", f"{number}.jpg", (), pair))
    return Searched([Snapshot(open_store(path))])


Way = Callable[[World], list[Ints]]
Holds = Callable[[Picture], bool]


def searching(*, group: bool = False, diversity: float = 0.0) -> Way:
    """Return the rows that a search answers with."""

    def asked(world: World) -> list[Ints]:
        queries = [
            Query(((query_D, 1.0),), k=TOP, exact=True, group=group, diversity=diversity)
            for query_D in world.queries_MD
        ]
        found = answers(world.searched, queries, world.queries_MD, {}, extra=())
        return [np.array([hit.row for hit in hits]) for hits in found]

    return asked


def plain_mmr(weight: float, count: int) -> Way:
    """Return the rows that maximal marginal relevance of raw cosines gives."""

    def one(world: World, query_D: Floats) -> Ints:
        scores_N = world.vectors_ND @ query_D
        near = np.argsort(-scores_N, kind="stable")[:count]
        chosen: list[int] = []
        for _ in range(TOP):
            left = np.setdiff1d(near, chosen)
            value = (1 - weight) * scores_N[left]
            if chosen:
                value -= weight * (world.vectors_ND[left] @ world.vectors_ND[chosen].T).max(1)
            chosen.append(int(left[value.argmax()]))
        return np.array(chosen)

    return lambda world: [one(world, query_D) for query_D in world.queries_MD]


def true_groups(world: World) -> list[Ints]:
    """Return the nearest row of each of the nearest originals: what no rule can do better."""
    found = []
    for query_D in world.queries_MD:
        order = np.argsort(-(world.vectors_ND @ query_D), kind="stable")
        firsts = np.sort(np.unique(world.of_N[order], return_index=True)[1])[:TOP]
        found.append(order[firsts])
    return found


WAYS: dict[str, Way] = {
    "plain": searching(),
    "true groups": true_groups,
    "group": searching(group=True),
    **{f"diversity {w:g}": searching(diversity=w) for w in WEIGHTS},
    **{f"group + {w:g}": searching(group=True, diversity=w) for w in WEIGHTS[1::2]},
    **{f"MMR {w:g}, {n}": plain_mmr(w, n) for w in (0.33, 0.5) for n in CANDIDATES},
}


def measure_ways(world: World, said: dict[str, str]) -> None:
    """Record a row for each way."""
    right_of: dict[str, Doubles] = {}
    for name, way in WAYS.items():
        found = way(world)
        distinct_M = np.array([len(set(world.of_N[rows].tolist())) for rows in found], np.float64)
        pairs = zip(world.right_MN, found, strict=True)
        right_M = right_of[name] = np.array([right_N[rows].mean() for right_N, rows in pairs])
        row = {**said, "queries": str(len(found)), "way": name, "distinct": told(distinct_M)}
        row["precision"] = told(right_M)
        for other in [way for way in right_of if way in ("plain", "true groups")]:
            row[f"over {other}"] = told(right_M - right_of[other])
        measure.append("diversity", row)


def asked_for(
    pictures: Sequence[Picture], rows: Ints, right: Sequence[Holds]
) -> tuple[Bools, Ints]:
    """Return the right rows of queries with enough of them, (M, N), and which these are."""
    right_MN = np.array([[holds(pictures[pictures[n].of]) for n in rows] for holds in right])
    originals_N = np.array([pictures[n].kind == copies.ORIGINAL for n in rows])
    asked = np.flatnonzero((right_MN & originals_N).sum(1) >= FEWEST)
    return right_MN[asked], asked


def main(arguments: Sequence[str]) -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(prog="bench diversity")
    parser.add_argument("folder", type=Path)
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--truth", required=True, metavar="KEY")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="M")
    parser.add_argument("--most", type=int, default=1_000, help="originals of a source")
    parser.add_argument("--changed", type=int, default=150, help="originals that are copied")
    options = parser.parse_args(arguments)
    words = options.texts.read_text("utf-8").split() if options.texts else []
    for source in options.sources:
        size = options.most, options.changed
        for case in copies.encoded(options.folder, source, options.model, *size, words):
            measure_case(case, options.truth, words)


def measure_case(case: copies.Encoded, truth: str, words: Sequence[str]) -> None:
    """Ask the pictures that are held out, and the texts, of one encoder."""
    rows, held_out = divided(case.pictures)
    vectors_ND = case.vectors_RD[rows]
    of_N = case.of_R[rows]
    fits = [partial(shares, key=truth, own=values(case.pictures[n], truth)) for n in held_out]
    kinds: dict[str, tuple[Floats, Sequence[Holds]]] = {"images": (case.vectors_RD[held_out], fits)}
    if len(case.texts_TD):
        kinds["texts"] = case.texts_TD, [partial(has_word, word=word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        searched = stored(Path(folder) / "pictures.store", vectors_ND)
        for kind, (queries_MD, right) in kinds.items():
            right_MN, asked = asked_for(case.pictures, rows, right)
            if not len(asked):
                continue
            world = World(searched, vectors_ND, of_N, queries_MD[asked], right_MN)
            said = {"source": case.source, "encoder": case.encoder, "asked": kind}
            said |= {"rows": str(len(rows)), "copies": f"{np.mean(of_N != rows):.3f}"}
            measure_ways(world, said)
