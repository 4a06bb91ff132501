"""Read the rows of a .csv or .tsv file with any separator, encoding and quoting style.

What the file does not declare is detected: the encoding from its first bytes, the separator and
header from its first line, the quoting of a .tsv and the numeric columns from one full pass.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from mmalign.data.columns import (
    SHOWN_CHARACTERS,
    ReadOptions,
    find_columns,
    listed,
    no_image_column,
    shown,
)
from mmalign.data.kinds import PICTURE_SUFFIXES, suffix
from mmalign.data.places import open_file
from mmalign.data.samples import DEFAULT_CAPTION_KEY, SampleProblem
from mmalign.errors import DataError

# The first separator that gives an image column is used.
SEPARATORS = ",;\t|"
MAX_LINE = 1 << 24
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEP = re.compile(r"\ufeff?sep=(.)\s*", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.(\d+))?(?:[eE][+-]?\d+)?", re.ASCII)
_NOT_FINITE = {"nan", "inf", "+inf", "-inf", "infinity", "-infinity"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a file is to be read."""

    path: str
    separator: str
    names: tuple[str, ...]
    skipped_lines: int
    """Lines before the first row: the header, and Excel's `sep=;`."""
    blank_follows: bool
    """A space after a separator belongs to it."""
    unnamed: frozenset[str] = frozenset()
    """Names that we assign to unnamed columns: a header may end in a separator."""
    quoted: bool = True
    guessed_header: str = ""
    """The assumed meaning of the columns in a file without a header."""


def find_layout(path: str, default: str, options: ReadOptions) -> Layout:
    """Detect how a file is written.

    Raises:
        DataError: It is empty, is not text, has duplicate column names, or has no image column.
    """
    with open_text(path) as file:
        first = file.readline(MAX_LINE)
        sep = _SEP.fullmatch(first.rstrip("\r\n"))
        line = file.readline(MAX_LINE) if sep else first
    if not line.strip():
        raise DataError(f"{path}: is empty" if not line else f"{path}: its first line is empty")
    if "\0" in line:
        raise DataError(f"{path}: not a text file: its first line contains a NUL byte")
    separators_to_try = sep[1] if sep else default + "".join(s for s in SEPARATORS if s != default)
    for separator in separators_to_try:
        names = _split(line, separator)
        found = find_columns(names, options)
        if found.image is not None:
            return _checked_layout(path, separator, names, 1 + bool(sep))
    for separator in separators_to_try:
        layout = _without_header(path, line, separator, int(bool(sep)), options)
        if layout is not None:
            return layout
    names = _split(line, separators_to_try[0])
    error = no_image_column(path, names, options)
    if len(names) == 1:
        raise DataError(
            f"{error}; only one column was found: are columns separated by , ; | or tabs?"
        )
    if any(len(name) > SHOWN_CHARACTERS for name in names):
        raise DataError(f"{error}; is its first line a header?")
    raise error


def rows(layout: Layout) -> Iterator[tuple[int, Row | SampleProblem]]:
    """Yield numbered rows of text; a row with more fields than the header is a problem.

    Raises:
        ValueError: A quote is not closed, or a field is too long; the message names the line.
    """
    width = len(layout.names)
    with open_text(layout.path) as file:
        for _ in range(layout.skipped_lines):
            file.readline(MAX_LINE)
        reader = _reader(file, layout)
        number = 0
        while True:
            first = reader.line_num + 1 + layout.skipped_lines
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(f"row that starts in line {first}: {_why(error)}") from None
            if not cells:
                continue
            if any(cells[width:]):
                reason = f"row has more fields than the header ({len(cells)} instead of {width})"
                yield number, SampleProblem(f"{reason}: is a field with a separator not quoted?")
            else:
                named = zip(layout.names, cells, strict=False)
                yield number, {n: cell for n, cell in named if cell or n not in layout.unnamed}
            number += 1


def with_detected_quoting(layout: Layout) -> Layout:
    """Determine by a full pass whether the quotes of a .tsv are quoting or plain text."""
    if layout.separator != "\t":
        return layout
    try:
        if all(not isinstance(row, SampleProblem) for _, row in rows(layout)):
            return layout
    except ValueError:
        pass
    return Layout(**{**vars(layout), "quoted": False})


@contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """Open a text file, compressed or not, in the encoding of its first bytes; newlines unchanged.

    Bytes that are not UTF-8 become lone surrogates, so that they cost one caption and not the file.
    """
    with open_bytes(path) as file:
        start = file.read(1024)
        encoding = next((name for bom, name in _BOMS if start.startswith(bom)), None)
        if encoding is None:
            odd, even = start[1::2].count(0), start[::2].count(0)
            wide = {True: "utf-16-le", False: "utf-16-be"}[odd > even]
            encoding = wide if max(odd, even) > len(start) // 4 else "utf-8"
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    with open_bytes(path) as file:
        yield io.TextIOWrapper(file, encoding, errors, newline="")


@contextmanager
def open_bytes(path: str) -> Iterator[Any]:
    """Open a file or URL; compressed content is decompressed while it is read."""
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    with open_file(path) as file:
        kind = infer_compression(path)
        if kind is None:
            yield file
        elif kind not in compr:
            raise DataError(f"{path}: no package that reads {kind} is installed: unpack it first")
        else:
            with compr[kind](file, mode="rb") as unpacked:
                yield unpacked


@dataclass
class NumberColumns:
    """Finds the columns in which every text is a number.

    A column is numeric if each number can be written back unchanged: `7`, `0.5`, or all with the
    same number of decimals (`12.50`, `3.00`). Codes such as 007, and versions such as 1.9 beside
    1.10, stay text.
    """

    text_columns: frozenset[str] = frozenset()
    """Columns that are text whatever they contain."""
    formats: dict[str, "_NumberFormat"] = field(default_factory=dict)

    def see(self, row: Row) -> None:
        """Update the statistics with the cells of a row."""
        for name, cell in row.items():
            if name in self.text_columns:
                continue
            format = self.formats.get(name)
            if format is None:
                format = self.formats[name] = _NumberFormat()
            if format.is_number:
                format.see(cell)

    def value(self, name: str, cell: str) -> Any:
        """Convert a cell to its column's type; return None where a number is missing."""
        format = self.formats[name]
        if not format.is_number or not format.seen:
            return cell
        text = cell.strip()
        if not text or text.lower() in _NOT_FINITE:
            return None
        return int(text) if text.lstrip("-").isdecimal() else float(text)


@dataclass
class _NumberFormat:
    """The format of a column's numbers so far."""

    is_number: bool = True
    seen: bool = False
    shortest: bool = True
    decimals: int | None = None

    def see(self, cell: str) -> None:
        text = cell.strip()
        if not text or text.lower() in _NOT_FINITE:
            return
        match = _NUMBER.fullmatch(text)
        if match is None:
            self.is_number = False
        elif text.lstrip("-").isdecimal():
            self.is_number = text != "-0"
        else:
            decimals = len(match[1] or "")
            self.shortest &= repr(float(text)) == text
            round_trips = (
                self.decimals in (None, decimals) and f"{float(text):.{decimals}f}" == text
            )
            self.decimals = decimals if round_trips else -1
            self.is_number = self.shortest or round_trips
        self.seen = True


def _checked_layout(path: str, separator: str, names: Sequence[str], skipped_lines: int) -> Layout:
    """Refuse duplicate names, because one column would hide the other."""
    stripped = [name.strip() for name in names]
    for name in stripped:
        if name and stripped.count(name) > 1:
            raise DataError(f"{path}: two columns are called {shown(name)!r}: rename one")
    blank = any(name.startswith(" ") for name in names)
    full = tuple(name or f"column{i + 1}" for i, name in enumerate(stripped))
    return Layout(path, separator, full, skipped_lines, blank, frozenset(full) - {*stripped})


def _without_header(
    path: str, line: str, separator: str, skipped_lines: int, options: ReadOptions
) -> Layout | None:
    """Treat the first line as a row if it contains an image file name or a URL."""
    cells = _split(line, separator)
    image = next((i for i, cell in enumerate(cells) if _is_image_name(cell)), None)
    if image is None or (options.image_column and not options.image_column.startswith("column")):
        return None
    names = [f"column{i + 1}" for i in range(len(cells))]
    said = f"no header line: the columns are called {listed(names)}"
    if options.image_column is None:
        said += f"; {names[image]} is used as the image"
        names[image] = "image"
        if len(cells) == 2 and DEFAULT_CAPTION_KEY in options.caption_keys:
            said += f", {names[1 - image]} as the caption"
            names[1 - image] = "caption"
    return Layout(path, separator, tuple(names), skipped_lines, False, guessed_header=said)


def _is_image_name(cell: str) -> bool:
    return suffix(cell.strip()) in PICTURE_SUFFIXES or cell.startswith(("http://", "https://"))


def _split(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error:
        return line.rstrip("\r\n").split(separator)


def _reader(file: TextIO, layout: Layout) -> Any:
    return csv.reader(
        _lines(file),
        delimiter=layout.separator,
        # Strict, because an unclosed quote would swallow the following rows.
        strict=True,
        quoting=csv.QUOTE_MINIMAL if layout.quoted else csv.QUOTE_NONE,
        skipinitialspace=layout.blank_follows,
    )


def _lines(file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise ValueError(f"line {number} has more than {MAX_LINE:,} characters")
        yield line


def _why(error: csv.Error) -> str:
    if "field larger" in str(error):
        limit = csv.field_size_limit()
        return f"a field has more than {limit:,} characters (base64 images are not supported)"
    return f"{error} (is a quote not closed, or not doubled inside a field?)"
