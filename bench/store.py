"""Vectors on disk: a store beside npy and parquet, written and read in one run.

    python -m bench store [--rows 1000000] [--dim 512] [--rounds 5] [--shards 1000] [--folder DIR]

Random unit vectors in float32, float16 on disk. All writes end on the disk (fsync). A store hashes
what it writes, and has an id and a uri for each row; parquet has ids, npy has nothing else.
"plain" is without compression and dictionaries, which cannot help such numbers. Reading opens the
files anew and sums all vectors as 64-bit integers: every byte is touched, and the sum costs little
beside that. The page cache is warm. `gb_per_s` counts the float16 vectors alone.

Then rows are found by id (`per_s` counts rows; "read by id" takes the uri of each as well), and a
store of many small shards is written, opened and read.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyarrow import parquet

from bench import measure
from mmalign.arrays import Floats
from mmalign.store import ModelCard, Row, Writer, open_store

CHUNK = 10_000
FOUND = 100_000
READ = 1_000
SMALL = 1_000
LARGE = 50_000


def unit_vectors(rows: int, dim: int) -> Floats:
    """Random directions."""
    generator = np.random.default_rng(0)
    vectors = np.empty((rows, dim), dtype=np.float32)
    for first in range(0, rows, CHUNK):
        part = generator.standard_normal((min(CHUNK, rows - first), dim), dtype=np.float32)
        vectors[first : first + CHUNK] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def name_of(row: int) -> str:
    """The id of a row."""
    return f"photos/{row:09d}"


# --- writing: vectors to a path, durably ----------------------------------------------------------


def write_store(vectors: Floats, path: Path, rows_per_shard: int = CHUNK) -> None:
    """Row by row through the writer, as embedding does."""
    card = ModelCard("bench-0000000000000000", "bench", vectors.shape[1])
    with Writer(path, card, rows_per_shard) as writer:
        for number, vector in enumerate(vectors):
            name = name_of(number)
            writer.add(Row(name, f"/data/{name}.jpg", (), {"image": vector[None]}))


def write_npy(vectors: Floats, path: Path) -> None:
    """One array."""
    with open(path, "wb") as file:
        np.save(file, vectors.astype(np.float16))
        file.flush()
        os.fsync(file.fileno())


def write_npy_files(vectors: Floats, path: Path) -> None:
    """As many arrays as a store has shards."""
    path.mkdir()
    for first in range(0, len(vectors), CHUNK):
        write_npy(vectors[first : first + CHUNK], path / f"{first:09d}.npy")


def write_parquet(vectors: Floats, path: Path, **settings: Any) -> None:
    """One table of ids and lists of numbers."""
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    table = pa.table({"id": [name_of(i) for i in range(len(vectors))], "vector": lists})
    with open(path, "wb") as file:
        parquet.write_table(table, file, **settings)
        file.flush()
        os.fsync(file.fileno())


# --- reading: a path to vectors, all touched ------------------------------------------------------


def touched(parts: Sequence[NDArray[np.float16]]) -> int:
    """Sum all bits, modulo 2^64, so that it does not matter how they lie in parts."""
    return sum(int(part.reshape(-1).view(np.uint64).sum()) for part in parts) % 2**64


def read_store(path: Path) -> int:
    """Mapped, without a copy."""
    return touched(open_store(path).vectors("image"))


def read_npy(path: Path) -> int:
    """Mapped too."""
    return touched([np.load(path, mmap_mode="r")])


def read_npy_files(path: Path) -> int:
    """Each mapped."""
    return touched([np.load(file, mmap_mode="r") for file in sorted(path.glob("*.npy"))])


def read_parquet(path: Path) -> int:
    """Decoded into memory."""
    lists = parquet.read_table(path, columns=["vector"])["vector"]
    return touched([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in lists.chunks])


Write = Callable[[Floats, Path], None]
Read = Callable[[Path], int]
FORMATS: dict[str, tuple[Write, Read]] = {
    "mmalign store": (write_store, read_store),
    f"mmalign store, {LARGE:,} rows a shard": (
        partial(write_store, rows_per_shard=LARGE),
        read_store,
    ),
    "npy": (write_npy, read_npy),
    "npy, a file a shard": (write_npy_files, read_npy_files),
    "parquet": (write_parquet, read_parquet),
    "parquet, plain": (
        partial(write_parquet, compression="none", use_dictionary=False),
        read_parquet,
    ),
}


# --- what is measured -----------------------------------------------------------------------------


def write_all(vectors: Floats, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Time all formats in turn; what the last round wrote stays. Removing is not timed."""
    times: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(rounds):
        for name, (write, _read) in FORMATS.items():
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            os.sync()
            started = time.perf_counter()
            write(vectors, path)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: measure.percentiles(values) for name, values in times.items()}


def finding(path: Path, rows: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Ways of finding rows by id: how many each finds, and how."""
    numbers = np.random.default_rng(1).integers(0, rows, FOUND)
    ids, store = [name_of(int(n)) for n in numbers], open_store(path)
    if not np.array_equal(store.find(ids), numbers):
        sys.exit(f"{path}: wrong rows were found")
    return {
        "first id found, store just opened": (1, lambda: open_store(path).find(ids[:1])),
        "found by id": (FOUND, lambda: store.find(ids)),
        "found by id, one at a time": (READ, lambda: [store.find([i]) for i in ids[:READ]]),
        "read by id": (READ, lambda: store.rows(store.find(ids[:READ]), ["id", "uri"])),
    }


def shards(path: Path) -> int:
    """How many files hold the vectors."""
    return sum(f.suffix in (".arrow", ".npy") for f in path.rglob("*")) if path.is_dir() else 1


def report(what: str, timing: dict[str, float], shape: tuple[int, int], **rest: Any) -> None:
    """Write a row; `rest` has `shards`, and `bytes` or `items` that were dealt with."""
    row: dict[str, Any] = {"what": what, "rows": shape[0], "dim": shape[1]}
    row |= {"shards": rest.get("shards", ""), **timing}
    seconds = timing["p50_ms"] / 1000
    row["gb_per_s"] = round(rest["bytes"] / seconds / 1e9, 3) if "bytes" in rest else ""
    row["per_s"] = round(rest["items"] / seconds) if "items" in rest else ""
    measure.append("store", row)


def main(words: list[str]) -> None:
    """Write, read, open, find."""
    parser = argparse.ArgumentParser(prog="python -m bench store")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=1000, help="small ones, of 1,000 rows")
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    options = parser.parse_args(words)
    torch.set_num_threads(2)
    vectors = unit_vectors(options.rows, options.dim)
    shape, size = vectors.shape, 2 * vectors.size
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for what, timing in write_all(vectors, folder, options.rounds).items():
            report(f"write {what}", timing, shape, bytes=size, shards=shards(folder / what))
        tasks = {n: partial(read, folder / n) for n, (_write, read) in FORMATS.items()}
        if len({task() for task in tasks.values()}) > 1:
            sys.exit("the formats do not hold the same vectors")
        for what, timing in measure.in_turn(tasks, options.rounds).items():
            report(f"read {what}", timing, shape, bytes=size, shards=shards(folder / what))
        store = folder / "mmalign store"
        ways = finding(store, options.rows)
        timings = measure.in_turn({n: way for n, (_, way) in ways.items()}, options.rounds)
        for what, timing in timings.items():
            report(what, timing, shape, items=ways[what][0], shards=shards(store))
        small(vectors, folder / "small", options)


def small(vectors: Floats, path: Path, options: argparse.Namespace) -> None:
    """Write and open a store of many small shards."""
    rows = min(len(vectors), SMALL * options.shards)
    started = time.perf_counter()
    write_store(vectors[:rows], path, SMALL)
    written = measure.percentiles([1000 * (time.perf_counter() - started)])
    tasks = {
        "open, small shards": lambda: open_store(path),
        "read, small shards": lambda: read_store(path),
    }
    shape, size = (rows, vectors.shape[1]), 2 * rows * vectors.shape[1]
    report("write, small shards", written, shape, bytes=size, shards=rows // SMALL)
    for what, timing in measure.in_turn(tasks, 4 * options.rounds).items():
        cost = {"bytes": size} if what.startswith("read") else {}
        report(what, timing, shape, shards=rows // SMALL, **cost)
