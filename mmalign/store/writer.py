"""Rows into shards, shards into a manifest generation; a crash costs what was not committed."""

import secrets
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from mmalign import files
from mmalign.errors import IdentityError
from mmalign.store import manifest as manifests
from mmalign.store.manifest import Manifest, ModelCard, Shard
from mmalign.store.schema import Row, schema, to_batch

ROWS_PER_SHARD = 10_000


class Writer:
    """Appends rows to a store. A row is acknowledged once `commit` has returned; final.

    Used as a context manager it commits what is left at the end, and after an error nothing that
    was not committed before.
    """

    def __init__(self, store: Path, model: ModelCard, rows_per_shard: int = ROWS_PER_SHARD) -> None:
        """Open or create a store.

        Raises:
            IdentityError: The store holds embeddings of another model.
        """
        self.store, self.model, self.rows_per_shard = store, model, rows_per_shard
        self._rows: list[Row] = []
        (store / "shards").mkdir(parents=True, exist_ok=True)
        if any(store.glob("manifest-*.json")):
            held = manifests.newest(store).model
            if held.identity != model.identity:
                raise IdentityError(
                    f"{store} holds embeddings of {held.identity}; these are of {model.identity}: "
                    "embed into a new store"
                )
        else:
            manifests.commit(store, lambda base: base, model)

    def add(self, row: Row) -> bool:
        """Take a row; True when that filled a shard and committed it."""
        self._rows.append(row)
        if len(self._rows) < self.rows_per_shard:
            return False
        self.commit()
        return True

    def commit(self) -> None:
        """Write the rows taken since the last commit as one shard, and name it in a generation."""
        if not self._rows:
            return
        # A random name: two writers never meet, and a shard no manifest names is no data.
        name = f"{secrets.token_hex(8)}.arrow"
        path = self.store / "shards" / name
        batch = to_batch(self._rows, self.model.dim)
        with files.atomic_file(path) as file, pa.ipc.new_file(file, schema(self.model.dim)) as out:
            out.write_batch(batch)
        shard = Shard(name, len(self._rows), path.stat().st_size, files.sha256(path))

        def change(base: Manifest) -> Manifest:
            return replace(base, shards=(*base.shards, shard))

        manifests.commit(self.store, change, self.model)
        self._rows = []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Ctrl-C keeps what was embedded; a failure of the writer itself must not be repeated.
        if kind is None or kind is KeyboardInterrupt:
            self.commit()
