"""`mmalign embed`: images and captions of any source into a store of unit vectors.

    scan -> what the store lacks -> read and decode in threads -> encode -> shards -> manifest

Run again, it adds what is new; killed, it goes on where the last committed shard ended.
"""

import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmalign import files, modality
from mmalign.data import (
    Record,
    Skip,
    decode_stream,
    fit_image,
    open_image,
    read_ahead,
    report_skips,
    scan,
)
from mmalign.model import Encoder, load_model
from mmalign.progress import bar, say
from mmalign.store import ModelCard, Row, Store, Writer, open_store

BATCH = 64
COMMIT_SECONDS = 60.0
THUMBNAIL_SIDE = 160


@dataclass(frozen=True)
class EmbedReport:
    """What a run of `embed` did."""

    added: int
    present: int
    failed: int
    rows: int
    images_per_s: float


@dataclass(frozen=True)
class _Item:
    pixels: NDArray[np.uint8]
    thumbnail: bytes


def embed(
    model: str | Path,
    sources: Sequence[str],
    out: str | Path,
    *,
    caption_keys: Sequence[str] = ("captions",),
    thumbnails: bool = True,
) -> EmbedReport:
    """Embed what the store does not hold yet.

    Args:
        model: A run folder or `NAME:TAG`.
        sources: Folders, tars, tables, URLs, as `data.scan` takes them.
        out: The store; made if it does not exist.
        caption_keys: Where the captions are.
        thumbnails: Keep a small WebP of each image, so that results can be shown.

    Raises:
        DataError: Nothing usable in the sources.
        IdentityError: The store belongs to another model.
    """
    store_path = Path(out)
    encoder = load_model(model)
    catalog = scan(sources, caption_keys=caption_keys)
    writer = Writer(store_path, ModelCard(encoder.identity, encoder.source, encoder.dim))
    todo = _missing(catalog.records, open_store(store_path))
    present = len(catalog.records) - len(todo)
    failures = list(catalog.skips)

    started, added, committed_at = time.monotonic(), 0, time.monotonic()
    with writer, bar("embed", len(todo)) as progress:
        for good, lost in _encoded(encoder, todo, thumbnails):
            failures += lost
            for row in good:
                writer.add(row)
            if time.monotonic() - committed_at > COMMIT_SECONDS:
                writer.commit()
                committed_at = time.monotonic()
            added += len(good)
            progress.update(len(good) + len(lost))
    seconds = time.monotonic() - started

    _list_failures(store_path, failures)
    lost = [f for f in failures if not f.kept]
    total = len(catalog.records) + len([s for s in catalog.skips if not s.kept])
    report_skips(failures, total, store_path / "failures.jsonl")
    store = open_store(store_path)
    say(f"{added} added, {present} already there, {len(lost)} failed: {len(store)} rows in {out}")
    return EmbedReport(added, present, len(lost), len(store), added / max(seconds, 1e-9))


def _missing(records: Sequence[Record], store: Store) -> list[Record]:
    """Leave out what the store holds; one id for two files is told apart by the uri."""
    held = dict(zip(store.column("id"), store.column("uri"), strict=True))
    missing = []
    for record in records:
        renamed = replace(record, id=record.uri) if record.id in held else record
        if held.get(record.id) != record.uri and renamed.id not in held:
            missing.append(renamed)
    return missing


def _encoded(
    encoder: Encoder, records: Sequence[Record], thumbnails: bool
) -> Iterator[tuple[list[Row], list[Skip]]]:
    """Yield rows and losses batch by batch; decoding runs ahead of the encoder."""
    shape = encoder.preprocess

    def decode(content: bytes) -> _Item:
        image = open_image(content)
        pixels = fit_image(image, shape.size, shape.resize_mode, shape.interpolation)
        return _Item(pixels, _thumbnail(image) if thumbnails else b"")

    stream = decode_stream(records, decode, modality.decode_workers())
    chunks = iter(lambda: list(islice(stream, BATCH)), [])
    for chunk in read_ahead(lambda c: c, chunks):
        lost = [item for _, item in chunk if isinstance(item, Skip)]
        good = [(record, item) for record, item in chunk if not isinstance(item, Skip)]
        yield (_rows(encoder, good) if good else []), lost


def _rows(encoder: Encoder, items: Sequence[tuple[Record, _Item]]) -> list[Row]:
    kinds = modality.of(encoder)
    images_BD = kinds["image"].encode(kinds["image"].batch([item.pixels for _, item in items]))
    # Equal captions are encoded once.
    captions = list(dict.fromkeys(c for record, _ in items for c in record.captions))
    texts: dict[str, NDArray[np.float32]] = {}
    for first in range(0, len(captions), BATCH):
        part = captions[first : first + BATCH]
        texts |= zip(part, kinds["text"].encode(part), strict=True)
    none = np.zeros((0, images_BD.shape[1]), dtype=np.float32)
    return [
        Row(
            id=record.id,
            uri=record.uri,
            captions=record.captions,
            image_embedding=vector_D,
            text_embeddings=np.stack([texts[c] for c in record.captions])
            if record.captions
            else none,
            meta=_as_json(record.meta),
            thumbnail=item.thumbnail,
        )
        for (record, item), vector_D in zip(items, images_BD, strict=True)
    ]


def _as_json(meta: dict[str, Any]) -> str:
    text = json.dumps(meta, ensure_ascii=False, default=str)
    # Half a surrogate cannot be stored as UTF-8; as a JSON escape it can.
    return text.encode("utf-8", "backslashreplace").decode()


def _thumbnail(image: Image.Image) -> bytes:
    image = image.copy()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=80)
    return out.getvalue()


def _list_failures(store: Path, failures: Sequence[Skip]) -> None:
    """Append what is not listed yet."""
    listed = {(f["uri"], f["reason"]) for f in files.read_lines(store / "failures.jsonl")}
    rows: list[dict[str, Any]] = [
        {"id": f.id, "uri": f.uri, "reason": f.reason, "embedded": f.kept}
        for f in failures
        if (f.uri, f.reason) not in listed
    ]
    if rows:
        files.append_lines(store / "failures.jsonl", rows)
