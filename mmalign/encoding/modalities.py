"""The modalities of a model: what encodes the items of each, and how a store records that."""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from mmalign import modality as table
from mmalign.arrays import Floats
from mmalign.data import is_taken_suffix
from mmalign.encoding.batches import TEXTS_AT_ONCE
from mmalign.encoding.images import ImageEncoder
from mmalign.encoding.modality_encoder import Decoded, ModalityEncoder
from mmalign.errors import UsageError
from mmalign.items import utf8_text
from mmalign.modality import IMAGE, TEXT, Modality
from mmalign.model import Encoder
from mmalign.store import ModelCard, Tower


class TextEncoder(ModalityEncoder):
    """Encodes texts."""

    batch_size = TEXTS_AT_ONCE

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @property
    def identity(self) -> str:  # type: ignore[override]
        """Return the identity of the text tower."""
        return self.encoder.tower_identity(TEXT.name)

    def decode(self, content: bytes, *, thumbnail: bool = False) -> Decoded:
        """Take a file as one text."""
        return Decoded([content.decode()])

    def decode_item(self, item: Any) -> Decoded:
        """Take a str."""
        return Decoded([utf8_text(item)])

    def encode(self, parts: Sequence[str]) -> Floats:
        """Encode texts to unit vectors (B, D)."""
        return self.encoder.encode_texts(parts)


MakeEncoder = Callable[[Encoder], ModalityEncoder]
_makers: dict[str, MakeEncoder] = {IMAGE.name: ImageEncoder, TEXT.name: TextEncoder}
_lock = threading.RLock()


def register_modality(modality: Modality, make: MakeEncoder) -> None:
    """Let a further modality be embedded and searched, in this process.

    Its vectors must be in the space of the model: its tower was aligned with the model's towers.

    Args:
        modality: Its name, the suffixes of its files, and where in an item a vector belongs.
        make: Makes what encodes its items, of a model; called once for each model.

    Raises:
        UsageError: Its name or a suffix cannot be used.
    """
    for suffix in modality.suffixes:
        if is_taken_suffix(suffix):
            raise UsageError(f"{modality.name}: {suffix} files are read in another way")
    with _lock:
        table.add(modality)
        _makers[modality.name] = make


def encoder_of(encoder: Encoder, name: str) -> ModalityEncoder:
    """Return what encodes the items of a modality with a model.

    Raises:
        UsageError: The modality is not installed here.
    """
    table.find(name)
    with _lock:
        make = _makers.get(name)
        if make is None:
            told = f"this installation cannot encode {name!r}"
            raise UsageError(f"{told}: import or install what registers that modality")
        made = encoder.modality_encoders.get(name)
        if made is None or made[0] is not make:
            made = encoder.modality_encoders[name] = make, make(encoder)
        return cast(ModalityEncoder, made[1])


def model_card(encoder: Encoder, others: Iterable[str] = ()) -> ModelCard:
    """Return what a store records of the model that makes its vectors.

    Args:
        encoder: The model.
        others: Modalities besides its own two.

    Raises:
        UsageError: One of them is not installed here.
    """
    towers = []
    for name in dict.fromkeys((IMAGE.name, TEXT.name, *others)):
        identity, modality = encoder_of(encoder, name).identity, table.find(name)
        assert modality
        towers.append(Tower(name, identity, modality.position))
    return ModelCard(encoder.space, encoder.source, encoder.dim, tuple(towers))


def is_model_of(encoder: Encoder, card: ModelCard) -> bool:
    """Return whether the vectors of an encoder can be compared with those of a store.

    Towers are compared as far as they are recorded, which is quicker than the identity of all.
    """
    recorded = {tower.modality: tower.identity for tower in card.towers if tower.identity}
    if TEXT.name in recorded and encoder.tower_identity(TEXT.name) == recorded[TEXT.name]:
        return True
    return card.identity in (encoder.space, encoder.identity)


def decode_workers() -> int:
    """Return the number of decoding threads: a few more than cores, as reading waits."""
    return (os.cpu_count() or 1) + 2
