"""The modalities that can be embedded: what everything must know of them.

What decodes and encodes their items is in `encoding/modalities.py`, where more can be registered.
Other packages announce theirs by an entry point of the group `mmalign.modalities`: a module that
registers it.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import PurePosixPath

from mmalign.errors import UsageError
from mmalign.progress import say

# How many numbers say where in its item a vector belongs: nothing, the number of a caption or a
# slice, a start and an end in seconds, a box (left, top, right, bottom) in shares of the sides.
POSITION_SIZES = {"": 0, "number": 1, "seconds": 2, "box": 4}
NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
GROUP = "mmalign.modalities"
# What an item may be besides an item of a modality, see `items.py`.
OTHER_KINDS = ("vector", "row")


@dataclass(frozen=True)
class Modality:
    """One kind of item that can be embedded."""

    name: str
    """Small letters, digits and underscores; the name of its column in a store."""
    position: str = ""
    """The kind of position of its vectors, a key of `POSITION_SIZES`."""
    suffixes: tuple[str, ...] = ()
    """Extensions of its files, with the dot, in small letters; images are told by more than that,
    see `data/kinds.py`."""
    column: str = ""
    """The column of a row that holds its items; empty if a row is one of its items."""


IMAGE = Modality("image")
TEXT = Modality("text", position="number", column="captions")
_known = {m.name: m for m in (IMAGE, TEXT)}
_by_suffix: dict[str, Modality] = {}


def add(modality: Modality) -> None:
    """Add a modality to those that are known; one of the same name is replaced.

    Raises:
        UsageError: A name, suffix or kind of position is invalid, or a suffix belongs to another.
    """
    if not NAME.fullmatch(modality.name) or modality.name in OTHER_KINDS:
        raise UsageError(f"{modality.name!r} is no name for a modality: write it like 'sound'")
    if modality.position not in POSITION_SIZES:
        kinds = ", ".join(map(repr, POSITION_SIZES))
        raise UsageError(f"{modality.name}: position={modality.position!r}: one of {kinds}")
    for suffix in modality.suffixes:
        if not re.fullmatch(r"\.[^./A-Z]+", suffix):
            raise UsageError(f"{modality.name}: {suffix!r} is no suffix: write it like '.wav'")
        other = _by_suffix.get(suffix, modality)
        if other.name != modality.name:
            raise UsageError(f"{modality.name}: {suffix} files belong to {other.name!r}")
    for suffix in [end for end, other in _by_suffix.items() if other.name == modality.name]:
        del _by_suffix[suffix]
    _known[modality.name] = modality
    _by_suffix.update(dict.fromkeys(modality.suffixes, modality))


def find(name: str) -> Modality | None:
    """Return the modality of a name; None if it is not known here."""
    _load_installed()
    return _known.get(name)


def of_file(name: str) -> Modality:
    """Return the modality of a file by its extension: an image, unless it is known as another's."""
    _load_installed()
    return _by_suffix.get(PurePosixPath(name).suffix.lower(), IMAGE) if _by_suffix else IMAGE


def is_of_rows(name: str) -> bool:
    """Return whether a row is an item of a modality, rather than having some in a column."""
    modality = find(name)
    return modality is None or not modality.column


@cache
def _load_installed() -> None:
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            say(f"warning: the modality {point.name} ({point.value}) cannot be loaded: {error}")
