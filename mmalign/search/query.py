"""The query to a store, as a value."""

from dataclasses import dataclass, replace
from typing import Any

from mmalign.errors import UsageError
from mmalign.items import kind_of
from mmalign.modality import OTHER_KINDS


@dataclass(frozen=True)
class Query:
    """One query: weighted items, which rows may be found, and the number of results.

    >>> Query((("a red dress", 1.0), ("stripes", -0.5)), where="price < 20", k=5).kind
    'text'
    """

    items: tuple[tuple[Any, float], ...]
    """Items and their weights. The weighted sum of their unit vectors is scaled to unit length; a
    negative weight moves away from an item. See `mmalign.items` for what an item is."""
    to: str | None = None
    """The modality by whose vectors rows are found: "text" for their captions. None is the main one
    of the store, as a rule "image"."""
    k: int = 10
    """Number of rows; fewer if the store has fewer."""
    offset: int = 0
    """Results to skip at the start: `offset=10, k=10` is the second page."""
    where: str | None = None
    """Only rows for which this SQL expression is true, see `mmalign.store.where`."""
    exact: bool = False
    """Compare every row, even if there is an index."""

    def __post_init__(self) -> None:
        if not self.items:
            raise UsageError("the query has no item")
        for item, weight in self.items:
            kind_of(item)
            if isinstance(item, str) and not item.strip():
                raise UsageError("the query is empty")
            if not float("-inf") < weight < float("inf"):
                raise UsageError(f"weight {weight} is not a finite number")
        if self.k < 1:
            raise UsageError(f"k={self.k} must be at least 1")
        if self.offset < 0:
            raise UsageError(f"offset={self.offset} must be at least 0")

    @property
    def kind(self) -> str | None:
        """Return the modality of its weightiest item; None for a vector or a row.

        An index is tuned for each query modality.
        """
        item, _ = max(self.items, key=lambda pair: abs(pair[1]))
        kind = kind_of(item)
        return None if kind in OTHER_KINDS else kind


def as_query(item: Any, **options: Any) -> Query:
    """Make a `Query` from an item, or from a `Query` with the given options replaced.

    Raises:
        ItemError: It is neither.
        UsageError: An item or option is invalid.
    """
    changes = {name: value for name, value in options.items() if value is not None}
    if isinstance(item, Query):
        return replace(item, **changes)
    return Query(((item, 1.0),), **changes)
