"""Filters of a query on metadata -> a SQL expression for `mmalign.store.where`. Pure."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from mmalign.errors import UsageError, nearest
from mmalign.items import utf8_text
from mmalign.search.grammar import Condition

NUMBER = re.compile(r"[+-]?\d{1,30}(\.\d{0,30})?(e[+-]?\d{1,2})?", re.IGNORECASE | re.ASCII)
TRUTHS = {"true": "true", "yes": "true", "false": "false", "no": "false"}
# Names that mean a column of every store in SQL; a field of such a name is only in the JSON there.
COLUMNS = ("id", "uri", "captions", "meta")


def as_sql(conditions: Sequence[Condition], kinds: Mapping[str, str]) -> str:
    """Return the SQL expression that is true where all conditions hold.

    A number is compared as a number. A text is equal in upper or lower case, and is compared by as
    many letters as the value has, so that 2025-12-31 lies in 2024..2025. If the value is a number,
    only texts that begin with a digit are compared; those that are numbers, as numbers. Of a list
    one element has to fit.

    Args:
        conditions: At least one.
        kinds: The kind of each field, as `Store.fields` gives it; "none" if no row here has it.

    Raises:
        UsageError: There is no such field, or it holds nothing that the value can be compared with.
    """
    same = Counter(name.lower() for name in kinds)
    tests = []
    for condition in conditions:
        name = condition.field
        if name not in kinds:
            raise UsageError(
                f"the filter {condition}: no row has a field {name!r}: {nearest(name, kinds)}"
            )
        utf8_text(condition.value + condition.high)
        if "\0" in condition.value + condition.high:
            raise UsageError(f"the filter {condition}: leave out the null character")
        is_column = name.lower() not in COLUMNS and same[name.lower()] == 1
        test = _test(condition, kinds[name] if is_column else "json")
        tests.append(f"not coalesce({test}, false)" if condition.excluded else f"({test})")
    return " and ".join(tests)


def _test(condition: Condition, kind: str) -> str:
    name = '"' + condition.field.replace('"', '""') + '"'
    bounds = _bounds(condition)
    if kind == "none":
        return "false"
    if kind == "number":
        if not all(_is_number(value) for _, value in bounds):
            raise UsageError(f"the filter {condition}: {condition.field} is a number")
        return " and ".join(f"{name} {sign} {_number(value)}" for sign, value in bounds)
    if kind == "truth":
        if condition.sign != "=" or condition.value.lower() not in TRUTHS:
            raise UsageError(f"the filter {condition}: {condition.field} is true or false")
        return f"{name} = {TRUTHS[condition.value.lower()]}"
    if kind == "text":
        return " and ".join(_text_test(name, sign, value) for sign, value in bounds)
    path, elements = (_literal(f'$."{condition.field}"{end}') for end in ("", "[*]"))
    values = (
        f"case json_type(meta, {path}) when 'ARRAY' then json_extract(meta, {elements}) "
        f"else list_value(json_extract(meta, {path})) end"
    )
    test = " and ".join(_text_test("(value->>'$')", sign, value) for sign, value in bounds)
    return f"len(list_filter({values}, lambda value: {test})) > 0"


def _bounds(condition: Condition) -> list[tuple[str, str]]:
    if condition.sign == "..":
        return [(">=", condition.value), ("<=", condition.high)]
    return [(condition.sign, condition.value)]


def _text_test(text: str, sign: str, value: str) -> str:
    """Compare texts: equal in any case, or the first letters, or numbers where both are."""
    wanted = f"lower(nfc_normalize({_literal(value)}))"
    found = f"lower(nfc_normalize({text}))"
    if sign == "=":
        return f"{found} = {wanted}"
    by_letters = f"left({found}, length({wanted})) {sign} {wanted}"
    if not _is_number(value):
        return by_letters
    by_number = f"try_cast({text} as double) {sign} {_number(value)}"
    return f"coalesce({by_number}, {found} between '0' and ':' and {by_letters})"


def _is_number(value: str) -> bool:
    return NUMBER.fullmatch(value) is not None


def _number(value: str) -> str:
    """Write a number as SQL; in brackets, so that two signs are no comment."""
    return f"({value})"


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
