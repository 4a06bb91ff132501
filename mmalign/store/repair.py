"""repair: a generation without damaged files, and with those that only a damaged one named.

An unreadable generation is still evidence: a shard whose name or hash appears in it was committed,
and deletions that can be read in it were made.
"""

import contextlib
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmalign import files
from mmalign.errors import StoreError
from mmalign.store import failures, health
from mmalign.store import manifest as manifests
from mmalign.store.ids import IdCache
from mmalign.store.manifest import Manifest, Shard
from mmalign.store.schema import schema
from mmalign.store.shards import ShardFile, read_damaged_shard

DELETED = rb'"%s"[^{}]*"deleted_rows": (\d+),\s*"deleted": "([^"]+)"'
ANNOUNCED = rb'"((?:shards|index)/[a-z0-9][a-z0-9_-]*)"'


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
    saved = [
        s
        for s in _find_saved(store, manifest, evidence, findings.damage)
        if f"shards/{Path(s.name).stem}" not in announced
    ]
    lost = findings.damaged_entries(store / "shards")
    indexes = findings.damaged_entries(store / "index")
    ids_of_shards = IdCache(store, manifest.model.dim)
    before, listed = manifest, 0

    def change(base: Manifest) -> Manifest:
        nonlocal before, listed
        before = base
        # First, so that a killed repair does not lose rows silently.
        listed = sum(
            _list_lost(store, s, manifest.model.dim) for s in base.shards if s.name in lost
        )
        undamaged = [
            _with_readable_deletions(s, evidence) for s in base.shards if s.name not in lost
        ]
        shards = _append_saved(store, ids_of_shards, undamaged, saved)
        # Without a shard, the rows after it get other numbers.
        drop_index = len(undamaged) < len(base.shards) or (
            base.index and base.index.name in indexes
        )
        removing = tuple(sorted({*base.removing, *announced}))
        return replace(
            base, shards=shards, index=None if drop_index else base.index, removing=removing
        )

    after = manifests.commit(store, change, manifest.model, over_damage=True)
    dropped = [s for s in before.shards if s.name in lost]
    moved = _mend_failures(store) if findings.lines else []
    moved += [
        *_set_aside(
            store, [f for f in manifests.generations(store) if _names_damaged(f, lost, indexes)]
        ),
        *_set_aside(store, [store / "shards" / name for name in sorted(lost)]),
        *_set_aside(store, [store / "index" / name for name in sorted(indexes)]),
    ]
    return RepairReport(
        after.generation,
        after.rows,
        tuple(health.describe_damage(store, findings)),
        tuple(s.name for s in dropped),
        sum(s.rows - s.deleted_rows for s in dropped),
        listed,
        tuple(s.name for s in saved),
        before.index is not None and after.index is None,
        tuple(moved),
    )


def _read_damaged(file: Path) -> bytes:
    with contextlib.suppress(OSError):
        return files.claimed(file)
    return b""


def _find_saved(
    store: Path, manifest: Manifest, evidence: Sequence[bytes], damage: dict[Path, str]
) -> list[Shard]:
    """Return shards that only the evidence names, in its order; add damaged ones to `damage`."""
    named = {s.name for s in manifest.shards} if evidence else set()
    saved = []
    for path in store.glob("shards/*.arrow") if evidence else ():
        if path.name in named:
            continue
        sha256 = files.sha256(path)
        mentions = [
            (i, c.find(n.encode())) for i, c in enumerate(evidence) for n in (path.name, sha256)
        ]
        mentions = [mention for mention in mentions if mention[1] >= 0]
        if mentions:
            try:
                file = ShardFile(path, manifest.model.dim)
                for column in schema(manifest.model.dim).names:
                    file.column(column)
            except StoreError as error:
                damage[path] = f"named by a damaged generation, but unusable: {error}"
                continue
            shard = Shard(path.name, len(file.batch), path.stat().st_size, sha256)
            saved.append((min(mentions), _with_readable_deletions(shard, evidence)))
    return [shard for _, shard in sorted(saved, key=lambda s: s[0])]


def _with_readable_deletions(shard: Shard, evidence: Iterable[bytes]) -> Shard:
    """Return the shard with the deletions that can be read in the evidence."""
    for content in evidence:
        match = re.search(DELETED % re.escape(shard.name.encode()), content)
        try:
            noted = replace(shard, deleted=match[2].decode()) if match else shard
            live_N = noted.live
        except ValueError:
            continue
        if match and shard.rows - live_N.sum() == int(match[1]):
            shard = shard.with_live(shard.live & live_N)
    return shard


def _append_saved(
    store: Path, ids_of_shards: IdCache, shards: Sequence[Shard], saved: Iterable[Shard]
) -> tuple[Shard, ...]:
    """Append the saved shards; their rows replace earlier rows with the same id."""
    for shard in saved:
        if shard.name not in {s.name for s in shards}:
            file = ShardFile(store / "shards" / shard.name, ids_of_shards.dim)
            ids = file.ids(np.flatnonzero(shard.live))
            shards = [*ids_of_shards.with_ids_deleted(shards, ids), shard]
    return tuple(shards)


def _list_lost(store: Path, shard: Shard, dim: int) -> int:
    rows = read_damaged_shard(store / "shards" / shard.name, dim, ("id", "uri"))
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


def _names_damaged(file: Path, lost: set[str], indexes: set[str]) -> bool:
    """Return whether a generation cannot be read or names damaged files."""
    try:
        manifest = manifests.read(file)
    except (ValueError, OSError):
        return True
    named = manifest.index.name if manifest.index else None
    return named in indexes or not lost.isdisjoint(s.name for s in manifest.shards)


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
