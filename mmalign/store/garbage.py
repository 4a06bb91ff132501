"""What may go: old generations, and files that no generation names.

A reader may have opened a generation that was the newest an hour ago, and a file that is young may
be one that somebody is about to commit, so age counts. It is never all that keeps a file that is
about to be committed: see `manifest.py` on what is announced before it is removed.
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
# An index that is being built may write nothing for hours.
UNFINISHED_AGE_S = 24 * 3600.0


def collect(store: Path, *, now: bool = False) -> tuple[list[str], int]:
    """Remove what only old generations need, and these; return the paths, and how many bytes.

    A generation is old when another one has been the newest for an hour. The newest two stay.

    Args:
        store: The store.
        now: Take every generation but the newest for an old one. Files that no generation has
            named yet keep their hour: somebody may be about to commit them.

    Raises:
        StoreError: A generation cannot be read, so that what it needs cannot be told.
    """
    model = manifests.newest(store).model
    linked = manifests.linked_folders(store)
    for folder in linked:
        say(f"warning: {folder}: a link to another place: nothing is removed there")
    announced = manifests.commit(store, lambda base: _announcing(store, base, now), model)
    removed: list[str] = []
    freed = 0
    named = (manifests.file_of(store, name) for name in announced.removing)
    gone = [path for path in named if path.parent not in linked]
    old = [path for path in gone if path.parent == store]
    # Oldest first, so that a number that is free again is below all that are there. All before the
    # files, as a generation must not come back after a power cut when its shards do not.
    for path in sorted(old, key=manifests.number_of):
        freed += _remove(store, path, removed)
    files.sync_folder(store)
    busy = []
    for path in [*(p for p in gone if p not in old), *_leftovers(store)]:
        try:
            freed += _remove(store, path, removed)
        except PermissionError as error:
            # Windows does not remove a file that a reader has mapped.
            busy.append(error)
    if busy:
        more = f" and {len(busy) - 1} more" if len(busy) > 1 else ""
        later = f"later: {shell_command('compact', store)}"
        say(f"warning: {busy[0].filename}{more}: cannot be removed now; {later}")
    return removed, freed


def waiting_bytes(store: Path) -> int:
    """Count the bytes of shards and indexes that the newest generation does not need."""
    named = manifests.newest(store).named
    waiting = (path for name, path in _files(store).items() if name not in named)
    return sum(map(_size, waiting))


def _announcing(store: Path, base: Manifest, now: bool) -> Manifest:
    """Return the newest generation with what is to be removed announced in it."""
    found = [f for f in manifests.generations(store) if manifests.number_of(f) < base.generation]
    kept, known = set(base.named), set[str]()
    old: list[str] = []
    newer = manifests.path_of(store, base.generation)
    for file in found:
        held = manifests.whole(file)
        if held is None:
            # Somebody else is collecting.
            continue
        if now or old or _is_older(newer, AGE_S):
            old.append(file.stem)
            known |= held.named
        else:
            kept |= held.named
        newer = file
    gone = {
        name
        for name, path in _files(store).items()
        if name not in kept and (name in known or _is_older(path, _least_age_s(path)))
    }
    # The announcement itself is the second of the newest two. Without it, the one before stays.
    if not gone and old == [f.stem for f in found[:1]]:
        old = []
    return replace(base, removing=tuple(sorted({*base.removing, *gone, *old})))


def _files(store: Path) -> dict[str, Path]:
    """Return the shards and indexes that are there, by their names as in `Manifest.removing`."""
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
    """List what killed writers left under temporary names. To remove it loses nobody a commit."""
    linked = manifests.linked_folders(store)
    indexes = [p for p in store.glob("index/*") if p.is_dir() and not p.is_symlink()]
    folders = (store, *(p for p in (store / "shards", *indexes) if not {p, p.parent} & {*linked}))
    found = (path for folder in folders for path in files.leftovers(folder))
    return [path for path in found if _is_older(path, AGE_S)]


def _remove(store: Path, path: Path, removed: list[str]) -> int:
    """Remove what may be gone already; note its name, and return its size."""
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
    """Say whether nothing was written there for some time; no where it is gone by now."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - max(p.stat().st_mtime for p in (path, *path.glob("*"))) > age_s
    return False


def _least_age_s(path: Path) -> float:
    unfinished = path.is_dir() and not (path / "index.json").exists()
    return UNFINISHED_AGE_S if unfinished else AGE_S
