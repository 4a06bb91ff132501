"""Garbage collection: old generations, and files that no generation names.

A reader may have opened a generation that was the newest an hour ago, and a writer may be about to
commit a young file, so age counts. Age is never the only protection of a file about to be
committed: removals are announced first, see `manifest.py`.
"""

import contextlib
import time
from dataclasses import replace
from pathlib import Path

from mmalign import files
from mmalign.errors import shell_command
from mmalign.progress import say
from mmalign.store import manifest as manifests
from mmalign.store.manifest import Manifest

AGE_S = 3600.0
# An index build may write nothing for hours.
UNFINISHED_AGE_S = 24 * 3600.0


def collect(store: Path, *, now: bool = False) -> tuple[list[str], int]:
    """Remove old generations and files that only they need; return the paths and total bytes.

    A generation is old when another one has been the newest for an hour. The newest two stay.

    Args:
        store: The store.
        now: Treat every generation but the newest as old. Files that no generation has named yet
            still stay for an hour, as a writer may be about to commit them.

    Raises:
        StoreError: A generation cannot be read, so the files it needs are unknown.
    """
    model = manifests.newest(store).model
    linked = manifests.linked_folders(store)
    for folder in linked:
        say(f"warning: {folder}: a link to another folder, so nothing is removed there")
    announced = manifests.commit(store, lambda base: _with_removals(store, base, now), model)
    removed: list[str] = []
    freed = 0
    named = (manifests.file_of(store, name) for name in announced.removing)
    to_remove = [path for path in named if path.parent not in linked]
    old = [path for path in to_remove if path.parent == store]
    # Oldest first, so that a freed number is below all existing ones. Generations before other
    # files, as a generation must not reappear after a power cut without its shards.
    for path in sorted(old, key=manifests.number_of):
        freed += _remove(store, path, removed)
    files.sync_folder(store)
    busy = []
    for path in [*(p for p in to_remove if p not in old), *_leftovers(store)]:
        try:
            freed += _remove(store, path, removed)
        except PermissionError as error:
            # Windows cannot remove a file that a reader has memory-mapped.
            busy.append(error)
    if busy:
        more = f" and {len(busy) - 1} more" if len(busy) > 1 else ""
        later = f"try again later with {shell_command('compact', store)}"
        say(f"warning: {busy[0].filename}{more}: cannot be removed now; {later}")
    return removed, freed


def waiting_bytes(store: Path) -> int:
    """Count the bytes of shards and indexes that the newest generation does not need."""
    named = manifests.newest(store).named_files
    waiting = (path for name, path in _files(store).items() if name not in named)
    return sum(map(_size, waiting))


def _with_removals(store: Path, base: Manifest, now: bool) -> Manifest:
    """Return the newest generation with the planned removals announced in it."""
    found = [f for f in manifests.generations(store) if manifests.number_of(f) < base.generation]
    needed, named_by_old = set(base.named_files), set[str]()
    old: list[str] = []
    newer = manifests.path_of(store, base.generation)
    for file in found:
        manifest = manifests.read_unless_gone(file)
        if manifest is None:
            # Another process is collecting.
            continue
        if now or old or _is_older(newer, AGE_S):
            old.append(file.stem)
            named_by_old |= manifest.named_files
        else:
            needed |= manifest.named_files
        newer = file
    to_remove = {
        name
        for name, path in _files(store).items()
        if name not in needed and (name in named_by_old or _is_older(path, _min_age_s(path)))
    }
    # The announcement itself is one of the newest two. Without it, the one before stays.
    if not to_remove and old == [f.stem for f in found[:1]]:
        old = []
    return replace(base, removing=tuple(sorted({*base.removing, *to_remove, *old})))


def _files(store: Path) -> dict[str, Path]:
    """Return the existing shards and indexes, keyed by their names as in `Manifest.removing`."""
    shards = {
        f"shards/{p.stem}": p
        for p in store.glob("shards/*.arrow")
        if manifests.SHARD.fullmatch(p.name)
    }
    folders = (p for p in store.glob("index/*") if p.is_dir() and manifests.INDEX.fullmatch(p.name))
    found = shards | {f"index/{p.name}": p for p in folders}
    linked = manifests.linked_folders(store)
    return {name: path for name, path in found.items() if path.parent not in linked}


def _leftovers(store: Path) -> list[Path]:
    """List temporary files left by killed writers. Removing them loses no commit."""
    linked = manifests.linked_folders(store)
    indexes = [p for p in store.glob("index/*") if p.is_dir() and not p.is_symlink()]
    folders = (store, *(p for p in (store / "shards", *indexes) if not {p, p.parent} & {*linked}))
    found = (path for folder in folders for path in files.leftovers(folder))
    return [path for path in found if _is_older(path, AGE_S)]


def _remove(store: Path, path: Path, removed: list[str]) -> int:
    """Remove a path that may be gone already; append it to `removed` and return its size."""
    if not path.exists():
        return 0
    size = _size(path)
    files.remove(path)
    removed.append(path.relative_to(store).as_posix())
    return size


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(p.stat().st_size for p in (path, *path.glob("*")) if p.is_file())
    return 0


def _is_older(path: Path, age_s: float) -> bool:
    """Return whether nothing was written to a path for some time; False if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - max(p.stat().st_mtime for p in (path, *path.glob("*"))) > age_s
    return False


def _min_age_s(path: Path) -> float:
    unfinished = path.is_dir() and not (path / "index.json").exists()
    return UNFINISHED_AGE_S if unfinished else AGE_S
