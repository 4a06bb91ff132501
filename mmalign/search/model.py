"""The model of a store: found wherever it was moved, and refused if it is another one."""

from pathlib import Path

from mmalign.encoding.modalities import is_model_of
from mmalign.errors import IdentityError, shell_command
from mmalign.modality import TEXT
from mmalign.model import Encoder, find_model, load_model
from mmalign.store import Store


def model_of(store: Store, model: str | Path | None = None) -> Encoder:
    """Load the model that a store was made with.

    Args:
        store: The store.
        model: Its folder or name; by default it is looked for, see `find_model`.

    Raises:
        ModelError: It is not found, or damaged.
        IdentityError: The model is another one.
    """
    card = store.manifest.model
    if model is None:
        recorded = {tower.modality: tower.identity for tower in card.towers if tower.identity}
        towers = {m: name for m, name in recorded.items() if m == TEXT.name}
        return find_model(card.source, card.identity, towers=towers, near=store.path)
    # A run that was trained further keeps the weights that made this store.
    encoder = load_model(model, card.identity, lazily=True)
    require_model_of(store, encoder)
    return encoder


def require_model_of(store: Store, encoder: Encoder) -> None:
    """Refuse an encoder whose vectors cannot be compared with those of a store.

    Raises:
        IdentityError: It is another model; the message names both.
    """
    card = store.manifest.model
    if not is_model_of(encoder, card):
        why = (
            _under_way(store, encoder)
            or encoder.former_fault(card.identity)
            or "search with the model that made the store, or embed again"
        )
        raise IdentityError(
            f"{store.path} holds embeddings of {card.identity}, the model is {encoder.space}: {why}"
        )


def _under_way(store: Store, encoder: Encoder) -> str:
    """Return what to do about a model whose vectors are being built; empty if they are not."""
    following = store.manifest.next
    if following is None or not is_model_of(encoder, following):
        return ""
    embed = shell_command(
        "embed", "--model", following.source, "--data", "SRC", "--out", store.path
    )
    return f"its vectors are being built beside them; search without --model until {embed} is done"
