"""Other indexes as baselines: built within a memory, searched over their parameter.

They want another numpy than ours, so this runs in an environment of its own, as a script that
imports nothing of this repository:

    python3 -m venv baselines && baselines/bin/pip install -r bench/index-baselines.txt
    baselines/bin/python bench/index_baselines.py hnswlib --images images.npy --queries q.npy \\
        --truth truth.npy --memory 4GB --threads 1 --cache DIR --out rows.jsonl

METHOD is autofaiss, faiss-hnsw32, faiss-ivf-flat, hnswlib or usearch. Truth holds the rows of the
100 or more nearest images of each query, best first. A line of rows.jsonl is a point: the shares of
the true 10 and 100 that are found when 10 and 100 are asked for, queries per second when all are
asked in one call, milliseconds when one is asked at a time, and what the index
cost. What does not fit the memory is a line that says so ("refused"). Building runs in a process of
its own, and the index is loaded from its file: `build_peak_bytes` and `peak_bytes` tell them apart.
An index stays in the cache with what it cost, and another run takes it from there.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 20_000
ROUNDS, ALONE = 2, 200
REFUSED = 3
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Images:
    """A file of vectors, read in blocks and never mapped: mapped pages would count as memory."""

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r")
        (self.rows, self.dim), self.dtype, self.start = mapped.shape, mapped.dtype, mapped.offset
        self.path = path
        digest = hashlib.sha256(mapped[:: max(1, self.rows // 256)].tobytes())
        self.mark = f"{self.rows}-{digest.hexdigest()[:8]}"
        """A few letters that other vectors would not have."""

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """The first row of each block, and the block."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            for first in range(0, self.rows, BLOCK):
                count = min(BLOCK, self.rows - first) * self.dim
                yield first, np.fromfile(file, self.dtype, count).reshape(-1, self.dim).astype("f4")

    def sample(self, count: int) -> Floats:
        """Some rows at random, no two alike."""
        kept = np.random.default_rng(0).choice(self.rows, min(count, self.rows), replace=False)
        parts = [b[kept[(kept >= f) & (kept < f + len(b))] - f] for f, b in self.blocks()]
        return np.concatenate(parts)


class Baseline(ABC):
    """A library's index; abstract.

    Each has `kind` (what is built, part of the file's name), `expected_bytes` (about what it will
    hold), `build(path)`, `load(path)`, `aim(point)` (set its parameter, and name it) and
    `search(queries, k)` (rows, best first).
    """

    package: str
    grid: tuple[int, ...] = (10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 640, 1000)
    kind: str
    expected_bytes: int
    index: Any = None

    def __init__(self, options: argparse.Namespace, images: Images) -> None:
        self.options, self.images = options, images
        self.choose(options.m, images.rows, images.dim)

    @abstractmethod
    def choose(self, m: int | None, rows: int, dim: int) -> None:
        """Set `kind` and `expected_bytes`."""


class Hnswlib(Baseline):
    """float32; the largest of three M that fits, unless told."""

    package = "hnswlib"

    def choose(self, m: int | None, rows: int, dim: int) -> None:
        sizes = {n: rows * (4 * dim + 8 * n + 36) for n in ((m,) if m else (32, 24, 16))}
        fitting = [n for n, size in sizes.items() if size < self.options.memory_bytes]
        self.m = (*fitting, *sizes)[0 if fitting else -1]
        self.kind, self.expected_bytes = f"M{self.m}-ef{self.options.construction}", sizes[self.m]

    def _new(self) -> Any:
        return importlib.import_module("hnswlib").Index("ip", self.images.dim)

    def build(self, path: Path) -> None:
        index = self._new()
        index.init_index(self.images.rows, ef_construction=self.options.construction, M=self.m)
        for first, block in self.images.blocks():
            numbers = np.arange(first, first + len(block))
            index.add_items(block, numbers, num_threads=self.options.build_threads)
        index.save_index(str(path))

    def load(self, path: Path) -> None:
        self.index = self._new()
        self.index.load_index(str(path))
        self.index.set_num_threads(self.options.threads)

    def aim(self, point: int) -> str:
        self.index.set_ef(point)
        return f"ef={point}"

    def search(self, queries: Floats, k: int) -> Ints:
        return np.asarray(self.index.knn_query(queries, k=k)[0], dtype=np.int64)


class Usearch(Baseline):
    """f32, f16 or i8: the first that fits, unless told."""

    package = "usearch"

    def choose(self, m: int | None, rows: int, dim: int) -> None:
        self.m = m or 16
        widths = {"f32": 4, "f16": 2, "i8": 1}
        sizes = {n: rows * (width * dim + 8 * self.m + 40) for n, width in widths.items()}
        fitting = [n for n, size in sizes.items() if size < self.options.memory_bytes]
        self.dtype = self.options.dtype or (*fitting, "i8")[0]
        self.kind = f"{self.dtype}-M{self.m}-ef{self.options.construction}"
        self.expected_bytes = sizes[self.dtype]

    def build(self, path: Path) -> None:
        index = importlib.import_module("usearch.index").Index(
            ndim=self.images.dim,
            metric="cos",
            dtype=self.dtype,
            connectivity=self.m,
            expansion_add=self.options.construction,
        )
        for first, block in self.images.blocks():
            numbers = np.arange(first, first + len(block), dtype=np.uint64)
            index.add(numbers, block, threads=self.options.build_threads)
        index.save(str(path))

    def load(self, path: Path) -> None:
        self.index = importlib.import_module("usearch.index").Index.restore(str(path))

    def aim(self, point: int) -> str:
        self.index.expansion_search = point
        return f"expansion={point}"

    def search(self, queries: Floats, k: int) -> Ints:
        keys = self.index.search(queries, k, threads=self.options.threads).keys
        return np.asarray(keys).astype(np.int64).reshape(len(queries), -1)


class Faiss(Baseline):
    """What all indexes of faiss share."""

    package = "faiss-cpu"

    def load(self, path: Path) -> None:
        self.index = _faiss(self.options.threads).read_index(str(path))

    def search(self, queries: Floats, k: int) -> Ints:
        return np.asarray(self.index.search(queries, k)[1], dtype=np.int64)

    def _fill(self, index: Any, path: Path) -> None:
        for _, block in self.images.blocks():
            index.add(block)
        _faiss(self.options.build_threads).write_index(index, str(path))


def _faiss(threads: int) -> Any:
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(threads)
    return faiss


class FaissHnsw(Faiss):
    """HNSW32 over float32."""

    def choose(self, m: int | None, rows: int, dim: int) -> None:
        self.m = m or 32
        self.kind = f"M{self.m}-ef{self.options.construction}"
        self.expected_bytes = rows * (4 * dim + 8 * self.m + 20)

    def build(self, path: Path) -> None:
        faiss = _faiss(self.options.build_threads)
        index = faiss.IndexHNSWFlat(self.images.dim, self.m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.options.construction
        self._fill(index, path)

    def aim(self, point: int) -> str:
        self.index.hnsw.efSearch = point
        return f"efSearch={point}"


class FaissIvf(Faiss):
    """IVF4096,Flat; fewer lists where there are fewer than 64 rows for each."""

    grid = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512)

    def choose(self, m: int | None, rows: int, dim: int) -> None:
        self.lists = min(4096, 1 << int(np.log2(max(1, rows / 64))))
        self.kind = f"IVF{self.lists},Flat"
        self.expected_bytes = (rows + self.lists) * (4 * dim + 8)

    def build(self, path: Path) -> None:
        faiss = _faiss(self.options.build_threads)
        index = faiss.index_factory(self.images.dim, self.kind, faiss.METRIC_INNER_PRODUCT)
        index.train(self.images.sample(64 * self.lists))
        self._fill(index, path)

    def aim(self, point: int) -> str:
        self.index.nprobe = min(point, self.lists)
        return f"nprobe={self.index.nprobe}"


class Autofaiss(Faiss):
    """Its own choice of index. Point 0 is its own choice of parameters as well.

    The memory is for the index; it may build with four times as much and 4 GB more.
    """

    package = "autofaiss"
    grid = (0, *Baseline.grid)

    def choose(self, m: int | None, rows: int, dim: int) -> None:
        self.megabytes = self.options.memory_bytes // 10**6
        self.kind, self.expected_bytes = f"{self.megabytes}MB", 0

    def build(self, path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            os.symlink(self.images.path.resolve(), Path(folder) / "images.npy")
            index, _ = importlib.import_module("autofaiss").build_index(
                embeddings=folder,
                index_path=str(path),
                index_infos_path=str(path.with_suffix(".infos")),
                max_index_memory_usage=f"{self.megabytes}MB",
                current_memory_available=f"{4 * self.megabytes + 4000}MB",
                max_index_query_time_ms=10,
                metric_type="ip",
                nb_cores=self.options.build_threads,
            )
        if index is None:
            sys.exit(REFUSED)

    def load(self, path: Path) -> None:
        super().load(path)
        infos = json.loads(path.with_suffix(".infos").read_bytes())
        self.kind, self.tuned = str(infos["index_key"]), str(infos["index_param"])

    def aim(self, point: int) -> str:
        """Set the first of its parameters; the others stay as they were tuned."""
        wanted = re.sub(r"^(\w+)=\d+", rf"\g<1>={point}", self.tuned) if point else self.tuned
        importlib.import_module("faiss").ParameterSpace().set_index_parameters(self.index, wanted)
        return wanted if point else f"{wanted} (its own choice)"


METHODS: dict[str, Any] = {
    "autofaiss": Autofaiss,
    "faiss-hnsw32": FaissHnsw,
    "faiss-ivf-flat": FaissIvf,
    "hnswlib": Hnswlib,
    "usearch": Usearch,
}


def peak_bytes() -> int:
    """The most memory this process had at a time (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith("VmHWM:")).split()[1])


def build(baseline: Any, path: Path) -> None:
    """Build into a path; what it cost comes to lie beside it."""
    started = time.perf_counter()
    made = path.with_suffix(".part")
    baseline.build(made)
    cost = {"build_s": round(time.perf_counter() - started, 1)}
    cost |= {"build_threads": baseline.options.build_threads, "build_peak_bytes": peak_bytes()}
    if made.with_suffix(".infos").exists():
        os.replace(made.with_suffix(".infos"), path.with_suffix(".infos"))
    path.with_suffix(".json").write_text(json.dumps(cost))
    os.replace(made, path)


def measured(baseline: Any, queries: Floats, truth: Ints) -> dict[str, float]:
    """Recall and speed where the baseline is aimed at, for 10 and 100 neighbours."""
    row: dict[str, float] = {}
    for k in (10, 100):
        found = baseline.search(queries, k)
        pairs = zip(found, truth[:, :k], strict=True)
        shares = [np.isin(true, rows).mean() for rows, true in pairs]
        row[f"recall_{k}"] = round(float(np.mean(shares)), 4)
        seconds, times = [], []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            baseline.search(queries, k)
            seconds.append(time.perf_counter() - started)
        for number in range(min(ALONE, len(queries))):
            started = time.perf_counter()
            baseline.search(queries[number : number + 1], k)
            times.append(1000 * (time.perf_counter() - started))
        row[f"qps_{k}"] = round(len(queries) / min(seconds), 1)
        row[f"p50_ms_{k}"] = round(float(np.percentile(times, 50)), 3)
        row[f"p99_ms_{k}"] = round(float(np.percentile(times, 99)), 3)
    return row


def parsed() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(prog="index_baselines.py")
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", default="4GB", help="that the index may have")
    parser.add_argument("--threads", type=int, default=1, help="of the search")
    parser.add_argument("--build-threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, help="a folder for indexes")
    parser.add_argument("--m", type=int, help="edges of a node, for graphs")
    parser.add_argument("--construction", type=int, default=200, help="breadth while building")
    parser.add_argument("--dtype", choices=("f32", "f16", "i8"), help="for usearch")
    parser.add_argument("--points", type=int, nargs="+", help="of the parameter")
    parser.add_argument("--build-only", type=Path, metavar="PATH", help="build there, and end")
    options = parser.parse_args()
    number, unit = re.fullmatch(r"([\d.]+)([GM])B", options.memory).groups()  # type: ignore[union-attr]
    options.memory_bytes = int(float(number) * {"G": 10**9, "M": 10**6}[unit])
    return options


def main() -> None:
    """Build, or take from the cache, then search at every point."""
    options = parsed()
    images = Images(options.images)
    baseline = METHODS[options.method](options, images)
    if options.build_only:
        build(baseline, options.build_only)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{options.method}-{baseline.kind}-{images.mark}.index"
        refused = baseline.expected_bytes > options.memory_bytes
        if not refused and not path.exists():
            words = [sys.executable, *sys.argv, "--build-only", str(path)]
            refused = subprocess.run(words, check=False).returncode == REFUSED
        if refused:
            row = {"method": options.method, "kind": baseline.kind, "rows": images.rows}
            report(options, {**row, "memory": options.memory, "refused": "does not fit"})
        else:
            sweep(baseline, path)


def report(options: argparse.Namespace, row: dict[str, Any]) -> None:
    """Show a row, and add it to the file."""
    line = json.dumps(row)
    print(line, flush=True)
    if options.out:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def sweep(baseline: Any, path: Path) -> None:
    """Measure every point of an index on disk, until recall no longer grows."""
    options, images = baseline.options, baseline.images
    queries = np.ascontiguousarray(np.load(options.queries), dtype=np.float32)
    truth = np.load(options.truth)[: len(queries)]
    baseline.load(path)
    cost = json.loads(path.with_suffix(".json").read_bytes())
    size = path.stat().st_size
    shared = {"method": options.method, "kind": baseline.kind, "rows": images.rows}
    shared |= {"dim": images.dim, "queries": len(queries), "memory": options.memory}
    shared |= {"threads": options.threads, "version": version(baseline.package)}
    for point in options.points or baseline.grid:
        row = {**shared, "point": baseline.aim(point), **measured(baseline, queries, truth), **cost}
        row |= {"index_bytes": size, "bytes_per_vector": round(size / images.rows, 1)}
        report(options, {**row, "peak_bytes": peak_bytes()})
        if point and row["recall_100"] > 0.9995:
            break


if __name__ == "__main__":
    main()
