"""Modalities: what everything must know of them, without what decodes or encodes their items."""

from dataclasses import dataclass

# How many numbers say where in its item a vector belongs: nothing, the number of a caption or a
# slice, a start and an end in seconds, a box (left, top, right, bottom) in shares of the sides.
POSITION_SIZES = {"": 0, "number": 1, "seconds": 2, "box": 4}


@dataclass(frozen=True)
class Modality:
    """One kind of item that can be embedded."""

    name: str
    """Small letters, digits and underscores; the name of its column in a store."""
    position: str = ""
    """The kind of position of its vectors, a key of `POSITION_SIZES`."""


IMAGE = Modality("image")
TEXT = Modality("text", position="number")
