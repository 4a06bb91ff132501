"""`mmalign evaluate`: retrieval recall in both directions, and zero-shot classification.

Shapes: N images, P captions, D dimensions, C classes.

Names and rules follow CLIP_benchmark: a text->image hit is the caption's own image, an image->text
hit is any of the image's captions.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmalign import kernels
from mmalign.arrays import Floats
from mmalign.data import Record, Skip, Sources, count_found, count_skipped, report_skips, scan
from mmalign.data.columns import normalised
from mmalign.encoding.batches import TextCache, report_truncated
from mmalign.encoding.pipeline import Pipeline
from mmalign.errors import DataError, nearest
from mmalign.evaluation.metrics import accuracy, mean_reciprocal_rank, recall_at
from mmalign.modality import IMAGE, TEXT
from mmalign.model import Encoder, cosines, load_model, to_fastest
from mmalign.progress import bar, say

RECALL_KS = (1, 5, 10)
# Warn if captions fit at least this share of the other images.
MOST_SHARED = 0.5
# Equal images get vectors that are equal up to bfloat16 rounding.
SAME = 1e-3
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of the {}.", "{}")


def evaluate(
    model: str | Path | Encoder,
    sources: Sources,
    *,
    caption_keys: Sequence[str] = ("captions",),
    image_column: str | None = None,
    classes: Sequence[str] = (),
    label_key: str = "label",
) -> dict[str, Any]:
    """Measure a model on pairs.

    Args:
        model: A run folder, `NAME:TAG`, or an encoder.
        sources: Pairs, as `data.scan` takes them.
        caption_keys: Which captions to query with.
        image_column: The table column that holds images, or their paths.
        classes: Class names; if given, zero-shot accuracy is measured too.
        label_key: The metadata field that holds a sample's class name.

    Returns:
        `image_retrieval_recall@k` (text->image) and `text_retrieval_recall@k` (image->text) for
        k of 1, 5, 10, and the mean reciprocal ranks `image_retrieval_mrr@10` and
        `text_retrieval_mrr@10`; with classes also `acc1`, `acc5`, `mean_per_class_recall`; and
        the counts `images`, `captions`, `skipped`.
    """
    encoder = model if isinstance(model, Encoder) else to_fastest(load_model(model))
    catalog = scan(
        sources, caption_keys=caption_keys, image_column=image_column, need_captions=True
    )
    records, images_ND, texts, unreadable = encode_records(encoder, catalog.records)
    skips = [*catalog.skips, *unreadable]
    found = count_found(len(catalog.records), catalog.skips)
    report_skips(skips, found=found, used=len(records))
    texts_PD = np.concatenate(texts)
    owners_P = np.repeat(np.arange(len(records)), [len(t) for t in texts])
    report: dict[str, Any] = retrieval(images_ND, texts_PD, owners_P)
    for warning in (
        too_few(len(records)),
        describe_overlap(records, "images", "recall is meaningless"),
        _same_vectors(images_ND),
    ):
        if warning:
            say(warning)
    if classes:
        report |= _zero_shot(encoder, records, images_ND, classes, label_key)
    counts = {
        "images": len(records),
        "captions": len(texts_PD),
        "skipped": count_skipped(skips, "sample"),
    }
    return report | counts


def retrieval(images_ND: Floats, texts_PD: Floats, owners_P: NDArray[np.int64]) -> dict[str, Any]:
    """Compute recall and MRR in both directions; `owners_P[p]` is the image of caption p."""
    images, texts = torch.from_numpy(images_ND), torch.from_numpy(texts_PD)
    numbers_N = np.arange(len(images_ND))
    report: dict[str, Any] = {}
    for name, queries, candidates, owners, wanted in (
        ("image_retrieval", texts, images, numbers_N, owners_P),
        ("text_retrieval", images, texts, owners_P, numbers_N),
    ):
        depth = min(max(RECALL_KS), len(candidates))
        ranked = kernels.topk(queries, candidates, depth)[1]
        recalls = recall_at(ranked.numpy(), owners, wanted, RECALL_KS)
        report |= {f"{name}_recall@{k}": value for k, value in recalls.items()}
        mrr = mean_reciprocal_rank(ranked.numpy(), owners, wanted)
        report[f"{name}_mrr@{max(RECALL_KS)}"] = mrr
    return report


def too_few(images: int) -> str | None:
    """Describe which recalls are always 1, as there are too few images; None if none is."""
    free = [k for k in RECALL_KS if k >= images]
    if not free:
        return None
    names = ", ".join(f"recall@{k}" for k in free)
    noun, verb = ("images" if images > 1 else "image"), ("are" if len(free) > 1 else "is")
    return f"warning: with {images} {noun}, {names} {verb} always 100 %: use more images"


def describe_overlap(records: Sequence[Record], what: str, consequence: str) -> str | None:
    """Describe that captions also fit other images, and the consequence; None if few do.

    >>> records = [Record(name, name, name, captions=("a cat",)) for name in "ab"]
    >>> describe_overlap(records, "images", "nothing is learned")
    'warning: all 2 images have the same captions and cannot be told apart, so nothing is learned'
    """
    images_with = Counter(c for r in records for c in set(r.captions))
    others = [images_with[c] - 1 for r in records for c in r.captions]
    share = sum(others) / (len(others) * (len(records) - 1)) if len(records) > 1 else 0.0
    if share < MOST_SHARED:
        return None
    if share < 1:
        return (
            f"warning: on average, a caption also fits {share:.0%} of the other {what}, "
            "so few pairs can be told apart"
        )
    return (
        f"warning: all {len(records)} {what} have the same captions and cannot be told apart, "
        f"so {consequence}"
    )


def _same_vectors(images_ND: Floats) -> str | None:
    """Describe that all images are equal, or look so to the model; None if they are not."""
    if len(images_ND) < 2 or np.ptp(images_ND, axis=0).max() > SAME:
        return None
    return f"warning: all {len(images_ND)} images have the same vector, so recall is meaningless"


def encode_records(
    encoder: Encoder, records: Sequence[Record]
) -> tuple[list[Record], Floats, list[Floats], list[Skip]]:
    """Embed images and captions of records.

    Returns the usable records, their image vectors (N, D), the caption vectors of each (C, D), and
    the skipped samples.
    """
    done: list[tuple[Record, Floats, Floats]] = []
    skips: list[Skip] = []
    with bar("encode", len(records)) as progress:
        pipeline = Pipeline(encoder, thumbnails=False)
        for good, bad in pipeline.run(records):
            done += [(e.record, e.vectors[IMAGE.name][0], e.vectors[TEXT.name]) for e in good]
            skips += bad
            progress.update(len(good) + len(bad))
    report_truncated(encoder, pipeline.texts.truncated)
    if not done:
        raise DataError(f"none of {len(records)} images can be decoded: {skips[0].reason}")
    kept, images, texts = zip(*done, strict=True)
    return list(kept), np.stack(images), list(texts), skips


def compare(model: Encoder, other: Encoder, records: Sequence[Record]) -> str:
    """Describe how closely a model in another arithmetic matches the original on some samples."""
    reports, vectors = [], []
    for encoder in (model, other):
        kept, images_ND, texts, _ = encode_records(encoder, records)
        texts_PD = np.concatenate(texts)
        owners_P = np.repeat(np.arange(len(kept)), [len(t) for t in texts])
        reports.append(retrieval(images_ND, texts_PD, owners_P) if len(texts_PD) else {})
        vectors.append((images_ND, texts_PD))
    near = [cosines(a, b) for a, b in zip(*vectors, strict=True)]
    words = f"cosine of images {near[0].mean():.4f} (lowest {near[0].min():.4f})"
    if not reports[0]:
        return words
    name = "image_retrieval_recall@1"
    return (
        f"{words}, of texts {near[1].mean():.4f}; text->image recall@1 on {len(kept)} images: "
        f"{reports[1][name]:.1%} instead of {reports[0][name]:.1%}"
    )


def _zero_shot(
    encoder: Encoder,
    records: Sequence[Record],
    images_ND: Floats,
    classes: Sequence[str],
    label_key: str,
) -> dict[str, float]:
    number = {name: i for i, name in enumerate(classes)}
    fields = {name: name for r in records for name in r.meta}
    field = fields.get(label_key) or {normalised(name): name for name in fields}.get(
        normalised(label_key)
    )
    if field is None:
        raise DataError(f"no sample has a field {label_key!r}: {nearest(label_key, fields)}")
    labels = [str(r.meta.get(field, "")) for r in records]
    known = np.array([label in number for label in labels])
    if not known.any():
        raise DataError(
            f"no sample has one of the {len(classes)} classes in its field {label_key!r} "
            f"(the first has {labels[0]!r})"
        )
    prompts = [t.format(name) for name in classes for t in TEMPLATES]
    vectors = TextCache(encoder)([prompts])[0].reshape(len(classes), len(TEMPLATES), -1)
    classes_CD = vectors.mean(axis=1)
    classes_CD /= np.linalg.norm(classes_CD, axis=1, keepdims=True)
    depth = min(5, len(classes))
    queries = torch.from_numpy(images_ND[known])
    ranked = kernels.topk(queries, torch.from_numpy(classes_CD), depth)[1].numpy()
    return accuracy(ranked, np.array([number[label] for label in labels if label in number]))
