"""One generation of a store: which rows of which shards, made by which model, with which index.

A generation is one file, `manifest-00000007.json`, and the only commit point: what the newest
readable generation does not name does not exist. A writer claims the next number; if another
writer has claimed it first, it reads that generation and retries on top of it.

A garbage collector is a writer too: it removes only what its own generation announces as
`removing`. A commit on top of that generation must not name these files, and a commit on top of an
older one fails to get the number. So no file that a commit names is removed, however long any
process pauses.

N rows of a shard.
"""

import base64
import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmalign import files
from mmalign.arrays import Bools
from mmalign.errors import IdentityError, StoreError, shell_command
from mmalign.progress import say

FORMAT = 2
TRIES = 100
# A manifest may name only files inside its store, as manifests are untrusted input.
NAME = r"[a-z0-9][a-z0-9_-]{0,63}"
SHARD, INDEX = re.compile(rf"{NAME}\.arrow"), re.compile(NAME)
REMOVING = re.compile(rf"manifest-[0-9]{{8,18}}|(shards|index)/{NAME}")
SHA256 = re.compile("[0-9a-f]{64}")
MOST_ROWS, MOST_DIM, MOST_BYTES = 2**31 - 1, 2**16, 2**48


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
    """One immutable Arrow file, and which of its rows are deleted in this generation."""

    name: str
    rows: int
    bytes: int
    sha256: str
    deleted_rows: int = 0
    deleted: str = ""
    """Base64 of one bit per row, highest bit of a byte first; empty if no row is deleted."""

    @property
    def live(self) -> Bools:
        """Mask of the rows that are not deleted, shape (N,)."""
        if not self.deleted:
            return np.ones(self.rows, np.bool_)
        bits = np.frombuffer(base64.b64decode(self.deleted), np.uint8)
        return ~np.unpackbits(bits, count=self.rows).astype(np.bool_)

    def with_live(self, live_N: Bools) -> "Shard":
        """Return the shard with only these rows live."""
        deleted = int(self.rows - live_N.sum())
        bits = base64.b64encode(np.packbits(~live_N).tobytes()).decode() if deleted else ""
        return replace(self, deleted_rows=deleted, deleted=bits)

    def with_rows_deleted(self, rows: Sequence[int]) -> "Shard":
        """Return the shard with these rows deleted too."""
        if not len(rows):
            return self
        live_N = self.live
        live_N[rows] = False
        return self.with_live(live_N)


@dataclass(frozen=True)
class IndexCard:
    """The index of a generation: a folder under index/."""

    name: str
    sha256: str
    """Hash of its index.json, which holds the hashes of the other files in the folder."""


@dataclass(frozen=True)
class Manifest:
    """What a store holds in one generation."""

    generation: int
    model: ModelCard
    shards: tuple[Shard, ...] = ()
    index: IndexCard | None = None
    removing: tuple[str, ...] = ()
    """What a collector is about to remove: paths in the store without file extensions, so that a
    search for shard names in a damaged generation does not match them."""
    previous: str = ""
    """Hash of the generation that this one was made from; empty if mmalign did not write it."""

    @property
    def rows(self) -> int:
        """Live rows of all shards."""
        return sum(shard.rows - shard.deleted_rows for shard in self.shards)

    @property
    def physical_rows(self) -> int:
        """Rows of all shards, deleted ones included; row numbers count these."""
        return sum(shard.rows for shard in self.shards)

    @property
    def named_files(self) -> set[str]:
        """Files to keep as long as this generation is kept, written as in `removing`."""
        indexes = {f"index/{self.index.name}"} if self.index else set()
        return indexes | {f"shards/{Path(shard.name).stem}" for shard in self.shards}


def canonical(values: dict[str, Any]) -> bytes:
    """Return the canonical JSON for hashing: sorted keys, no spaces, only ASCII."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def render(manifest: Manifest) -> bytes:
    """Return a manifest as JSON, with its hash."""
    values = {**_values(manifest), "sha256": sha256_of(manifest)}
    return json.dumps(values, indent=1).encode() + b"\n"


def sha256_of(manifest: Manifest) -> str:
    """Return the hash that a manifest file holds."""
    return hashlib.sha256(canonical(_values(manifest))).hexdigest()


def _values(manifest: Manifest) -> dict[str, Any]:
    values = {"format": FORMAT, **asdict(manifest)}
    for name in ("removing", "previous"):
        if not values[name]:
            del values[name]
    return values


def parse(content: bytes) -> Manifest:
    """Read a manifest from its JSON.

    Raises:
        ValueError: The content is damaged.
        StoreError: The content is intact, but from another version of mmalign or another program.
    """
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        recorded_hash = values.pop("sha256", None)
        actual_hash = hashlib.sha256(canonical(values)).hexdigest()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if recorded_hash != actual_hash:
        early = "format 1 of an early version of mmalign: embed into a new store"
        raise ValueError(early if values.get("format") == 1 else "its hash does not match")
    if values.get("format") != FORMAT:
        known = f"this version of mmalign reads format {FORMAT}"
        raise StoreError(f"format {values.get('format')!r}, but {known}")
    try:
        index = values["index"]
        manifest = Manifest(
            generation=values["generation"],
            model=ModelCard(**values["model"]),
            shards=tuple(Shard(**s) for s in values["shards"]),
            index=IndexCard(**index) if index else None,
            removing=tuple(values.get("removing", ())),
            previous=values.get("previous", ""),
        )
        wrong = next(_invalid_values(manifest), None)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        wrong = f"invalid fields: {error}"
    if wrong:
        raise StoreError(f"not made by mmalign: {wrong}")
    return manifest


def _invalid_values(held: Manifest) -> Iterator[str]:
    """Yield values that mmalign never writes: names outside the store, impossible sizes."""
    if not _is_count(held.generation, 10**18):
        yield f"generation {held.generation!r}"
    if not _is_count(held.model.dim, MOST_DIM) or held.model.dim < 1:
        yield f"{held.model.dim!r} dimensions"
    if not {type(held.model.identity), type(held.model.source)} <= {str}:
        yield f"the model {held.model.identity!r} of {held.model.source!r}"
    for shard in held.shards:
        yield from (
            f"the shard {shard.name!r} with {what}" for what in _invalid_shard_values(shard)
        )
    if len({shard.name for shard in held.shards}) < len(held.shards):
        yield "the same shard twice"
    if held.index and not (
        _matches(INDEX, held.index.name) and _matches(SHA256, held.index.sha256)
    ):
        yield f"the index {held.index.name!r} with the hash {held.index.sha256!r}"
    yield from (
        f"{name!r}, which is not a file of a store"
        for name in held.removing
        if not _matches(REMOVING, name)
    )
    if held.previous and not _matches(SHA256, held.previous):
        yield f"the hash {held.previous!r}"


def _invalid_shard_values(shard: Shard) -> Iterator[str]:
    if not _matches(SHARD, shard.name):
        yield "an invalid name"
    if not (_is_count(shard.rows, MOST_ROWS) and _is_count(shard.bytes, MOST_BYTES)):
        yield f"{shard.rows!r} rows and {shard.bytes!r} bytes"
    if not _matches(SHA256, shard.sha256):
        yield f"the hash {shard.sha256!r}"
    bits = base64.b64decode(shard.deleted, validate=True)
    if bits and len(bits) != (shard.rows + 7) // 8:
        yield f"{len(bits)} bytes of deletions for {shard.rows} rows"
    if not _is_count(shard.deleted_rows, shard.rows) or bool(bits) != bool(shard.deleted_rows):
        yield f"{shard.deleted_rows!r} deleted of {shard.rows} rows"


def _matches(pattern: re.Pattern[str], text: Any) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None


def _is_count(number: Any, most: int) -> bool:
    return type(number) is int and 0 <= number <= most


def path_of(store: Path, generation: int) -> Path:
    """Return the file of a generation."""
    return store / f"manifest-{generation:08d}.json"


def file_of(store: Path, name: str) -> Path:
    """Return the file or folder that a name in `removing` stands for."""
    ending = {"shards": ".arrow", "index": ""}.get(name.partition("/")[0], ".json")
    return store / f"{name}{ending}"


def linked_folders(store: Path) -> list[Path]:
    """Return the folders of a store that are links to another place.

    The other place may hold any files, under names that an untrusted manifest may contain.
    """
    folders = (store / name for name in ("shards", "index", "damaged"))
    return [f for f in folders if f.exists() and f.resolve().parent != store.resolve()]


def number_of(file: Path) -> int:
    """Return the generation of a file."""
    return int(file.stem[9:])


def generations(store: Path) -> list[Path]:
    """List the files of all generations, newest first."""
    found = [f for f in store.glob("manifest-*.json") if f.stem[9:].isdecimal()]
    return sorted(found, key=number_of, reverse=True)


def read(file: Path) -> Manifest:
    """Read the file of a generation.

    Raises:
        ValueError, OSError: The file is damaged or missing.
        StoreError: It may be intact: another version of mmalign wrote it, or permission is denied.
    """
    try:
        return parse(files.claimed(file))
    except StoreError as error:
        raise StoreError(f"{file}: {error}") from None
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOENT):
            raise
        raise StoreError(f"{file}: cannot be read: {error.strerror}") from None


def newest(store: Path) -> Manifest:
    """Read the newest readable generation; warn if it is not the newest file.

    Raises:
        StoreError: The folder is not a store, or no generation can be read.
    """
    for _ in range(TRIES):
        found = generations(store)
        if not found:
            known = "is a folder without a manifest" if store.is_dir() else "does not exist"
            made = shell_command("embed", "--model", "RUN_OR_NAME", "--data", "SRC", "--out", store)
            raise StoreError(f"{store}: not a store: it {known}; create one with {made}")
        manifest = _newest_of(store, found)
        if manifest:
            return manifest
    raise StoreError(f"{store}: {TRIES} other writers committed first; run it again")


def _newest_of(store: Path, found: Sequence[Path]) -> Manifest | None:
    """Read the newest readable generation of a list; return None if the list is outdated."""
    problems = []
    for file in found:
        try:
            manifest = read(file)
        except (ValueError, OSError) as error:
            if isinstance(error, FileNotFoundError) and generations(store) != found:
                return None
            problems.append(f"{file.name}: {error}")
            continue
        if problems:
            told = f"{'; '.join(problems)}; opened {file.name} instead"
            remedy = f"{shell_command('repair', store)} recovers what it can"
            say(f"warning: {store}: unreadable {told}; {remedy}")
        return manifest
    raise StoreError(f"{store}: no generation can be read: {'; '.join(problems)}")


def read_unless_gone(file: Path) -> Manifest | None:
    """Read the file of a generation that must not be skipped; return None if it is gone.

    Raises:
        StoreError: It is damaged, or cannot be read.
    """
    try:
        return read(file)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        remedy = shell_command("repair", file.parent)
        raise StoreError(f"{file}: unreadable: {error}; first run {remedy}") from None


def commit(
    store: Path,
    change: Callable[[Manifest], Manifest],
    model: ModelCard,
    *,
    over_damage: bool = False,
) -> Manifest:
    """Commit a change to the generation that is the newest when the claim succeeds.

    If nothing changes, the newest generation stays the newest. Files that only a damaged generation
    names would be lost after a newer one, so only `repair`, which looks first, commits over damage.

    Raises:
        StoreError: The newest generation is damaged, or other writers were faster each time.
    """
    for _ in range(TRIES):
        # One listing gives both the base and the number to claim. If the folder were listed again
        # for the number, a generation made in between would be skipped and lost.
        found = generations(store)
        base: Manifest | None = Manifest(0, model)
        if found:
            base = _newest_of(store, found) if over_damage else read_unless_gone(found[0])
        if base is None:
            continue
        last_number = number_of(found[0]) if found else 0
        try:
            changed = change(base)
        except StoreError:
            # Files it read may have been removed, as a newer generation does not need them.
            if found and generations(store)[:1] != found[:1]:
                continue
            raise
        if changed == base and found and last_number == base.generation:
            # Its writer may have died before it was durable.
            files.sync_folder(store)
            return base
        if changed.named_files - base.named_files:
            _require_shards(store, base, changed)
        following = replace(
            changed,
            generation=last_number + 1,
            removing=tuple(name for name in changed.removing if file_of(store, name).exists()),
            previous=sha256_of(base) if found else "",
        )
        if not files.claim(path_of(store, last_number + 1), render(following)):
            continue
        if not found or _is_in_history(store, found[0], following):
            return following
        # So much time has passed that an old number was free again; this generation would never
        # be read.
        files.remove(path_of(store, last_number + 1))
    raise StoreError(
        f"{store}: {TRIES} other writers committed first; nothing was changed; run it again"
    )


def _require_shards(store: Path, base: Manifest, changed: Manifest) -> None:
    """Reject new shards and indexes that are so old that a collector treated them as garbage."""
    for name in sorted(changed.named_files - base.named_files):
        # Removed files do not come back, so a file that exists and is not announced now stays until
        # a generation announces it, and then this commit fails to get its number.
        if name in base.removing or not file_of(store, name).exists():
            file = file_of(store, name).name
            raise StoreError(f"{store}: {file} was removed before it was committed; run it again")


def _is_in_history(store: Path, base: Path, claimed: Manifest) -> bool:
    """Return whether a generation just claimed is the newest, or others were built on it.

    It is neither if its number belonged to another generation that has since been removed.
    """
    later = [file for file in generations(store) if number_of(file) > claimed.generation]
    if not later:
        return True
    if number_of(later[-1]) > claimed.generation + 1:
        return False
    try:
        previous = read(later[-1]).previous
    except FileNotFoundError:
        return _is_in_history(store, base, claimed)
    except (ValueError, OSError):
        previous = ""
    # Garbage is removed oldest first, so a number is free again only when its base is gone.
    return previous == sha256_of(claimed) if previous else base.exists()


def require_model(store: Path, stored: Manifest, model: ModelCard) -> None:
    """Check that a store holds embeddings of this model.

    Raises:
        IdentityError: The store holds embeddings of another model.
    """
    if stored.model.identity != model.identity:
        raise IdentityError(
            f"{store} holds embeddings of {stored.model.identity}, the model is {model.identity}: "
            "embed into a new store"
        )


def commit_index(store: Path, name: str, shards: tuple[str, ...]) -> Manifest:
    """Commit an index folder to the store; the shards it was built from must still be there."""

    def change(base: Manifest) -> Manifest:
        if tuple(s.name for s in base.shards[: len(shards)]) != shards:
            raise StoreError(f"{store}: its shards changed while the index was built; run it again")
        description = store / "index" / name / "index.json"
        return replace(base, index=IndexCard(name, files.sha256(description)))

    return commit(store, change, newest(store).model)
