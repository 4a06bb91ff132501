"""Images and captions into vectors: our pipeline beside clip-retrieval and a loop over open_clip.

    python -m bench embed --data clothing-photos.tar --texts flickr8k-train-000.tar \
        --weights ViT-B-32.pt [--clip-retrieval PYTHON] [--theirs 64:2 ...] [--rounds 2]

Everybody loads the same weights and reads the same tars, four of them, as clip-retrieval gives a
whole tar to a worker. Every run is a process of its own; all take turns; medians are reported.

- `images_per_s`, `texts_per_s`: without imports and loading of weights. Ours counts the scan of the
  sources. Embedding takes captions together with images, so its texts are timed as the difference
  between a run with captions and one without. "Encoder alone" gets decoded images (texts as they
  are) and is the most that a pipeline around it can reach: `share_of_encoder`.
- `cosine_*`: with the vectors of open_clip in float32, over all images or texts. `centred` means
  that the mean of the reference was taken from both first. Untrained weights map all images to
  nearly one vector; only what is left then tells vectors apart.
- `peak_mib`: resident memory of all processes of the run with images, shared parts once, looked at
  four times a second; `process_s` is how long that run took from start to end, with everything.
- `spread`: the fastest round over the slowest, images.

PYTHON is that of clip-retrieval's own environment, see bench/clip_retrieval.py; `--theirs
BATCH:WORKERS` names its settings, each a row; 256:4 are its own defaults. `--long N` embeds so many
images once, the same over and over under other names: whether memory grows. Weights can be made
without a network:

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32", pretrained=None).state_dict(), "ViT-B-32.pt")
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bench import clip_retrieval, measure, processes
from mmalign.arrays import Floats
from mmalign.data import Record, in_batches, in_threads, read_image, scan
from mmalign.embedding.embed import embed
from mmalign.encoding.modalities import encoder_of
from mmalign.encoding.pipeline import CPU_BATCH
from mmalign.memory import keep_free_memory
from mmalign.modality import IMAGE, TEXT
from mmalign.model import Precision, in_precision, load_model, openclip
from mmalign.store import open_store

BATCH = 64
TARS = 4
REFERENCE = "open_clip in a loop"
THEIRS = "clip-retrieval "
LONG = "mmalign embed"

Made = tuple[list[str], Floats, float, str]
"""Keys (names of images, or texts), their vectors, the seconds it took, and the precision."""


@dataclass(frozen=True)
class Task:
    """What one process embeds: a kind of the tars in a folder."""

    model: str
    weights: str
    kind: str
    """images, long (images, repeated) or texts."""
    tars: Path
    out: Path

    @property
    def encoder(self) -> str:
        """The name by which mmalign knows the model."""
        return f"{self.model}:{self.weights}"

    def sources(self, kind: str) -> list[str]:
        """The tars of a kind."""
        return [str(self.tars / f"{kind}-{i}.tar") for i in range(TARS)]

    @property
    def pattern(self) -> str:
        """The same with braces, of the kind to embed."""
        return str(self.tars / f"{self.kind}-{{0..{TARS - 1}}}.tar")

    def images(self) -> list[Record]:
        """The images to embed."""
        return list(scan(self.sources(self.kind), caption_keys=()).records)

    def texts(self) -> list[str]:
        """The captions to embed."""
        records = scan(self.sources("pairs")).records
        return [caption for record in records for caption in record.captions]


# --- what is embedded -----------------------------------------------------------------------------


def write_sources(options: argparse.Namespace, tars: Path) -> None:
    """Lay out the tars of each kind: `images`, `long`, `texts` and `pairs`.

    `texts` holds a caption a sample, for clip-retrieval; `pairs` the same captions with their
    images, for us.
    """
    photos = [read_image(r) for r in scan(options.data, caption_keys=()).records[: options.images]]
    write_tars(tars, "images", [{"jpg": photo} for photo in photos])
    write_tars(tars, "long", [{"jpg": photo} for photo in islice(cycle(photos), options.long)])
    captions: dict[str, None] = {}
    pairs: list[dict[str, bytes]] = []
    for record in scan(options.texts, need_captions=True).records:
        fresh = [c for c in record.captions if c not in captions]
        fresh = fresh[: options.captions - len(captions)]
        if fresh:
            pairs.append(
                {"jpg": read_image(record), "json": json.dumps({"captions": fresh}).encode()}
            )
            captions |= dict.fromkeys(fresh)
    write_tars(tars, "pairs", pairs)
    write_tars(tars, "texts", [{"txt": caption.encode()} for caption in captions])


def write_tars(folder: Path, kind: str, samples: list[dict[str, bytes]]) -> None:
    """Deal samples out to the tars of a kind."""
    for first in range(TARS):
        with tarfile.open(folder / f"{kind}-{first}.tar", "w") as tar:
            for number in range(first, len(samples), TARS):
                for ending, content in samples[number].items():
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def key(name: str) -> str:
    """What remains of an id or a path: the number of the image."""
    return name.rpartition("/")[2]


# --- ways of embedding; each runs in a process of its own -----------------------------------------


def ours(task: Task, **settings: Any) -> Made:
    """`mmalign embed`."""
    if task.kind == "texts":
        # The first run in a process is slower; taken as the one without captions, it would hide
        # a part of what captions cost.
        embed_seconds(task, "pairs", "first", caption_keys=(), **settings)
        bare_s, _ = embed_seconds(task, "pairs", "bare", caption_keys=(), **settings)
        whole_s, precision = embed_seconds(task, "pairs", "made", **settings)
        seconds = whole_s - bare_s
        store = open_store(task.out / "made.store")
        keys = [caption for captions in store.column("captions") for caption in captions]
        vectors = store.vectors("text")
    else:
        seconds, precision = embed_seconds(task, task.kind, "made", caption_keys=(), **settings)
        store = open_store(task.out / "made.store")
        keys, vectors = [key(i) for i in store.column("id")], store.vectors("image")
    return keys, np.concatenate(vectors).astype(np.float32), seconds, precision


def embed_seconds(task: Task, kind: str, store: str, **settings: Any) -> tuple[float, str]:
    """How long a run takes with its scan and without loading of weights; and its precision."""
    started = time.perf_counter()
    scan(task.sources(kind))
    scan_s = time.perf_counter() - started
    report = embed(task.encoder, task.sources(kind), task.out / f"{store}.store", **settings)
    return scan_s + report.added / report.images_per_s, report.precision


def encoder_alone(task: Task, precision: Precision = "auto") -> Made:
    """Our encoder on batches that are ready, as many at once as the pipeline has encoders."""
    encoder, got = in_precision(load_model(task.encoder), precision)
    batches: list[Sequence[Any]]
    if task.kind == "texts":
        keys, way = task.texts(), encoder_of(encoder, TEXT.name)
        batches, encoders, threads = [keys], 1, torch.get_num_threads()
    else:
        records, way = task.images(), encoder_of(encoder, IMAGE.name)
        keys = [key(r.id) for r in records]
        parts = [way.decode(read_image(r)).parts[0] for r in records]
        batches = list(in_batches(parts, CPU_BATCH))
        encoders, threads = torch.get_num_threads(), 1
        keep_free_memory()
    way.encode(batches[0][:CPU_BATCH])
    started = time.perf_counter()
    alone = partial(torch.set_num_threads, threads)
    vectors = list(in_threads(way.encode, batches, encoders, ahead=len(batches), prepare=alone))
    return keys, np.concatenate(vectors), time.perf_counter() - started, got


class Inputs(Dataset[torch.Tensor]):
    """Images or texts as open_clip's own transform or tokenizer makes them; final."""

    def __init__(self, items: list[Any], make: Callable[[Any], torch.Tensor]) -> None:
        self.items, self.make = items, make

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.make(self.items[index])


def open_clip_loop(task: Task, workers: int) -> Made:
    """What a person writes who knows open_clip: float32, batches of 64."""
    open_clip = openclip.module()
    clip, _, transform = open_clip.create_model_and_transforms(task.model, task.weights)
    clip.eval()
    if task.kind == "texts":
        tokenizer, encode = open_clip.get_tokenizer(task.model), clip.encode_text
        keys = task.texts()
        inputs = Inputs(keys, lambda text: tokenizer([text])[0])
    else:
        records, encode = task.images(), clip.encode_image
        keys = [key(r.id) for r in records]
        inputs = Inputs(records, lambda r: transform(Image.open(io.BytesIO(read_image(r)))))
    started = time.perf_counter()
    with torch.inference_mode():
        loader = DataLoader(inputs, BATCH, num_workers=workers)
        vectors = [F.normalize(encode(batch), dim=-1) for batch in loader]
    return keys, torch.cat(vectors).numpy(), time.perf_counter() - started, "float32"


WAYS: dict[str, Callable[[Task], Made]] = {
    REFERENCE: partial(open_clip_loop, workers=0),
    "open_clip, DataLoader with 2 workers": partial(open_clip_loop, workers=2),
    "encoder alone": encoder_alone,
    "mmalign embed": ours,
    "mmalign embed, no thumbnails": partial(ours, thumbnails=False),
    "encoder alone, float32": partial(encoder_alone, precision="float32"),
    "mmalign embed, float32": partial(ours, precision="float32"),
    "encoder alone, int8": partial(encoder_alone, precision="int8"),
    "mmalign embed, int8": partial(ours, precision="int8"),
    "mmalign embed, int8, no thumbnails": partial(ours, precision="int8", thumbnails=False),
}
ENCODER = {
    name: name.replace("mmalign embed", "encoder alone").replace(", no thumbnails", "")
    for name in WAYS
    if name.startswith("mmalign")
}


# --- runs and what they cost ----------------------------------------------------------------------


def run(options: argparse.Namespace, name: str, kind: str, tars: Path) -> dict[str, Any]:
    """Embed one kind in one way in a process; what it made and what it cost."""
    with tempfile.TemporaryDirectory() as folder:
        task = Task(options.model, options.weights, kind, tars, Path(folder))
        if name in WAYS:
            words = json.dumps(asdict(task), default=str)
            command = [sys.executable, "-m", "bench", "embed", "--way", name, "--task", words]
            cost = processes.run([*command, "--threads", str(options.threads)], options.threads)
            made: dict[str, Any] = json.loads((task.out / "made.json").read_text(encoding="utf-8"))
            made["vectors"] = np.load(task.out / "vectors.npy")
        else:
            model, settings = f"{task.model}/{task.weights}", name.removeprefix(THEIRS)
            command = clip_retrieval.command(
                options.clip_retrieval, task.pattern, task.out, model, kind == "texts", settings
            )
            cost = processes.run(command, options.threads)
            keys, vectors, seconds = clip_retrieval.made(task.out, kind == "texts")
            keys = keys if kind == "texts" else [key(k) for k in keys]
            made = {"keys": keys, "vectors": vectors, "seconds": seconds, "precision": "float32"}
    count = f"{len(made['keys'])} {kind} in {made['seconds']:.2f} s"
    print(f"{name}: {count}", file=sys.stderr, flush=True)
    return made | cost


def run_here(options: argparse.Namespace) -> None:
    """Be the process that embeds; leave what was made in its folder."""
    torch.set_num_threads(options.threads)
    values = json.loads(options.task)
    task = Task(**values | {"tars": Path(values["tars"]), "out": Path(values["out"])})
    keys, vectors, seconds, precision = WAYS[options.way](task)
    made = {"keys": keys, "seconds": seconds, "precision": precision}
    np.save(task.out / "vectors.npy", vectors)
    (task.out / "made.json").write_text(json.dumps(made), encoding="utf-8")


# --- rows -----------------------------------------------------------------------------------------


def cosines(found: dict[str, Any], truth: dict[str, Any]) -> tuple[Floats, Floats]:
    """Cosine of each vector with the reference of the same key, as they are and centred."""
    rows = {name: row for row, name in enumerate(found["keys"])}
    if set(rows) != set(truth["keys"]):
        sys.exit(f"{len(rows)} were embedded, not the {len(truth['keys'])} of the reference")
    one, other = found["vectors"][[rows[k] for k in truth["keys"]]], truth["vectors"]
    mean = other.mean(0)
    return cosine(one, other), cosine(one - mean, other - mean)


def cosine(one: Floats, other: Floats) -> Floats:
    """Cosines of rows."""
    product: Floats = (one * other).sum(1)
    norms: Floats = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.divide(product, norms)


def rates(runs: list[dict[str, Any]]) -> list[float]:
    """Items per second of each run."""
    return [len(r["keys"]) / r["seconds"] for r in runs]


def report(name: str, images: Any, texts: Any, truth: Any, encoder: Any, note: str) -> None:
    """Write the row of a way.

    Args:
        name: Of the way.
        images: Its runs with images.
        texts: Its runs with texts; none where only images were embedded.
        truth: Runs of the reference by kind.
        encoder: Runs of the encoder alone, with images; none where it is no part of the way.
        note: The versions behind it.
    """
    speeds = rates(images)
    row: dict[str, Any] = {"what": name, "precision": images[0]["precision"]}
    row["images"] = len(images[0]["keys"])
    row["images_per_s"] = round(median(speeds), 2)
    row["share_of_encoder"] = round(median(speeds) / median(rates(encoder)), 3) if encoder else ""
    row["texts"] = len(texts[0]["keys"]) if texts else 0
    row["texts_per_s"] = round(median(rates(texts)), 2) if texts else ""
    for kind, runs in (("image", images), ("text", texts)):
        pair = cosines(runs[0], truth[f"{kind}s"][0]) if texts else (None, None)
        for form, values in zip(("cosine", "centred"), pair, strict=True):
            row[f"{kind}_{form}_mean"] = "" if values is None else f"{values.mean():.6f}"
            row[f"{kind}_{form}_min"] = "" if values is None else f"{values.min():.6f}"
    for cost in ("seconds", "process_s", "peak_mib"):
        row[cost] = round(median(r[cost] for r in images), 1)
    row |= {"rounds": len(images), "spread": round(max(speeds) / min(speeds), 3), "versions": note}
    measure.append("embed", row)


def parse(words: list[str]) -> argparse.Namespace:
    """Read the words of the call."""
    parser = argparse.ArgumentParser(prog="python -m bench embed")
    parser.add_argument("--data", action="append", help="images")
    parser.add_argument("--texts", action="append", help="images with captions, for the captions")
    parser.add_argument("--model", default="ViT-B-32", help="as open_clip calls it")
    parser.add_argument("--weights", help="a file")
    parser.add_argument("--clip-retrieval", metavar="PYTHON")
    parser.add_argument("--theirs", nargs="+", default=["64:0", "64:2", "256:4"])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--captions", type=int, default=1000)
    parser.add_argument("--long", type=int, default=5000, help="0: leave that out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="WAY", help="these, and the reference")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    for need in ("data", "texts", "weights"):
        if not options.way and not getattr(options, need):
            parser.error(f"--{need} is needed")
    if options.weights:
        options.weights = str(Path(options.weights).resolve())
    return options


def main(words: list[str]) -> None:
    """Let all ways take turns, then write their rows."""
    options = parse(words)
    torch.set_num_threads(options.threads)
    if options.way:
        return run_here(options)
    names, note = list(WAYS), ""
    if options.clip_retrieval:
        names += [f"{THEIRS}{settings}" for settings in options.theirs]
        note = clip_retrieval.versions(options.clip_retrieval)
    if options.only:
        names = [n for n in names if n == REFERENCE or n in options.only]
    runs: dict[str, dict[str, Any]] = {n: {"images": [], "texts": []} for n in names}
    with tempfile.TemporaryDirectory() as folder:
        write_sources(options, Path(folder))
        for _ in range(options.rounds):
            for name, kind in product(names, ("images", "texts")):
                runs[name][kind].append(run(options, name, kind, Path(folder)))
        if options.long and LONG in names:
            runs[f"{LONG}, long"] = {
                "images": [run(options, LONG, "long", Path(folder))],
                "texts": [],
            }
    for name, found in runs.items():
        encoder = runs.get(ENCODER.get(name, ""), {}).get("images", [])
        versions = note if name.startswith(THEIRS) else ""
        report(name, **found, truth=runs[REFERENCE], encoder=encoder, note=versions)
