"""The model whose vectors a store holds: its space, and the tower of each modality."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmalign.errors import IdentityError
from mmalign.modality import IMAGE, POSITION_SIZES, TEXT
from mmalign.store.groups import is_count, matches

MODALITY = re.compile(r"[a-z][a-z0-9_]{0,31}")
MOST_DIM, MOST_MODALITIES = 2**16, 64


@dataclass(frozen=True)
class Tower:
    """The tower of a model that made the vectors of one modality."""

    modality: str
    identity: str = ""
    """Name and hash, as `Encoder.tower_identities` gives it; empty if unknown."""
    position: str = ""
    """The kind of position of its vectors, see `modality.py`."""


@dataclass(frozen=True)
class ModelCard:
    """The model whose embeddings a store holds."""

    identity: str
    """Name and hash, as `Encoder.identity` gives it."""
    source: str
    """The run folder or open_clip name it was loaded from."""
    dim: int
    towers: tuple[Tower, ...] = (Tower(IMAGE.name), Tower(TEXT.name, position=TEXT.position))

    @property
    def positions(self) -> dict[str, int]:
        """The modalities, and how many numbers are the position of a vector."""
        return {tower.modality: POSITION_SIZES[tower.position] for tower in self.towers}


def model_values(model: ModelCard) -> dict[str, Any]:
    """Return a model card as values for JSON."""
    values = asdict(model)
    return values | {"towers": [list(tower.values()) for tower in values["towers"]]}


def model_card_of(values: dict[str, Any]) -> ModelCard:
    """Return the model card of its values; see `invalid_model`."""
    if "towers" in values:
        values = {**values, "towers": tuple(Tower(*tower) for tower in values["towers"])}
    return ModelCard(**values)


def invalid_model(model: ModelCard) -> Iterator[str]:
    """Yield values of a model card that mmalign never writes."""
    if not is_count(model.dim, MOST_DIM) or model.dim < 1:
        yield f"{model.dim!r} dimensions"
    if not {type(model.identity), type(model.source)} <= {str}:
        yield f"the model {model.identity!r} of {model.source!r}"
    for tower in model.towers:
        if not matches(MODALITY, tower.modality) or type(tower.identity) is not str:
            yield f"the tower {tower.identity!r} of {tower.modality!r}"
        if tower.position not in POSITION_SIZES:
            yield f"positions of the kind {tower.position!r}"
    if len({tower.modality for tower in model.towers}) < len(model.towers) > 0:
        yield "two towers of a modality"
    if len(model.towers) > MOST_MODALITIES:
        yield f"{len(model.towers)} modalities"


def joined_model(store: Path, stored: ModelCard, model: ModelCard) -> ModelCard:
    """Return the model of a store with the towers that a writer adds to it.

    Raises:
        IdentityError: The store holds embeddings of another model, or of another tower.
    """
    if stored.identity != model.identity:
        raise IdentityError(
            f"{store} holds embeddings of {stored.identity}, the model is {model.identity}: "
            "use that model, or a new store"
        )
    towers = {tower.modality: tower for tower in stored.towers}
    for tower in model.towers:
        held = towers.setdefault(tower.modality, tower)
        if held.identity and tower.identity and held.identity != tower.identity:
            raise IdentityError(
                f"{store} holds {tower.modality} vectors of the tower {held.identity}, "
                f"the model has {tower.identity}: embed into a new store"
            )
        if held.position != tower.position:
            raise IdentityError(
                f"{store} holds {tower.modality} vectors with positions of the kind "
                f"{held.position!r}, not {tower.position!r}: embed into a new store"
            )
    return replace(stored, towers=tuple(towers.values()))
