"""An index on disk: for each modality what was chosen, why, and a FAISS file if there is one.

index.json     what was built, from which rows, what was tried, and the measured recall
image.faiss    only if the image vectors have a FAISS index
image.lists    the lists of an IVF, memory-mapped instead of read
text.*         likewise
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmalign import files
from mmalign.arrays import Bools, Ints
from mmalign.errors import StoreError, shell_command
from mmalign.index import approximate
from mmalign.index.exact import Exact, Extended
from mmalign.index.measure import Trial
from mmalign.index.owners import Owners
from mmalign.index.plan import Queries, plan
from mmalign.index.spec import JSON_NAMES, Index, OperatingPoint, Shards
from mmalign.index.vectors import VectorReader

FORMAT = 3
# Bytes at the start of a graph's file that are checked on every opening. They contain sizes that
# FAISS trusts; a wrong one can make a search run forever. The file of an IVF is checked completely:
# it is read completely anyway, and is small beside its lists.
HEAD_BYTES = 1 << 22


def write_index(
    folder: Path,
    modality: str,
    shards: Shards,
    *,
    queries_by_modality: Mapping[str, Queries],
    recall: float,
    memory: float,
    memory_share: float = 1.0,
    live_N: Bools | None = None,
    owners: Ints | None = None,
) -> dict[str, Any]:
    """Choose, build and write the index of one modality; return its part of index.json.

    Args:
        folder: An existing folder for the FAISS file.
        modality: What the vectors are of.
        shards: The vectors, each (vectors, D) float16.
        queries_by_modality: Those of the first modality decide the choice.
        recall: Share of the true ten nearest rows to be found, above 0 and at most 1.
        memory: Bytes that the index may hold.
        memory_share: `memory` as a share of the memory for all indexes of a store.
        live_N: Which vectors are not deleted; None if all are live.
        owners: The row of each vector, ascending; None if each row has one.
    """
    vectors = VectorReader(shards, live_N, owners)
    chosen = plan(vectors, queries_by_modality, recall, memory, memory_share)
    if chosen.index is not None:
        approximate.save(chosen.index, folder / f"{modality}.faiss")
    promised = chosen.measured[0] if chosen.measured else None
    return {
        "kind": chosen.spec.kind,
        "name": chosen.spec.name(vectors.live, vectors.dim),
        "rows": vectors.total,
        "held": vectors.live,
        "vectors_per_row": round(vectors.per_row, 3),
        "dim": vectors.dim,
        "recall_wanted": recall,
        "memory": memory,
        "recall": promised.recall if promised else 1.0,
        "queries": promised.queries if promised else 0,
        "points": {name: [_to_json(p) for p in points] for name, points in chosen.points.items()},
        "measured": [_to_json(t) for t in chosen.measured],
        "tried": [_to_json(t) for t in chosen.tried],
    }


def _to_json(values: Trial | OperatingPoint) -> dict[str, Any]:
    return asdict(values, dict_factory=lambda fields: {JSON_NAMES.get(n, n): v for n, v in fields})


def describe(folder: Path) -> dict[str, Any]:
    """Read index.json."""
    try:
        return json.loads((folder / "index.json").read_bytes())  # type: ignore[no-any-return]
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{folder / 'index.json'}: index cannot be read: {error}") from None


def open_index(
    folder: Path | None, modality: str, shards: Shards, owners: Ints | None = None
) -> Index:
    """Open the index of one modality; rows that it does not cover are searched exactly.

    Args:
        folder: None means exact search.
        modality: What the vectors are of.
        shards: The vectors, each (vectors, D) float16.
        owners: The row of each vector, ascending; None if each row has one. Not copied.

    Raises:
        StoreError: The index is damaged, or belongs to other vectors.
    """
    if folder is None:
        return Exact(shards, owners=Owners.of(owners))
    try:
        return _open_modality(folder, describe(folder), modality, shards, owners)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"not made by mmalign: {type(error).__name__}: {error}"
        raise StoreError(f"{folder / 'index.json'}: {reason}") from None


def _open_modality(
    folder: Path, content: dict[str, Any], modality: str, shards: Shards, owners: Ints | None
) -> Index:
    if content["format"] != FORMAT:
        other = (
            f"index format {content['format']}, but this version of mmalign reads format {FORMAT}"
        )
        raise StoreError(f"{folder}: {other}: run {shell_command('index', folder.parents[1])}")
    part = content["modalities"].get(modality)
    if part is None or part["kind"] == "exact":
        return Exact(shards, owners=Owners.of(owners))
    file = folder / f"{modality}.faiss"
    for name, size in content["bytes"].items():
        beside = folder / name
        if beside.stem == modality and not (beside.is_file() and beside.stat().st_size == size):
            raise StoreError(f"{beside}: missing, or not of the size in index.json")
    if approximate.lists_path(file).exists():
        intact = files.sha256(file) == content["sha256"][file.name]
    else:
        intact = _head_crc(file) == content["heads"][file.name]
    if not intact:
        raise StoreError(f"{file}: damaged: its content does not match its hash")
    vectors = VectorReader(shards, owners=owners)
    if vectors.owners is not None and "vectors_per_row" not in part:
        what = "its recall was measured by vector, not by row"
        raise StoreError(f"{file}: {what}: run {shell_command('index', folder.parents[1])}")
    if vectors.total < part["rows"]:
        raise StoreError(
            f"{file}: covers {part['rows']} vectors, but the store has {vectors.total}"
        )
    points = {
        name: [OperatingPoint(p["k"], p["breadth"], p["candidates"]) for p in points]
        for name, points in part["points"].items()
    }
    faiss_index = approximate.load(file, part["held"], vectors.dim)
    return Extended(approximate.Approximate(faiss_index, vectors, points, part["rows"]), vectors)


def write_description(folder: Path, content: dict[str, Any]) -> None:
    """Write index.json with sizes and hashes of the other files; this completes the index."""
    written = sorted(p for p in folder.iterdir() if p.name != "index.json")
    sizes = {p.name: p.stat().st_size for p in written}
    hashes = {p.name: files.sha256(p) for p in written}
    heads = {p.name: _head_crc(p) for p in written if p.suffix == ".faiss"}
    checks = {"bytes": sizes, "sha256": hashes, "heads": heads}
    files.write_json(folder / "index.json", {"format": FORMAT, **content, **checks})


def _head_crc(file: Path) -> int:
    """Return the checksum of the start of a file."""
    with open(file, "rb") as content:
        return zlib.crc32(content.read(HEAD_BYTES))
