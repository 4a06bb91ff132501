"""What a store must hold: rows that are a function of their id and version, and a list of promises.

`observe` reads a whole store and proves that what belongs together is together. A `Ledger` knows
what was acknowledged and what a call that has not returned may have done.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from mmalign.store import ModelCard, Row, open_store, pair_vectors

DIM = 8
CARD = ModelCard("nano-0123", "somewhere/run", DIM)
NEXT = ModelCard("tiny-4567", "somewhere/else", DIM + 4)
COLUMNS = ("id", "uri", "captions", "meta", "thumbnail", "stamp", "checksum")

Rows = dict[str, int]
"""Versions by id."""
Failures = dict[str, str | None]
"""Reasons by uri; None for what is resolved."""


@dataclass(frozen=True)
class State:
    """What a generation holds; final."""

    rows: Rows
    index: str | None = None
    model: ModelCard = CARD


@dataclass(frozen=True)
class Ledger:
    """What was promised; final. A state of None: there is no store."""

    state: State | None = None
    coming: tuple[State | None, ...] = ()
    """What a call that has not returned may leave instead."""
    failures: Failures = field(default_factory=dict)
    failures_coming: tuple[Failures, ...] = ()
    damaged: bool = False
    """Something is; `state` and `failures` are what `repair` must bring."""
    torn: bool = False
    """An append to the list of failures may have been cut off."""

    @property
    def rows(self) -> Rows:
        return self.state.rows if self.state else {}

    @property
    def model(self) -> ModelCard:
        return self.state.model if self.state else CARD


@cache
def row(name: str, version: int, model: ModelCard = CARD) -> Row:
    """Make a row; nothing of it is equal in two rows, and no vector in two models."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {version}".encode()))
    vectors = rng.normal(size=(rng.integers(1, 5), model.dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    checksum = hashlib.sha256(f"{name} {version}".encode()).digest()
    return Row(
        id=name,
        uri=f"/pictures/{name}-{version}.jpg",
        captions=tuple(f"caption {c} of {name} {version}" for c in range(len(vectors) - 1)),
        vectors=pair_vectors(vectors[0], vectors[1:]),
        meta=json.dumps({"name": name, "version": version}),
        thumbnail=checksum[: version % 7],
        stamp=int.from_bytes(checksum[:8], "big"),
        checksum=checksum,
    )


def index_content(shards: Sequence[str]) -> bytes:
    """Stand for an index of these shards."""
    return "\n".join(["index", *shards]).encode()


def observe(path: Path, *, thumbnails: bool = True) -> State:
    """Read all of a store; ids, vectors, captions and index must belong together."""
    store = open_store(path)
    numbers = np.arange(store.manifest.physical_rows)
    numbers = numbers if store.live is None else numbers[store.live]
    model = store.manifest.model
    assert model in (CARD, NEXT)
    none = np.zeros((0, model.dim), np.float16)
    images, texts = (np.concatenate([none, *store.vectors(m)]) for m in ("image", "text"))
    held: Rows = {}
    for number, values in zip(numbers, store.rows(numbers, COLUMNS), strict=True):
        name, version = values["id"], json.loads(values["meta"])["version"]
        meant = row(name, version, model)
        wanted = {c: getattr(meant, c) for c in COLUMNS} | {"captions": list(meant.captions)}
        if not thumbnails and not values["thumbnail"]:
            wanted["thumbnail"] = b""
        assert values == wanted
        its = images[store.owners("image") == number]
        assert np.array_equal(its, meant.vectors["image"].astype(np.float16))
        its = texts[store.owners("text") == number]
        assert np.array_equal(its, meant.vectors["text"].astype(np.float16))
        assert name not in held, f"{name} is there twice"
        held[name] = version
    assert len(store) == len(held)
    assert store.find([*held, "nobody"]).tolist() == [*numbers, -1]
    if store.manifest.index is None:
        return State(held, None, model)
    folder = store.index_folder
    assert folder is not None
    described = json.loads((folder / "index.json").read_bytes())
    assert tuple(described["shards"]) == tuple(
        s.name for s in store.manifest.shards[: len(described["shards"])]
    )
    assert (folder / "image.faiss").read_bytes() == index_content(described["shards"])
    return State(held, store.manifest.index.name, model)
