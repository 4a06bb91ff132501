"""update: set fields of the metadata of rows. Only the files of their rows are written anew.

Vectors, thumbnails, row numbers, deletions and the index stay. So does the stamp of a row, which
covers its source: `embed` sees an unchanged source and keeps the row as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmalign.arrays import Ints
from mmalign.errors import StoreError, UsageError, shell_command
from mmalign.progress import bar
from mmalign.store import manifest as manifests
from mmalign.store.changes import refresh_times, unknown_ids
from mmalign.store.groups import Shard, StoredFile
from mmalign.store.manifest import Manifest
from mmalign.store.model_card import ModelCard
from mmalign.store.reader import Store, open_store
from mmalign.store.schema import meta_values
from mmalign.store.shards import ShardReader, write_rows_with
from mmalign.store.upgrade import is_old
from mmalign.values import json_value, to_json


@dataclass(frozen=True)
class UpdateReport:
    """What `update` did."""

    rows: int
    """Rows whose metadata changed."""
    shards: int
    """Shards whose rows were written anew."""
    generation: int


def update(path: str | Path, ids: Sequence[str], values: Mapping[str, Any]) -> UpdateReport:
    """Set fields of the metadata of rows by id; see `update_rows`.

    Raises:
        StoreError: An id is unknown; nothing was updated.
    """
    opened = open_store(path)
    numbers = opened.find(ids)
    unknown = [i for i, number in zip(ids, numbers, strict=True) if number < 0]
    if unknown:
        raise StoreError(f"{unknown_ids(opened.path, unknown)}; nothing was updated")
    return update_rows(opened, numbers, values)


def update_rows(
    opened: Store, numbers: Sequence[int] | Ints, values: Mapping[str, Any]
) -> UpdateReport:
    """Set fields of the metadata of rows, chosen by their numbers in an open store.

    All rows change in one generation. A row that was deleted or replaced since the store was opened
    is left out.

    Args:
        opened: The store.
        numbers: The rows.
        values: The new fields, as a JSON merge patch (RFC 7396): fields of a table are set one by
            one, None removes a field. Values are converted as `json_value` does.

    Raises:
        UsageError: A field has the name of a column, or there is none.
        StoreError: A file is damaged, or the store was compacted since; nothing was updated.
    """
    store, patch = opened.path, _patch(opened, values)
    rows_by_shard = {shard.name: rows for shard, rows in opened.by_shard(numbers)}
    # What was written for a file of rows, and which rows in it changed.
    written: dict[str, tuple[StoredFile, Ints] | None] = {}
    changed_rows = changed_shards = 0

    def with_values(shard: Shard, rows: Ints, model: ModelCard) -> Shard:
        nonlocal changed_rows, changed_shards
        name = shard.row_file.name
        if name not in written:
            written[name] = _rewrite(store, shard, rows, model, patch)
            new = [found[0].name for found in written.values() if found]
            refresh_times([store / "shards" / file for file in new])
            progress.update(len(rows))
        found = written[name]
        live = int(shard.live[found[1]].sum()) if found else 0
        if not found or not live:
            return shard
        changed_rows, changed_shards = changed_rows + live, changed_shards + 1
        return replace(shard, row_file=found[0])

    def change(base: Manifest) -> Manifest:
        nonlocal changed_rows, changed_shards
        changed_rows = changed_shards = 0
        if rows_by_shard.keys() - {shard.name for shard in base.shards}:
            told = "the store was compacted or repaired meanwhile; nothing was updated"
            raise StoreError(f"{store}: {told}; run it again")
        shards = [
            with_values(shard, rows_by_shard[shard.name], base.model)
            if shard.name in rows_by_shard
            else shard
            for shard in base.shards
        ]
        return replace(base, shards=tuple(shards))

    with bar("update", sum(map(len, rows_by_shard.values())), "rows") as progress:
        after = manifests.commit(store, change, opened.manifest.model)
    return UpdateReport(changed_rows, changed_shards, after.generation)


def _patch(opened: Store, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return new values as JSON."""
    columns = {name.lower() for name in opened.columns}
    for name in values:
        if not name:
            raise UsageError("a field without a name cannot be set")
        if name.lower() in columns:
            told = "fields of meta are written by their own names"
            raise UsageError(f"{name!r} is a column, which cannot be updated; {told}")
    if not values:
        raise UsageError("there is no field to set")
    try:
        patch: dict[str, Any] = json_value(values)
    except ValueError as error:
        raise UsageError(f"the new values are {error}") from None
    return patch


def _rewrite(
    store: Path, shard: Shard, rows: Ints, model: ModelCard, patch: dict[str, Any]
) -> tuple[StoredFile, Ints] | None:
    """Write the rows of a shard with the new values; return the file and the changed rows.

    None if no row changes. Rows that are deleted get the values too: a row deleted between two
    tries needs no other file.
    """
    if is_old(shard):
        remedy = shell_command("upgrade", store)
        raise StoreError(f"{store}: has shards of format 2; run {remedy}")
    reader = ShardReader(store, shard, model)
    meta = reader.column("meta")
    texts = zip(reader.ids(rows), meta.take(pa.array(rows)).to_pylist(), strict=True)
    new = [_patched_text(meta_values(*text), patch) for text in texts]
    changed = rows[[text is not None for text in new]]
    if not len(changed):
        return None
    is_changed = np.zeros(shard.rows, np.bool_)
    is_changed[changed] = True
    replacements = pa.array([text for text in new if text is not None], pa.string())
    column = pc.replace_with_mask(meta, pa.array(is_changed), replacements)
    return write_rows_with(reader, "meta", column), changed


def _patched_text(meta: dict[str, Any], patch: dict[str, Any]) -> str | None:
    """Return the JSON of metadata with new values; None if nothing changes."""
    text = to_json(_patched(meta, patch))
    # Compared as text, as in Python 1 equals true.
    return None if text == to_json(meta) else text


def _patched(values: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """Apply a JSON merge patch."""
    out = dict(values)
    for name, value in patch.items():
        if value is None:
            out.pop(name, None)
        elif isinstance(value, dict):
            inner = out.get(name)
            out[name] = _patched(inner if isinstance(inner, dict) else {}, value)
        else:
            out[name] = value
    return out
