"""A store of drawn topics, of which it is known what it holds; no model is needed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign.store import ModelCard, Row, Writer, pair_vectors

DIM, ROWS, TOPICS, KNOWN = 64, 400, 200, 100
CARD = ModelCard("drawn", "drawn", DIM)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


# What there is in the world; the store holds the first `KNOWN`. Images and texts lie apart.
WORLD = unit(np.random.default_rng(0).normal(size=(TOPICS, DIM)))
GAP = unit(np.random.default_rng(1).normal(size=DIM))


def drawn(topic: int, seed: int, side: float) -> np.ndarray:
    noise = np.random.default_rng((topic, seed)).normal(size=DIM) * 0.5 / np.sqrt(DIM)
    return unit(WORLD[topic] + noise + side * GAP)


class Drawn:
    """Texts are `topic NUMBER`, in either language; all others are of no topic."""

    identity = space = source = name = "drawn"
    dim = DIM

    class tokenizer:
        @staticmethod
        def cut(texts: list[str]) -> list[str]:
            return []

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.stack([text_vector(text) for text in texts])

    def encode(self, items: list[Any]) -> np.ndarray:
        return self.encode_texts(items)


def text_vector(text: str) -> np.ndarray:
    number = "".join(c for c in text if c.isdigit())
    if number:
        return drawn(int(number), 7, 0.5)
    return unit(np.random.default_rng(list(text.encode())).normal(size=DIM) + 4 * GAP)


def write(path: Path, captions: bool = True, first: int = 0) -> Path:
    """Write a store of KNOWN topics from the first one on."""
    with Writer(path, CARD, 100) as writer:
        for number in range(ROWS):
            topic = first + number % KNOWN
            words = (f"thing {topic}, no {number}", f"物{topic}第{number}") * captions
            texts = [drawn(topic, 1000 + number + 5000 * i, 0.5) for i in range(len(words))]
            vectors = np.array(texts).reshape(-1, DIM)
            image = drawn(topic, 100_000 + number, -0.5)
            writer.add(Row(f"id{number}", f"{number}.jpg", words, pair_vectors(image, vectors)))
    return path


def write_takes(path: Path, topics: Sequence[int], caption: Callable[[int, int], str]) -> Path:
    """Write a row for each topic named; rows of one topic have nearly the same picture.

    A caption follows from the number of the row and its topic.
    """
    with Writer(path, CARD, 100) as writer:
        for n, topic in enumerate(topics):
            image = unit(drawn(topic, 2, -0.5) + 0.01 * drawn(topic, 50 + n, 0))
            texts = np.array([drawn(topic, 100 + n, 0.5)])
            writer.add(Row(f"id{n}", f"{n}.jpg", (caption(n, topic),), pair_vectors(image, texts)))
    return path


def draw_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches find `Drawn` as the model, and encode texts by drawing them."""

    def encode(encoder: Any, items: list[Any]) -> list[np.ndarray]:
        return [text_vector(i) if isinstance(i, str) else np.asarray(i) for i in items]

    monkeypatch.setattr("mmalign.search.searcher.encode_items", encode)
    for place in ("mmalign.search.model.find_model", "mmalign.search.model.load_model"):
        monkeypatch.setattr(place, lambda *args, **words: Drawn())
