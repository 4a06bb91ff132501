"""Our trainer beside open_clip's own: the same images, the same minutes, models of one size.

    python -m bench train --data 'train-{000..005}.tar' --val val.tar --minutes 20 [--only ours]

Theirs is `python -m open_clip_train.main`, given every caption as a row of a csv, in bfloat16 where
the machine has it and float32 where not, and as many epochs as fit into the minutes (measured on
one epoch first, which does not count), so that its cosine schedule ends with the time. Both are
then measured by the same evaluation. Needs pandas.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import measure
from mmalign.data import read_image, scan
from mmalign.evaluation.evaluate import evaluate
from mmalign.kernels.processor import has_bfloat16
from mmalign.model import openclip
from mmalign.training.train import TrainConfig, train

THEIR_MODEL = {
    "embed_dim": 256,
    "vision_cfg": {
        "timm_model_name": "resnet10t",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 64,
    },
    "text_cfg": {
        "context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2,
    },
}  # fmt: skip
START = (
    "import sys, open_clip; open_clip.add_model_config(sys.argv[1]); "
    "from open_clip_train.main import main; main(sys.argv[2:])"
)


def ours(options: argparse.Namespace) -> None:
    """Train our preset for the minutes, with one caption key, and measure it."""
    config = TrainConfig(preset="tiny", minutes=options.minutes, validations=4)
    started = time.monotonic()
    run = options.out / "ours"
    result = train(options.data, run, config, val=options.val)
    report("mmalign tiny", evaluate(run, options.val), started, result["epoch"], options)


def theirs(options: argparse.Namespace) -> None:
    """Train with open_clip's trainer for as many whole epochs as fit, and measure that."""
    table, model = options.out / "train.csv", options.out / "open-clip-small.json"
    write_csv(options, table)
    model.write_text(json.dumps(THEIR_MODEL))
    epoch_s = run_open_clip(options, table, model, epochs=1, name="calibrate")
    epochs = max(1, int(60 * options.minutes / epoch_s))
    started = time.monotonic()
    run_open_clip(options, table, model, epochs=epochs, name="run")
    openclip.module().add_model_config(model)
    weights = options.out / "logs" / "run" / "checkpoints" / f"epoch_{epochs}.pt"
    encoder = openclip.load("open-clip-small", str(weights))
    # Its epoch is over captions; five of them are one over images.
    report("open_clip_train", evaluate(encoder, options.val), started, epochs * 5, options)


def write_csv(options: argparse.Namespace, table: Path) -> None:
    """Unpack the images and list every caption as a row."""
    folder = options.out / "images"
    folder.mkdir(exist_ok=True)
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        for record in scan(options.data, need_captions=True).records:
            path = folder / (record.id.replace("/", "-") + ".jpg")
            path.write_bytes(read_image(record))
            writer.writerows([str(path), caption] for caption in record.captions)


def run_open_clip(
    options: argparse.Namespace, table: Path, model: Path, *, epochs: int, name: str
) -> float:
    """Run open_clip's trainer and return the seconds it took."""
    precision = "amp_bf16" if has_bfloat16() else "fp32"
    words: list[Any] = [
        "--model", model.stem, "--train-data", table, "--dataset-type", "csv",
        "--csv-separator", ",", "--batch-size", 256, "--lr", 1e-3, "--wd", 0.2, "--warmup", 100,
        "--epochs", epochs, "--precision", precision, "--workers", 2, "--device", "cpu",
        "--save-frequency", epochs, "--logs", options.out / "logs", "--name", name,
    ]  # fmt: skip
    started = time.monotonic()
    command = [sys.executable, "-c", START, model, *words]
    with open(options.out / f"{name}.log", "w", encoding="utf-8") as log:
        subprocess.run([str(w) for w in command], check=True, stdout=log, stderr=log)
    return time.monotonic() - started


def report(
    name: str, recalls: dict[str, Any], started: float, epochs: float, options: argparse.Namespace
) -> None:
    """Write the row."""
    row: dict[str, Any] = {"trainer": name, "minutes_allowed": options.minutes}
    row["minutes"] = round((time.monotonic() - started) / 60, 2)
    row["epochs_of_images"] = round(epochs, 1)
    for kind in ("image", "text"):
        for k in (1, 5, 10):
            key = f"{kind}_retrieval_recall@{k}"
            row[key] = round(recalls[key], 4)
    measure.append("train", row)


def main(words: list[str]) -> None:
    """Run both trainers, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m bench train")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--val", action="append", required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=Path("bench-train"))
    parser.add_argument("--only", choices=("ours", "theirs"))
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only != "theirs":
        ours(options)
    if options.only != "ours":
        theirs(options)
