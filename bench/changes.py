"""A folder of small files, embedded, again, moved, touched, edited: what is done each time.

    python -m bench changes [--files 10000] [--model RUN_OR_NAME] [--threads 2]

Each file is a JPEG of 240 x 180 (about 6 kB) with a caption in a .txt beside it. Every step is a
process of its own, `mmalign embed`, from its start to its end. Without --model it is an untrained
`nano`: what is measured is all but the encoder.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import measure
from mmalign.model import new_model, save_model

SIZE = (240, 180)
EDITED = 100


def write_files(folder: Path, count: int) -> None:
    """Fill a folder with pictures of smooth noise and their captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(picture(rng))
        (folder / f"{number:06d}.txt").write_text(f"picture {number}", encoding="utf-8")


def picture(rng: np.random.Generator) -> bytes:
    """Draw a picture."""
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize(SIZE, Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def touch(folder: Path) -> None:
    """Give every file another time."""
    later = time.time() + 60
    for file in folder.iterdir():
        os.utime(file, (later, later))


def edit(folder: Path) -> None:
    """Replace some pictures."""
    rng = np.random.default_rng(1)
    for file in sorted(folder.glob("*.jpg"))[:EDITED]:
        file.write_bytes(picture(rng))


def embed(model: str, folder: Path, store: Path, threads: int) -> dict[str, Any]:
    """Run `mmalign embed`; return its report and the seconds it took."""
    command = [sys.executable, "-m", "mmalign", "embed", "--model", model, "--data", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--out", str(store), "--json"],
        check=True, env=environment, stdout=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    seconds = time.perf_counter() - started
    report: dict[str, Any] = json.loads(done.stdout)
    return report | {"seconds": round(seconds, 2)}


def main(words: list[str]) -> None:
    """Make the folder, change it, and embed it after each change."""
    parser = argparse.ArgumentParser(prog="python -m bench changes")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--model", help="A run or a name; an untrained nano where none is given.")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        model = options.model
        if model is None:
            model = str(root / "run")
            Path(model).mkdir()
            save_model(new_model("nano", ["a picture"]), Path(model))
        photos, moved = root / "photos", root / "moved"
        write_files(photos, options.files)
        steps: dict[str, tuple[Path, Callable[[], object]]] = {
            "first": (photos, lambda: None),
            "again": (photos, lambda: None),
            "moved": (moved, lambda: photos.rename(moved)),
            "moved, again": (moved, lambda: None),
            "touched": (moved, lambda: touch(moved)),
            "touched, again": (moved, lambda: None),
            f"{min(EDITED, options.files)} replaced": (moved, lambda: edit(moved)),
        }
        for name, (folder, change) in steps.items():
            change()
            report = embed(model, folder, root / "photos.store", options.threads)
            keys = ("seconds", "read", "encoded", "added", "changed", "present", "moved", "rows")
            row = {"files": options.files, "step": name, **{key: report[key] for key in keys}}
            measure.append("changes", row)
