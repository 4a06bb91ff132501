"""What every row of a benchmark carries: the machine, the versions, the commit, the date."""

import csv
import ctypes
import datetime
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
GENERATION = {"family": "cpu family", "model": "model"}
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


def machine() -> dict[str, str]:
    """Describe where and with what a row was measured."""
    said = _processor()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "cpu": said.get("model name") or platform.processor() or platform.machine(),
        "kind": kind(said),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": _version("open_clip_torch"),
        "faiss": _version("faiss-cpu"),
        "triton": _version("triton"),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def kind(said: Mapping[str, str]) -> str:
    """Name a kind of processor by what tells it apart: virtual machines hide the model's name."""
    known = said.get("flags", "").split()
    told = [f"{word} {said[key]}" for word, key in GENERATION.items() if key in said]
    return " ".join([*told, *(f.replace("amx_tile", "amx") for f in FEATURES if f in known)])


def _processor() -> dict[str, str]:
    """What the system says of the first processor."""
    said: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        said.setdefault(key.strip(), value.strip())
    return said


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def append(name: str, row: dict[str, Any]) -> None:
    """Add a row to results/<name>.csv and show it; columns that are new are empty in older rows."""
    path = ROOT / "bench" / "results" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    whole = {**row, **machine()}
    older: list[dict[str, Any]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            older = list(csv.DictReader(file))
    gone = [column for column in (older[0] if older else ()) if column not in whole]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*whole, *gone], restval="")
        writer.writeheader()
        writer.writerows([*older, whole])
    print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)


def in_turn(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Time tasks one after the other, over and over, so that a slow minute strikes all alike.

    Returns:
        For each, `p20_ms`, `p50_ms` and `p80_ms`; the first round warms up and does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            gc.collect()
            synchronize()
            started = time.perf_counter()
            task()
            synchronize()
            if turn:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: percentiles(values) for name, values in times.items()}


def percentiles(values: list[float]) -> dict[str, float]:
    """Return p20, p50 and p80 of some milliseconds."""
    ordered = sorted(values)
    return {
        f"p{p}_ms": round(ordered[min(len(ordered) - 1, p * len(ordered) // 100)], 3)
        for p in (20, 50, 80)
    }


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(task: Callable[[], object]) -> int:
    """Return the most memory a task holds at a time, beyond what was held before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    # What was freed goes back to the system first, so that it is counted when it is taken again.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # Linux: writing 5 sets the high-water mark of the resident set back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    task()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(name + ":")).split()[1])


def product_limit(dtype: torch.dtype, device: str) -> float:
    """Measure what the machine reaches in plain matrix products, in FLOP/s."""
    side = 8192 if device == "cuda" else 2048
    one = torch.randn(side, side, device=device).to(dtype)
    timing = in_turn({"product": lambda: one @ one}, 10 if device == "cuda" else 5)
    return float(2 * side**3 / (timing["product"]["p20_ms"] / 1000))


def read_limit(device: str) -> float:
    """Measure how fast the machine reads memory, in bytes/s."""
    numbers = torch.ones(1 << (31 if device == "cuda" else 28), device=device)
    timing = in_turn({"sum": numbers.sum}, 10 if device == "cuda" else 5)
    return float(numbers.nbytes / (timing["sum"]["p20_ms"] / 1000))
