"""What is searched: one generation of a store, or of several stores of one space.

Shapes: R random vectors, D dimensions.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from mmalign.arrays import Floats
from mmalign.search import duplicates
from mmalign.search.duplicates import Usual
from mmalign.search.snapshot import Snapshot

# Random vectors by which queries are compared, see `feedback`.
SAMPLE = 1024


class Searched:
    """Generations that are searched together; it never changes. Safe to use from many threads."""

    def __init__(self, snapshots: Sequence[Snapshot], *, named: bool = False) -> None:
        """Take one generation of each store; `named`: whether hits name their store.

        Stores without rows are left out, unless all are.
        """
        filled = [snapshot for snapshot in snapshots if len(snapshot.store)]
        self.snapshots = tuple(filled or snapshots[:1])
        self.named = named
        self._samples: dict[str | None, Floats] = {}

    @property
    def fields(self) -> set[str]:
        """The fields of the metadata that any of the stores has."""
        return {name for snapshot in self.snapshots for name in snapshot.store.fields}

    @cached_property
    def usual(self) -> Usual:
        """The usual distances, by which near-duplicates are told."""
        drawn = self._shares(duplicates.SAMPLE)
        vectors = [s.vectors_of(s.random_rows(count)) for s, count in drawn]
        return Usual(np.concatenate(vectors))

    def sample(self, to: str | None) -> Floats:
        """Return random vectors (R, D) of a modality; None is the main one."""
        if to not in self._samples:
            drawn = self._shares(SAMPLE)
            vectors = [s.random_vectors(s.target(to), count) for s, count in drawn]
            self._samples[to] = np.concatenate(vectors)
        return self._samples[to]

    def _shares(self, count: int) -> Iterator[tuple[Snapshot, int]]:
        """Divide a number of random rows among the stores, by their size."""
        total = sum(len(snapshot.store) for snapshot in self.snapshots)
        for snapshot in self.snapshots:
            yield snapshot, round(count * len(snapshot.store) / max(total, 1))
