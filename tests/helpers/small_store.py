"""Tiny stores of rows with captions in two languages, meta and pictures; no model is needed."""

import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import store_samples
from PIL import Image

from mmalign.store import Row, Store, Writer, open_store

CARD, DIM = store_samples.CARD, store_samples.DIM


def thumbnail(number: int) -> bytes:
    """A small picture of one colour; every fourth row has none."""
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (number % 256, 0, 0)).save(out, "WEBP", lossless=True)
    return out.getvalue() if number % 4 else b""


def row(number: int, captions: int | None = None, **meta: Any) -> Row:
    """A row with 0, 1 or 2 captions by its number, unless told."""
    count = number % 3 if captions is None else captions
    return replace(
        store_samples.row(number, count),
        captions=tuple(f"a dog, {number}.{c}, 狗" for c in range(count)),
        meta=json.dumps(meta, ensure_ascii=False),
        thumbnail=thumbnail(number),
    )


def fill(path: Path, rows: Iterable[Row], rows_per_shard: int = 10) -> Store:
    """Put rows into a store, and open it."""
    with Writer(path, CARD, rows_per_shard) as writer:
        for one in rows:
            writer.add(one)
    return open_store(path)
