"""`mmalign index`: build an index of a store, its recall by row measured on held-out queries."""

import math
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign import files
from mmalign.arrays import Floats, Ints
from mmalign.encoding.batches import report_truncated
from mmalign.errors import (
    DataError,
    ModelError,
    StoreError,
    UsageError,
    shell_command,
)
from mmalign.index import Queries, VectorReader, describe, table, write_description, write_index
from mmalign.modality import TEXT, is_of_rows
from mmalign.progress import say
from mmalign.search import calibrate, lexical, relevance
from mmalign.search.lexical import Lexical, Postings
from mmalign.search.model import model_of
from mmalign.store import Store, commit_index, open_store

# Queries drawn from the store: this many are held out to measure, the others tune and provide the
# query distribution.
HELD_OUT, TUNING = 1_000, 8_000
UNITS = {
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "PB": 1e15,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "PIB": 2**50,
}


def build_index(
    path: str | Path,
    *,
    recall: float = 0.95,
    memory: str | float = "2GB",
    queries: str | Path | None = None,
    model: str | Path | None = None,
    prefer: str | None = None,
) -> dict[str, Any]:
    """Build an index over the vectors of each modality of a store and make it current.

    Args:
        path: The store.
        recall: Recall target: share of the true nearest rows to be found, above 0 and at most 1.
        memory: Memory limit of the index, in bytes or with a unit ("300MB", "2GB"); the store's own
            vectors, which stay on disk, are not counted.
        queries: A file with one text query per line for tuning and measuring; by default the
            store's own captions.
        model: The model that encodes them, if it was moved after the store was made.
        prefer: The modality of the queries that decide which index is the fastest; by default
            "text". All query modalities reach the recall.

    Returns:
        The content of the new index.json.
    """
    if not 0 < recall <= 1:
        raise UsageError(f"--recall {recall} must be above 0 and at most 1")
    budget = memory_bytes(memory)
    store = open_store(path)
    if not len(store):
        what = "rows left" if store.manifest.physical_rows else "rows yet"
        fill = shell_command("embed", "--model", "RUN_OR_NAME", "--data", "SRC", "--out", path)
        raise StoreError(f"{path}: the store has no {what}: add some with {fill}")
    started = time.monotonic()
    if prefer is not None and prefer not in (TEXT.name, *store.modalities):
        known = ", ".join(dict.fromkeys((TEXT.name, *store.modalities)))
        raise UsageError(f"--prefer {prefer}: queries are of {known}")
    user_queries = None if queries is None else _read_query_file(store, queries, model)
    name = secrets.token_hex(6)
    folder = store.path / "index" / name
    files.make_folder(folder)
    try:
        with files.scratch_in(store.path):
            modalities = _build_all(
                store,
                folder,
                recall=recall,
                memory=budget,
                user_queries=user_queries,
                prefer=prefer,
            )
            words = lexical.postings(lexical.captions_of(store))
            calibration = _calibrate(store, words, folder, model)
            described = _write_words(words, folder)
        shard_names = tuple(s.name for s in store.manifest.shards)
        content = {
            "name": name,
            "model": store.manifest.model.identity,
            "generation": store.manifest.generation,
            "rows": len(store),
            "shards": list(shard_names),
            "seconds": round(time.monotonic() - started, 3),
            "modalities": modalities,
            "relevance": calibration,
            "lexical": described,
        }
        write_description(folder, content)
    except BaseException:
        # Also on Ctrl-C: the old generation stays in use, and nothing is left behind.
        files.remove(folder)
        raise
    # A commit that raises may still have happened: from here on nothing is removed.
    commit_index(store.path, name, shard_names, store.manifest.model.identity)
    for modality, part in modalities.items():
        _report(modality, part)
    if calibration is not None:
        say(calibrate.summary(calibration))
    return describe(folder)


def memory_bytes(text: str | float) -> float:
    """Parse an amount of memory.

    >>> memory_bytes("300MB"), memory_bytes("1.5 GiB")
    (300000000.0, 1610612736.0)
    """
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)", str(text).strip().lower())
    try:
        assert found
        amount = float(found[1]) * UNITS[found[2].upper() or "B"]
        assert math.isfinite(amount)
    except (AssertionError, KeyError, ValueError):
        raise UsageError(f"--memory {text}: write an amount such as 300MB or 2GB") from None
    if amount <= 0:
        raise UsageError(f"--memory {text} must be above 0")
    return amount


def _build_all(
    store: Store,
    folder: Path,
    *,
    recall: float,
    memory: float,
    user_queries: Queries | None,
    prefer: str | None,
) -> dict[str, Any]:
    """Build an index for each modality with vectors; memory is split by number of vectors.

    Queries for the vectors of a modality come from the other modalities of the store. What rows are
    items of is also searched by rows of the store.
    """
    names = store.modalities
    readers = {name: _reader(store, name) for name in names}
    sampled = {name: _sample_queries(store, name, readers[name]) for name in names}
    total = sum(reader.total for reader in readers.values())
    modalities: dict[str, Any] = {}
    for name, reader in readers.items():
        if not reader.total:
            continue
        # Those of the first modality decide the choice: captions, if the store has any, or those
        # that `prefer` names.
        others = sorted((other for other in names if other != name), key=is_of_rows)
        queries = {other: sampled[other] for other in others}
        if user_queries is not None and name != TEXT.name:
            queries[TEXT.name] = user_queries
        if is_of_rows(name):
            queries[name] = replace(sampled[name], stored=True)
        queries = dict(sorted(queries.items(), key=lambda item: item[0] != prefer))
        share = reader.total / total
        modalities[name] = write_index(
            folder, name, store.vectors(name), queries_by_modality=queries, recall=recall,
            memory=memory * share, memory_share=share, live_N=reader.live_N,
            owners=_owners(store, name),
        )  # fmt: skip
    return modalities


def _calibrate(
    store: Store, words: Postings, folder: Path, model: str | Path | None
) -> dict[str, Any] | None:
    """Calibrate relevance; return what index.json says of it, or None if it is not calibrated."""

    def encode_texts(texts: Sequence[str]) -> Floats:
        encoder = model_of(store, model)
        parts = [encoder.encode_texts(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        return np.concatenate(parts)

    try:
        found = calibrate.calibrate(store, Lexical([words]), encode_texts)
    except ModelError as error:
        say(f"warning: no relevance, as phrases cannot be encoded: {error}")
        return None
    if found is None:
        return None
    relevance.save(folder, found.null_RD, found.bank_BD)
    return found.content


def _write_words(words: Postings, folder: Path) -> dict[str, int] | None:
    """Write the words of captions; return what index.json says of them, or None without any."""
    if not len(words.terms):
        return None
    lexical.save(folder, words)
    return {"rows": len(words.lengths), "words": len(words.terms), "matches": len(words.rows)}


def _owners(store: Store, modality: str) -> Ints | None:
    """Return the row of each vector; None if each row has one."""
    return None if store.is_single(modality) else store.owners(modality)


def _reader(store: Store, modality: str) -> VectorReader:
    owners_N, live_N = _owners(store, modality), store.live
    if live_N is not None and owners_N is not None:
        live_N = live_N[owners_N]
    return VectorReader(store.vectors(modality), live_N, owners_N)


def _sample_queries(store: Store, modality: str, vectors: VectorReader) -> Queries:
    """Draw vectors of one modality as queries."""
    if not vectors.live:
        empty = np.zeros((0, store.manifest.model.dim), np.float32)
        return Queries(empty, empty)
    drawn = np.random.default_rng(1).permutation(vectors.sample_rows(TUNING + HELD_OUT, seed=0))
    owners_N = _owners(store, modality)
    rows = drawn if owners_N is None else owners_N[drawn]
    return _split(vectors.gather(drawn).astype(np.float32), rows)


def _split(queries_MD: NDArray[np.float32], image_ids_M: NDArray[np.int64]) -> Queries:
    """Split queries at random into tuning and held-out queries.

    Duplicates are removed, and all queries of an image are on the same side: tuning queries must
    reveal nothing about the held-out ones.
    """
    first = np.sort(np.unique(queries_MD, axis=0, return_index=True)[1])
    queries_MD, image_ids_M = queries_MD[first], image_ids_M[first]
    _, first_seen, image_number_M = np.unique(image_ids_M, return_index=True, return_inverse=True)
    # Images in the order of their first query, as long as their queries fit.
    image_rank_M = np.argsort(np.argsort(first_seen))[image_number_M]
    cumulative_counts = np.cumsum(np.bincount(image_rank_M))
    held_out_M = image_rank_M < np.searchsorted(
        cumulative_counts, min(HELD_OUT, len(queries_MD) // 2), side="right"
    )
    return Queries(
        queries_MD[~held_out_M],
        queries_MD[held_out_M],
        held_out_image_ids_M=image_ids_M[held_out_M],
    )


def _report(modality: str, part: dict[str, Any]) -> None:
    if part["tried"]:
        say(f"\n{modality}: tried on samples\n{table(part['tried'])}\n")
    if part["measured"]:
        say(f"{modality}: measured on held-out queries\n{table(part['measured'])}")
    if part["kind"] == "exact":
        say(f"{modality}: exact search over {part['held']} vectors, so its recall is 1")
    for trial in part["measured"]:
        if trial["low"] < part["recall_wanted"]:
            say(
                f"{modality}: {trial['queries']} held-out {trial['asked']} queries are too few to "
                f"confirm a recall of {part['recall_wanted']:.1%}: recall@{trial['point']['k']} "
                f"lies between {trial['low']:.1%} and {trial['high']:.1%}"
            )


def _read_query_file(store: Store, queries: str | Path, model: str | Path | None) -> Queries:
    try:
        lines = [q.strip() for q in Path(queries).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{queries}: queries must be UTF-8 text, one per line") from None
    except OSError as error:
        raise DataError(f"{queries}: queries cannot be read: {error.strerror}") from None
    lines = list(dict.fromkeys(q for q in lines if q))
    if len(lines) < 2:
        raise DataError(f"{queries}: {len(lines)} queries; give at least 2, one per line")
    encoder = model_of(store, model)
    report_truncated(encoder, len(encoder.tokenizer.cut(lines)), "queries")
    parts = [encoder.encode_texts(lines[i : i + 256]) for i in range(0, len(lines), 256)]
    return _split(np.concatenate(parts), np.arange(len(lines)))
