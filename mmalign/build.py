"""`mmalign index`: an index generation over a store, with its recall measured on text queries."""

import secrets
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign import files
from mmalign.errors import DataError, StoreError, UsageError
from mmalign.index import build_index, describe, write_description
from mmalign.model import load_model
from mmalign.progress import say
from mmalign.store import Store, commit_index, open_store

MAX_QUERIES = 2_000
OTHER = {"image": "text", "text": "image"}


def build(
    path: str | Path, *, recall: float = 0.95, queries: str | Path | None = None
) -> dict[str, Any]:
    """Build an index over the image and the caption vectors of a store and make it current.

    Args:
        path: The store.
        recall: Share of the true neighbours that a search must find, above 0 and at most 1.
        queries: A file with one text query a line to measure image search with; by default the
            store's own captions.

    Returns:
        The content of the new index.json.
    """
    if not 0 < recall <= 1:
        raise UsageError(f"--recall {recall} must be above 0 and at most 1")
    store = open_store(path)
    if not len(store):
        raise StoreError(f"{path}: the store has no rows yet: run `mmalign embed` first")
    started = time.monotonic()
    name = secrets.token_hex(6)
    folder = store.path / "index" / name
    files.make_folder(folder)
    try:
        modalities = _build_all(store, folder, recall, queries)
    except BaseException:
        # Ctrl-C included: the old generation goes on serving, and nothing is left behind.
        files.remove(folder)
        raise
    names = tuple(s.name for s in store.manifest.shards)
    content = {
        "name": name,
        "model": store.manifest.model.identity,
        "rows": len(store),
        "shards": list(names),
        "seconds": round(time.monotonic() - started, 3),
        "modalities": modalities,
    }
    write_description(folder, content)
    commit_index(store.path, name, names)
    for modality, part in modalities.items():
        say(f"{modality}: {_in_words(part)}")
    return describe(folder)


def _build_all(
    store: Store, folder: Path, recall: float, queries: str | Path | None
) -> dict[str, Any]:
    """Build an index for each modality that has vectors."""
    modalities: dict[str, Any] = {}
    for modality, other in OTHER.items():
        shards = store.vectors(modality)
        if not sum(len(s) for s in shards):
            continue
        asked = _query_file(store, queries) if queries and modality == "image" else None
        vectors = _sample(store, other) if asked is None else asked
        modalities[modality] = build_index(
            folder,
            modality,
            shards,
            dim=store.manifest.model.dim,
            queries_MD=vectors,
            recall=recall,
        )
    return modalities


def _in_words(part: dict[str, Any]) -> str:
    spec = part["spec"]
    if spec["kind"] == "exact":
        return f"exact search over {spec['rows']} vectors, nothing to miss"
    measured = (
        f"recall@10 {part['recall']:.3f} on {part['queries']} held-out queries"
        if part["recall"] is not None
        else "recall not measured, as there are no queries"
    )
    return f"{spec['lists']} lists over {spec['rows']} vectors, {spec['nprobe']} probed; {measured}"


def _sample(store: Store, modality: str) -> NDArray[np.float32]:
    """Draw vectors of one modality to serve as queries for the other."""
    shards = store.vectors(modality)
    total = sum(len(s) for s in shards)
    rows = np.random.default_rng(0).permutation(total)[:MAX_QUERIES]
    parts, first = [np.zeros((0, store.manifest.model.dim), np.float32)], 0
    for shard in shards:
        inside = rows[(rows >= first) & (rows < first + len(shard))] - first
        parts.append(shard[inside].astype(np.float32))
        first += len(shard)
    drawn = np.concatenate(parts)
    return drawn[np.random.default_rng(1).permutation(len(drawn))]


def _query_file(store: Store, queries: str | Path) -> NDArray[np.float32]:
    try:
        lines = [q.strip() for q in Path(queries).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{queries}: queries must be UTF-8 text, one a line") from None
    except OSError as error:
        raise DataError(f"{queries}: queries cannot be read: {error.strerror}") from None
    lines = [q for q in lines if q]
    if len(lines) < 2:
        raise DataError(f"{queries}: {len(lines)} queries; give at least 2, one a line")
    encoder = load_model(store.manifest.model.source)
    return np.concatenate(
        [encoder.encode_texts(lines[i : i + 256]) for i in range(0, len(lines), 256)]
    )
