"""Read files beside an image that describe it: captions, and metadata of other programs.

These are searched for beside `a.jpg`. Their own extension may be in upper case (`a.TXT`):
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

from mmalign.data.kinds import CAPTION_SUFFIXES
from mmalign.data.samples import (
    CAPTION_ALIASES,
    DEFAULT_CAPTION_KEY,
    SampleProblem,
    captions_in,
    clean_captions,
    to_text,
)
from mmalign.values import json_value

_SUFFIX_ORDER = (*CAPTION_SUFFIXES, ".json", ".xmp")
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


def with_lower_suffix(name: str) -> str:
    """Return a file name with its extension in lower case; sidecars are looked up by this name."""
    stem, dot, end = name.rpartition(".")
    return f"{stem}{dot}{end.lower()}"


def webdataset_key(path: str) -> str:
    """Return a path up to the first dot of its file name: the key that WebDataset groups by."""
    folder, slash, file = path.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def shared_sidecar_names(image: str) -> list[str]:
    """List the names of possible sidecars of all images that have the WebDataset key of this one.

    As all names that this module returns, they have their extension in lower case.
    """
    return [f"{webdataset_key(image)}{end}" for end in _SUFFIX_ORDER]


def caption_files(image: str, caption_keys: Sequence[str]) -> dict[str, str]:
    """Map caption keys that are file extensions, such as `outputs.txt`, to names of files.

    >>> caption_files("k.input.jpg", ["captions", "outputs.txt"])
    {'outputs.txt': 'k.outputs.txt'}
    """
    return {
        key: with_lower_suffix(f"{webdataset_key(image)}.{key}")
        for key in caption_keys
        if key.lower().endswith(CAPTION_SUFFIXES)
    }


def sidecar_names(image: str) -> list[str]:
    """List the names of possible sidecars of one image, highest priority first."""
    folder, slash, file = image.rpartition("/")
    stem = file.rpartition(".")[0] or file
    names = [f"{name}{end}" for end in _SUFFIX_ORDER for name in (stem, file)]
    unnumbered, number = file, ""
    if numbered := _NUMBERED.fullmatch(file):
        unnumbered, number = f"{numbered['stem']}{numbered['end']}", numbered["number"]
        names.append(f"{unnumbered}{number}.json")
    for full_name in (unnumbered, f"{unnumbered}.supplemental-metadata"):
        names.append(f"{full_name[:_TAKEOUT_LENGTH]}{number}.json")
    return [f"{folder}{slash}{name}" for name in dict.fromkeys(names)]


def read_sidecars(
    files: Sequence[tuple[str, bytes]],
    caption_keys: Sequence[str],
    text_by_key: Mapping[str, bytes],
) -> SidecarContent:
    """Read the sidecars of one image.

    The captions of a key are taken from its file in `text_by_key` if there is one, else from the
    .json, else (the default key only) from the text file, else from Takeout or XMP: there the
    default key stands for the description or, without one, the title.

    A file that cannot be read affects only itself.

    Args:
        files: Name and content of the sidecars, highest priority first.
        caption_keys: The keys that hold captions.
        text_by_key: The content of the files that `caption_files` names.
    """
    json_values, other_values, caption_lines, problems = _parse_sidecars(files)
    captions: list[str] = []
    # The field of Takeout or XMP that is used as caption, so it is not metadata.
    used_field = ""
    for key in caption_keys:
        try:
            if key in text_by_key:
                captions += to_text(text_by_key[key]).splitlines()
            elif found := captions_in(json_values, (key,)):
                captions += found
            elif key == DEFAULT_CAPTION_KEY and caption_lines:
                captions += caption_lines
            else:
                names = ("description", "title") if key == DEFAULT_CAPTION_KEY else (key,)
                present = [name for name in names if other_values.get(name)]
                captions += captions_in(other_values, present[:1])
                used_field = next(iter(present), used_field)
        except SampleProblem as problem:
            problems.append(str(problem))
    has_text = any(with_lower_suffix(name).endswith(CAPTION_SUFFIXES) for name, _ in files)
    if (
        has_text
        and not (captions or json_values or problems)
        and DEFAULT_CAPTION_KEY in caption_keys
    ):
        problems.append("caption file is empty")
    left_out = {*caption_keys, *CAPTION_ALIASES}
    meta = {k: v for k, v in json_values.items() if k not in left_out}
    _add_missing(meta, {k: v for k, v in other_values.items() if k != used_field})
    try:
        meta = json_value(meta)
    except ValueError as error:
        problems.append(f"metadata cannot be used: {error}")
        meta = {}
    return SidecarContent(clean_captions(captions), meta, "; ".join(problems))


def _parse_sidecars(
    files: Sequence[tuple[str, bytes]],
) -> tuple[Values, Values, tuple[str, ...], list[str]]:
    """Return the values of .json files, those of Takeout and XMP, lines of text, and problems."""
    json_values: Values = {}
    other_values: Values = {}
    caption_lines: tuple[str, ...] = ()
    problems: list[str] = []
    for name, content in files:
        end = f".{name.rpartition('.')[2].lower()}"
        try:
            if end in CAPTION_SUFFIXES:
                caption_lines = caption_lines or clean_captions(to_text(content).splitlines())
            elif end == ".xmp":
                _add_missing(other_values, _xmp(content))
            elif _is_takeout(values := _json(content)):
                _add_missing(other_values, _takeout(values))
            else:
                _add_missing(json_values, values)
        except SampleProblem as problem:
            problems.append(str(problem))
    return json_values, other_values, caption_lines, problems


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
    """Extract Google Photos' metadata of an image, without `title`, which is the file name."""
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
