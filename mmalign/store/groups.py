"""Groups: the lower level of a manifest. A generation names groups by hash, a group names shards.

A group is a file named by the hash of its content and never changed. A commit writes the groups
that differ from those of the generation before, so what it writes does not grow with the store.
Each group is written twice, as no other file says what it says.

N rows of a shard.
"""

import base64
import contextlib
import hashlib
import json
import re
import secrets
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmalign import files
from mmalign.arrays import Bools
from mmalign.errors import StoreError, shell_command

FOLDER = "groups"
# A manifest may name only files inside its store, as manifests are untrusted input.
NAME = r"[a-z0-9][a-z0-9_-]{0,63}"
SHARD_FILE, SHARD, SHA256 = (
    re.compile(rf"{NAME}\.arrow"),
    re.compile(NAME),
    re.compile("[0-9a-f]{64}"),
)
MOST_ROWS, MOST_BYTES = 2**31 - 1, 2**48
# One in so many shards ends a group, and so many at most are in one.
BORDER, MOST_SHARDS = 64, 256
NEXT = "next"
ROLES = ("rows", "vectors", "thumbnails")
DELETED = ("deleted", "deleted-copy")
DELETED_SCHEMA = pa.schema([pa.field("deleted", pa.bool_(), nullable=False)])


@dataclass(frozen=True)
class StoredFile:
    """An immutable file under shards/."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class NextVectors:
    """Vectors of the rows of a shard in the space that will replace the current one.

    A row whose image could not be read has none of it.
    """

    file: StoredFile
    space: str
    """The identity of their model, see `ModelCard`."""
    precision: str = ""
    version: str = ""


@dataclass(frozen=True)
class Shard:
    """Rows in files that all hold the same rows, and which of the rows are deleted.

    In a store that was format 2, all three are the same file.
    """

    name: str
    rows: int
    row_file: StoredFile
    """Ids, locations, captions, metadata, and the hashes of the ids."""
    vector_file: StoredFile
    thumbnail_file: StoredFile | None = None
    """None if no row has a thumbnail."""
    precision: str = ""
    """The arithmetic that its vectors were computed in; empty if unknown."""
    version: str = ""
    """The version of mmalign that wrote them; empty if unknown."""
    space: str = ""
    """The identity of their model, see `ModelCard`; empty in shards of earlier versions."""
    next: NextVectors | None = None
    """What takes the place of `vector_file` when all shards have it, see `Manifest.next`."""
    deleted_rows: int = 0
    deleted: str = ""
    """Base64 of compressed bits, one for each row, the highest bit of a byte first; 1 is deleted.
    Empty if no row is deleted, or if there are files that say it."""
    deleted_files: tuple[StoredFile, ...] = ()
    """Two equal files of the deletions, if these are large: nothing else says what they say."""
    store: Path | None = field(default=None, compare=False, repr=False)
    """The folder of the store, if there are such files."""

    @property
    def files(self) -> dict[str, StoredFile]:
        """All files by role: of the rows, the vectors of the next space, large deletions."""
        following = {NEXT: self.next.file} if self.next else {}
        return self.current_files | following | dict(zip(DELETED, self.deleted_files, strict=False))

    @property
    def current_files(self) -> dict[str, StoredFile]:
        """The files of the rows, by role: rows, vectors, thumbnails."""
        every = zip(ROLES, (self.row_file, self.vector_file, self.thumbnail_file), strict=True)
        return {role: file for role, file in every if file}

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in set(self.files.values()))

    @property
    def live(self) -> Bools:
        """Mask of the rows that are not deleted, shape (N,).

        Raises:
            StoreError: The files of the deletions are damaged or missing.
        """
        if self.deleted_files:
            return ~_read_deleted(self)
        if not self.deleted:
            return np.ones(self.rows, np.bool_)
        bits = np.frombuffer(_bits(self), np.uint8)
        return ~np.unpackbits(bits, count=self.rows).astype(np.bool_)

    def swapped(self) -> "Shard":
        """Return the shard with the vectors of the next space as its own."""
        assert self.next is not None
        new = self.next
        return replace(
            self, vector_file=new.file, space=new.space, precision=new.precision,
            version=new.version, next=None,
        )  # fmt: skip

    def with_live(self, live_N: Bools) -> "Shard":
        """Return the shard with only these rows live."""
        deleted = int(self.rows - live_N.sum())
        bits = compressed(np.packbits(~live_N).tobytes()) if deleted else ""
        return replace(self, deleted_rows=deleted, deleted=bits, deleted_files=())

    def with_rows_deleted(self, rows: Sequence[int]) -> "Shard":
        """Return the shard with these rows deleted too."""
        if not len(rows):
            return self
        live_N = self.live
        live_N[rows] = False
        return self.with_live(live_N)


def compressed(bits: bytes) -> str:
    """Return bits as `Shard.deleted` holds them."""
    return base64.b64encode(zlib.compress(bits, 9)).decode()


def _bits(shard: Shard) -> bytes:
    # No more than a shard can have: the content is untrusted, and could expand without limit.
    most = (shard.rows + 7) // 8 + 1
    content = base64.b64decode(shard.deleted, validate=True)
    return zlib.decompressobj().decompress(content, most)


def _read_deleted(shard: Shard) -> Bools:
    """Read the deletions of a shard from the file that is undamaged."""
    assert shard.store is not None
    problem = ""
    for file in shard.deleted_files:
        path = shard.store / "shards" / file.name
        try:
            files.require_regular(path)
            content = path.read_bytes()
        except FileNotFoundError:
            again = "if the store was compacted since it was opened, open it again"
            problem = problem or f"{path}: deletions are missing ({again})"
            continue
        except OSError as error:
            problem = problem or f"{path}: {error.strerror or error}"
            continue
        if hashlib.sha256(content).hexdigest() == file.sha256:
            # Even so the content is untrusted: anyone may have written both.
            with contextlib.suppress(ValueError, IndexError, pa.ArrowException):
                column = pa.ipc.open_file(content).get_batch(0).column(0)
                column.validate(full=True)
                deleted_N: Bools = column.to_numpy(zero_copy_only=False)
                if deleted_N.shape == (shard.rows,) and deleted_N.sum() == shard.deleted_rows:
                    return deleted_N.astype(np.bool_)
        problem = f"{path}: deletions are damaged"
    raise StoreError(f"{problem}; run {shell_command('repair', shard.store)}")


def divide(shards: Sequence[Shard]) -> list[tuple[Shard, ...]]:
    """Divide shards into groups, at borders that the names of the shards decide.

    So a change in the middle of a store moves no border behind it.
    """
    groups: list[tuple[Shard, ...]] = []
    first = 0
    for end, shard in enumerate(shards, 1):
        is_border = zlib.crc32(shard.name.encode()) % BORDER == 0
        if is_border or end - first == MOST_SHARDS or end == len(shards):
            groups.append(tuple(shards[first:end]))
            first = end
    return groups


class Groups:
    """Reads and writes the groups of a store; those it knows are not read or written again; final.

    What is known is checked against the disk by nobody: keep it no longer than one task takes.
    """

    def __init__(self, store: Path) -> None:
        self.folder = store / FOLDER
        self._shards: dict[str, tuple[Shard, ...]] = {}
        self._names: dict[tuple[int, ...], str] = {}

    def read(self, names: Sequence[str]) -> tuple[Shard, ...]:
        """Return the shards of groups.

        Raises:
            ValueError, OSError: A group is damaged or missing, in both of its files.
            StoreError: It was not made by mmalign.
        """
        for name in names:
            if name not in self._shards:
                self._keep(name, parse(read_either(self.folder, name), self.folder.parent))
        return tuple(shard for name in names for shard in self._shards[name])

    def write(self, shards: Sequence[Shard], avoid: frozenset[str]) -> tuple[str, ...]:
        """Write the groups of shards that are not on the disk yet; return the names of all.

        Args:
            shards: The shards, in order.
            avoid: Names that another process may be about to remove.
        """
        names = []
        known = self._names, self._shards
        self._names, self._shards = {}, {}
        for group in divide(shards):
            name = known[0].get(tuple(map(id, group)), "")
            if not name or name in avoid:
                content = render(group)
                name = hashlib.sha256(content).hexdigest()
                if name in avoid:
                    content = render(group, salt=secrets.token_hex(4))
                    name = hashlib.sha256(content).hexdigest()
                self._write(name, content)
            self._keep(name, group)
            names.append(name)
        return tuple(names)

    def _keep(self, name: str, shards: tuple[Shard, ...]) -> None:
        self._shards[name] = shards
        self._names[tuple(map(id, shards))] = name

    def _write(self, name: str, content: bytes) -> None:
        files.make_folder(self.folder)
        for path in both(self.folder, name):
            if path.exists() and path.read_bytes() == content:
                # Its writer may have died before the name was durable.
                files.sync_folder(self.folder)
            else:
                files.write_bytes(path, content)


def both(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the two files of a group."""
    return folder / f"{name}.json", folder / f"{name}.copy.json"


def read_either(folder: Path, name: str) -> bytes:
    """Return the content of a group from the file that is undamaged.

    Raises:
        ValueError: Both are damaged.
        OSError: Both are missing, or the disk fails.
    """
    problem: Exception | None = None
    for path in both(folder, name):
        try:
            files.require_regular(path)
            content = path.read_bytes()
        except OSError as error:
            problem = problem or error
            continue
        if hashlib.sha256(content).hexdigest() == name:
            return content
        problem = ValueError(f"the group {name} is damaged")
    assert problem is not None
    raise problem


def render(shards: Sequence[Shard], salt: str = "") -> bytes:
    """Return a group as JSON, a shard a line; a salt gives it another name."""
    lines = ",\n".join(json.dumps(_values(shard), separators=(",", ":")) for shard in shards)
    beside = f'"salt":"{salt}",' if salt else ""
    return f'{{{beside}"shards":[\n{lines}\n]}}\n'.encode()


def _values(shard: Shard) -> dict[str, Any]:
    values: dict[str, Any] = {"name": shard.name, "rows": shard.rows}
    values["files"] = {r: [f.name, f.bytes, f.sha256] for r, f in shard.files.items()}
    if shard.next:
        values[NEXT] = [shard.next.space, shard.next.precision, shard.next.version]
    optional = ("precision", "version", "space", "deleted_rows", "deleted")
    return values | {name: getattr(shard, name) for name in optional if getattr(shard, name)}


def parse(content: bytes, store: Path | None = None) -> tuple[Shard, ...]:
    """Read a group of a store from its JSON.

    Raises:
        StoreError: It was not made by mmalign.
    """
    try:
        shards = tuple(_shard(values, store) for values in json.loads(content)["shards"])
        wrong = next((f"the shard {s.name!r} with {w}" for s in shards for w in invalid(s)), None)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, zlib.error) as error:
        wrong = f"invalid fields: {error}"
    if wrong:
        raise StoreError(f"not made by mmalign: {wrong}")
    return shards


def _shard(values: dict[str, Any], store: Path | None) -> Shard:
    stored = {role: StoredFile(*file) for role, file in values["files"].items()}
    return Shard(
        values["name"],
        values["rows"],
        stored["rows"],
        stored["vectors"],
        stored.get("thumbnails"),
        next=NextVectors(stored[NEXT], *values[NEXT]) if NEXT in stored else None,
        deleted_files=tuple(stored[role] for role in DELETED if role in stored),
        store=store,
        **{k: v for k, v in values.items() if k not in ("name", "rows", "files", NEXT)},
    )


def invalid(shard: Shard) -> Iterator[str]:
    """Yield values that mmalign never writes: names outside the store, impossible sizes."""
    if not matches(SHARD, shard.name):
        yield "an invalid name"
    if not is_count(shard.rows, MOST_ROWS):
        yield f"{shard.rows!r} rows"
    for file in shard.files.values():
        if not (matches(SHARD_FILE, file.name) and is_count(file.bytes, MOST_BYTES)):
            yield f"the file {file.name!r} of {file.bytes!r} bytes"
        if not matches(SHA256, file.sha256):
            yield f"the hash {file.sha256!r}"
    told = [shard.precision, shard.version, shard.space, shard.deleted]
    if shard.next:
        told += [shard.next.space, shard.next.precision, shard.next.version]
    if len(shard.deleted_files) not in (0, len(DELETED)) or (shard.deleted_files and shard.deleted):
        yield f"{len(shard.deleted_files)} files of deletions"
    if not {type(text) for text in told} <= {str}:
        yield f"the precision {shard.precision!r} and version {shard.version!r}"
    elif not is_count(shard.deleted_rows, shard.rows):
        yield f"{shard.deleted_rows!r} deleted of {shard.rows} rows"
    else:
        is_inline = shard.deleted_rows and not shard.deleted_files
        expected = (shard.rows + 7) // 8 if is_inline else 0
        found = len(_bits(shard)) if shard.deleted else 0
        if found != expected:
            yield f"{found} bytes of deletions for {shard.rows} rows"


def matches(pattern: re.Pattern[str], text: Any) -> bool:
    """Return whether a value is a string that matches a pattern."""
    return isinstance(text, str) and pattern.fullmatch(text) is not None


def is_count(number: Any, most: int) -> bool:
    """Return whether a value is an integer from 0 to `most`."""
    return type(number) is int and 0 <= number <= most
