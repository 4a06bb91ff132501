"""`mmalign export`: rows of a store, all or chosen by SQL, as files of other programs.

Shapes: N rows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mmalign import files
from mmalign.arrays import Ints
from mmalign.errors import StoreError, UsageError
from mmalign.exchange.layouts import write_dataset, write_parquet
from mmalign.exchange.parts import write_parts
from mmalign.progress import bar, say
from mmalign.store import Store, open_store

Format = Literal["parquet", "npy", "hf"]


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote."""

    out: str
    format: str
    rows: int
    captions: int
    """Captions exported with their vectors."""
    captions_left_out: int
    """Captions after the first, if the layout holds only one text vector per row."""
    bytes: int


def export(
    store: str | Path,
    out: str | Path,
    kind: Format,
    *,
    where: str | None = None,
    thumbnails: bool = False,
) -> ExportReport:
    """Export live rows of a store for other programs; OUT appears only when it is complete.

    Args:
        store: The store.
        out: The file (parquet) or folder to make.
        kind: "parquet", "npy" (the folder of clip-retrieval) or "hf" (a Hugging Face dataset).
        where: Only rows for which this SQL is true; see `store.where`.
        thumbnails: Include thumbnails in the parquet file; "hf" includes them if there are any.

    Raises:
        UsageError: OUT exists, or the SQL is invalid.
        StoreError: There are no rows to export.
    """
    opened, out_path = open_store(store), Path(out)
    if thumbnails and kind == "npy":
        raise UsageError("--thumbnails: the npy format cannot hold pictures; use parquet or hf")
    _require_free(out_path)
    numbers = _select_rows(opened, where)
    counts_N = np.bincount(opened.owners("text"), minlength=opened.manifest.physical_rows)[numbers]
    captions = int(counts_N.sum())
    files.make_folder(out_path.parent)
    with files.atomic_path(out_path) as draft, bar("export", len(numbers), "rows") as progress:
        if kind == "parquet":
            write_parquet(opened, numbers, draft, progress.update, thumbnails=thumbnails)
        elif kind == "npy":
            write_parts(opened, numbers, draft, progress.update)
        else:
            write_dataset(opened, numbers, draft, progress.update)
        _require_free(out_path)
    left_out = captions - int((counts_N > 0).sum()) if kind == "npy" else 0
    written_files = [f for f in (out_path, *out_path.rglob("*")) if f.is_file()]
    size = sum(file.stat().st_size for file in written_files)
    say(f"{len(numbers)} rows and {captions - left_out} captions in {out}: {size / 1e6:.1f} MB")
    if left_out:
        say(
            f"this format has one text vector per row, that of its first caption: {left_out} more "
            "captions are in the metadata, without a vector"
        )
    return ExportReport(str(out), kind, len(numbers), captions - left_out, left_out, size)


def _select_rows(store: Store, expression: str | None) -> Ints:
    """Return the numbers of the rows to export, ascending."""
    if expression is not None:
        from mmalign.store.where import where

        numbers = where(store, expression)
    elif store.live is None:
        numbers = np.arange(store.manifest.physical_rows, dtype=np.int64)
    else:
        numbers = np.flatnonzero(store.live)
    if not len(numbers):
        reason = "the store is empty" if expression is None else f"no row matches {expression}"
        raise StoreError(f"{store.path}: no rows to export: {reason}")
    return numbers


def _require_free(out_path: Path) -> None:
    if out_path.exists() or out_path.is_symlink():
        raise UsageError(f"{out_path}: already exists; use another --to")
