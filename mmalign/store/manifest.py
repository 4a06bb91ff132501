"""One generation of a store: which shards, made by which model, with which index.

A generation is one file, `manifest-00000007.json`, and the only commit point: whatever is not
named by the newest readable generation does not exist. A writer claims the next number; who comes
second to a number reads what the first one wrote and tries again on top of it.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign import files
from mmalign.errors import StoreError
from mmalign.progress import say

FORMAT = 1
TRIES = 100


@dataclass(frozen=True)
class ModelCard:
    """The model whose embeddings a store holds."""

    identity: str
    """Name and hash, as `Encoder.identity` gives it."""
    source: str
    """The run folder or open_clip name it was loaded from."""
    dim: int


@dataclass(frozen=True)
class Shard:
    """One immutable Arrow file."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a store holds in one generation."""

    generation: int
    model: ModelCard
    shards: tuple[Shard, ...] = ()
    tombstones: tuple[str, ...] = ()
    index: str | None = None
    """Name of the folder under index/, or None."""
    format: int = field(default=FORMAT)

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)


def path_of(store: Path, generation: int) -> Path:
    """Return the file of a generation."""
    return store / f"manifest-{generation:08d}.json"


def newest(store: Path) -> Manifest:
    """Read the newest generation that can be read; say so where that is not the newest file.

    Raises:
        StoreError: The folder is no store, or no generation can be read.
    """
    found = _generations(store)
    if not found:
        known = "is a folder without a manifest" if store.is_dir() else "does not exist"
        raise StoreError(f"{store}: not a store: it {known} (make one with `mmalign embed`)")
    return _newest_of(store, found)


def _generations(store: Path) -> list[Path]:
    """Files of all generations, the newest first."""
    return sorted(store.glob("manifest-*.json"), reverse=True)


def _newest_of(store: Path, found: list[Path]) -> Manifest:
    problems = []
    for file in found:
        try:
            manifest = parse(file.read_bytes())
        except (ValueError, KeyError, TypeError, OSError) as error:
            problems.append(f"{file.name}: {error}")
            continue
        if problems:
            say(f"warning: {store}: unreadable {'; '.join(problems)}; opened {file.name} instead")
        return manifest
    raise StoreError(f"{store}: no generation can be read: {'; '.join(problems)}")


def parse(content: bytes) -> Manifest:
    """Read a manifest from its JSON."""
    values: dict[str, Any] = json.loads(content)
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']} is not the known format {FORMAT}")
    return Manifest(
        generation=int(values["generation"]),
        model=ModelCard(**values["model"]),
        shards=tuple(Shard(**s) for s in values["shards"]),
        tombstones=tuple(values["tombstones"]),
        index=values["index"],
    )


def commit(store: Path, change: Callable[[Manifest], Manifest], model: ModelCard) -> Manifest:
    """Make the next generation out of the newest one, whichever that is when the claim succeeds."""
    for _ in range(TRIES):
        # One listing says both what to build on and which number to claim. Were the folder listed
        # again for the number, a generation made in between would be passed over, and be lost.
        found = _generations(store)
        base = _newest_of(store, found) if found else Manifest(0, model)
        taken = int(found[0].stem[9:]) if found else 0
        following = replace(change(base), generation=taken + 1)
        content = json.dumps(asdict(following), ensure_ascii=False, indent=1).encode() + b"\n"
        if files.claim(path_of(store, taken + 1), content):
            return following
    raise StoreError(f"{store}: {TRIES} other writers were faster; nothing was changed")


def commit_index(store: Path, name: str, shards: tuple[str, ...]) -> Manifest:
    """Make an index folder part of the store; the shards it was built from must still be there."""

    def change(base: Manifest) -> Manifest:
        if tuple(s.name for s in base.shards[: len(shards)]) != shards:
            raise StoreError(f"{store}: its shards changed while the index was built; run it again")
        return replace(base, index=name)

    return commit(store, change, newest(store).model)
