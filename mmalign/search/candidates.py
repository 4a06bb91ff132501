"""The rows of a store that may be hits of a query, and those of several stores in one order.

Shapes: K candidates of one store, J of all stores, P places among them, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from mmalign.arrays import Bools, Floats, Ints
from mmalign.search.fusion import WORDS, Fused, fused_order
from mmalign.search.query import Query
from mmalign.search.relevance import Judgement
from mmalign.search.snapshot import Hit, Snapshot


@dataclass(frozen=True)
class Candidates:
    """Rows of one store, the best first."""

    snapshot: Snapshot
    to: str
    scores_K: Floats
    numbers_K: Ints
    """Numbers of the best vectors."""
    rows_K: Ints
    near: int
    """How many were found by vectors."""
    fused: Fused | None
    """What words found, if the query is lexical."""
    judged: Judgement | None

    @classmethod
    def of(
        cls, snapshot: Snapshot, query: Query, vector_D: Floats, near: tuple[Floats, Ints], *,
        to: str, selected_N: Bools | None,
    ) -> "Candidates":  # fmt: skip
        """Take what is near to a query, or has its words.

        Args:
            snapshot: The store.
            query: The query.
            vector_D: Its unit vector.
            near: Scores and numbers (K,) of the nearest vectors; -1 if there are fewer.
            to: Their modality.
            selected_N: Which rows may be found; None for all.
        """
        is_found_K = near[1] >= 0
        scores_K, numbers_K = near[0][is_found_K], near[1][is_found_K]
        count, fused = len(numbers_K), None
        if query.lexical:
            fused = snapshot.fuse(vector_D, near, to, snapshot.match(query.words), selected_N)
            scores_K, numbers_K = fused.scores_K, fused.numbers_K
        rows_K = snapshot.rows_of(numbers_K, to)
        judged = snapshot.judge(vector_D, scores_K, to, _judged_text(query))
        return cls(snapshot, to, scores_K, numbers_K, rows_K, count, fused, judged)

    @property
    def nothing_found(self) -> bool | None:
        """Whether no row is relevant; None if that is not known."""
        if not (self.judged and self.judged.is_calibrated):
            return None if len(self.scores_K) else True
        if self.fused:
            return {*self.judged.levels_K} <= {"unlikely"} and not self.fused.complete
        return self.judged.nothing

    def hits(self, places_P: Ints, extra: Sequence[str], *, named: bool) -> list[Hit]:
        """Read some of them as hits, without ranks; see `Snapshot.hits`."""
        hits = self.snapshot.hits(
            self.scores_K[places_P], self.numbers_K[places_P], self.to, first=1, extra=extra,
            judged=self.judged and self.judged.of(places_P),
        )  # fmt: skip
        if named:
            store = str(self.snapshot.store.path)
            hits = [replace(hit, store=store) for hit in hits]
        if self.fused:
            words_P = self.fused.words_K[places_P].tolist()
            found_by = [self.fused.found_by_K[place] for place in places_P.tolist()]
            hits = [
                replace(hit, words=words, found_by=by)
                for hit, words, by in zip(hits, words_P, found_by, strict=True)
            ]
        return hits


@dataclass(frozen=True)
class Joined:
    """The candidates of all stores, the best first."""

    parts: Sequence[Candidates]
    part_J: Ints
    """Which of the parts each is from."""
    place_J: Ints
    """Its place there."""

    @classmethod
    def of(cls, parts: Sequence[Candidates], most: int) -> "Joined":
        """Join candidates; at most so many, unless they were fused with words."""
        part_J = np.repeat(np.arange(len(parts)), [len(part.rows_K) for part in parts])
        place_J = np.concatenate([np.arange(len(part.rows_K)) for part in parts])
        if len(parts) == 1:
            return cls(parts, part_J, place_J)
        scores_J = np.concatenate([part.scores_K for part in parts])
        fused = [part.fused for part in parts if part.fused]
        if fused:
            words_J = np.concatenate([of.words_K for of in fused])
            by_vector_J = np.array([by != WORDS for of in fused for by in of.found_by_K], np.bool_)
            order = fused_order(scores_J, words_J, by_vector_J)
        else:
            order = np.argsort(-scores_J, kind="stable")[:most]
        return cls(parts, part_J[order], place_J[order])

    @property
    def scores_J(self) -> Floats:
        """Return their scores."""
        scores_J = np.empty(len(self.part_J), np.float32)
        for part, of_J, place_P in self._by_part():
            scores_J[of_J] = part.scores_K[place_P]
        return scores_J

    @property
    def vectors_JD(self) -> Floats:
        """Return a vector of each, see `Snapshot.vectors_of`."""
        dim = self.parts[0].snapshot.store.manifest.model.dim
        vectors_JD = np.empty((len(self.part_J), dim), np.float32)
        for part, of_J, place_P in self._by_part():
            vectors_JD[of_J] = part.snapshot.vectors_of(part.rows_K[place_P])
        return vectors_JD

    @property
    def nothing_found(self) -> bool | None:
        """Whether no store has anything relevant; None if one may have."""
        told = {part.nothing_found for part in self.parts}
        return False if False in told else None if None in told else True

    def hits(self, chosen_P: Ints, *, first: int, extra: Sequence[str], named: bool) -> list[Hit]:
        """Read some of them as hits; `first` is the rank of the first, see `Snapshot.hits`."""
        found: dict[int, Hit] = {}
        chosen = Joined(self.parts, self.part_J[chosen_P], self.place_J[chosen_P])
        for part, of_P, places in chosen._by_part():
            hits = part.hits(places, extra, named=named)
            found |= zip(np.flatnonzero(of_P).tolist(), hits, strict=True)
        return [replace(found[i], rank=first + i) for i in range(len(chosen_P))]

    def ids(self, chosen: Sequence[Ints]) -> list[tuple[str, ...]]:
        """Return the ids of groups of them."""
        flat = np.concatenate([*chosen, np.zeros(0, np.int64)])
        told = np.empty(len(flat), object)
        for part, of_P, places in Joined(
            self.parts, self.part_J[flat], self.place_J[flat]
        )._by_part():
            rows = part.snapshot.store.rows(part.rows_K[places], ("id",))
            told[of_P] = [row["id"] for row in rows]
        ids = iter(told.tolist())
        return [tuple(islice(ids, len(group))) for group in chosen]

    def _by_part(self) -> list[tuple[Candidates, Bools, Ints]]:
        """Return each part with which candidates are from it, and their places there."""
        return [
            (part, self.part_J == i, self.place_J[self.part_J == i])
            for i, part in enumerate(self.parts)
        ]


def _judged_text(query: Query) -> str | None:
    """Return the words of a query, if relevance is known for it: texts that are added."""
    items = [(item, weight) for item, weight in query.items if isinstance(item, str) and weight > 0]
    if query.more or query.less or query.excluded or len(items) != len(query.items):
        return None
    return " ".join(item for item, _ in items)
