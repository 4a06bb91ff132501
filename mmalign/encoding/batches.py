"""Tools for loops over an encoder: a cache of texts, and batches that fit the memory.

Shapes: B items of a batch, C captions of one item, D dimensions.
"""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from mmalign.arrays import Floats
from mmalign.model import Encoder
from mmalign.progress import say

T = TypeVar("T")
TEXTS_AT_ONCE = 256
CACHED_TEXTS = 20_000


class TextCache:
    """Encodes captions, with a cache of the last 20,000.

    Safe to use from several threads.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._encode = BatchSplitter(encoder.encode_texts)
        self._known: OrderedDict[str, Floats] = OrderedDict()
        self._lock = threading.Lock()
        self.truncated = 0
        """Number of captions that were truncated so far."""

    def __call__(self, captions: Sequence[Sequence[str]]) -> list[Floats]:
        """Return, for each item, the unit vectors (C, D) of its captions, in order."""
        asked = list(dict.fromkeys(c for own in captions for c in own))
        with self._lock:
            found = {c: self._known[c] for c in asked if c in self._known}
        missing = [c for c in asked if c not in found]
        for first in range(0, len(missing), TEXTS_AT_ONCE):
            part = missing[first : first + TEXTS_AT_ONCE]
            found |= zip(part, self._encode(part), strict=True)
        truncated = self.encoder.tokenizer.cut(missing)
        with self._lock:
            # Another thread may have encoded the same texts at the same time.
            self.truncated += sum(c not in self._known for c in truncated)
            for caption in asked:
                self._known[caption] = found[caption]
                self._known.move_to_end(caption)
            while len(self._known) > CACHED_TEXTS:
                self._known.popitem(last=False)
        none = np.zeros((0, self.encoder.dim), np.float32)
        return [np.stack([found[c] for c in own]) if own else none for own in captions]


class BatchSplitter(Generic[T]):
    """Encodes batches; one that does not fit the memory is split, as are all later ones.

    Safe to use from several threads.
    """

    def __init__(self, encode: Callable[[Sequence[T]], Floats]) -> None:
        self.encode = encode
        self.most = sys.maxsize

    def __call__(self, items: Sequence[T]) -> Floats:
        """Encode a batch, whole or in parts.

        Raises:
            RuntimeError: There is not enough memory for a single item.
        """
        most = self.most
        if len(items) > most:
            parts = range(0, len(items), most)
            return np.concatenate([self(items[first : first + most]) for first in parts])
        try:
            return self.encode(items)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(items) < 2:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.most = min(self.most, len(items) // 2)
        say(f"out of memory with a batch of {len(items)}; continuing with batches of {self.most}")
        return self(items)


def report_truncated(encoder: Encoder, count: int, what: str = "captions") -> None:
    """Report how many texts are longer than a model reads, if any are."""
    if count:
        say(f"warning: {count} {what} are longer than {encoder.name} can read: they were truncated")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out."""
    # torch has an exception class for GPU memory only; on a CPU only the message shows it.
    kinds = (MemoryError, torch.OutOfMemoryError)
    words = ("can't allocate memory", "MPS backend out of memory")
    return isinstance(error, kinds) or any(w in str(error) for w in words)
