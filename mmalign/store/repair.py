"""repair: a generation without damaged files, and with those that only a damaged one named.

An unreadable generation is still evidence: a group whose name can be read in it was committed.
"""

import contextlib
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmalign import files
from mmalign.errors import StoreError
from mmalign.store import failures, health
from mmalign.store import manifest as manifests
from mmalign.store.groups import SHA256, Shard, parse, read_either
from mmalign.store.ids import OpenShards
from mmalign.store.manifest import Manifest
from mmalign.store.model_card import ModelCard
from mmalign.store.shards import ShardReader, read_damaged

ANNOUNCED = rb'"((?:shards|index|groups)/[a-z0-9][a-z0-9_-]*)"'


@dataclass(frozen=True)
class RepairReport:
    """What `repair` found and did."""

    generation: int
    rows: int
    damage: tuple[str, ...]
    """What `verify` reported before."""
    lost_shards: tuple[str, ...]
    lost_rows: int
    """Rows of these shards. The next `embed` adds them again if their sources still exist."""
    listed_rows: int
    """How many of them still had readable ids; they are listed as failures."""
    saved_shards: tuple[str, ...]
    """Shards that only a damaged generation named; their rows are in the store again."""
    index_dropped: bool
    moved: tuple[str, ...]
    """Paths that are now under damaged/."""


def repair(path: str | Path) -> RepairReport:
    """Commit a generation without damaged shards or index, and move damaged files to damaged/.

    Rows of undamaged shards stay, even of shards that only a damaged generation names.

    Raises:
        StoreError: No generation can be read, or a folder of the store is a link.
    """
    store = Path(path)
    manifest = manifests.newest(store)
    for folder in manifests.linked_folders(store):
        raise StoreError(f"{folder}: a link to another folder; replace it by the folder itself")
    findings = health.find_damage(store)
    evidence = [
        _read_damaged(f)
        for f in findings.unreadable
        if manifests.number_of(f) > manifest.generation
    ]
    # A collector that announced a removal in a damaged generation may still be running.
    announced = {n.decode() for content in evidence for n in re.findall(ANNOUNCED, content)}
    announced |= set(manifest.removing)
    mended = list(_mend_groups(store, findings))
    saved = _find_saved(store, manifest, evidence, announced, findings.damage)
    damaged = findings.damaged_entries(store / "shards")
    indexes = findings.damaged_entries(store / "index")
    open_shards = OpenShards(store, manifest.model)
    before, lost, listed = manifest, list[Shard](), 0

    def change(base: Manifest) -> Manifest:
        nonlocal before, lost, listed
        before = base
        lost = [s for s in base.shards if _is_lost(s, damaged)]
        # First, so that a killed repair does not lose rows silently.
        listed = sum(_list_lost(store, shard) for shard in lost)
        found = [_without_damaged(s, damaged) for s in base.shards if not _is_lost(s, damaged)]
        kept = _with_saved_deletions(found, saved)
        shards = _append_saved(open_shards, kept, _of_model(saved, base.model))
        # Without a shard, the rows after it get other numbers.
        drop_index = lost or (base.index and base.index.name in indexes)
        removing = tuple(sorted({*base.removing, *announced}))
        return replace(
            base, shards=shards, index=None if drop_index else base.index, removing=removing
        )

    after = manifests.commit(store, change, manifest.model, over_damage=True, upgrade=True)
    moved = [*mended, *(_mend_failures(store) if findings.lines else [])]
    moved += [
        *_set_aside(
            store, [f for f in manifests.generations(store) if _names_damaged(f, damaged, indexes)]
        ),
        *_set_aside(store, [store / "shards" / name for name in sorted(damaged)]),
        *_set_aside(store, [store / "index" / name for name in sorted(indexes)]),
    ]
    return RepairReport(
        after.generation,
        after.rows,
        tuple(health.describe_damage(store, findings)),
        tuple(s.name for s in lost),
        sum(s.rows - s.deleted_rows for s in lost),
        listed,
        tuple(
            s.name
            for s in _of_model(saved, before.model)
            if s.name not in {b.name for b in before.shards}
        ),
        before.index is not None and after.index is None,
        tuple(moved),
    )


def _read_damaged(file: Path) -> bytes:
    with contextlib.suppress(OSError):
        return files.claimed(file)
    return b""


def _mend_groups(store: Path, findings: health.Findings) -> Iterator[str]:
    """Write the damaged files of readable groups anew, and yield where the damaged ones are now."""
    folder = store / "groups"
    for path in [p for p in findings.damage if p.parent == folder]:
        content = read_either(folder, path.name[:64])
        yield from _set_aside(store, [path])
        files.write_bytes(path, content)


def _find_saved(
    store: Path,
    manifest: Manifest,
    evidence: Sequence[bytes],
    announced: set[str],
    damage: dict[Path, str],
) -> list[Shard]:
    """Return the shards of groups that only the evidence names; add damaged files to `damage`.

    The vectors of a next space are left out: which one it is, only their generation knows.
    """
    saved: dict[str, Shard] = {}
    for name in _named_groups(store, evidence):
        if name in manifest.groups or f"groups/{name}" in announced:
            continue
        with contextlib.suppress(ValueError, OSError, StoreError):
            for named in parse(read_either(store / "groups", name), store):
                shard = replace(named, next=None)
                if not _tells_deleted_rows(shard):
                    continue
                # One of another space is in the evidence of a swap: its rows are read from the
                # shard that had its name before, but what was deleted in it counts.
                others = not _of_model([shard], manifest.model)
                if others or _is_whole(store, shard, manifest.model, announced, damage):
                    saved[shard.name] = shard
    return list(saved.values())


def _tells_deleted_rows(shard: Shard) -> bool:
    with contextlib.suppress(StoreError):
        return len(shard.live) == shard.rows
    return False


def _named_groups(store: Path, evidence: Sequence[bytes]) -> list[str]:
    """Return the groups on the disk that the evidence names, in its order.

    Half of a name is enough, as a bit of the other half may be damaged.
    """
    found = []
    for name in {path.name[:64] for path in store.glob("groups/*.json")}:
        if not SHA256.fullmatch(name):
            continue
        halves = name[:32].encode(), name[32:].encode()
        mentions = [(i, c.find(half)) for i, c in enumerate(evidence) for half in halves]
        mentions = [mention for mention in mentions if mention[1] >= 0]
        if mentions:
            found.append((min(mentions), name))
    return [name for _, name in sorted(found)]


def _is_whole(
    store: Path, shard: Shard, model: ModelCard, announced: set[str], damage: dict[Path, str]
) -> bool:
    """Return whether all files of a shard are there; add damaged ones to `damage`."""
    for role, stored in shard.current_files.items():
        path = store / "shards" / stored.name
        if f"shards/{path.stem}" in announced:
            return False
        try:
            ShardReader(store, shard, model).file(role)
            same = files.sha256(path) == stored.sha256
            reason = "" if same else "its content does not match its hash"
        except StoreError as error:
            reason = str(error)
        if reason:
            if path.exists():
                damage[path] = f"named by a damaged generation, but unusable: {reason}"
            return False
    return True


def _with_saved_deletions(shards: Iterable[Shard], saved: Iterable[Shard]) -> list[Shard]:
    """Return shards as the damaged generation had them: what was deleted in it stays deleted."""
    later = {shard.name: shard for shard in saved}
    out = []
    for shard in shards:
        newer = later.get(shard.name)
        if newer is None:
            out.append(shard)
            continue
        both_live = newer.rows == shard.rows
        # After a swap, its vectors are of another space.
        kept = replace(newer, next=shard.next) if newer.space == shard.space else shard
        out.append(kept.with_live(newer.live & shard.live) if both_live else shard)
    return out


def _of_model(shards: Iterable[Shard], model: ModelCard) -> list[Shard]:
    """Return the shards whose vectors are those of a model."""
    return [shard for shard in shards if shard.space in ("", model.identity)]


def _is_lost(shard: Shard, damaged: set[str]) -> bool:
    """Return whether rows or vectors of a shard are damaged, or all that tells its deleted rows."""
    deleted = [file.name in damaged for file in shard.deleted_files]
    own = shard.row_file.name in damaged or shard.vector_file.name in damaged
    return own or (len(deleted) > 0 and all(deleted))


def _without_damaged(shard: Shard, damaged: set[str]) -> Shard:
    """Return a shard without damaged thumbnails, and without damaged vectors of a next space.

    Deletions of which one file is damaged are written anew from the other.
    """
    if any(file.name in damaged for file in shard.deleted_files):
        shard = shard.with_live(shard.live)
    if shard.thumbnail_file and shard.thumbnail_file.name in damaged:
        shard = replace(shard, thumbnail_file=None)
    return replace(shard, next=None) if shard.next and shard.next.file.name in damaged else shard


def _append_saved(
    open_shards: OpenShards, shards: Sequence[Shard], saved: Iterable[Shard]
) -> tuple[Shard, ...]:
    """Append the saved shards; their rows replace earlier rows with the same id."""
    for shard in saved:
        if shard.name not in {s.name for s in shards}:
            reader = ShardReader(open_shards.store, shard, open_shards.model)
            ids = reader.ids(np.flatnonzero(shard.live))
            shards = [*open_shards.with_ids_deleted(shards, ids), shard]
    return tuple(shards)


def _list_lost(store: Path, shard: Shard) -> int:
    rows = read_damaged(store / "shards" / shard.row_file.name, ("id", "uri"))
    live_N = np.ones(shard.rows, np.bool_)
    with contextlib.suppress(StoreError):
        live_N = shard.live
    lost = [
        {"id": i, "uri": uri, "reason": f"lost: shard {shard.name} damaged", "embedded": False}
        for number, (i, uri) in enumerate(rows)
        if number < shard.rows and live_N[number]
    ]
    failures.add_failures(store, lost)
    return len(lost)


def _mend_failures(store: Path) -> list[str]:
    """Keep only the readable lines; the original file is copied to damaged/."""
    failures_file = failures.path_of(store)
    files.make_folder(store / "damaged")
    copy = store / "damaged" / f"failures-{secrets.token_hex(4)}.jsonl"

    def change(content: bytes) -> bytes:
        files.write_bytes(copy, content)
        return failures.readable_lines_of(content)

    files.rewrite(failures_file, change)
    return [str(copy.relative_to(store))]


def _names_damaged(file: Path, damaged: set[str], indexes: set[str]) -> bool:
    """Return whether a generation cannot be read or names damaged files."""
    try:
        manifest = manifests.read(file)
    except (ValueError, OSError):
        return True
    named = manifest.index.name if manifest.index else None
    return named in indexes or any(
        file.name in damaged for shard in manifest.shards for file in shard.files.values()
    )


def _set_aside(store: Path, paths: Iterable[Path]) -> list[str]:
    moved = []
    for path in filter(Path.exists, paths):
        files.make_folder(store / "damaged")
        target = store / "damaged" / path.name
        if target.exists():
            target = target.with_name(f"{path.name}.{secrets.token_hex(4)}")
        # A compaction may have removed it just now.
        with contextlib.suppress(FileNotFoundError):
            files.move(path, target)
            moved.append(str(target.relative_to(store)))
    return moved
