"""The query to a store, as a value."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmalign.errors import UsageError
from mmalign.items import Row, kind_of
from mmalign.modality import OTHER_KINDS, TEXT
from mmalign.search.grammar import Condition, Reading, Term, quoted_words, read


@dataclass(frozen=True)
class Selection:
    """Which rows of a store a query is about."""

    where: str | None = None
    conditions: tuple[Condition, ...] = ()
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Query:
    """One query: weighted items, which rows may be found, and the number of results.

    >>> Query((("a red dress", 1.0), ("stripes", -0.5)), where="price < 20", k=5).kind
    'text'
    >>> str(Query.parse("a red dress - 0.5:stripes price:<20", fields=["price"]))
    'price:<20 a red dress - 0.5:stripes'
    """

    items: tuple[tuple[Any, float], ...]
    """Items and their weights; a negative weight moves away from an item. See `mmalign.items` for
    what an item is, and `mmalign.search.combine` for how they are added up. Without items and
    examples, the selected rows come in the order of the store."""
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
    lexical: bool = False
    """Also find rows whose captions have words of the query, and fuse both by rank."""
    diversity: float = 0.0
    """From 0, the nearest rows, to 1, rows as unlike each other as may be; see
    `mmalign.search.diversity`."""
    group: bool = False
    """Near-duplicates are one hit, see `mmalign.search.duplicates`; `k` and `offset` count hits."""
    excluded: tuple[Any, ...] = ()
    """Items; rows that match one are left out, see `mmalign.search.exclusion`."""
    phrases: tuple[str, ...] = ()
    """Only rows with each of these in a caption, in upper or lower case, of any width."""
    conditions: tuple[Condition, ...] = ()
    """Only rows for whose metadata these hold."""
    more: tuple[Any, ...] = ()
    """Examples of what is looked for, as `Row`, image or vector; see `mmalign.search.feedback`.
    Rows named here and in `less` are no hits."""
    less: tuple[Any, ...] = ()
    """Examples of what is not."""

    def __post_init__(self) -> None:
        if self.less and not self.is_ranked:
            raise UsageError("less turns a query away from rows: give a query, or rows as more")
        if not (self.is_ranked or self.excluded or any(vars(self.selection).values())):
            raise UsageError("the query has no item")
        for example in (*self.more, *self.less):
            if kind_of(example) == TEXT.name:
                told = (
                    f"{example!r} is a text, which belongs in the query; a row is Row({example!r})"
                )
                raise UsageError(f"more and less take rows, images and vectors: {told}")
        for item, weight in (*self.items, *((item, 1.0) for item in self.excluded)):
            kind_of(item)
            if isinstance(item, str) and not item.strip():
                raise UsageError("the query is empty")
            if not float("-inf") < weight < float("inf"):
                raise UsageError(f"weight {weight} is not a finite number")
        if self.k < 1:
            raise UsageError(f"k={self.k} must be at least 1")
        if self.offset < 0:
            raise UsageError(f"offset={self.offset} must be at least 0")
        if self.lexical and not self.words:
            raise UsageError("lexical matches words with captions: the query has none")

        if not 0 <= self.diversity <= 1:
            raise UsageError(f"diversity={self.diversity} must be from 0 to 1")
        self._require_ranked_and_by_vectors()

    def _require_ranked_and_by_vectors(self) -> None:
        """Refuse diversity and groups where they make no sense."""
        if self.diversity and not self.is_ranked:
            raise UsageError("diversity weighs nearness to a query: filters alone have none")
        if self.group and not self.is_ranked:
            raise UsageError("group needs something to search for: filters alone list every row")
        if self.diversity and self.lexical:
            raise UsageError("diversity goes by vectors alone: leave it out, or lexical")

    @classmethod
    def parse(cls, text: str, *, fields: Iterable[str] = (), files: bool = False) -> "Query":
        """Read a query in the query language, see `mmalign.search.grammar`.

        What cannot be read in the language is words. `str` of the result writes it down; reading
        that gives an equal query.

        Args:
            text: The query.
            fields: The fields of the metadata that can be filtered by, as `Searcher.fields`.
            files: Whether `@path` is a file. Leave it off where others write the query.

        Raises:
            UsageError: The text is empty.
        """
        reading = read(text, fields, files=files)
        if not (reading.terms or reading.conditions):
            raise UsageError("the query is empty")
        return cls(
            tuple((_item(term), term.weight) for term in reading.terms if not term.excluded),
            excluded=tuple(_item(term) for term in reading.terms if term.excluded),
            phrases=tuple(phrase for term in reading.terms for phrase in term.phrases),
            conditions=reading.conditions,
        )

    @property
    def is_ranked(self) -> bool:
        """Whether rows are ranked by how near they are to something; else they are listed."""
        return bool(self.items or self.more)

    @property
    def examples(self) -> tuple[str, ...]:
        """Return the ids of the rows that are examples."""
        return tuple(item.id for item in (*self.more, *self.less) if isinstance(item, Row))

    @property
    def kind(self) -> str | None:
        """Return the modality of its weightiest item; None for a vector, a row or no item.

        An index is tuned for each query modality.
        """
        if not self.items:
            return None
        item, _ = max(self.items, key=lambda pair: abs(pair[1]))
        kind = kind_of(item)
        return None if kind in OTHER_KINDS else kind

    @property
    def words(self) -> str:
        """Return its texts that are not subtracted, for a match with captions."""
        return " ".join(item for item, w in self.items if isinstance(item, str) and w > 0)

    @property
    def selection(self) -> Selection:
        """Return which rows may be found."""
        return Selection(self.where, self.conditions, self.phrases)

    @property
    def reading(self) -> Reading:
        """Return what it asks for, as the query language says it.

        Items that cannot be written, as vectors, have no content. Other options are not part of it.
        """
        phrases = deque(self.phrases)
        terms = [_term(item, weight, phrases) for item, weight in self.items]
        excluded = [
            replace(_term(item, -1, deque()), weight=1.0, excluded=True) for item in self.excluded
        ]
        return Reading((*terms, *excluded), self.conditions)

    @property
    def read_as(self) -> dict[str, Any]:
        """Return how it was read as plain values: its text in the query language, and its parts."""
        reading = self.reading
        parts: list[dict[str, Any]] = [
            {"kind": "filter", "content": str(replace(c, excluded=False)), "weight": None,
             "excluded": c.excluded}
            for c in reading.conditions
        ]  # fmt: skip
        for term in reading.terms:
            words = term.words if term.kind == "text" else term.content
            parts.append(
                {"kind": term.kind, "content": words, "weight": term.weight,
                 "excluded": term.excluded}
            )  # fmt: skip
        for phrase in self.phrases:
            parts.append({"kind": "phrase", "content": phrase, "weight": None, "excluded": False})
        return {"text": str(reading), "parts": parts}

    def __str__(self) -> str:
        """Write it in the query language; an item that cannot be written is `<kind>`."""
        return str(self.reading)


def _require_no_text(*examples: Any) -> None:
    for example in examples:
        if kind_of(example) == TEXT.name:
            told = f"{example!r} is a text, which belongs in the query; a row is Row({example!r})"
            raise UsageError(f"more and less take rows, images and vectors: {told}")


def as_query(item: Any, **options: Any) -> Query:
    """Make a `Query` from an item, or from a `Query` with the given options replaced.

    None is no item, where there are examples.

    Raises:
        ItemError: It is neither.
        UsageError: An item or option is invalid.
    """
    changes = {name: value for name, value in options.items() if value is not None}
    for name in ("more", "less"):
        if name in changes:
            if not isinstance(changes[name], list | tuple):
                raise UsageError(f"{name} takes a list: {name}=[Row(id)]")
            changes[name] = tuple(changes[name])
    if isinstance(item, Query):
        return replace(item, **changes)
    only_examples = item is None and ("more" in changes or "less" in changes)
    return Query(() if only_examples else ((item, 1.0),), **changes)


def _item(term: Term) -> Any:
    """Return what a term stands for, see `mmalign.items`."""
    made = {"row": Row, "file": Path}.get(term.kind)
    return made(term.content) if made else term.words


def _term(item: Any, weight: float, phrases: deque[str]) -> Term:
    """Write an item as a term; phrases that are found in it are removed."""
    if isinstance(item, str):
        return Term(quoted_words(item, phrases, added=weight > 0), weight=weight)
    if isinstance(item, Row):
        return Term(item.id, "row", weight)
    if isinstance(item, Path):
        return Term(str(item), "file", weight)
    return Term("", kind_of(item), weight)
