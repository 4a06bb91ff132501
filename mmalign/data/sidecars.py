"""Read files beside an image that describe it: captions, and metadata of other programs.

These are searched for beside `a.jpg`, with their own extension in any case:
    a.txt, a.caption, a.jpg.txt, a.jpg.caption    one caption per line
    a.json, a.jpg.json                            captions under keys, the rest is metadata
    a.jpg.supplemental-metadata.json, a.jpg.json  as Google Takeout writes them
    a.xmp, a.jpg.xmp                              XMP: title, description, subject, date, rating
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

from mmalign.data.samples import (
    CAPTION_ALIASES,
    DEFAULT_CAPTION_KEY,
    SampleProblem,
    captions_in,
    clean_captions,
    to_text,
)
from mmalign.values import json_value

TEXT_SUFFIXES = (".txt", ".caption")
_ORDER = (*TEXT_SUFFIXES, ".json", ".xmp")
SUFFIXES = frozenset(_ORDER)
# Takeout cuts names to this many characters before `.json`.
_TAKEOUT_LENGTH = 46
# IMG.jpg(1).json describes IMG(1).jpg.
_NUMBERED = re.compile(r"(?P<stem>.*)(?P<number>\(\d+\))(?P<end>\.[^.]*)")
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_XMP = "{http://ns.adobe.com/xap/1.0/}"
_DATES = (
    "{http://ns.adobe.com/exif/1.0/}DateTimeOriginal",
    "{http://ns.adobe.com/photoshop/1.0/}DateCreated",
    f"{_XMP}CreateDate",
)
Values = dict[str, Any]


@dataclass(frozen=True)
class SidecarContent:
    """The content of the files beside an image, and which of them could not be used."""

    captions: tuple[str, ...] = ()
    meta: Values = field(default_factory=dict)
    problem: str = ""


def lookup_name(name: str) -> str:
    """Return a file name with its extension in lower case, as sidecars are looked up."""
    stem, dot, end = name.rpartition(".")
    return f"{stem}{dot}{end.lower()}"


def key_of(image: str) -> str:
    """Return the path up to the first dot of its file name, as WebDataset does."""
    folder, slash, file = image.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def names_of_key(image: str) -> list[str]:
    """List the folded names of files that describe all images of one key."""
    return [f"{key_of(image)}{end}" for end in _ORDER]


def caption_files(image: str, keys: Sequence[str]) -> dict[str, str]:
    """Map caption keys such as `outputs.txt` to the folded names of their files.

    >>> caption_files("k.input.jpg", ["captions", "outputs.txt"])
    {'outputs.txt': 'k.outputs.txt'}
    """
    return {
        k: lookup_name(f"{key_of(image)}.{k}") for k in keys if k.lower().endswith(TEXT_SUFFIXES)
    }


def sidecar_names(image: str) -> list[str]:
    """List the folded names of possible sidecars of one image, highest priority first."""
    folder, slash, file = image.rpartition("/")
    stem = file.rpartition(".")[0] or file
    names = [f"{name}{end}" for end in _ORDER for name in (stem, file)]
    unnumbered, number = file, ""
    if numbered := _NUMBERED.fullmatch(file):
        unnumbered, number = f"{numbered['stem']}{numbered['end']}", numbered["number"]
        names.append(f"{unnumbered}{number}.json")
    for full_name in (unnumbered, f"{unnumbered}.supplemental-metadata"):
        names.append(f"{full_name[:_TAKEOUT_LENGTH]}{number}.json")
    return [f"{folder}{slash}{name}" for name in dict.fromkeys(names)]


def read_sidecars(
    files: Sequence[tuple[str, bytes]], keys: Sequence[str], named: Mapping[str, bytes]
) -> SidecarContent:
    """Read the sidecars of one image.

    A .json takes precedence if it has a wanted key; the text file replaces the default key, then
    the description of Takeout or XMP. A file that cannot be read affects only itself.

    Args:
        files: Name and content of the sidecars, highest priority first.
        keys: The keys that hold captions.
        named: Text files for caption keys, see `caption_files`.
    """
    own_values, other_values, caption_lines, problems = _parse_sidecars(files)
    captions: list[str] = []
    caption_field = ""
    for key in keys:
        try:
            if key in named:
                captions += to_text(named[key]).splitlines()
            elif found := captions_in(own_values, (key,)):
                captions += found
            elif key == DEFAULT_CAPTION_KEY and caption_lines:
                captions += caption_lines
            else:
                names = ("description", "title") if key == DEFAULT_CAPTION_KEY else (key,)
                present = [name for name in names if other_values.get(name)]
                captions += captions_in(other_values, present[:1])
                caption_field = next(iter(present), caption_field)
        except SampleProblem as problem:
            problems.append(str(problem))
    has_text = any(lookup_name(name).endswith(TEXT_SUFFIXES) for name, _ in files)
    if has_text and not (captions or own_values or problems) and DEFAULT_CAPTION_KEY in keys:
        problems.append("caption file is empty")
    left_out = {*keys, *CAPTION_ALIASES}
    meta = {k: v for k, v in own_values.items() if k not in left_out}
    _add_missing(meta, {k: v for k, v in other_values.items() if k != caption_field})
    try:
        meta = json_value(meta)
    except ValueError as error:
        problems.append(f".json is {error}")
        meta = {}
    return SidecarContent(clean_captions(captions), meta, "; ".join(problems))


def _parse_sidecars(
    files: Sequence[tuple[str, bytes]],
) -> tuple[Values, Values, tuple[str, ...], list[str]]:
    """Read sidecars: our own .json, other programs' metadata, lines of text, and problems."""
    own_values: Values = {}
    other_values: Values = {}
    caption_lines: tuple[str, ...] = ()
    problems: list[str] = []
    for name, content in files:
        end = f".{name.rpartition('.')[2].lower()}"
        try:
            if end in TEXT_SUFFIXES:
                caption_lines = caption_lines or clean_captions(to_text(content).splitlines())
            elif end == ".xmp":
                _add_missing(other_values, _xmp(content))
            elif _is_takeout(values := _json(content)):
                _add_missing(other_values, _takeout(values))
            else:
                _add_missing(own_values, values)
        except SampleProblem as problem:
            problems.append(str(problem))
    return own_values, other_values, caption_lines, problems


def _add_missing(values: Values, more: Values) -> None:
    for key, value in more.items():
        values.setdefault(key, value)


def _json(content: bytes) -> Values:
    try:
        values = json.loads(to_text(content))
    except (ValueError, RecursionError) as error:
        raise SampleProblem(f".json is not valid: {error}") from None
    if not isinstance(values, dict):
        raise SampleProblem(".json is not a JSON object")
    return values


def _is_takeout(values: Values) -> bool:
    return isinstance(values.get("photoTakenTime"), dict)


def _takeout(values: Values) -> Values:
    """Extract Google Photos' metadata of an image; its `title` is the file name."""
    found: Values = {}
    if isinstance(values.get("description"), str) and values["description"].strip():
        found["description"] = values["description"].strip()
    try:
        seconds = int(values["photoTakenTime"]["timestamp"])
        found["taken"] = datetime.fromtimestamp(seconds, UTC)
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        pass
    geo = values.get("geoData")
    if isinstance(geo, dict) and (geo.get("latitude") or geo.get("longitude")):
        names = ("latitude", "longitude", "altitude")
        found |= {n: geo[n] for n in names if isinstance(geo.get(n), int | float)}
    people = [p.get("name") for p in values.get("people") or () if isinstance(p, dict)]
    if people:
        found["people"] = [p for p in people if isinstance(p, str)]
    return found


def _xmp(content: bytes) -> Values:
    """Read the few XMP fields that describe a picture to a person."""
    kind = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        xml = content.decode(kind)
        # XMP does not need a document type, which is where entities could be declared that expand
        # to gigabytes or refer to other files.
        if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
            raise SampleProblem(".xmp is not supported: it declares a document type")
        tree = ElementTree.fromstring(xml)
    except (ValueError, ElementTree.ParseError) as error:
        raise SampleProblem(f".xmp is not valid: {error}") from None
    found: Values = {}
    for name in ("title", "description", "subject"):
        items = [e.text or "" for e in tree.iterfind(f".//{_DC}{name}//{_RDF}li")]
        if items := list(clean_captions(items)):
            found[name] = items if name == "subject" or len(items) > 1 else items[0]
    descriptions = list(tree.iter(f"{_RDF}Description"))

    def field_of(name: str) -> str:
        values = [v for e in descriptions for v in (e.get(name), e.findtext(name)) if v]
        return values[0].strip() if values else ""

    if taken := next(filter(None, map(field_of, _DATES)), ""):
        found["taken"] = _date(taken)
    if (rating := field_of(f"{_XMP}Rating")).lstrip("-").isdecimal():
        found["rating"] = int(rating)
    return found


def _date(date: str) -> datetime | str:
    try:
        return datetime.fromisoformat(date)
    except ValueError:
        return date
