"""Remove rows from a store, and rewrite its shards: delete, compact, join small shards."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmalign import files
from mmalign.arrays import Ints
from mmalign.errors import StoreError, shell_command
from mmalign.progress import say
from mmalign.store import manifest as manifests
from mmalign.store.garbage import AGE_S, collect, index_in_the_making, waiting_bytes
from mmalign.store.groups import Shard
from mmalign.store.ids import OpenShards, with_rows_deleted
from mmalign.store.manifest import Manifest
from mmalign.store.model_card import ModelCard
from mmalign.store.reader import Store
from mmalign.store.shards import ShardReader, write_tables
from mmalign.store.writer import ROWS_PER_SHARD


@dataclass(frozen=True)
class CompactReport:
    """What `compact` did."""

    generation: int
    rows: int
    deleted_rows: int
    """Rows deleted earlier that are now gone from the newest generation."""
    shards_before: int
    shards: int
    index_dropped: bool
    removed: tuple[str, ...]
    """Files and folders that no generation needs any longer."""
    removed_bytes: int
    waiting_bytes: int
    """Bytes that can be removed when they are an hour old, or with `now`."""


# A small store has shards that are quickly rewritten, a large one few shards to look into.
MOST_ROWS_PER_SHARD, SHARDS_WANTED = 262_144, 64
# So many shards, each of less than so many rows, are joined; of a long run the last ones.
FEWEST_JOINED, SMALL_SHARD, MOST_ROWS_JOINED = 8, ROWS_PER_SHARD // 2, 20 * ROWS_PER_SHARD
# Joining happens unasked, so readers of earlier generations get longer than after a compaction.
JOINED_AGE_S = 24 * 3600.0
# Deleting a larger fraction of the rows at once must be confirmed.
MOST_DELETED = 0.1


class ManyDeletions(StoreError):
    """More than a tenth of the rows would be deleted; nothing was."""


def require_few(path: str | Path, count: int, rows: int, yes: bool) -> None:
    """Refuse to delete more than a tenth of the rows unless the caller confirms it.

    Raises:
        ManyDeletions: It is more than a tenth, and `yes` is false.
    """
    if count > MOST_DELETED * rows and not yes:
        raise ManyDeletions(
            f"{path}: {count} of {rows} rows would be deleted, more than a tenth: "
            "nothing was deleted; to delete them anyway, add --yes (Python: yes=True)"
        )


def delete(path: str | Path, ids: Sequence[str]) -> int:
    """Delete rows by id, all in one generation; return how many.

    Raises:
        StoreError: An id is unknown; nothing was deleted.
    """
    return _delete(Path(path), ids, all_known=True)


def delete_rows(opened: Store, numbers: Sequence[int] | Ints) -> int:
    """Delete rows by their numbers in an open store if their ids are still live; return how many.

    The newest generation of the store is changed, which may have other row numbers.
    """
    rows = np.asarray(numbers, np.int64)
    rows = rows if opened.live is None else rows[opened.live[rows]]
    ids = [row["id"] for row in opened.rows(rows, ("id",))]
    return _delete(opened.path, ids, all_known=False)


def _delete(store: Path, ids: Sequence[str], all_known: bool) -> int:
    model = manifests.newest(store).model
    open_shards = OpenShards(store, model)
    deleted = 0

    def change(base: Manifest) -> Manifest:
        nonlocal deleted
        found = open_shards.find(base.shards, ids)
        deleted = sum(map(len, found))
        if all_known:
            _require_known(store, ids, found)
        return replace(base, shards=with_rows_deleted(base.shards, found))

    manifests.commit(store, change, model)
    return deleted


def _require_known(store: Path, ids: Sequence[str], found: Sequence[dict[str, int]]) -> None:
    live = {i for part in found for i in part}
    unknown = [i for i in dict.fromkeys(ids) if i not in live]
    if unknown:
        raise StoreError(f"{unknown_ids(store, unknown)}; nothing was deleted")


def unknown_ids(store: Path, unknown: Sequence[str], shown: int = 3) -> str:
    """Return the beginning of a message about ids that no row has."""
    more = f" and {len(unknown) - shown} more" if len(unknown) > shown else ""
    return f"{store}: no row has the id {', '.join(map(repr, unknown[:shown]))}{more}"


def shard_rows(total: int) -> int:
    """Return how many rows a shard should have in a store of so many, see decision 12."""
    return min(MOST_ROWS_PER_SHARD, max(ROWS_PER_SHARD, total // SHARDS_WANTED))


def compact(
    path: str | Path,
    rows_per_shard: int | None = None,
    *,
    now: bool = False,
    drop_next: bool = False,
) -> CompactReport:
    """Rewrite shards that have deleted rows or few rows, and remove files no longer needed.

    Rows keep their order but get new numbers, so an index is dropped. Other writers may run. While
    vectors of another model are being built, shards stay as they are, deleted rows included.

    Args:
        path: The store.
        rows_per_shard: Approximate number of rows in a new shard; by default, it grows with the
            store.
        now: Immediately remove files that only older generations need, and with them all that is
            left of deleted rows. Otherwise they stay for an hour, for current readers.
        drop_next: Drop the vectors of another model that are being built.

    Raises:
        StoreError: Something is damaged, or another compaction was faster; nothing was changed.
    """
    store = Path(path)
    before = manifests.newest(store)
    manifests.require_format(store, before)
    if drop_next:
        before = manifests.commit(store, lambda base: base.with_next(None), before.model)
    rows_per_shard = rows_per_shard or shard_rows(before.rows)
    if before.next:
        _say_waiting(store, before.next)
    for file in manifests.generations(store):
        # If a generation is unreadable, garbage and data cannot be told apart.
        manifests.read_unless_gone(file)
    new_shards: list[Shard] = []
    new_files: list[Path] = []
    rewritten = []
    try:
        for group in _runs_to_rewrite(before, rows_per_shard):
            first_new = len(new_shards)
            for shard in _rewrite(store, group, before.model, rows_per_shard):
                new_shards.append(shard)
                new_files += [store / "shards" / f.name for f in shard.files.values()]
                refresh_times(new_files)
            rewritten.append((group, tuple(new_shards[first_new:])))
    except StoreError:
        if before.named_files <= manifests.newest(store).named_files:
            raise
        raise StoreError(f"{store}: another compaction finished first; run it again") from None
    dropped = False

    def change(base: Manifest) -> Manifest:
        nonlocal dropped
        dropped = bool(rewritten) and base.index is not None
        shards = list(base.shards)
        for group, written in rewritten:
            shards = _replace_shards(store, shards, group, written)
        return replace(base, shards=tuple(shards), index=None if dropped else base.index)

    after = manifests.commit(store, change, before.model)
    if dropped:
        say(
            f"{store}: rows have new numbers, so the index was removed: "
            f"build a new one with {shell_command('index', store)}"
        )
    removed, removed_bytes = collect(store, now=now)
    waiting = waiting_bytes(store)
    if waiting:
        say(
            f"{store}: {waiting / 1e6:.3g} MB more are kept for an hour, as other processes may "
            f"still read them: compact again later, or {shell_command('compact', store, '--now')}"
        )
    if (store / "damaged").exists():
        say(
            f"{store / 'damaged'}: files set aside by a repair; delete them if you do not need them"
        )
    return CompactReport(
        after.generation,
        after.rows,
        sum(s.deleted_rows for group, _ in rewritten for s in group),
        len(before.shards),
        len(after.shards),
        dropped,
        tuple(removed),
        removed_bytes,
        waiting,
    )


def _say_waiting(store: Path, following: ModelCard) -> None:
    source = following.source or "MODEL"
    embed = shell_command("embed", "--model", source, "--data", "SRC", "--out", store)
    drop = shell_command("compact", store, "--drop-next")
    say(
        f"{store}: vectors of {following.identity} are being built, so shards stay as they are, "
        f"deleted rows included: complete them with {embed} and compact again, or run {drop}"
    )


def join_small_shards(path: str | Path) -> int:
    """Join the small shards at the end of a store if there are many; return how many were joined.

    Only shards behind those of the index: it stays valid. Rows keep their order and vectors, and
    their numbers but for those behind a deleted row. Files that earlier generations need stay for a
    day. Other writers may run.

    Raises:
        StoreError: Something is damaged, or another change was faster; nothing was changed.
    """
    store = Path(path)
    before = manifests.newest(store)
    manifests.require_format(store, before)
    group = _small_at_the_end(before.shards[_indexed(store, before) :])
    # New vectors that are being built belong to the shards as they are.
    if not group or before.next or index_in_the_making(store, before):
        return 0
    written = tuple(_rewrite(store, group, before.model, ROWS_PER_SHARD))

    def change(base: Manifest) -> Manifest:
        indexed = {shard.name for shard in base.shards[: _indexed(store, base)]}
        if indexed & {shard.name for shard in group} or index_in_the_making(store, base):
            raise StoreError(f"{store}: an index was built meanwhile; run it again")
        if base.next:
            raise StoreError(f"{store}: another model was begun meanwhile; run it again")
        return replace(base, shards=tuple(_replace_shards(store, base.shards, group, written)))

    manifests.commit(store, change, before.model)
    collect(store, age_s=JOINED_AGE_S)
    return len(group)


def _small_at_the_end(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Return the small shards at the end that are worth joining.

    A first shard of more rows than all behind it stays as it is. So what was joined is joined again
    only into a shard of at least twice its size, and growth day by day costs little.
    """
    kind = (shards[-1].precision, shards[-1].version) if shards else ()
    run: list[Shard] = []
    first = rows = 0
    for shard in reversed(shards):
        is_small = shard.rows < SMALL_SHARD and rows + shard.rows <= MOST_ROWS_JOINED
        if not is_small or (shard.precision, shard.version) != kind:
            break
        run.append(shard)
        first = len(run) if shard.rows <= rows or len(run) == 1 else first
        rows += shard.rows
    joined = tuple(run[:first][::-1])
    return joined if len(joined) >= FEWEST_JOINED else ()


def _indexed(store: Path, base: Manifest) -> int:
    """Return how many shards, from the first on, the index covers; all if that cannot be read."""
    if base.index is None:
        return 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = (store / "index" / base.index.name / "index.json").read_bytes()
        if hashlib.sha256(content).hexdigest() == base.index.sha256:
            return len(json.loads(content)["shards"])
    return len(base.shards)


def refresh_times(paths: Sequence[Path]) -> None:
    """Keep collectors from treating the new files of a long task as garbage."""
    # If one did so anyway, the commit reports it.
    with contextlib.suppress(FileNotFoundError):
        if paths and time.time() - paths[0].stat().st_mtime > AGE_S / 4:
            for path in paths:
                files.disk.touch(path)


def _runs_to_rewrite(before: Manifest, rows_per_shard: int) -> list[tuple[Shard, ...]]:
    """Return the runs of adjacent shards of one precision that are worth rewriting.

    None while vectors of another model are built: they are those of the shards as they are.
    """
    if before.next:
        return []

    def kind(shard: Shard) -> tuple[bool, str, str]:
        is_worth = shard.deleted_rows > 0 or shard.rows < rows_per_shard / 2
        return is_worth, shard.precision, shard.version

    runs = [tuple(run) for (is_worth, *_), run in groupby(before.shards, kind) if is_worth]
    return [run for run in runs if len(run) > 1 or run[0].deleted_rows]


def _rewrite(
    store: Path, group: Sequence[Shard], model: ModelCard, rows_per_shard: int
) -> Iterator[Shard]:
    """Write the live rows of some shards into new ones of about equal size."""
    total = sum(s.rows - s.deleted_rows for s in group)
    bounds = np.linspace(0, total, -(-total // rows_per_shard) + 1).astype(int)
    buffer: list[pa.Table] = []
    sources = (_live_rows(store, shard, model) for shard in group)
    for rows in np.diff(bounds).tolist():
        while not buffer or len(buffer[0]) < rows:
            following = next(sources)
            pairs = zip(buffer, following, strict=True) if buffer else ((t,) for t in following)
            buffer = [pa.concat_tables(pair) for pair in pairs]
        taken = [table.slice(0, rows) for table in buffer]
        yield write_tables(
            store, *taken, precision=group[0].precision, version=group[0].version,
            space=model.identity,
        )  # fmt: skip
        buffer = [table.slice(rows) for table in buffer]


def _live_rows(store: Path, shard: Shard, model: ModelCard) -> list[pa.Table]:
    tables = undamaged_tables(store, shard, model)
    return [t.filter(pa.array(shard.live)) for t in tables] if shard.deleted_rows else tables


def undamaged_tables(store: Path, shard: Shard, model: ModelCard) -> list[pa.Table]:
    """Return all rows of a shard as `ShardReader.tables` does, after comparing the hashes.

    Raises:
        StoreError: A file is damaged: copied damage would get a matching hash.
    """
    reader = ShardReader(store, shard, model)
    for role, stored in shard.current_files.items():
        file = reader.file(role)
        if files.sha256(file.path) != stored.sha256:
            raise file.refuse("damaged")
    return list(reader.tables())


def _replace_shards(
    store: Path, shards: Sequence[Shard], group: Sequence[Shard], written: Sequence[Shard]
) -> list[Shard]:
    """Replace the old shards by the new ones, keeping deletions made meanwhile."""
    names = [s.name for s in group]
    first = next((i for i, s in enumerate(shards) if s.name == names[0]), len(shards))
    now = shards[first : first + len(group)]
    if [s.name for s in now] != names:
        raise StoreError(f"{store}: another compaction finished first; run it again")
    if [(s.current_files, s.next) for s in now] != [(s.current_files, s.next) for s in group]:
        raise StoreError(f"{store}: rows were updated during the compaction; run it again")
    still_live = _live(now)[_live(group)]
    ends = np.cumsum([s.rows for s in written])
    new = [
        s.with_live(part) for s, part in zip(written, np.split(still_live, ends)[:-1], strict=True)
    ]
    return [*shards[:first], *new, *shards[first + len(group) :]]


def _live(shards: Sequence[Shard]) -> NDArray[np.bool_]:
    return np.concatenate([s.live for s in shards])
