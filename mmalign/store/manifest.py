"""One generation of a store: which rows of which shards, made by which model, with which index.

A generation is one file, `manifest-00000007.json`, and the only commit point: what the newest
readable generation does not name does not exist. A writer claims the next number; if another
writer has claimed it first, it reads that generation and retries on top of it. The shards are
listed in groups, see `groups.py`.

What a commit stops naming is recorded as retired. Files are removed only after a generation has
announced it as `removing`. A commit on top of that generation must not name these files, and a
commit on top of an older one fails to get the number. So no file that a commit names is removed,
however long any process pauses. Each commit removes all but the newest generations, and then the
groups that only these named; shards and indexes are left to `garbage.py`.

N rows of a shard.
"""

import contextlib
import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign import files
from mmalign.errors import StoreError, shell_command
from mmalign.progress import say
from mmalign.store import format2
from mmalign.store import groups as shard_groups
from mmalign.store.groups import NAME, SHA256, Groups, Shard, is_count, matches
from mmalign.store.model_card import ModelCard, invalid_model, model_card_of, model_values
from mmalign.store.shards import with_deleted_files

FORMAT = 3
TRIES = 100
# Generations that are kept: a damaged one is replaced by the one before.
KEPT = 16
INDEX = re.compile(NAME)
REMOVING = re.compile(rf"manifest-[0-9]{{8,18}}|(shards|index|groups)/{NAME}")


@dataclass(frozen=True)
class IndexCard:
    """The index of a generation: a folder under index/."""

    name: str
    sha256: str
    """Hash of its index.json, which holds the hashes of the other files in the folder."""


@dataclass(frozen=True)
class Retired:
    """A file or folder that an earlier generation named."""

    name: str
    """Its path in the store, without the file extension."""
    generation: int
    """The first generation that does not name it. The time of change of the file is no earlier."""


@dataclass(frozen=True)
class Manifest:
    """What a store holds in one generation."""

    generation: int
    model: ModelCard
    shards: tuple[Shard, ...] = ()
    index: IndexCard | None = None
    next: ModelCard | None = None
    """The model whose vectors are being built beside those of `model`, to take their place."""
    removing: tuple[str, ...] = ()
    """What is about to be removed: paths in the store without file extensions."""
    retired: tuple[Retired, ...] = ()
    """What earlier generations named, as long as it is on the disk."""
    previous: str = ""
    """Hash of the generation that this one was made from; empty if mmalign did not write it."""
    groups: tuple[str, ...] = field(default=(), compare=False)
    """The names of the files that hold `shards`."""
    recorded_hash: str = field(default="", compare=False)
    """The hash in its file, if it was read from one."""
    format: int = field(default=FORMAT, compare=False)

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
        """Shards and indexes that this generation needs, written as in `removing`."""
        return names_of(self.shards, self.index)

    def with_next(self, model: ModelCard | None) -> "Manifest":
        """Return the generation in which vectors of a model are built beside the current ones.

        Those of another model that were built so far are dropped; with None, nothing is built.
        """
        if model and self.next and self.next.identity == model.identity:
            # It may have a modality more than when it was begun.
            return replace(self, next=model)
        shards = tuple(replace(s, next=None) if s.next else s for s in self.shards)
        return replace(self, next=model, shards=shards)

    def swapped(self) -> "Manifest":
        """Return the generation that has the next vectors of all its shards as its own.

        An index of the old vectors is left behind.
        """
        assert self.next is not None
        shards = tuple(shard.swapped() for shard in self.shards)
        return replace(self, model=self.next, next=None, index=None, shards=shards)


def names_of(shards: Iterable[Shard], index: IndexCard | None = None) -> set[str]:
    """Return the files of shards, and the folder of an index, written as in `removing`."""
    indexes = {f"index/{index.name}"} if index else set()
    return indexes | {f"shards/{Path(f.name).stem}" for s in shards for f in s.files.values()}


def canonical(values: dict[str, Any]) -> bytes:
    """Return the canonical JSON for hashing: sorted keys, no spaces, only ASCII."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def render(manifest: Manifest) -> bytes:
    """Return a manifest as JSON, with its hash; its groups must be written before."""
    values = {**_values(manifest), "sha256": sha256_of(manifest)}
    return json.dumps(values, indent=1).encode() + b"\n"


def sha256_of(manifest: Manifest) -> str:
    """Return the hash that the file of a manifest holds when it is written."""
    return hashlib.sha256(canonical(_values(manifest))).hexdigest()


def _values(manifest: Manifest) -> dict[str, Any]:
    values = {
        "format": FORMAT,
        "generation": manifest.generation,
        "model": model_values(manifest.model),
        "groups": list(manifest.groups),
        "index": asdict(manifest.index) if manifest.index else None,
    }
    optional: dict[str, Any] = {
        "next": model_values(manifest.next) if manifest.next else None,
        "removing": list(manifest.removing),
        "retired": [[r.name, r.generation] for r in manifest.retired],
        "previous": manifest.previous,
    }
    return values | {name: value for name, value in optional.items() if value}


def parse(content: bytes, groups: Groups) -> Manifest:
    """Read a manifest from its JSON.

    Args:
        content: The content of the file.
        groups: Reads the groups of its store.

    Raises:
        ValueError, OSError: The content or one of its groups is damaged or missing.
        StoreError: It is intact, but from another version of mmalign or another program.
    """
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        recorded_hash = values.pop("sha256", None)
        actual_hash = hashlib.sha256(canonical(values)).hexdigest()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    found = values.get("format")
    if recorded_hash != actual_hash:
        early = "format 1 of an early version of mmalign: embed into a new store"
        raise ValueError(early if found == 1 else "its hash does not match")
    if found not in (format2.FORMAT, FORMAT):
        known = f"this version of mmalign reads formats {format2.FORMAT} and {FORMAT}"
        raise StoreError(f"format {found!r}, but {known}")
    try:
        manifest = replace(_manifest(values), recorded_hash=actual_hash, format=found)
        wrong = next(_invalid_values(manifest), None)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        wrong = f"invalid fields: {error}"
    if wrong:
        raise StoreError(f"not made by mmalign: {wrong}")
    if found == FORMAT:
        manifest = replace(manifest, shards=groups.read(manifest.groups))
    if len({shard.name for shard in manifest.shards}) < len(manifest.shards):
        raise StoreError("not made by mmalign: the same shard twice")
    if not all(is_in_space(shard, manifest) for shard in manifest.shards):
        raise StoreError("not made by mmalign: vectors of several spaces")
    return manifest


def is_in_space(shard: Shard, manifest: Manifest) -> bool:
    """Return whether the vectors of a shard are of the models of a generation."""
    following = manifest.next.identity if manifest.next else None
    return shard.space in ("", manifest.model.identity) and (
        shard.next is None or shard.next.space == following
    )


def _manifest(values: dict[str, Any]) -> Manifest:
    index, following = values["index"], values.get("next")
    listed = values["shards"] if values["format"] == format2.FORMAT else None
    return Manifest(
        generation=values["generation"],
        model=model_card_of(values["model"]),
        shards=tuple(format2.shard(shard) for shard in listed or ()),
        index=IndexCard(**index) if index else None,
        next=model_card_of(following) if following else None,
        removing=tuple(values.get("removing", ())),
        retired=tuple(Retired(*r) for r in values.get("retired", ())),
        previous=values.get("previous", ""),
        groups=tuple(values["groups"] if listed is None else ()),
    )


def _invalid_values(manifest: Manifest) -> Iterator[str]:
    """Yield values that mmalign never writes: names outside the store, impossible sizes."""
    if not is_count(manifest.generation, 10**18):
        yield f"generation {manifest.generation!r}"
    for model in filter(None, (manifest.model, manifest.next)):
        yield from invalid_model(model)
    for shard in manifest.shards:
        yield from (f"the shard {shard.name!r} with {w}" for w in shard_groups.invalid(shard))
    index = manifest.index
    if index and not (matches(INDEX, index.name) and matches(SHA256, index.sha256)):
        yield f"the index {index.name!r} with the hash {index.sha256!r}"
    yield from (f"the group {name!r}" for name in manifest.groups if not matches(SHA256, name))
    for name in (*manifest.removing, *(r.name for r in manifest.retired)):
        if not matches(REMOVING, name):
            yield f"{name!r}, which is not a file of a store"
    for retired in manifest.retired:
        if not is_count(retired.generation, 10**18):
            yield f"{retired.name!r}, retired by {retired.generation!r}"
    if manifest.previous and not matches(SHA256, manifest.previous):
        yield f"the hash {manifest.previous!r}"


def path_of(store: Path, generation: int) -> Path:
    """Return the file of a generation."""
    return store / f"manifest-{generation:08d}.json"


def paths_of(store: Path, name: str) -> list[Path]:
    """Return the files or the folder that a name in `removing` stands for."""
    kind, _, stem = name.partition("/")
    if kind == shard_groups.FOLDER:
        return list(shard_groups.both(store / kind, stem))
    ending = {"shards": ".arrow", "index": ""}.get(kind, ".json")
    return [store / f"{name}{ending}"]


def is_there(store: Path, name: str) -> bool:
    """Return whether anything of a name in `removing` is on the disk."""
    return any(path.exists() for path in paths_of(store, name))


def linked_folders(store: Path) -> list[Path]:
    """Return the folders of a store that are links to another place.

    The other place may hold any files, under names that an untrusted manifest may contain.
    """
    folders = (store / name for name in ("shards", "index", "groups", "damaged"))
    return [f for f in folders if f.exists() and f.resolve().parent != store.resolve()]


def number_of(file: Path) -> int:
    """Return the generation of a file."""
    return int(file.stem[9:])


def generations(store: Path) -> list[Path]:
    """List the files of all generations, newest first."""
    found = [f for f in store.glob("manifest-*.json") if f.stem[9:].isdecimal()]
    return sorted(found, key=number_of, reverse=True)


def read(file: Path, groups: Groups | None = None) -> Manifest:
    """Read the file of a generation and its groups.

    Raises:
        ValueError, OSError: The file is damaged or missing.
        StoreError: It may be intact: another version of mmalign wrote it, or permission is denied.
    """
    try:
        return parse(files.claimed(file), groups or Groups(file.parent))
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
        manifest = _newest_of(store, found, Groups(store))
        if manifest:
            return manifest
    raise StoreError(f"{store}: {TRIES} other writers committed first; run it again")


def _newest_of(store: Path, found: Sequence[Path], groups: Groups) -> Manifest | None:
    """Read the newest readable generation of a list; return None if the list is outdated."""
    problems = []
    for file in found:
        try:
            manifest = read(file, groups)
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


def read_unless_gone(file: Path, groups: Groups | None = None) -> Manifest | None:
    """Read the file of a generation that must not be skipped; return None if it is gone.

    Raises:
        StoreError: It is damaged, or cannot be read.
    """
    try:
        return read(file, groups)
    except FileNotFoundError:
        if file.exists():
            remedy = shell_command("repair", file.parent)
            raise StoreError(f"{file}: a group is missing; first run {remedy}") from None
        return None
    except (ValueError, OSError) as error:
        remedy = shell_command("repair", file.parent)
        raise StoreError(f"{file}: unreadable: {error}; first run {remedy}") from None


def commit(
    store: Path,
    change: Callable[[Manifest], Manifest],
    model: ModelCard,
    *,
    groups: Groups | None = None,
    over_damage: bool = False,
    upgrade: bool = False,
) -> Manifest:
    """Commit a change to the generation that is the newest when the claim succeeds.

    If nothing changes, the newest generation stays the newest. Files that only a damaged generation
    names would be lost after a newer one, so only `repair`, which looks first, commits over damage.

    Args:
        store: The store; a folder without generations becomes one.
        change: Returns the new content; it may be called several times.
        model: The model of a new store.
        groups: Kept by callers that commit often.
        over_damage: Build on the newest generation that can be read.
        upgrade: Make format 3 of a store of format 2.

    Raises:
        StoreError: The newest generation is damaged or of format 2, or other writers were faster
            each time.
    """
    groups = groups or Groups(store)
    for _ in range(TRIES):
        # One listing gives both the base and the number to claim. If the folder were listed again
        # for the number, a generation made in between would be skipped and lost.
        found = generations(store)
        read = _newest_of if over_damage else _newest_undamaged
        base = read(store, found, groups) if found else Manifest(0, model)
        if base is None:
            continue
        if not upgrade:
            require_format(store, base)
        last_number = number_of(found[0]) if found else 0
        try:
            changed = change(base)
        except StoreError:
            # Files it read may have been removed, as a newer generation does not need them.
            if found and generations(store)[:1] != found[:1]:
                continue
            raise
        same = changed == base and base.format == FORMAT
        if same and found and last_number == base.generation:
            # Its writer may have died before it was durable.
            files.sync_folder(store)
            return base
        try:
            following, obsolete = _following(store, base, changed, found, groups)
        except FileNotFoundError:
            # Nothing was written for so long that the file of a group was taken for garbage.
            if not store.is_dir():
                raise
            continue
        path = path_of(store, following.generation)
        if not files.claim(path, render(following)):
            continue
        if not found or _is_in_history(store, found[0], following):
            _remove(obsolete)
            return following
        # So much time has passed that an old number was free again; this generation would never
        # be read.
        files.remove(path)
    raise StoreError(
        f"{store}: {TRIES} other writers committed first; nothing was changed; run it again"
    )


def _newest_undamaged(store: Path, found: Sequence[Path], groups: Groups) -> Manifest | None:
    return read_unless_gone(found[0], groups)


def _following(
    store: Path, base: Manifest, changed: Manifest, found: Sequence[Path], groups: Groups
) -> tuple[Manifest, list[Path]]:
    """Return the generation to claim, with its groups written, and the files that it removes."""
    shards = tuple(with_deleted_files(store, shard) for shard in changed.shards)
    changed = replace(changed, shards=shards)
    added, dropped = _difference(base, changed)
    require_files(store, base, added)
    leaving = {f"groups/{name}" for name in base.groups}
    avoid = frozenset(name.partition("/")[2] for name in (*base.removing, *_names(base.retired)))
    names = groups.write(changed.shards, avoid)
    leaving -= {f"groups/{name}" for name in names}
    retired = [r for r in base.retired if r.name not in added and is_there(store, r.name)]
    number = (number_of(found[0]) if found else 0) + 1
    retired += [Retired(name, number) for name in sorted(dropped | leaving)]
    _touch(path for name in dropped for path in paths_of(store, name))
    oldest = number_of(found[-1]) if found else 0
    old_groups = [
        r.name for r in retired if r.name.startswith("groups/") and r.generation <= oldest
    ]
    old_generations = found[KEPT - 1 :]
    removing = {*changed.removing, *old_groups, *(file.stem for file in old_generations)}
    following = replace(
        changed,
        generation=number,
        removing=tuple(sorted(name for name in removing if is_there(store, name))),
        retired=tuple(retired),
        previous=base.recorded_hash,
        groups=names,
        format=FORMAT,
    )
    # The generations that named these groups are gone, and the claim has made that durable.
    # Oldest first, so that a freed number is below all existing ones.
    obsolete = [path for name in old_groups for path in paths_of(store, name)]
    return replace(following, recorded_hash=sha256_of(following)), [
        *obsolete,
        *old_generations[::-1],
    ]


def _names(retired: Iterable[Retired]) -> list[str]:
    return [r.name for r in retired]


def _difference(base: Manifest, changed: Manifest) -> tuple[set[str], set[str]]:
    """Return the names that only the changed manifest has, and those that only the base has."""
    before, after = ({id(shard) for shard in m.shards} for m in (base, changed))
    new = names_of((s for s in changed.shards if id(s) not in before), changed.index)
    old = names_of((s for s in base.shards if id(s) not in after), base.index)
    return new - old, old - new


def require_files(store: Path, base: Manifest, added: Iterable[str]) -> None:
    """Check that new shards and indexes have not been removed.

    Raises:
        StoreError: They were so old that a collector treated them as garbage.
    """
    for name in sorted(added):
        # Removed files do not come back, so a file that exists and is not announced now stays until
        # a generation announces it, and then this commit fails to get its number.
        if name in base.removing or not is_there(store, name):
            file = paths_of(store, name)[0].name
            raise StoreError(f"{store}: {file} was removed before it was committed; run it again")


def _touch(paths: Iterable[Path]) -> None:
    """Record in files that they are needed until now."""
    for path in paths:
        with contextlib.suppress(OSError):
            files.disk.touch(path)


def _remove(paths: Iterable[Path]) -> None:
    """Remove files that no generation needs; what cannot be removed is tried again later."""
    for path in paths:
        with contextlib.suppress(OSError):
            files.remove(path)


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
    return previous == claimed.recorded_hash if previous else base.exists()


def require_format(store: Path, manifest: Manifest) -> None:
    """Check that a store may be changed.

    Raises:
        StoreError: It has a format that is only read.
    """
    if manifest.format < FORMAT:
        remedy = shell_command("upgrade", store)
        raise StoreError(f"{store}: format {manifest.format}, which is only read; run {remedy}")


def commit_index(store: Path, name: str, shards: tuple[str, ...], space: str) -> Manifest:
    """Commit an index folder to the store.

    The shards it was built from must still be there, with vectors of the same space.
    """

    def change(base: Manifest) -> Manifest:
        current = tuple(s.name for s in base.shards[: len(shards)])
        if (current, base.model.identity) != (shards, space):
            raise StoreError(f"{store}: its shards changed while the index was built; run it again")
        description = store / "index" / name / "index.json"
        return replace(base, index=IndexCard(name, files.sha256(description)))

    return commit(store, change, newest(store).model)
