"""clip-retrieval as a baseline: how its inference is started, and what it leaves.

Version 2.45.0 wants old versions of much (numpy below 2, pyarrow below 16, open_clip below 3, and a
setuptools that still has pkg_resources), so it lives in an environment of its own:

    python3 -m venv clip-retrieval && clip-retrieval/bin/pip install -r bench/clip-retrieval.txt

It is called through `START` and not by its command for one reason: its log process imports torch
while the first batches run. `START` waits until that is done, so that it is not counted.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# The log process is up once it has taken a first entry, of nothing, from the queue.
START = """
import json, sys, time
from clip_retrieval.clip_inference import logger, main
begin = logger.LoggerWriter.start
def start(self):
    begin(self)
    self.queue.put({"start_time": 0, "sample_count": 0})
    time.sleep(1)
    while not self.queue.empty():
        time.sleep(0.1)
logger.LoggerWriter.start = start
main.main(**json.loads(sys.argv[1]))
"""
VERSIONS = """
from importlib.metadata import version
names = "clip_retrieval", "torch", "open_clip_torch", "numpy", "pillow", "webdataset"
print(", ".join(f"{name} {version(name)}" for name in names))
"""


def command(python: str, tars: str, out: Path, model: str, texts: bool, settings: str) -> list[str]:
    """The words that run its inference.

    Args:
        python: The interpreter of its environment.
        tars: A pattern with braces.
        out: Where it writes.
        model: NAME/FILE, as it names open_clip models.
        texts: Embed .txt, not .jpg.
        settings: BATCH:WORKERS.
    """
    batch, workers = (int(n) for n in settings.split(":"))
    words = {
        "input_dataset": tars,
        "output_folder": str(out),
        "input_format": "webdataset",
        "enable_text": texts,
        "enable_image": not texts,
        "clip_model": f"open_clip:{model}",
        "batch_size": batch,
        "num_prepro_workers": workers,
    }
    return [python, "-c", START, json.dumps(words)]


def made(out: Path, texts: bool) -> tuple[list[str], NDArray[np.float32], float]:
    """Captions or names of images, their vectors, and the sum of its batches' durations."""
    from pyarrow import parquet

    kind, column = ("text", "caption") if texts else ("img", "image_path")
    vectors = np.load(out / f"{kind}_emb" / f"{kind}_emb_0.npy").astype(np.float32)
    names = parquet.read_table(out / "metadata" / "metadata_0.parquet")[column].to_pylist()
    stats = json.loads((out / "stats" / "0.json").read_text(encoding="utf-8"))
    return names, vectors, float(stats["total_duration"])


def versions(python: str) -> str:
    """What its environment holds."""
    words = [python, "-c", VERSIONS]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
