"""What may go: old generations, and files that no generation names.

A file that is young may be one that somebody is about to commit, so age counts as well.
"""

import contextlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmalign import files
from mmalign.store import manifest as manifests

GENERATIONS = 8
AGE_S = 3600.0
# An index that is being built may write nothing for hours.
UNFINISHED_AGE_S = 24 * 3600.0


def collect(store: Path) -> tuple[list[str], int]:
    """Remove what the newest generations do not need; return the paths, and how many bytes.

    The newest eight are kept, and those that were the newest within the last hour.

    Every generation must be readable.
    """
    removed: list[str] = []
    freed = 0
    # What is gone already somebody else is collecting, who will do it all.
    with contextlib.suppress(FileNotFoundError):
        found = manifests.generations(store)
        old = _old(found)
        kept = [manifests.read(file) for file in found if file not in old]
        for path in old:
            freed += _remove(path)
            removed.append(path.name)
        # A generation must not come back after a power cut when its shards do not.
        files.sync_folder(store)
        for path in _unnamed(store, kept):
            if _age_s(path) > _least_age_s(path):
                freed += _remove(path)
                removed.append(str(path.relative_to(store)))
    return removed, freed


def _old(generations: Sequence[Path]) -> list[Path]:
    """Return the generations that may go; who opened one when it was the newest has an hour."""
    pairs = zip(generations[GENERATIONS - 1 :], generations[GENERATIONS:], strict=False)
    return [file for newer, file in pairs if _age_s(newer) > AGE_S]


def _unnamed(store: Path, kept: Iterable[manifests.Manifest]) -> list[Path]:
    """List shards and indexes that no generation names, and what killed writers left."""
    shards = {s.name for held in kept for s in held.shards}
    indexes = {held.index.name for held in kept if held.index}
    folders = [p for p in store.glob("index/*") if p.is_dir()]
    return [
        *(p for p in store.glob("shards/*.arrow") if p.name not in shards),
        *(p for p in folders if p.name not in indexes),
        *(p for folder in (store, store / "shards", *folders) for p in files.leftovers(folder)),
    ]


def _remove(path: Path) -> int:
    size = sum(p.stat().st_size for p in (path, *path.glob("*")) if p.is_file())
    files.remove(path)
    return size


def _age_s(path: Path) -> float:
    return time.time() - max(p.stat().st_mtime for p in (path, *path.glob("*")))


def _least_age_s(path: Path) -> float:
    unfinished = path.is_dir() and not (path / "index.json").exists()
    return UNFINISHED_AGE_S if unfinished else AGE_S
