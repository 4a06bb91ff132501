"""The query language: text -> what is asked for, and back. Pure, and it refuses nothing.

    query     = { filter } [ term ] { operator ( term | filter ) } ;
    operator  = " + " | " - " | " ! " ;           add, subtract, exclude
    term      = [ weight ":" ] ( row | file | part { " " part } ) ;
    part      = word | phrase | filter ;
    phrase    = '"' text '"' ;                    must occur in a caption
    row       = "row:" id ;                       more like this row
    file      = "@" path ;                        an image, where paths are allowed
    filter    = field ":" ( [ sign ] value | [ value ] ".." [ value ] ) ;
    sign      = "=" | ">" | ">=" | "<" | "<=" ;

An operator stands between spaces, so `t-shirt`, `24-70mm` and Chinese text are words, and something
follows it; one at the very start counts. A weight is a number above 0 before a colon that no digit
follows: `16:9` is a word. A filter may stand anywhere; its name is a field of the metadata, in any
case. Behind `-` or `!` it must not hold, and quotes there only hold words together. Values and ids
in quotes may hold spaces; the last of an odd number of quotes is left out. Full-width forms count
as well. Whatever cannot be read in this way is words. Reading takes time in proportion to the
length of the text.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Sign = Literal["=", ">", ">=", "<", "<=", ".."]
OPERATORS = {"+": "+", "＋": "+", "-": "-", "－": "-", "!": "!", "！": "!"}
_PLAIN = str.maketrans({"“": '"', "”": '"', "＂": '"'})
_PLAIN_SIGNS = str.maketrans({"＞": ">", "＜": "<", "＝": "="})
# What has no spaces, except between quotes.
_TOKEN = re.compile(r'(?:[^\s"]|"[^"]*")+')
_QUOTED = re.compile(r'"[^"]*"')
_WEIGHT = re.compile(r"(\d{1,3}(?:\.\d{1,3})?)[:：](?=[^\s\d])")
_FILTER = re.compile(r"([^\W\d][\w.]*)[:：]([<>＜＞]?[=＝]?)([^\s/<>=＜＞＝].*)", re.DOTALL)
_ROW = re.compile(r"row[:：](.+)", re.DOTALL)
_NEEDS_QUOTES = re.compile(r"\s|\.\.|^[./<>=＜＞＝]|\.$")


@dataclass(frozen=True)
class Term:
    """One weighted thing that is asked for."""

    content: str
    """Words, the id of a row, or the path of a file."""
    kind: str = "text"
    """Or "row", "file"; others, as "vector", cannot be written."""
    weight: float = 1.0
    """Negative if it is subtracted."""
    excluded: bool = False
    """Rows that match it are left out, see `mmalign.search.exclusion`."""

    @property
    def phrases(self) -> tuple[str, ...]:
        """What must occur in a caption: what stands in quotes, if it is added."""
        counts = self.kind == "text" and self.weight > 0 and not self.excluded
        return tuple(filter(None, map(_phrase, tokens(self.content)))) if counts else ()

    @property
    def words(self) -> str:
        """The text without the quotes of phrases."""
        return " ".join(_phrase(token) or token for token in tokens(self.content))

    def __str__(self) -> str:
        """Write it without its operator."""
        content = {
            "text": self.content,
            "row": f"row:{_quoted(self.content)}",
            "file": f"@{_quoted(self.content)}",
        }.get(self.kind, f"<{self.kind}>")
        weight = f"{abs(self.weight):g}:"
        needed = weight != "1:" or tokens(content)[:1] in [[name] for name in OPERATORS]
        return f"{weight if needed else ''}{content}"


@dataclass(frozen=True)
class Condition:
    """What a field of the metadata must be."""

    field: str
    sign: Sign
    value: str
    high: str = ""
    """The upper end of a range; `value` is the lower."""
    excluded: bool = False
    """Rows for which it holds are left out."""

    def __str__(self) -> str:
        """Write it as a filter."""
        value = _quoted(self.value)
        if self.sign == "..":
            value += f"..{_quoted(self.high)}"
        elif self.sign != "=":
            value = self.sign + value
        return f"{'! ' if self.excluded else ''}{self.field}:{value}"


@dataclass(frozen=True)
class Reading:
    """How a text was read."""

    terms: tuple[Term, ...] = ()
    conditions: tuple[Condition, ...] = ()

    def __str__(self) -> str:
        """Write it in the query language; reading that gives an equal value."""
        parts = [str(condition) for condition in self.conditions]
        for number, term in enumerate(self.terms):
            operator = "!" if term.excluded else "-" if term.weight < 0 else "+"
            parts += [operator] * (number > 0 or operator != "+")
            parts.append(str(term))
        return " ".join(parts)


def read(text: str, fields: Iterable[str] = (), *, files: bool = False) -> Reading:
    """Read a text as a query.

    >>> str(read("price:..20  2:红裙子 ＋ stripes - t-shirt", ["price"]))
    'price:<=20 2:红裙子 + stripes - t-shirt'

    Args:
        text: Any text.
        fields: The fields of the metadata; a filter on another field stays words.
        files: Whether `@path` is a file.
    """
    names = {name.lower(): name for name in fields} | {name: name for name in fields}
    words: list[str] = []
    conditions: list[Condition] = []
    operator = ""  # the one just in front of the token
    for token in tokens(_with_pairs_of_quotes(text)):
        condition = _condition(token, names)
        if condition is None:
            words.append(token)
        else:
            if operator:
                words.pop()
            conditions.append(replace(condition, excluded=operator in ("-", "!")))
        operator = OPERATORS.get(token, "")
    terms = [term for sign, part in _divided(words) for term in _terms(part, sign, files)]
    return Reading(tuple(terms), tuple(conditions))


def tokens(text: str) -> list[str]:
    """Split a text at its spaces, except between quotes."""
    return _TOKEN.findall(text)


def _with_pairs_of_quotes(text: str) -> str:
    """Return a text with plain quotes; the last one of an odd number is left out."""
    text = text.translate(_PLAIN)
    before, quote, after = text.rpartition('"')
    return before + after if text.count('"') % 2 else before + quote + after


def quoted_words(words: str, phrases: deque[str], *, added: bool) -> str:
    """Return the content of a term from its words: what `Term.words` and `Term.phrases` undo.

    Args:
        words: Words without the quotes of phrases.
        phrases: Phrases to find in the words, in order; those found are removed.
        added: Whether the term is added; otherwise quotes keep words from being read as more.
    """
    every, content, first = tokens(words), list[str](), 0
    while first < len(every):
        phrase = phrases[0].split() if phrases and added else []
        if phrase and every[first : first + len(phrase)] == phrase:
            content.append(f'"{phrases.popleft()}"')
            first += len(phrase)
            continue
        token = every[first]
        is_more = token in OPERATORS or ":" in token or "：" in token or token[0] == "@"
        content.append(f'"{token}"' if is_more and not added and '"' not in token else token)
        first += 1
    return " ".join(content)


def _divided(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the words of each term, with the operator in front of it."""
    operator, part = "+", list[str]()
    for number, word in enumerate(words):
        following = words[number + 1 : number + 2]
        is_operator = word in OPERATORS and following and following[0] not in OPERATORS
        if is_operator and (part or number == 0):
            if part:
                yield operator, part
            operator, part = OPERATORS[word], []
        else:
            part.append(word)
    if part:
        yield operator, part


def _terms(part: Sequence[str], operator: str, files: bool) -> Iterator[Term]:
    """Yield what stands between two operators: rows, a file, and runs of words."""
    sign, excluded = -1.0 if operator == "-" else 1.0, operator == "!"
    words, weight = list[str](), 1.0
    for token in part:
        found = None if words else _WEIGHT.match(token)
        own = float(found[1]) if found else 0.0
        rest = token[found.end() :] if found and own else token
        kind, content = _item(rest, files and not words)
        if kind == "text":
            words.append(content)
            weight = own or weight
            continue
        if words:
            yield Term(" ".join(words), "text", sign * weight, excluded)
        yield Term(content, kind, sign * (own or 1.0), excluded)
        words, weight = [], 1.0
    if words:
        yield Term(" ".join(words), "text", sign * weight, excluded)


def _item(token: str, files: bool) -> tuple[str, str]:
    """Return the kind and the content of a token."""
    row = _ROW.fullmatch(token)
    if row and _bare(row[1]):
        return "row", _bare(row[1])
    if files and token[0] == "@" and _bare(token[1:]):
        return "file", _bare(token[1:])
    return "text", token


def _condition(token: str, names: Mapping[str, str]) -> Condition | None:
    """Return what a token asks of a field; None if it is no filter."""
    weight = _WEIGHT.match(token)  # of no meaning here
    found = _FILTER.fullmatch(token, weight.end() if weight else 0)
    if not found or found[1] == "row":
        return None
    field = names.get(found[1]) or names.get(found[1].lower())
    value, bare = found[3], _bare(found[3])
    if not field or not bare:
        return None
    sign: Sign = found[2].translate(_PLAIN_SIGNS) or "="  # type: ignore[assignment]
    low, dots, high = value.partition("..")
    low, high = _bare(low), _bare(high)
    if sign != "=" or not dots or _QUOTED.fullmatch(value):
        return Condition(field, sign, bare)
    if not (low or high):
        return None
    if low and high:
        return Condition(field, "..", low, high)
    return Condition(field, ">=" if low else "<=", low or high)


def _phrase(token: str) -> str:
    """Return what a token has in quotes, with single spaces; empty if it is no phrase."""
    return " ".join(token[1:-1].split()) if _QUOTED.fullmatch(token) else ""


def _bare(value: str) -> str:
    """Return a value without quotes; empty if it is blank."""
    value = value.replace('"', "")
    return value if value.strip() else ""


def _quoted(value: str) -> str:
    """Put a value in quotes where it would be read in another way without."""
    return f'"{value}"' if _NEEDS_QUOTES.search(value) else value
