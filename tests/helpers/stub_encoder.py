"""An encoder whose vectors are a hash of what it is given: embedding without a model."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.model import Preprocess

DIM = 8
LONGEST = 60


def vector(content: bytes, space: str = "stub", dim: int = DIM) -> np.ndarray:
    """Return a unit vector (dim,) that only this content has in this space."""
    seed = int.from_bytes(hashlib.sha256(space.encode() + content).digest()[:8], "little")
    drawn = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return drawn / np.linalg.norm(drawn)


class StubTokenizer:
    """A tokenizer that cuts texts of more than LONGEST characters."""

    def cut(self, texts: Sequence[str]) -> list[str]:
        return [text for text in texts if len(text) > LONGEST]


class StubEncoder:
    """What embedding asks of an encoder."""

    device = torch.device("cpu")
    preprocess = Preprocess(size=8)
    towers = torch.nn.Identity()
    tokenizer = StubTokenizer()
    images = 0

    def __init__(self, name: str = "stub", dim: int = DIM) -> None:
        self.identity = self.space = self.source = self.name = name
        self.dim = dim
        self.modality_encoders: dict[str, Any] = {}

    def on(self, device: object) -> "StubEncoder":
        return self

    def tower_identity(self, modality: str) -> str:
        return f"{modality}-{self.name}"

    def former_fault(self, identity: str) -> str:
        return ""

    def encode_images(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        StubEncoder.images += len(pixels_BSS3)
        return np.stack([vector(p.tobytes(), self.space, self.dim) for p in pixels_BSS3])

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([vector(t.encode(), self.space, self.dim) for t in texts])


def stub(name: object = "stub", *_: object, **__: object) -> Any:
    """Load a stub by its name; one whose name ends in a number has so many dimensions."""
    number = str(name).rpartition("-")[2]
    return StubEncoder(str(name), int(number) if number.isdigit() else DIM)


def use_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `embed` load the stub of the name that it is given."""
    for name, value in (
        ("load_model", stub),
        ("to_fastest", lambda encoder: encoder),
        ("in_precision", lambda encoder, precision: (encoder, "float32")),
        ("keep_weights", lambda encoder: None),
        ("fastest_device", lambda: torch.device("cpu")),
    ):
        monkeypatch.setattr(f"mmalign.embedding.embed.{name}", value, raising=False)
