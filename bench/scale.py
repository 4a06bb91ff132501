"""A large store, many commits, and a manifest of a billion rows: what grows, and what does not.

    python -m bench scale [--rows 1000000] [--dim 64] [--commits 5000] [--billion 1000000000]

Times are medians of single operations, each in a store that was just opened unless told otherwise.
The store of a billion rows is entries only: its manifest is written, opened and committed to as
that of a real one, but there are no shards.
"""

import argparse
import json
import resource
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import measure
from bench.store import CHUNK, name_of, unit_vectors
from mmalign.store import ModelCard, Row, Writer, delete, open_store
from mmalign.store import manifest as manifests
from mmalign.store.changes import shard_rows
from mmalign.store.groups import Groups, Shard, StoredFile
from mmalign.store.shards import with_deleted_files
from mmalign.store.where import where

FEW = 1_000
LOOKUPS = 200
REPEATS = 5


def fill(path: Path, first: int, rows: int, dim: int, rows_per_shard: int) -> None:
    """Add rows with a little metadata."""
    card = ModelCard("bench-0000000000000000", "bench", dim)
    vectors = unit_vectors(min(rows, CHUNK), dim)
    with Writer(path, card, rows_per_shard) as writer:
        for number in range(first, first + rows):
            meta = json.dumps({"price": number % 1_000, "label": f"label {number % 7}"})
            vector = {"image": vectors[[number % len(vectors)]]}
            writer.add(Row(name_of(number), f"/data/{number}.jpg", (), vector, meta))


def timed(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the median time of a call in milliseconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times))


def bytes_of(path: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def large(path: Path, rows: int, dim: int) -> dict[str, Any]:
    """Write a store and time what is done to it."""
    out: dict[str, Any] = {}
    out["write_s"] = timed(lambda: fill(path, 0, rows, dim, shard_rows(rows))) / 1000
    out["bytes_per_row"] = bytes_of(path) / rows
    out["open_ms"] = timed(lambda: open_store(path), REPEATS)
    names = [name_of(int(n)) for n in np.random.default_rng(0).integers(0, rows, LOOKUPS)]
    out["first_id_ms"] = timed(lambda: open_store(path).find(names[:1]), REPEATS)
    store = open_store(path)
    store.find(names)
    out["id_ms"] = timed(lambda: [store.find([name]) for name in names]) / LOOKUPS
    where(store, "price < 5")
    out["filter_ms"] = timed(lambda: where(store, "price < 5"), REPEATS)
    out["add_1000_ms"] = timed(lambda: fill(path, rows, FEW, dim, FEW))
    gone = [name_of(int(n)) for n in np.random.default_rng(1).choice(rows, FEW, replace=False)]
    out["delete_1000_ms"] = timed(lambda: delete(path, gone))
    out["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return out


def many_commits(path: Path, commits: int, dim: int) -> dict[str, Any]:
    """Commit one row after the other, and compare the first commits with the last ones."""
    times, sizes = [], []
    vector = unit_vectors(1, dim)
    with Writer(path, ModelCard("bench-0000000000000000", "bench", dim)) as writer:
        for number in range(commits):
            writer.add(Row(name_of(number), f"/data/{number}.jpg", (), {"image": vector}))
            times.append(timed(writer.commit))
            newest = manifests.path_of(path, number + 2)
            group = open_group(path) if number % (commits // 10) == 0 or number > commits - 9 else 0
            sizes.append(newest.stat().st_size + group)
    few = slice(0, 100), slice(-100, None)
    return {
        "commits": commits,
        "first_commit_ms": float(np.median(times[few[0]])),
        "last_commit_ms": float(np.median(times[few[1]])),
        "first_manifest_bytes": sizes[0],
        "last_manifest_bytes": sizes[-1],
        "store_bytes": bytes_of(path),
        "manifest_bytes": bytes_of(path) - bytes_of(path / "shards"),
    }


def open_group(path: Path) -> int:
    """Bytes of the group that was written last."""
    found = list((path / "groups").glob("*.copy.json"))
    return max(found, key=lambda f: f.stat().st_mtime_ns).stat().st_size if found else 0


def billion(path: Path, rows: int, deleted: float) -> dict[str, Any]:
    """Open and commit to the manifest of so many rows, of which a share is deleted.

    All shards share the files of their deletions, which are real.
    """
    per_shard = shard_rows(rows)
    path.mkdir()
    (path / "shards").mkdir()
    live_N = np.random.default_rng(0).random(per_shard) >= deleted
    of_all = with_deleted_files(path, fake_shard(per_shard).with_live(live_N))
    shards = tuple(
        replace(of_all, **names_of(fake_shard(per_shard))) for _ in range(-(-rows // per_shard))
    )
    card = ModelCard("bench-0000000000000000", "bench", 512)
    groups = Groups(path)
    names = groups.write(shards, frozenset())
    first = manifests.Manifest(1, card, shards, groups=names)
    manifests.path_of(path, 1).write_bytes(manifests.render(first))
    found: dict[str, Any] = {
        "shards": len(shards),
        "groups": len(names),
        "group_bytes": bytes_of(groups.folder),
    }
    found["manifest_bytes"] = manifests.path_of(path, 1).stat().st_size
    found["open_ms"] = timed(lambda: manifests.newest(path), REPEATS)

    def delete_one(base: manifests.Manifest) -> manifests.Manifest:
        number = secrets.randbelow(len(base.shards))
        changed = base.shards[number].with_rows_deleted([secrets.randbelow(per_shard)])
        return replace(base, shards=(*base.shards[:number], changed, *base.shards[number + 1 :]))

    warm = Groups(path)
    manifests.commit(path, delete_one, card, groups=warm)
    found["commit_ms"] = timed(
        lambda: manifests.commit(path, delete_one, card, groups=warm), REPEATS
    )
    found["commit_of_a_new_process_ms"] = timed(
        lambda: manifests.commit(path, delete_one, card), REPEATS
    )
    return found


def names_of(shard: Shard) -> dict[str, Any]:
    """Return the fields of a shard that name it and its files."""
    names = ("name", "row_file", "vector_file", "thumbnail_file")
    return {name: getattr(shard, name) for name in names}


def fake_shard(rows: int) -> Shard:
    """An entry as a real shard has."""
    name = secrets.token_hex(8)
    files = {
        role: StoredFile(
            f"{name}-{role}-{secrets.token_hex(4)}.arrow", rows * 1024, secrets.token_hex(32)
        )
        for role in ("rows", "vectors", "thumbnails")
    }
    return Shard(
        name,
        rows,
        files["rows"],
        files["vectors"],
        files["thumbnails"],
        precision="bfloat16",
        version="0.1.0",
    )


def main(words: list[str]) -> None:
    """Run the three and write a row for each."""
    parser = argparse.ArgumentParser(prog="python -m bench scale")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--commits", type=int, default=5_000)
    parser.add_argument("--billion", type=int, default=1_000_000_000)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    options = parser.parse_args(words)
    if min(options.rows, options.commits, options.billion) < FEW:
        sys.exit(f"--rows, --commits and --billion must be at least {FEW}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        row: dict[str, Any] = {"rows": options.rows, "dim": options.dim}
        row |= large(folder / "large.store", options.rows, options.dim)
        row |= prefixed(
            "commits", many_commits(folder / "many.store", options.commits, options.dim)
        )
        for deleted, prefix in ((0.0, "billion"), (0.01, "billion_1%_deleted")):
            found = billion(folder / f"{prefix}.store", options.billion, deleted)
            row |= prefixed(prefix, found)
        measure.append("scale", {k: round(v, 3) for k, v in row.items()})


def prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return values under names that say which of the three stores they are of."""
    return {f"{prefix}_{name}": value for name, value in values.items()}
