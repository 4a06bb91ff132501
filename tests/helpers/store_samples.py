"""Small stores to test with."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mmalign import files
from mmalign.store import ModelCard, Row, Store, Writer, commit_index, open_store, pair_vectors

DIM = 8
CARD = ModelCard("nano-0123", "somewhere/run", DIM)


def encoder_of(card: ModelCard = CARD) -> Any:
    """What stands for the encoder of a store where nothing is encoded."""
    return SimpleNamespace(
        modality_encoders={},
        identity=card.identity,
        space=card.identity,
        source=card.source,
        dim=card.dim,
        tower_identity=lambda modality: "",
    )


def row(number: int, captions: int = 2, version: int = 0) -> Row:
    """A row whose content follows from its number and version."""
    rng = np.random.default_rng((number, version))
    vectors = rng.normal(size=(captions + 1, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    words = tuple(f"caption {number}.{c}" for c in range(captions))
    return Row(
        f"id{number}",
        f"/pictures/{number}.jpg",
        words,
        pair_vectors(vectors[0], vectors[1:]),
        thumbnail=bytes(number % 5),
        stamp=2**64 - 1 - version,
        checksum=bytes([version]) * 32,
    )


def fill(path: Path, numbers: Iterable[int], rows_per_shard: int = 10, version: int = 0) -> None:
    with Writer(path, CARD, rows_per_shard) as writer:
        for number in numbers:
            writer.add(row(number, number % 3, version))


def ids_of(numbers: Iterable[int]) -> list[str]:
    return [f"id{number}" for number in numbers]


def versions(store: Store) -> dict[str, int]:
    """The version of every live row; the vectors and checksums must be of the same."""
    ids, stamps = store.column("id"), store.column("stamp")
    assert len(ids) == len(set(ids)) == len(store), "an id is live once"
    found = {i: 2**64 - 1 - stamp for i, stamp in zip(ids, stamps, strict=True)}
    assert store.column("checksum") == [bytes([v]) * 32 for v in found.values()]
    for name, vector in zip(ids, store.column("image_embedding"), strict=True):
        number = int(name.removeprefix("id"))
        made = row(number, number % 3, found[name]).vectors["image"][0]
        assert np.allclose(np.asarray(vector, np.float32), made, atol=1e-3)
    return found


def write_index(path: Path, name: str = "abc") -> Path:
    """Make an index folder, as `mmalign index` does, part of a store."""
    folder = path / "index" / name
    folder.mkdir(parents=True)
    (folder / "image.faiss").write_bytes(bytes(range(256)) * 4)
    hashes = {"image.faiss": files.sha256(folder / "image.faiss")}
    files.write_json(folder / "index.json", {"name": name, "sha256": hashes})
    built = open_store(path).manifest
    commit_index(path, name, tuple(s.name for s in built.shards), built.model.identity)
    return folder


def flip(file: Path, bit: int | None = None) -> None:
    """Change one bit of a file, by default one in its middle."""
    content = bytearray(file.read_bytes())
    bit = len(content) * 4 if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
