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


def vector(content: bytes) -> np.ndarray:
    """Return a unit vector (DIM,) that only this content has."""
    seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    drawn = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return drawn / np.linalg.norm(drawn)


class StubTokenizer:
    """A tokenizer that cuts texts of more than LONGEST characters."""

    def cut(self, texts: Sequence[str]) -> list[str]:
        return [text for text in texts if len(text) > LONGEST]


class StubEncoder:
    """What embedding asks of an encoder."""

    identity, space, source, dim = "stub", "stub", "stub", DIM
    device = torch.device("cpu")
    preprocess = Preprocess(size=8)
    towers = torch.nn.Identity()
    tokenizer = StubTokenizer()
    name = "stub"
    images = 0

    def __init__(self) -> None:
        self.modality_encoders: dict[str, Any] = {}

    def on(self, device: object) -> "StubEncoder":
        return self

    def tower_identity(self, modality: str) -> str:
        return f"{modality}-stub"

    def encode_images(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        StubEncoder.images += len(pixels_BSS3)
        return np.stack([vector(p.tobytes()) for p in pixels_BSS3])

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([vector(t.encode()) for t in texts])


def use_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `embed` load the stub, whatever model it is given."""
    stub: Any = StubEncoder()
    for name, value in (
        ("load_model", lambda model: stub),
        ("to_fastest", lambda encoder: encoder),
        ("in_precision", lambda encoder, precision: (encoder, "float32")),
        ("keep_weights", lambda encoder: None),
        ("fastest_device", lambda: torch.device("cpu")),
    ):
        monkeypatch.setattr(f"mmalign.embedding.embed.{name}", value, raising=False)
