"""What a store lacks of its sources, found without a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign import files
from mmalign.data import Sources, SpilledRecords, as_sources
from mmalign.embedding.changes import ScanOptions, find_changes, find_removed
from mmalign.store import Store, open_store


@dataclass(frozen=True)
class Pending:
    """What `embed` would do; false if that is nothing."""

    store: Store
    """The generation that was compared."""
    samples: int
    """Samples that would be read: new ones, and those that may have changed."""
    gone: tuple[int, ...]
    """Rows whose images are gone, unless a new sample turns out to be one that was moved."""

    def __bool__(self) -> bool:
        """Return whether there is anything to do."""
        return bool(self.samples or self.gone)


def find_pending(
    path: str | Path,
    sources: Sources,
    *,
    caption_keys: Sequence[str] = ("captions",),
    image_column: str | None = None,
) -> Pending:
    """Compare a store with its sources; the arguments are those of `embed`.

    Raises:
        DataError: Nothing usable in the sources.
        StoreError: There is no store, or it cannot be read.
    """
    store = open_store(path)
    options = ScanOptions(as_sources(sources), caption_keys, image_column)
    with files.scratch_in(store.path), SpilledRecords() as spilled:
        changes = find_changes(store, options, spilled)
        return Pending(store, len(spilled), tuple(find_removed(changes, ())))
