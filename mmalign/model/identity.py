"""Identities of towers, and spaces: names that change with whatever decides a model's vectors.

A tower's identity covers what decides its vectors: architecture, activation, weights on its
embedding path, and preprocessing or tokenizer. Towers that were aligned share a space; vectors can
be compared only within one space.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MODALITIES = ("image", "text")
# Every identity and space matches this.
PRINTABLE = re.compile(r"[A-Za-z0-9._:/@-]+")
# Counts the batches that a batch norm was trained with; nothing is computed from it.
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Origin:
    """The model that an encoder's weights came from, before any training; final."""

    space: str
    towers: dict[str, str]
    """The identity of each tower, by modality."""

    @classmethod
    def from_json(cls, recorded: Any) -> "Origin | None":
        """Read the space and towers of a JSON object; None if there are none.

        Raises:
            ValueError: They are not names.
        """
        found: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
        space, towers = found.get("space"), found.get("towers")
        if space is None and towers is None:
            return None
        if isinstance(space, str) and isinstance(towers, dict):
            names = [space, *towers.values()]
            if all(isinstance(name, str) and PRINTABLE.fullmatch(name) for name in names):
                return cls(space, towers)
        raise ValueError(f"not the names of a space and its towers: {space!r}, {towers!r}")


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tower_identity(
    modality: str, architecture: dict[str, Any], preparation: str, weights: Mapping[str, Tensor]
) -> str:
    """Return MODALITY-HASH for one tower.

    The model's name is no part of it: a tower keeps its identity inside another model.

    Args:
        modality: "image" or "text".
        architecture: The part that decides the tower's vectors.
        preparation: The tower's preprocessing or tokenizer, as JSON.
        weights: Those on its embedding path, by their names inside the tower.
    """
    digest = hashlib.sha256(json.dumps([architecture, preparation], sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        if not name.endswith(COUNTER):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(raw(tensor))
    return f"{modality}-{digest.hexdigest()[:16]}"


def space_after(before: Origin | None, identity_of: Callable[[str], str], name: str) -> str:
    """Return the space of a model.

    If a tower is still the one that the model started with, it was frozen and the other was aligned
    to it: the space stays. Otherwise it is NAME-HASH, a hash over the towers.

    Args:
        before: The model that it started from; None if it was trained from scratch.
        identity_of: The identity of its tower by modality; called only as far as needed.
        name: The model's name.
    """
    # The text tower first: it is usually smaller, and its identity is what a text search needs.
    if before and any(before.towers.get(m) == identity_of(m) for m in reversed(MODALITIES)):
        return before.space
    digest = hashlib.sha256(json.dumps(sorted(map(identity_of, MODALITIES))).encode())
    shown = re.sub(r"[^A-Za-z0-9._:/@-]", "_", name)
    return f"{shown}-{digest.hexdigest()[:16]}"
