"""Garbage collection: shards and indexes that no generation needs, and what killed writers left.

A reader may still use the files of a generation that it opened some time ago, so retired files stay
for an hour. A file that no generation has named may be one that a writer is about to commit, so it
stays until nothing was written to it for an hour. Age alone protects no file that a commit may
name: removals are announced in a generation first, see `manifest.py`.
"""

import contextlib
import errno
import time
from dataclasses import replace
from pathlib import Path

from mmalign import files
from mmalign.errors import shell_command
from mmalign.progress import say
from mmalign.store import manifest as manifests
from mmalign.store.groups import SHA256, SHARD_FILE, Groups
from mmalign.store.manifest import Manifest

AGE_S = 3600.0
# An index build may write nothing for hours.
UNFINISHED_AGE_S = 24 * 3600.0


def collect(store: Path, *, now: bool = False, age_s: float = AGE_S) -> tuple[list[str], int]:
    """Remove retired files, and the generations that name them; return the paths and total bytes.

    Args:
        store: The store.
        now: Do not wait for an hour. Files that no generation has named yet still stay so long.
        age_s: Wait longer.

    Raises:
        StoreError: A generation cannot be read, so the files it needs are unknown.
    """
    model = manifests.newest(store).model
    linked = manifests.linked_folders(store)
    for folder in linked:
        say(f"warning: {folder}: a link to another folder, so nothing is removed there")
    announced = manifests.commit(store, lambda base: _with_removals(store, base, now, age_s), model)
    removed: list[str] = []
    freed = 0
    named = [path for name in announced.removing for path in manifests.paths_of(store, name)]
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
        except OSError as error:
            # Windows cannot remove a file that a reader has memory-mapped; and a folder that was
            # silent for a day may be written to again.
            if not isinstance(error, PermissionError) and error.errno != errno.ENOTEMPTY:
                raise
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


def _with_removals(store: Path, base: Manifest, now: bool, age_s: float) -> Manifest:
    """Return the newest generation with the planned removals announced in it."""
    numbers = [manifests.number_of(file) for file in manifests.generations(store)]
    earlier = [number for number in numbers if number < base.generation]
    retired = {r.name: r for r in base.retired}
    on_disk = _files(store)
    ripe = [r for n, r in retired.items() if n in on_disk and (now or _is_older(on_disk[n], age_s))]
    # The generations before that still name them.
    limit = base.generation if now else max((r.generation for r in ripe), default=0)
    old = [number for number in earlier if number < limit]
    # The announcement is a generation, too: to remove one by another would have no end.
    if not ripe and now and old == earlier[:1]:
        old = []
    unknown = {
        name
        for name, path in {**on_disk, **_groups(store)}.items()
        if name not in retired
        and name not in base.named_files
        and name.partition("/")[2] not in base.groups
        and _is_older(path, _min_age_s(path))
    }
    unneeded = unknown - _named_by(store, [n for n in earlier if n not in old])
    oldest = min([n for n in earlier if n not in old], default=base.generation)
    groups = {n for n, r in retired.items() if n.startswith("groups/") and r.generation <= oldest}
    names = {r.name for r in ripe} | {manifests.path_of(store, n).stem for n in old} | unneeded
    if names - set(base.removing):
        names |= {name for name in groups if manifests.is_there(store, name)}
    return replace(base, removing=tuple(sorted({*base.removing, *names})))


def _named_by(store: Path, numbers: list[int]) -> set[str]:
    """Return the files that some generations name."""
    named: set[str] = set()
    groups = Groups(store)
    for number in numbers:
        manifest = manifests.read_unless_gone(manifests.path_of(store, number), groups)
        if manifest:
            named |= manifest.named_files | {f"groups/{name}" for name in manifest.groups}
    return named


def _groups(store: Path) -> dict[str, Path]:
    """Return the groups on the disk, keyed by their names as in `Manifest.removing`."""
    found = (p for p in store.glob("groups/*.json") if SHA256.fullmatch(p.stem[:64]))
    return {f"groups/{path.stem[:64]}": path for path in found}


def _files(store: Path) -> dict[str, Path]:
    """Return the existing shards and indexes, keyed by their names as in `Manifest.removing`."""
    shards = {
        f"shards/{p.stem}": p for p in store.glob("shards/*.arrow") if SHARD_FILE.fullmatch(p.name)
    }
    folders = (p for p in store.glob("index/*") if p.is_dir() and manifests.INDEX.fullmatch(p.name))
    found = shards | {f"index/{p.name}": p for p in folders}
    linked = manifests.linked_folders(store)
    return {name: path for name, path in found.items() if path.parent not in linked}


def _leftovers(store: Path) -> list[Path]:
    """List temporary files left by killed writers. Removing them loses no commit."""
    linked = manifests.linked_folders(store)
    indexes = [p for p in store.glob("index/*") if p.is_dir() and not p.is_symlink()]
    folders = (
        store,
        *(
            p
            for p in (store / "shards", store / "groups", *indexes)
            if not {p, p.parent} & {*linked}
        ),
    )
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


def index_in_the_making(store: Path, base: Manifest) -> bool:
    """Return whether a process may be building an index, for which shards must keep their names."""
    known = {r.name for r in base.retired} | base.named_files
    return any(
        name not in known and not _is_older(path, UNFINISHED_AGE_S)
        for name, path in _files(store).items()
        if name.startswith("index/")
    )


def remove_drafts(path: Path) -> None:
    """Remove what killed processes left of a folder that was to get this name."""
    for draft in files.leftovers(path.parent):
        if draft.name.startswith(f".{path.name}.") and _is_older(draft, UNFINISHED_AGE_S):
            with contextlib.suppress(OSError):
                files.remove(draft)


def _min_age_s(path: Path) -> float:
    unfinished = path.is_dir() and not (path / "index.json").exists()
    return UNFINISHED_AGE_S if unfinished else AGE_S
