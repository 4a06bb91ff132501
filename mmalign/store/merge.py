"""merge: one store with the rows of several. Shard files are linked or copied, never decoded."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mmalign import files
from mmalign.arrays import Ints
from mmalign.errors import IdentityError, StoreError, UsageError, shell_command
from mmalign.progress import bar, say
from mmalign.store import manifest as manifests
from mmalign.store.failures import add_failures
from mmalign.store.garbage import remove_drafts
from mmalign.store.groups import Shard, StoredFile
from mmalign.store.model_card import ModelCard
from mmalign.store.reader import Store, open_store

COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class MergeReport:
    """What `merge` wrote."""

    rows: int
    replaced: int
    """Rows left out because a later store has a row with the same id."""
    shards: int
    failures: int
    """Samples without an embedding, of all stores."""
    linked: int
    """Files that share their bytes with a source, as hard links."""
    copied: int
    generation: int


def merge(paths: Sequence[str | Path], out: str | Path) -> MergeReport:
    """Make a store with the rows of several stores of the same model, in their order.

    If two stores have a row with the same id, the row of the later store is kept. Deleted rows stay
    deleted. OUT appears only when it is complete; it has no index.

    Raises:
        UsageError: Fewer than two stores, the same store twice, or OUT exists.
        IdentityError: Two stores hold embeddings of different models.
        StoreError: A store cannot be read, or has an earlier format.
    """
    out_path = Path(out)
    stores = _open(paths)
    _require_free(out_path)
    model = _common_model(stores)
    remaining = _without_replaced(stores)
    total = sum(len(set(s.current_files.values())) for shards in remaining for s in shards)
    files.make_folder(out_path.parent)
    remove_drafts(out_path)
    with files.atomic_path(out_path) as draft, bar("merge", total, "files") as progress:
        for folder in (draft, draft / "shards", draft / "groups"):
            files.make_folder(folder)
        copy = _Copy(draft, progress.update)
        shards = tuple(
            copy.shard(store.path, shard)
            for store, shards in zip(stores, remaining, strict=True)
            for shard in shards
        )
        files.sync_folder(draft / "shards")
        after = manifests.commit(draft, lambda base: replace(base, shards=shards), model)
        failures = add_failures(draft, _joined_failures(stores))
        _require_free(out_path)
    replaced = sum(map(len, stores)) - after.rows
    if replaced:
        say(f"{replaced} rows were replaced by rows of a later store with the same id")
    if any(store.manifest.index for store in stores):
        say(f"indexes are not copied: build one with {shell_command('index', out_path)}")
    return MergeReport(
        after.rows, replaced, len(shards), failures, copy.linked, copy.copied, after.generation
    )


def _open(paths: Sequence[str | Path]) -> list[Store]:
    if len(paths) < 2:
        raise UsageError("give at least two stores to merge")
    for one, other in combinations(paths, 2):
        if Path(one).resolve() == Path(other).resolve():
            raise UsageError(f"{other}: the same store twice")
    stores = [open_store(path) for path in paths]
    for store in stores:
        manifests.require_format(store.path, store.manifest)
    return stores


def _require_free(out_path: Path) -> None:
    if out_path.exists() or out_path.is_symlink():
        raise UsageError(f"{out_path}: already exists; use another --out")


def _common_model(stores: Sequence[Store]) -> ModelCard:
    """Return the model of all stores; a tower that one of them does not know is unknown."""
    for one, other in combinations(stores, 2):
        first, second = one.manifest.model, other.manifest.model
        if not _is_same_model(first, second):
            names = [first.identity, second.identity]
            if names[0] == names[1]:
                names = [_towers(first), _towers(second)]
            raise IdentityError(
                f"{one.path} holds embeddings of {names[0]}, {other.path} those of {names[1]}: "
                "only stores of the same model can be merged"
            )
    models = [store.manifest.model for store in stores]
    known = [tower for tower in models[0].towers if all(tower in m.towers for m in models)]
    towers = (t if t in known else replace(t, identity="") for t in models[0].towers)
    return replace(models[0], towers=tuple(towers))


def _is_same_model(one: ModelCard, other: ModelCard) -> bool:
    """Return whether two stores hold vectors of the same model, as far as towers are recorded."""
    shapes = [
        (m.identity, m.dim, [(tower.modality, tower.position) for tower in m.towers])
        for m in (one, other)
    ]
    pairs = ((a.identity, b.identity) for a, b in zip(one.towers, other.towers, strict=False))
    return shapes[0] == shapes[1] and all(a == b or "" in (a, b) for a, b in pairs)


def _towers(model: ModelCard) -> str:
    towers = (f"{tower.modality} {tower.identity or 'unknown'}" for tower in model.towers)
    return f"{model.identity} ({', '.join(towers)}; {model.dim} dimensions)"


def _without_replaced(stores: Sequence[Store]) -> list[list[Shard]]:
    """Return the shards of each store, with rows deleted that a later store replaces."""
    replaced: list[list[Ints]] = [[] for _ in stores]
    for later, store in enumerate(stores):
        ids = store.column("id") if later else []
        for earlier in range(later):
            numbers = stores[earlier].find(ids)
            replaced[earlier].append(numbers[numbers >= 0])
    out = []
    for store, numbers_of_later in zip(stores, replaced, strict=True):
        numbers = np.concatenate([np.zeros(0, np.int64), *numbers_of_later])
        gone = {shard.name: rows.tolist() for shard, rows in store.by_shard(numbers)}
        shards = store.manifest.shards
        out.append([s.with_rows_deleted(gone.get(s.name, [])) for s in shards])
    return out


def _joined_failures(stores: Sequence[Store]) -> list[dict[str, Any]]:
    """Return the failures of all stores, except for samples that another store has as rows."""
    joined: dict[str, dict[str, Any]] = {}
    for store in stores:
        failures = store.failures()
        ids = [failure["id"] for failure in failures]
        others = [other.find(ids) >= 0 for other in stores if other is not store]
        is_row = np.any(others, axis=0)
        for failure, resolved in zip(failures, is_row.tolist(), strict=True):
            if failure["embedded"] or not resolved:
                joined[failure["uri"]] = failure
    return list(joined.values())


class _Copy:
    """Puts the files of shards into a new store."""

    def __init__(self, out: Path, tick: Any) -> None:
        self.out, self.tick = out, tick
        self.linked = self.copied = 0
        self._names: set[str] = set()

    def shard(self, store: Path, shard: Shard) -> Shard:
        """Copy the files of a shard; names get new ones if the new store has them already."""
        shard = shard.with_live(shard.live)
        name, named = shard.name, {f: f.name for f in shard.current_files.values()}
        if self._names & {name, *named.values()}:
            # Two stores may be copies of the same store.
            name = secrets.token_hex(8)
            roles = reversed(shard.current_files.items())
            named = {f: f"{name}-{role}.arrow" for role, f in roles}
        self._names |= {name, *named.values()}
        new = {}
        for file, new_name in named.items():
            self._file(store, file, new_name)
            new[file] = replace(file, name=new_name)
            self.tick(1)
        thumbnails = shard.thumbnail_file
        return replace(
            shard,
            name=name,
            row_file=new[shard.row_file],
            vector_file=new[shard.vector_file],
            thumbnail_file=new[thumbnails] if thumbnails else None,
            next=None,
        )

    def _file(self, store: Path, file: StoredFile, name: str) -> None:
        source, target = store / "shards" / file.name, self.out / "shards" / name
        try:
            files.require_regular(source)
            if _link(source, target):
                self.linked += 1
            else:
                self._copied(source, target, file)
                self.copied += 1
        except FileNotFoundError as error:
            if str(error.filename) != str(source):
                raise
            remedy = shell_command("verify", store)
            told = f"missing; run it again, and if it is still missing {remedy}"
            raise StoreError(f"{source}: {told}") from None

    @staticmethod
    def _copied(source: Path, target: Path, file: StoredFile) -> None:
        with open(source, "rb") as opened, files.atomic_file(target) as draft:
            while content := opened.read(COPY_BYTES):
                draft.write(content)
            if draft.sha256() != file.sha256:
                remedy = shell_command("repair", source.parents[1])
                raise StoreError(f"{source}: damaged; run {remedy}")


def _link(source: Path, target: Path) -> bool:
    """Create a hard link; return False if the file systems do not allow it."""
    try:
        files.disk.link(source, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno not in files.NO_LINKS:
            raise
        return False
    return True
