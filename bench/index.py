"""Recall, speed, memory and build time of the index, beside those of others, at equal memory.

    python -m bench index --work DIR [--rows 1000000] [--recall 0.9 0.95 0.99] \
        [--memory 4GB 1GB 300MB] [--threads 1 2] [--others PYTHON] [--methods hnswlib usearch ...]
    python -m bench index --work DIR --grow 100000 300000 1000000 3000000
    python -m bench index --work DIR --change [--rows 300000]
    python -m bench index --work DIR --turns 3 --others PYTHON [--kinds image] [--points 80 160 320]

Rows are drawn by `bench/standin.py`, or come from files (`--vectors images.npy texts.npy`, float16
and float32, say those of a real store). Half of the held-out queries come as texts, half as images;
the truth is exact search. Ours chooses and builds an index for every recall and memory, with two
threads, in a process of its own that sees no more texts than a store would give it; then held-out
queries measure it, many at once and one at a time. Others (PYTHON is that of an environment with
what `bench/index-baselines.txt` names) build what fits the memory and sweep their parameter; so
every row is one point of a curve. Rows go to bench/results/index.csv, the curves to a picture
beside it for each kind of processor (index-amd-epyc-avx512.png), as others do not compare; with
`--vectors` to index-real*. `--grow` builds ours at several sizes and prints the exponents of build
time and QPS.
`--change` builds over five sixths of the rows, and measures text queries under filters that leave
a half, a twentieth and a two-hundredth of them; then with the last sixth added and a fifth of the
others deleted, as they are searched before the index is built again. Rows of index-change.csv.
`--turns` measures what was built over and over, each index in its turn, so that a slow minute
strikes all alike: medians and the range of QPS in index.csv, and QPS beside those of others at the
same recall, between their two nearest points.

DIR keeps vectors, truths and what others built, as that takes longest.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import measure, processes
from bench.standin import StandIn
from mmalign.index import Exact, Queries, VectorReader, open_index, write_description, write_index
from mmalign.index.approximate import set_threads
from mmalign.index.measure import interval, neighbour_recall
from mmalign.search.build import memory_bytes

KS, SHARD_ROWS, KINDS = (10, 100), 10_000, ("text", "image")
TUNING, HELD = 8_000, 1_000
BUILD_THREADS = 2
# Queries that are timed alone; all together are asked so many times, and the better time counts.
ALONE, ROUNDS = 300, 2
# What rows of two methods have to share to be compared.
SETTING = ("asked", "k", "search_threads")
COLOURS = {
    "autofaiss": "tab:blue",
    "faiss-hnsw32": "tab:orange",
    "faiss-ivf-flat": "tab:green",
    "hnswlib": "tab:red",
    "usearch": "tab:brown",
}
METHODS = tuple(COLOURS)
MARKS = {"4GB": "-", "1GB": "--", "300MB": ":"}


def main(arguments: list[str]) -> None:
    """Run what is asked for."""
    given = _parse(arguments)
    if given.one:
        _ours(**json.loads(given.one))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    if given.grow:
        given.threads = [1]
        _grow(given)
        return
    data = _data(given.work, given.rows, given.vectors)
    if given.change:
        _change(data, given.recall[0], memory_bytes(given.memory[0]))
        return
    if given.turns:
        _in_turns(given, data)
        return
    name = "index-real" if given.vectors else "index"
    for memory in given.memory:
        for recall in given.recall:
            for row in _in_process(data, recall, memory, given):
                measure.append(name, row)
    for method in given.methods if given.others else ():
        for memory in given.memory:
            for row in _others(given, method, data, memory):
                measure.append(name, row)
    _draw(name, given.threads[0])


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench index")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--vectors", type=Path, nargs=2)
    parser.add_argument("--recall", type=float, nargs="*", default=[0.9, 0.95, 0.99])
    parser.add_argument("--memory", nargs="*", default=["4GB", "1GB", "300MB"])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--others")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--grow", type=int, nargs="*")
    parser.add_argument("--change", action="store_true")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--points", nargs="*", help="parameters of the others")
    parser.add_argument("--prefer", choices=KINDS, default="text", help="which queries choose ours")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _data(work: Path, rows: int, vectors: list[Path] | None) -> dict[str, Any]:
    """Draw vectors and queries, find the truth, and keep them in files; return their names."""
    folder = work / (f"standin-{rows}" if vectors is None else vectors[0].stem)
    names = {n: str(folder / f"{n}.npy") for n in ("images", "tuning", "text", "image")}
    names |= {f"{n}-truth": str(folder / f"{n}-truth.npy") for n in ("text", "image")}
    if all(Path(n).exists() for n in names.values()):
        return names
    folder.mkdir(exist_ok=True)
    if vectors is None:
        world = StandIn(rows)
        images = np.lib.format.open_memmap(names["images"], "w+", np.float16, (rows, world.dim))
        world.images(images)
        texts = world.texts(TUNING + HELD)[0]
        held_out = world.held_out(HELD)
    else:
        images = np.load(vectors[0], mmap_mode="r")
        texts = np.load(vectors[1])
        np.random.default_rng(0).shuffle(texts)
        held = np.random.default_rng(1).choice(len(images), HELD, replace=False)
        held_out = images[held].astype(np.float32)
        images = np.delete(images, held, axis=0)
        np.save(names["images"], images)
    np.save(names["text"], texts[:HELD])
    np.save(names["tuning"], texts[HELD:])
    np.save(names["image"], held_out)
    torch.set_num_threads(BUILD_THREADS)
    for kind in ("text", "image"):
        true = Exact([images]).search(np.load(names[kind]), KS[-1])[1]
        np.save(names[f"{kind}-truth"], true)
    return names


def _in_process(
    data: dict[str, Any],
    recall: float,
    memory: str,
    given: argparse.Namespace,
    kept: Path | None = None,
) -> list[Any]:
    """Build and measure ours in a process of its own; what is kept in a folder is only measured."""
    words = {
        "data": data, "recall": recall, "memory": memory_bytes(memory), "threads": given.threads,
        "kinds": given.kinds, "prefer": given.prefer, "kept": str(kept) if kept else None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "-m",
            "bench",
            "index",
            "--one",
            json.dumps({**words, "out": str(out)}),
        ]
        peak = processes.run(command, BUILD_THREADS, private=True)
        found = json.loads(out.read_text())
    return [
        {"method": "mmalign", "memory": memory, "wanted": recall, **row,
         "peak_mib": round(peak["peak_mib"])}
        for row in found
    ]  # fmt: skip


def _ours(
    data: dict[str, str],
    recall: float,
    memory: float,
    *,
    threads: list[int],
    kinds: list[str],
    prefer: str,
    kept: str | None,
    out: str,
) -> None:
    """Choose, build, write, open and measure an index; its rows go to a file."""
    _use(BUILD_THREADS)
    images = np.load(data["images"], mmap_mode="r")
    shards = [images[i : i + SHARD_ROWS] for i in range(0, len(images), SHARD_ROWS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(kept or name)
        build_s, design = _build(folder, data, shards, recall, memory, prefer)
        size = sum(p.stat().st_size for p in folder.glob("image.*"))
        started = time.perf_counter()
        index = open_index(folder, "image", shards)
        open_ms = 1000 * (time.perf_counter() - started)
        common = {
            "design": design, "build_s": round(build_s, 1), "open_ms": round(open_ms, 2),
            "bytes_per_vector": round(size / len(images), 1),
        }  # fmt: skip
        rows = []
        for count in threads:
            _use(count)
            for kind in kinds:
                queries, true = np.load(data[kind]), np.load(data[f"{kind}-truth"])
                for k in KS:
                    rows.append(
                        {**common, "asked": kind, "k": k, "search_threads": count}
                        | _speed(
                            lambda q, k=k, kind=kind: index.search(q, k, query_modality=kind)[1],
                            queries,
                            true[:, :k],
                        )
                    )
        Path(out).write_text(json.dumps(rows))


def _build(
    folder: Path, data: dict[str, str], shards: Any, recall: float, memory: float, prefer: str
) -> tuple[float, str]:
    """Build an index unless the folder holds one; return the seconds and its name."""
    note = folder / "build.json"
    if note.exists():
        seconds, design = json.loads(note.read_text())
        return float(seconds), str(design)
    folder.mkdir(exist_ok=True)
    tuning = np.load(data["tuning"])
    stored = VectorReader(shards)
    drawn = np.random.default_rng(1).permutation(stored.sample_rows(2 * HELD, seed=0))
    tune, held = np.split(stored.gather(drawn).astype(np.float32), 2)
    asked = {
        "text": Queries(tuning[HELD:], tuning[:HELD]),
        "image": Queries(tune, held, stored=True),
    }
    asked = dict(sorted(asked.items(), key=lambda item: item[0] != prefer))
    started = time.perf_counter()
    part = write_index(
        folder, "image", shards, queries_by_modality=asked, recall=recall, memory=memory
    )
    seconds = time.perf_counter() - started
    write_description(folder, {"modalities": {"image": part}})
    note.write_text(json.dumps([seconds, part["name"]]))
    return seconds, str(part["name"])


def _in_turns(given: argparse.Namespace, data: dict[str, Any]) -> None:
    """Measure all that is built in turns; medians, and QPS beside others at the same recall."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for _ in range(given.turns):
        for memory in given.memory:
            rows = [
                row
                for recall in given.recall
                for row in _in_process(
                    data, recall, memory, given,
                    given.work / f"ours-{given.rows}-{memory}-{recall}-{given.prefer}",
                )
            ]  # fmt: skip
            for method in given.methods if given.others else ():
                rows += _others(given, method, data, memory)
            for row in rows:
                key = tuple(row[c] for c in ("method", "memory", "wanted", "design", *SETTING))
                found.setdefault(key, []).append(row)
    rows = [_median(turns) for turns in found.values()]
    for row in rows:
        measure.append("index", row)
    for row in rows:
        if row["method"] == "mmalign":
            setting = {column: row[column] for column in ("memory", *SETTING)}
            for method in given.methods:
                points = [
                    (other["recall"], other["qps"])
                    for other in rows
                    if other["method"] == method and setting.items() <= other.items()
                ]
                beside = at_recall(points, row["recall"])
                ratio = f"{row['qps'] / beside:.2f}" if beside else "not reached by it"
                print(f"{row['recall']:.4f} {setting}: QPS beside {method}: {ratio}")
    _draw("index", given.threads[0])


def _median(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row for the same measurement in several turns."""
    medians = {
        name: round(float(np.median([row[name] for row in turns])), 3)
        for name in ("qps", "p50_ms", "p99_ms")
    }
    spread = f"{min(row['qps'] for row in turns):.0f}-{max(row['qps'] for row in turns):.0f}"
    return {**turns[0], **medians, "turns": len(turns), "qps_range": spread}


def at_recall(points: list[tuple[float, float]], recall: float) -> float | None:
    """Return QPS at a recall between two points of a curve; None beyond its ends.

    >>> round(at_recall([(0.9, 400.0), (0.98, 100.0)], 0.94))
    200
    """
    recalls, speeds = np.array(sorted(points)).T if points else (np.zeros(0), np.zeros(0))
    if not len(recalls) or not recalls[0] <= recall <= recalls[-1]:
        return None
    return float(np.exp(np.interp(recall, recalls, np.log(speeds))))


def _others(given: argparse.Namespace, method: str, data: dict[str, Any], memory: str) -> Any:
    """Let another library build once and be measured for every kind of query and thread count."""
    worker = Path(__file__).with_name("index_baselines.py")
    points = ["--points", *given.points] if given.points else []
    for count in given.threads:
        for kind in given.kinds:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "rows.jsonl"
                words = {
                    "--images": data["images"], "--queries": data[kind],
                    "--truth": data[f"{kind}-truth"], "--memory": memory, "--threads": str(count),
                    "--cache": str(Path(data["images"]).parent / "others"), "--out": str(out),
                }  # fmt: skip
                environment = os.environ | {"OMP_NUM_THREADS": str(BUILD_THREADS)}
                subprocess.run(
                    [
                        given.others, str(worker), method,
                        *(x for pair in words.items() for x in pair), *points,
                    ],
                    check=True, env=environment,
                )  # fmt: skip
                for line in out.read_text().splitlines():
                    yield from _rows_of(json.loads(line), kind, memory)


def _rows_of(point: dict[str, Any], kind: str, memory: str) -> list[dict[str, Any]]:
    """One row for each k, with the columns of ours."""
    if "refused" in point:
        return []
    return [
        {
            "method": point["method"], "memory": memory, "wanted": "",
            "design": f"{point['kind']} {point['point']}",
            "build_s": point["build_s"], "open_ms": "",
            "bytes_per_vector": point["bytes_per_vector"], "asked": kind, "k": k,
            "search_threads": point["threads"], "recall": point[f"recall_{k}"], "low": "",
            "high": "", "qps": point[f"qps_{k}"], "p50_ms": point[f"p50_ms_{k}"],
            "p99_ms": point[f"p99_ms_{k}"],
            "peak_mib": round(point["build_peak_bytes"] / 2**20),
        }
        for k in KS
    ]  # fmt: skip


def _change(data: dict[str, Any], recall: float, memory: float) -> None:
    """Build over some rows; measure filters, then rows that came and went since."""
    _use(BUILD_THREADS)
    images = np.load(data["images"], mmap_mode="r")
    shards = [images[i : i + SHARD_ROWS] for i in range(0, len(images), SHARD_ROWS)]
    covered = len(shards) * 5 // 6
    tuning, queries = np.load(data["tuning"]), np.load(data["text"])
    asked = {"text": Queries(tuning[HELD:], tuning[:HELD])}
    draw = np.random.default_rng(0).random(len(images))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part = write_index(
            folder,
            "image",
            shards[:covered],
            queries_by_modality=asked,
            recall=recall,
            memory=memory,
        )
        write_description(folder, {"modalities": {"image": part}})
        built = open_index(folder, "image", shards[:covered])
        grown = open_index(folder, "image", shards)
        cases = [(f"filter {share:.1%}", built, draw < share) for share in (1, 0.5, 0.05, 0.005)]
        cases.append(("a fifth deleted, a fifth added", grown, draw < 0.8))
        for case, index, allowed in cases:
            allow = allowed[: index.rows].copy()
            if index is grown:
                allow[built.rows :] = True
            held = shards if index is grown else shards[:covered]
            for count in (1, BUILD_THREADS):
                _use(count)
                true = Exact(held).search(queries, KS[0], allow)[1]
                row = _speed(lambda q, i=index, a=allow: i.search(q, KS[0], a)[1], queries, true)
                common = {
                    "case": case,
                    "rows": index.rows,
                    "design": part["name"],
                    "wanted": recall,
                }
                measure.append("index-change", {**common, "search_threads": count, **row})


def _draw(name: str, threads: int) -> None:
    """Draw QPS over recall from all rows of a file: a picture for each kind of processor."""
    results = measure.ROOT / "bench" / "results"
    with open(results / f"{name}.csv", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if int(r["search_threads"]) == threads]
    machines: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        cpu = row["cpu"].replace("(R)", "").removesuffix(" Processor")
        machines.setdefault(f"{cpu}, {row['simd']}", []).append(row)
    for machine, own in machines.items():
        mark = re.sub("[^a-z0-9]+", "-", machine.lower())
        _draw_curves(results / f"{name}-{mark}.png", own, f"{machine}, {threads} thread(s)")


def _draw_curves(path: Path, rows: list[dict[str, str]], where: str) -> None:
    """Draw a field for each kind of query and number of neighbours."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), sharex=True, layout="constrained")
    for axis, (kind, k) in zip(axes.flat, product(("text", "image"), KS), strict=True):
        for (method, memory), curve in sorted(_curves(rows, kind, k).items(), reverse=True):
            axis.plot(
                *zip(*curve, strict=True), MARKS.get(memory, "-"), marker="o", markersize=4,
                color=COLOURS.get(method, "black"), linewidth=2 if method == "mmalign" else 1.2,
                label=f"{method}, {memory}",
            )  # fmt: skip
        axis.set(yscale="log", xlim=(0.8, 1.0), title=f"{kind} queries, {k} neighbours")
        axis.grid(visible=True, which="both", alpha=0.25)
        for target in (0.9, 0.95, 0.99):
            axis.axvline(target, color="grey", linewidth=0.6, linestyle=":")
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("recall on held-out queries")
    figure.supylabel(f"queries a second, many at once; {where}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curves(rows: list[dict[str, str]], kind: str, k: int) -> dict[tuple[str, str], Any]:
    """Points (recall, QPS) of each method and memory, by recall."""
    curves: dict[tuple[str, str], Any] = {}
    for row in rows:
        if (row["asked"], row["k"]) == (kind, str(k)):
            key = (row["method"], row["memory"])
            curves.setdefault(key, []).append((float(row["recall"]), float(row["qps"])))
    return {key: sorted(points) for key, points in curves.items()}


def _grow(given: argparse.Namespace) -> None:
    """Build ours at several sizes: time, memory, QPS, and how they grow with the rows."""
    found = []
    for rows in given.grow:
        data = _data(given.work, rows, None)
        for row in _in_process(data, given.recall[0], given.memory[0], given):
            measure.append("index-growth", {"rows": rows, **row})
            if (row["asked"], row["k"]) == ("text", KS[0]):
                found.append((rows, row["build_s"], row["qps"]))
    sizes, builds, speeds = np.log(np.array(found)).T
    for name, values in (("build time", builds), ("QPS", speeds)):
        print(f"{name} grows with the rows to the power of {np.polyfit(sizes, values, 1)[0]:.2f}")


def _speed(search: Any, queries: Any, true_MK: Any) -> dict[str, Any]:
    """Recall with its interval, QPS of many queries at once, milliseconds of one alone."""
    search(queries[:20])
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        found = search(queries)
        seconds.append(time.perf_counter() - started)
    shares = neighbour_recall(found, true_MK)
    alone = []
    for number in range(ALONE):
        started = time.perf_counter()
        search(queries[number : number + 1])
        alone.append(1000 * (time.perf_counter() - started))
    low, high = interval(shares)
    return {
        "recall": round(float(shares.mean()), 4), "low": round(low, 4), "high": round(high, 4),
        "qps": round(len(queries) / min(seconds), 1),
        "p50_ms": round(float(np.quantile(alone, 0.5)), 3),
        "p99_ms": round(float(np.quantile(alone, 0.99)), 3),
    }  # fmt: skip


def _use(threads: int) -> None:
    torch.set_num_threads(threads)
    set_threads(threads)
