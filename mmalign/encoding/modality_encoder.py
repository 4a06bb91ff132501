"""How the items of one modality become vectors: what a new modality has to bring.

Shapes: B parts of a batch, V parts of an item, D dimensions, P numbers of a position.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.arrays import Floats
from mmalign.errors import UsageError


@dataclass(frozen=True)
class Decoded:
    """One item, decoded."""

    parts: Sequence[Any]
    """What is encoded: each part becomes one vector of the row."""
    positions: Floats | None = None
    """Where in the item the parts are, (V, P); by default, parts whose position is a number are
    counted from 0."""
    thumbnail: bytes = b""
    """A small WebP picture, or empty."""


class ModalityEncoder(ABC):
    """Decodes and encodes the items of one modality with one encoder.

    All methods are called from many threads at once.
    """

    identity: str = ""
    """A name that changes with whatever decides the vectors; empty if that is unknown."""
    batch_size: int | None = None
    """How many items a list is encoded in at once; None for what suits images on the device."""

    @abstractmethod
    def decode(self, content: bytes, *, thumbnail: bool = False) -> Decoded:
        """Decode the content of a file.

        Args:
            content: The whole file.
            thumbnail: Whether a thumbnail is wanted.

        Raises:
            SampleProblem: It cannot be used; the reason is reported with the sample.
        """

    @abstractmethod
    def encode(self, parts: Sequence[Any]) -> Floats:
        """Encode parts of any items to unit vectors (B, D)."""

    def decode_item(self, item: Any) -> Decoded:
        """Decode an item that was given as a query or to `Encoder.encode`, see `mmalign.items`.

        Raises:
            UsageError: A file does not exist.
            SampleProblem: It cannot be used.
        """
        if not isinstance(item, Path):
            return self.decode(bytes(item))
        if not item.is_file():
            raise UsageError(f"{item}: no such file")
        return self.decode(item.read_bytes())

    def metadata(self, content: bytes) -> dict[str, Any]:
        """Return what a file says of itself, such as camera and date of a photograph."""
        return {}
