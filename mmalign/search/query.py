"""What can be asked of a store, as a value."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from mmalign.errors import UsageError
from mmalign.items import kind_of

Target = Literal["image", "text"]


@dataclass(frozen=True)
class Query:
    """One question: weighted items, which rows may answer, and how many answers are wanted.

    >>> Query((("a red dress", 1.0), ("stripes", -0.5)), where="price < 20", k=5).kind
    'text'
    """

    items: tuple[tuple[Any, float], ...]
    """Items and their weights. Their unit vectors are added up, weighted, and scaled to unit
    length; a negative weight turns away from an item. See `mmalign.items` for what an item is."""
    to: Target = "image"
    """Whether images or captions are found."""
    k: int = 10
    """Results wanted; fewer where the store has fewer."""
    offset: int = 0
    """Results left out at the start: `offset=10, k=10` is the second page."""
    where: str | None = None
    """Only rows for which this SQL expression is true, see `mmalign.store.where`."""
    exact: bool = False
    """Compare every row, whatever index there is."""

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
        """Which queries it resembles, as the index is tuned for each modality of queries."""
        item, _ = max(self.items, key=lambda pair: abs(pair[1]))
        return "text" if kind_of(item) == "text" else "image"


def as_query(asked: Any, **options: Any) -> Query:
    """Make a `Query` of an item; of a `Query`, the same with what is given in place of its own.

    Raises:
        ItemError: It is neither.
        UsageError: An item or option is off.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(asked, Query):
        return replace(asked, **given)
    return Query(((asked, 1.0),), **given)
