"""Read rows of JSON: one object per line (.jsonl, .ndjson), or one array of objects (.json)."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

from mmalign.data.delimited import MAX_LINE, open_text
from mmalign.data.samples import SampleProblem
from mmalign.errors import DataError

CHUNK = 1 << 18
BLANKS = " \t\r\n\ufeff"
Row = dict[str, Any]


def rows(path: str) -> Iterator[tuple[int, Row | SampleProblem]]:
    """Yield numbered objects; anything that is not an object, or not JSON, is a problem.

    Raises:
        DataError: The file is empty, or contains something else, such as one multi-line object.
    """
    with open_text(path) as file:
        start = next((c for c in iter(lambda: file.read(1), "") if c not in BLANKS), "")
        file.seek(0)
        if not start:
            raise DataError(f"{path}: is empty")
        if start == "[":
            yield from enumerate(_elements(file))
            return
        filled = (line for line in _lines(file) if line.strip())
        first, second = next(filled, ""), next(filled, "")
        if start == "{" and _is_begun(first.lstrip(BLANKS)) and not _is_object(second):
            raise DataError(
                f"{path}: contains one JSON object over several lines: "
                "write one object per line, or an array of objects"
            )
        file.seek(0)
        yield from _objects(file)


def _is_begun(line: str) -> bool:
    """Return whether a line is only the beginning of an object."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def _is_object(line: str) -> bool:
    return isinstance(_object(line, "line"), dict)


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_LINE):
        yield line


def _objects(file: TextIO) -> Iterator[tuple[int, Row | SampleProblem]]:
    number, is_long = 0, False
    for piece in _lines(file):
        if len(piece) == MAX_LINE and not piece.endswith("\n"):
            is_long = True
        elif is_long:
            yield number, SampleProblem(f"line has more than {MAX_LINE:,} characters")
        elif piece.strip():
            yield number, _object(piece.lstrip(BLANKS), "line")
        if piece.endswith("\n"):
            number, is_long = number + 1, False
    if is_long:
        yield number, SampleProblem(f"line has more than {MAX_LINE:,} characters")


def _object(text: str, what: str) -> Row | SampleProblem:
    try:
        row = json.loads(text)
    except RecursionError:
        return SampleProblem(f"{what} is not valid JSON: nested too deeply")
    except ValueError as error:  # also a number of thousands of digits
        return SampleProblem(f"{what} is not valid JSON: {error}")
    return row if isinstance(row, dict) else SampleProblem(f"{what} is not a JSON object")


def _elements(file: TextIO) -> Iterator[Row | SampleProblem]:
    """Yield the elements of an array, using the memory of one."""
    decoder = json.JSONDecoder()
    text, at, ended = "", 0, False
    opened = False
    while True:
        while at < len(text) and text[at] in BLANKS + ",":
            at += 1
        if not opened and text[at : at + 1] == "[":
            opened, at = True, at + 1
            continue
        if text[at : at + 1] == "]":
            return
        try:
            row, end = decoder.raw_decode(text, at)
        except RecursionError:
            raise ValueError("element is nested too deeply") from None
        except ValueError:
            if ended or len(text) - at > MAX_LINE:
                raise
            more = file.read(max(CHUNK, len(text) - at))
            text, at, ended = text[at:] + more, 0, not more
            continue
        at = end
        yield row if isinstance(row, dict) else SampleProblem("element is not a JSON object")
