"""`mmalign evaluate`: retrieval recall in both directions, and zero-shot classification.

N images, P captions, D dimensions, C classes. Names and rules are those of CLIP_benchmark: a
text->image hit is the caption's own image, an image->text hit is any of the image's captions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmalign import kernels, modality
from mmalign.data import Record, Skip, decode_stream, report_skips, scan
from mmalign.errors import DataError
from mmalign.metrics import accuracy, recall_at
from mmalign.model import Encoder, load_model
from mmalign.progress import bar

KS = (1, 5, 10)
BATCH = 128
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of the {}.", "{}")
Vectors = NDArray[np.float32]


def evaluate(
    model: str | Path | Encoder,
    sources: Sequence[str],
    *,
    caption_keys: Sequence[str] = ("captions",),
    classes: Sequence[str] = (),
    label_key: str = "label",
) -> dict[str, Any]:
    """Measure a model on pairs.

    Args:
        model: A run folder, `NAME:TAG`, or an encoder.
        sources: Pairs, as `data.scan` takes them.
        caption_keys: Which captions to query with.
        classes: Class names; given, zero-shot accuracy is measured too.
        label_key: Where a sample's metadata holds its class name.

    Returns:
        `image_retrieval_recall@k` (text->image) and `text_retrieval_recall@k` (image->text) for
        k of 1, 5, 10; with classes also `acc1`, `acc5`, `mean_per_class_recall`; and the counts
        `images`, `captions`, `skipped`.
    """
    encoder = model if isinstance(model, Encoder) else load_model(model)
    catalog = scan(sources, caption_keys=caption_keys, need_captions=True)
    records, images_ND, lost = encode_records(encoder, catalog.records)
    skips = [*catalog.skips, *lost]
    report_skips(skips, len(catalog.records) + len([s for s in catalog.skips if not s.kept]))
    texts_PD = encode_texts(encoder, [c for r in records for c in r.captions])
    owners_P = np.repeat(np.arange(len(records)), [len(r.captions) for r in records])
    report: dict[str, Any] = retrieval(images_ND, texts_PD, owners_P)
    if classes:
        report |= _zero_shot(encoder, records, images_ND, classes, label_key)
    counts = {"images": len(records), "captions": len(texts_PD), "skipped": len(skips)}
    return report | counts


def retrieval(images_ND: Vectors, texts_PD: Vectors, owners_P: NDArray[np.int64]) -> dict[str, Any]:
    """Recall in both directions; `owners_P[p]` is the image that caption p belongs to."""
    images, texts = torch.from_numpy(images_ND), torch.from_numpy(texts_PD)
    numbers_N = np.arange(len(images_ND))
    report: dict[str, Any] = {}
    for name, queries, candidates, owners, wanted in (
        ("image_retrieval", texts, images, numbers_N, owners_P),
        ("text_retrieval", images, texts, owners_P, numbers_N),
    ):
        depth = min(max(KS), len(candidates))
        ranked = kernels.topk(queries, candidates, depth)[1]
        recalls = recall_at(ranked.numpy(), owners, wanted, KS)
        report |= {f"{name}_recall@{k}": value for k, value in recalls.items()}
    return report


def encode_records(
    encoder: Encoder, records: Sequence[Record]
) -> tuple[list[Record], Vectors, list[Skip]]:
    """Embed the images of records; return those that could be, their vectors, and the rest."""
    image = modality.of(encoder)["image"]
    kept: list[Record] = []
    skips: list[Skip] = []
    vectors: list[Vectors] = []
    waiting: list[Any] = []
    with bar("images", len(records)) as progress:
        for record, item in decode_stream(records, image.decode, modality.decode_workers()):
            progress.update()
            if isinstance(item, Skip):
                skips.append(item)
                continue
            kept.append(record)
            waiting.append(item)
            if len(waiting) == BATCH:
                vectors.append(image.encode(image.batch(waiting)))
                waiting = []
        if waiting:
            vectors.append(image.encode(image.batch(waiting)))
    if not kept:
        raise DataError(f"none of {len(records)} images can be decoded: {skips[0].reason}")
    return kept, np.concatenate(vectors), skips


def encode_texts(encoder: Encoder, texts: Sequence[str]) -> Vectors:
    """Embed texts; equal ones once, and those of like length together, as padding costs time."""
    distinct = sorted(set(texts), key=len)
    parts = [distinct[i : i + BATCH] for i in range(0, len(distinct), BATCH)]
    with bar("texts", len(distinct), "texts") as progress:
        vectors: dict[str, Vectors] = {}
        for part in parts:
            vectors |= dict(zip(part, encoder.encode_texts(part), strict=True))
            progress.update(len(part))
    return np.stack([vectors[t] for t in texts])


def _zero_shot(
    encoder: Encoder,
    records: Sequence[Record],
    images_ND: Vectors,
    classes: Sequence[str],
    label_key: str,
) -> dict[str, float]:
    number = {name: i for i, name in enumerate(classes)}
    labels = [str(r.meta.get(label_key, "")) for r in records]
    known = np.array([label in number for label in labels])
    if not known.any():
        raise DataError(
            f"no sample has one of the {len(classes)} classes under {label_key!r} "
            f"(the first has {labels[0]!r})"
        )
    prompts = [t.format(name) for name in classes for t in TEMPLATES]
    vectors = encode_texts(encoder, prompts).reshape(len(classes), len(TEMPLATES), -1)
    classes_CD = vectors.mean(axis=1)
    classes_CD /= np.linalg.norm(classes_CD, axis=1, keepdims=True)
    depth = min(5, len(classes))
    queries = torch.from_numpy(images_ND[known])
    ranked = kernels.topk(queries, torch.from_numpy(classes_CD), depth)[1].numpy()
    return accuracy(ranked, np.array([number[label] for label in labels if label in number]))
