"""Words of captions beside the vectors: what they find that a model does not know, and their cost.

    python -m bench lexical STORE            # photos with captions in English and Chinese
    python -m bench lexical --rows 1000000   # build, bytes and queries, beside SQLite's FTS5

With STORE, whose model is at hand: every fifth row gets an invented name in a caption, of syllables
or of rare Chinese characters; 1 to 4 rows have the same name. Each name is a query, and so is each
caption of the other rows that has another caption in its language. A caption that is asked is in
no index of words; the others of its row are, which is what a caption by another person is worth.
`recall@10` is the share of the rows with the name among the ten best, or whether the row of the
caption is; `vectors` is without words, `lexical` with them, `words` by the words alone.

With --rows, captions of one to twenty words drawn by Zipf's law are indexed and searched by queries
of three of their words, in turns with FTS5 (tokenizer unicode61, the same text, `order by rank`).
"""

import argparse
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import measure
from mmalign.arrays import Floats
from mmalign.modality import is_of_rows
from mmalign.search import fusion, lexical, words
from mmalign.search.model import model_of
from mmalign.search.relevance import language
from mmalign.store import open_store

TOP, EVERY, QUERIES, VOCABULARY = 10, 5, 1_000, 200_000
ONSETS, VOWELS = list("bdfgklmnprstvz"), ["a", "e", "i", "o", "u", "ae", "ou"]
RARE = "翡鸢麓霁翊骧澍黻虢嬴鳐濯徵劭旻昶曦瑄"


@dataclass(frozen=True)
class Asked:
    """A query, the rows it is meant for, and the caption that no words are taken from."""

    text: str
    vector_D: Floats
    rows: tuple[int, ...]
    hidden: tuple[int, str] | None = None


def name(rng: np.random.Generator, *, chinese: bool) -> str:
    """Draw a name that no model has read."""
    if chinese:
        return "".join(rng.choice(list(RARE), 3, replace=False))
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(3))


def named(captions: list[list[str]], *, chinese: bool) -> tuple[list[list[str]], dict[str, Any]]:
    """Put names into the captions of every fifth row; return the rows of each name too."""
    rng = np.random.default_rng(chinese)
    changed = [list(row) for row in captions]
    rows_of: dict[str, Any] = {}
    rows = list(range(0, len(captions), EVERY))
    while rows:
        called = name(rng, chinese=chinese)
        taken, rows = rows[: (count := int(rng.integers(1, 5)))], rows[count:]
        rows_of[called] = (*rows_of.get(called, ()), *taken)
        for row in taken:
            changed[row].append(f"{called}在这里" if chinese else f"this is {called}")
    return changed, rows_of


def recalls(
    rows_ND: Floats, captions: list[list[str]], queries: Sequence[Asked]
) -> dict[str, float]:
    """Measure recall@10 of the three ways."""
    whole = lexical.Lexical([lexical.postings(iter(captions))])
    found: dict[str, list[float]] = {"vectors": [], "lexical": [], "words": []}
    for asked in queries:
        scores_N = rows_ND @ asked.vector_D
        near = np.argsort(-scores_N, kind="stable")[: fusion.DEPTH]
        matches = whole.match(asked.text)
        if asked.hidden:
            row, caption = asked.hidden
            rest = [text for text in captions[row] if text != caption]
            matches.scores_N[row] = rescored(whole, matches.scores_N, row, rest, asked.text)
        by_words = fusion.best_rows(matches, None, fusion.DEPTH)
        fused = fusion.fuse(
            (scores_N[near], near, near), (scores_N[by_words], by_words, by_words), matches
        )
        ordered = by_words[np.lexsort((-scores_N[by_words], -matches.scores_N[by_words]))]
        for way, rows in (("vectors", near), ("lexical", fused.numbers_K), ("words", ordered)):
            hits = len(set(rows[:TOP].tolist()) & set(asked.rows))
            found[way].append(hits / len(asked.rows))
    return {f"{way}_recall@10": round(float(np.mean(of)), 4) for way, of in found.items()}


def rescored(
    whole: lexical.Lexical, scores_N: Floats, row: int, rest: list[str], text: str
) -> float:
    """Score one row by fewer of its captions, words as rare as they are in the whole store."""
    part = whole.parts[0]
    length = len([w for caption in rest for w in words.indexed_words(caption)])
    own = lexical.postings(iter([rest]))
    mean = float(part.lengths.mean())
    score = 0.0
    for word in words.asked_words(text):
        term = lexical.hash_of(word)
        at, here = part.of(term), own.of(term)
        having = at.stop - at.start
        count = float(own.counts[here].sum())
        rarity = np.log1p((whole.rows - having + 0.5) / (having + 0.5))
        norm = lexical.K1 * (1 - lexical.B + lexical.B * length / mean)
        score += float(rarity * (lexical.K1 + 1) * count / (count + norm))
    return score


def on_store(path: str) -> None:
    """Measure what words find in a store."""
    store = open_store(path)
    encoder = model_of(store)
    main = next(filter(is_of_rows, store.modalities))
    rows_ND = np.concatenate(store.vectors(main)).astype(np.float32)
    captions = store.column("captions")
    rng = np.random.default_rng(0)
    for spoken in ("other", "zh"):
        changed, rows_of = named(captions, chinese=spoken == "zh")
        vectors = encoder.encode_texts(list(rows_of))
        asked = [Asked(n, v, rows_of[n]) for n, v in zip(rows_of, vectors, strict=True)]
        record(store.path, spoken, "names", recalls(rows_ND, changed, asked), len(asked))
        pairs = [
            (row, text)
            for row, texts in enumerate(captions)
            for text in texts
            if language(text) == spoken and row % EVERY
        ]
        drawn = [pairs[i] for i in rng.permutation(len(pairs))[:QUERIES]]
        vectors = encoder.encode_texts([text for _, text in drawn])
        asked = [
            Asked(text, vector, (row,), (row, text))
            for (row, text), vector in zip(drawn, vectors, strict=True)
        ]
        record(store.path, spoken, "captions", recalls(rows_ND, changed, asked), len(asked))


def record(path: Path, spoken: str, asked: str, values: dict[str, float], count: int) -> None:
    """Write a row of the results."""
    row = {"store": path.stem, "language": spoken, "asked": asked, "queries": count, **values}
    measure.append("lexical", row)


def drawn_captions(rows: int) -> Iterator[str]:
    """Draw captions whose words are as rare as those of a language."""
    rng = np.random.default_rng(0)
    for _ in range(rows):
        numbers = rng.zipf(1.2, int(rng.integers(1, 21))) % VOCABULARY
        yield " ".join(f"w{number}" for number in numbers.tolist())


def on_rows(rows: int) -> None:
    """Measure build time, bytes and latency beside FTS5."""
    captions = list(drawn_captions(rows))
    rng = np.random.default_rng(1)
    queries = [" ".join(captions[i].split()[:3]) for i in rng.integers(rows, size=20).tolist()]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        started = time.perf_counter()
        lexical.save(place, lexical.postings([text] for text in captions))
        built = time.perf_counter() - started
        content = {"lexical": {}, "bytes": {p.name: p.stat().st_size for p in place.iterdir()}}
        found = lexical.load(place, content)
        assert found is not None
        ours = lexical.Lexical([found])
        started = time.perf_counter()
        table = sqlite3.connect(place / "fts.sqlite")
        table.execute("create virtual table t using fts5(c, content='', tokenize='unicode61')")
        table.executemany("insert into t(rowid, c) values (?, ?)", enumerate(captions))
        table.commit()
        fts_built = time.perf_counter() - started
        asked = [" OR ".join(f'"{word}"' for word in words.asked_words(q)) for q in queries]
        best = "select rowid from t where t match ? order by rank limit 256"
        timings = measure.in_turn(
            {
                "ours": lambda: [
                    fusion.best_rows(ours.match(query), None, fusion.DEPTH) for query in queries
                ],
                "fts5": lambda: [table.execute(best, (query,)).fetchall() for query in asked],
            },
            rounds=3,
        )
        size = (place / "fts.sqlite").stat().st_size
        for way, seconds, held in (
            ("ours", built, sum(content["bytes"].values())), ("fts5", fts_built, size),
        ):  # fmt: skip
            row: dict[str, Any] = {"rows": rows, "way": way, "build_s": round(seconds, 2)}
            row |= {"bytes": held, "query_ms": round(timings[way]["p50_ms"] / len(queries), 2)}
            measure.append("lexical", row)


def main(arguments: Sequence[str]) -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(prog="bench lexical")
    parser.add_argument("store", nargs="?")
    parser.add_argument("--rows", type=int)
    options = parser.parse_args(arguments)
    if options.store:
        on_store(options.store)
    if options.rows:
        on_rows(options.rows)
