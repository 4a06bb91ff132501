"""The query to a store, as a value."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from mmalign.errors import UsageError
from mmalign.items import kind_of

Target = Literal["image", "text"]


@dataclass(frozen=True)
class Query:
    """One query: weighted items, which rows may be found, and the number of results.

    >>> Query((("a red dress", 1.0), ("stripes", -0.5)), where="price < 20", k=5).kind
    'text'
    """

    items: tuple[tuple[Any, float], ...]
    """Items and their weights. The weighted sum of their unit vectors is scaled to unit length; a
    negative weight moves away from an item. See `mmalign.items` for what an item is."""
    to: Target = "image"
    """Whether rows are found by their images or by their captions."""
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
            if kind_of(item) == "text" and not item.strip():
                raise UsageError("the query is empty")
            if not float("-inf") < weight < float("inf"):
                raise UsageError(f"weight {weight} is not a finite number")
        if self.to not in ("image", "text"):
            raise UsageError(f"to={self.to!r}: write 'image' or 'text'")
        if self.k < 1:
            raise UsageError(f"k={self.k} must be at least 1")
        if self.offset < 0:
            raise UsageError(f"offset={self.offset} must be at least 0")

    @property
    def kind(self) -> Target:
        """Return the modality that it resembles, as the index is tuned for each query modality."""
        item, _ = max(self.items, key=lambda pair: abs(pair[1]))
        return "text" if kind_of(item) == "text" else "image"


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
