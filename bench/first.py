"""The first answer of `mmalign search` in a new process, with `import torch` alone beside it.

    python -m bench first [--models ViT-B-32 nano tiny] [--against CHECKOUT] [--rounds 9]

Each model has random weights and a store of drawn scenes, made anew in a temporary folder. Every
answer is a process of its own, and all take turns, so that a slow minute strikes all alike. A row
for each model: `p20_ms` to `p80_ms` are the time until the process ended, `cpu_ms` the median of
processor time, `torch_ms` the median of `import torch`.

CHECKOUT is another version of mmalign, which answers from the same stores; `before_ms` is its
median and `ratio` the median of this version over its own: below 1 is faster. `spread` is the 20 %
and 80 % of the ratios of neighbours.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from bench import measure
from mmalign.data.scenes import sample, write_scenes
from mmalign.embedding.embed import embed
from mmalign.model import PRESETS, new_model, openclip, save_model

SCENES, SEED, QUERY = 100, 5, "two small red striped stars"
THIS, BEFORE, TORCH = "this", "before", "import torch"

Times = tuple[float, float]
"""Milliseconds until a process ended, and of its processor time."""


def made(name: str, folder: Path) -> str:
    """Write a model with random weights; return the name to load it by."""
    torch.manual_seed(SEED)
    if name in PRESETS:
        captions = [str(sample(SEED, number)["txt"]) for number in range(SCENES)]
        run = folder / name
        run.mkdir()
        save_model(new_model(name, captions), run)
        return str(run)
    weights = openclip.load(name, None).towers.clip.state_dict()  # type: ignore[union-attr]
    file = folder / f"{name}.safetensors"
    save_file({key: weight.contiguous().clone() for key, weight in weights.items()}, file)
    return f"{name}:{file}"


def process(code: Sequence[str], checkout: Path, threads: int) -> Times:
    """Run Python to its end; its last words end the program if it fails."""
    count = str(threads)
    environment = {**os.environ, "OMP_NUM_THREADS": count, "PYTHONPATH": str(checkout)}
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        running = subprocess.Popen(
            [sys.executable, *code], env=environment, cwd=checkout, stdout=log, stderr=log
        )
        _, status, used = os.wait4(running.pid, 0)
        took = time.perf_counter() - started
        running.returncode = os.waitstatus_to_exitcode(status)
        if running.returncode:
            log.seek(0)
            sys.exit(f"{log.read().decode()[-3000:]}\nfailed: {' '.join(code)}")
    return 1e3 * took, 1e3 * (used.ru_utime + used.ru_stime)


def row(name: str, times: dict[str, list[Times]]) -> dict[str, Any]:
    """Summarize the rounds of a model."""
    wall = {who: [ms for ms, _ in taken] for who, taken in times.items()}
    told: dict[str, Any] = {
        "model": name,
        **measure.percentiles(wall[THIS]),
        "cpu_ms": round(median(ms for _, ms in times[THIS])),
        "torch_ms": round(median(wall[TORCH])),
        "rounds": len(wall[THIS]),
    }
    if BEFORE in times:
        ratios = sorted(a / b for a, b in zip(wall[THIS], wall[BEFORE], strict=True))
        low, high = (ratios[min(len(ratios) - 1, p * len(ratios) // 100)] for p in (20, 80))
        told["before_ms"] = round(median(wall[BEFORE]))
        told["before_cpu_ms"] = round(median(ms for _, ms in times[BEFORE]))
        told["ratio"] = round(median(wall[THIS]) / median(wall[BEFORE]), 3)
        told["spread"] = f"{low:.3f}-{high:.3f}"
    return told


def main(arguments: Sequence[str]) -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(prog="bench first")
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "nano", "tiny"])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    checkouts = {THIS: measure.ROOT}
    if options.against:
        checkouts[BEFORE] = options.against.resolve()
    with tempfile.TemporaryDirectory() as made_here:
        folder = Path(made_here)
        os.environ["MMALIGN_HOME"] = str(folder / "home")
        write_scenes(folder / "scenes.tar", SCENES, SEED, tick=lambda: None)
        stores = {name: folder / f"{name}.store" for name in options.models}
        for name, store in stores.items():
            embed(made(name, folder), [folder / "scenes.tar"], store, precision="float32")
        times: dict[str, dict[str, list[Times]]] = {name: {} for name in stores}
        for turn in range(options.rounds + 1):
            for name, store in stores.items():
                tasks = {
                    who: (["-m", "mmalign", "search", str(store), QUERY], checkout)
                    for who, checkout in checkouts.items()
                } | {TORCH: (["-c", "import torch"], measure.ROOT)}
                order = list(tasks) if turn % 2 else list(reversed(tasks))
                for who in order:
                    taken = process(*tasks[who], threads=torch.get_num_threads())
                    if turn:  # the first round warms up
                        times[name].setdefault(who, []).append(taken)
    for name in stores:
        measure.append("first", row(name, times[name]))
