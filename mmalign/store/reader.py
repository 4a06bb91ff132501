"""A generation of a store, memory-mapped: vectors without a copy, rows by number or id.

N rows, D dimensions, P captions (each with the number of the row that owns it).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmalign import files
from mmalign.errors import StoreError, nearest
from mmalign.store import manifest as manifests
from mmalign.store.manifest import Manifest, Shard

Vectors = NDArray[np.float16]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Store:
    """One generation of a store, open for reading. It never changes under the reader."""

    path: Path
    manifest: Manifest

    def __len__(self) -> int:
        return self.manifest.rows

    @cached_property
    def _tables(self) -> list[pa.Table]:
        return [_open_shard(self.path, shard) for shard in self.manifest.shards]

    @cached_property
    def _ends(self) -> Ints:
        return np.cumsum([len(t) for t in self._tables], dtype=np.int64)

    def vectors(self, modality: str) -> list[Vectors]:
        """Return one (rows, D) float16 view a shard of "image" or "text", in row order, uncopied.

        Text vectors are numbered by caption; `caption_owners` tells whose they are.
        """
        dim = self.manifest.model.dim
        name = f"{modality}_embedding"
        columns = self._tables[0].column_names if self._tables else []
        if self._tables and name not in columns:
            known = [c.removesuffix("_embedding") for c in columns if c.endswith("_embedding")]
            raise StoreError(f"{self.path}: no {modality!r} vectors: {nearest(modality, known)}")
        views = []
        for table in self._tables:
            for chunk in table.column(name).chunks:
                lists = chunk.flatten() if modality == "text" else chunk
                flat = lists.flatten().to_numpy(zero_copy_only=True)
                views.append(flat.reshape(-1, dim))
        return views

    @cached_property
    def caption_owners(self) -> Ints:
        """Row number of each caption, shape (P,)."""
        counts = [t.column("captions").combine_chunks().value_lengths() for t in self._tables]
        lengths = [c.to_numpy(zero_copy_only=False) for c in counts]
        every = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        return np.repeat(np.arange(len(every), dtype=np.int64), every)

    def rows(self, numbers: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Read some columns of some rows."""
        out = []
        for number in numbers:
            shard = int(np.searchsorted(self._ends, number, side="right"))
            first = int(self._ends[shard - 1]) if shard else 0
            table = self._tables[shard]
            out.append({c: table.column(c)[int(number) - first].as_py() for c in columns})
        return out

    def column(self, name: str) -> list[Any]:
        """Read one column of all rows."""
        return [value for t in self._tables for value in t.column(name).to_pylist()]

    def failures(self) -> list[dict[str, Any]]:
        """Every sample that has no embedding, and why; the last word on a sample counts."""
        return list({f["uri"]: f for f in files.read_lines(self.path / "failures.jsonl")}.values())

    @property
    def index_folder(self) -> Path | None:
        """Where the index of this generation lies, if it has one."""
        return self.path / "index" / self.manifest.index if self.manifest.index else None


def open_store(path: str | Path) -> Store:
    """Open the newest readable generation of a store.

    Raises:
        StoreError: There is no store, or it cannot be read.
    """
    return Store(Path(path), manifests.newest(Path(path)))


def verify(path: str | Path) -> list[str]:
    """Check every file of every generation; return what is damaged, a line each.

    A shard or an index file is read whole and compared with its hash.
    """
    store = Path(path)
    manifests.newest(store)
    damage: list[str] = []
    shards: dict[str, Shard] = {}
    for file in sorted(store.glob("manifest-*.json")):
        try:
            held = manifests.parse(file.read_bytes())
        except (ValueError, KeyError, TypeError, OSError) as error:
            damage.append(f"{file}: unreadable: {error}")
            continue
        shards |= {s.name: s for s in held.shards}
        if held.index and not (store / "index" / held.index / "index.json").exists():
            damage.append(f"{store / 'index' / held.index}: missing")
    damage += [d for s in shards.values() if (d := _damage(store / "shards" / s.name, s.sha256))]
    for description in sorted(store.glob("index/*/index.json")):
        try:
            hashes = json.loads(description.read_bytes())["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            damage.append(f"{description}: unreadable: {error}")
            continue
        damage += [d for n, h in hashes.items() if (d := _damage(description.parent / n, h))]
    return damage


def _damage(file: Path, sha256: str) -> str | None:
    if not file.exists():
        return f"{file}: missing"
    if files.sha256(file) != sha256:
        return f"{file}: its content is not what was written"
    return None


def _open_shard(store: Path, shard: Shard) -> pa.Table:
    path = store / "shards" / shard.name
    try:
        if path.stat().st_size != shard.bytes:
            raise StoreError(
                f"{path}: {path.stat().st_size} bytes where {shard.bytes} were written"
            )
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(f"{path}: shard cannot be read: {error}") from None
    if len(table) != shard.rows:
        raise StoreError(f"{path}: {len(table)} rows where the manifest names {shard.rows}")
    return table
