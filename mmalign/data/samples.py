"""Define an undecoded sample: a record of where its file and captions are."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mmalign.data.places import is_url, local_path, version
from mmalign.errors import DataError
from mmalign.modality import of_file

DEFAULT_CAPTION_KEY = "captions"
# If the default key is absent, these are read instead.
CAPTION_ALIASES = ("captions", "caption", "text", "txt", "title")


# What a skip affects: a sample, which is not used; only the captions of a sample, which is used
# without them; a place (a folder, a tar, a table) that cannot be listed completely, so that none of
# its samples may be treated as removed; a file that is skipped because of its extension; or
# nothing, because the sample was found before.
Affected = Literal["sample", "captions", "place", "extension", "nothing"]


class SampleProblem(DataError):
    """The reason why a sample, or part of it, cannot be used; a scan turns it into a `Skip`."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sample: the location of its image, and its captions.

    The image is the whole file at `path`, or `length` bytes of it from `offset`, or row `row` of
    column `column` of a parquet file.
    """

    id: str
    uri: str
    path: str
    offset: int = 0
    length: int = -1
    row: int = -1
    column: str = ""
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    id_from_source: bool = False
    """The source names the sample itself (a table with an id column): the id identifies the sample
    wherever its row moves. Otherwise the id is made from file names or rows, and carries no more
    information than the uri."""
    stamp: int = 0
    """The value of `Stamps` when it was scanned; 0 if it was not requested."""

    @property
    def modality(self) -> str:
        """Return the name of its modality, told by the extension of its file."""
        return of_file(self.uri).name


@dataclass(frozen=True, slots=True)
class Skip:
    """An unused item of a source, and the reason."""

    id: str
    uri: str
    reason: str
    affects: Affected = "sample"
    count: int = 1
    """The number of files it represents: files of one folder or tar that are skipped by extension
    form one skip per extension, with the first file as its uri."""

    @property
    def sample_is_used(self) -> bool:
        """Whether the sample is still used, without its captions."""
        return self.affects == "captions"


class JoinedSkips:
    """The skips of one folder or tar; files skipped by extension are merged by reason."""

    def __init__(self) -> None:
        """Start empty."""
        self._skips: dict[str, Skip] = {}

    def add(self, skip: Skip) -> None:
        """Add a skip."""
        key = skip.reason if skip.affects == "extension" else f"{len(self._skips)} {skip.uri}"
        first = self._skips.get(key)
        self._skips[key] = replace(first, count=first.count + skip.count) if first else skip

    def __iter__(self) -> Iterator[Skip]:
        """Yield the skips in the order of first occurrence."""
        return iter(self._skips.values())


class Stamps:
    """Detects changed samples without reading them. Thread-safe."""

    def __init__(self) -> None:
        """Start without cached data: the properties of a tar or a table are read only once."""
        self._versions: dict[str, list[str]] = {}

    def of(self, record: Record) -> int:
        """Return 64 bits that change when a sample does, as far as known without reading its image.

        They cover captions, metadata, length and file properties: size and modification time; for a
        URL ETag, time and size, if the server provides them. Never 0. A member of a tar has the
        time of its tar.

        Raises:
            OSError: The file properties cannot be read.
        """
        known: list[Any] = [record.captions, record.meta, record.length, record.row, record.column]
        alone = record.length < 0 and record.row < 0
        if not is_url(record.path):
            status = os.stat(local_path(record.path))
            # The size of a tar or a table is not that of the sample.
            known += [status.st_mtime_ns, status.st_size if alone else 0]
        elif alone:
            known += version(record.path)
        else:
            if record.path not in self._versions:
                self._versions[record.path] = version(record.path)
            known += self._versions[record.path]
        digest = hashlib.blake2b(repr(known).encode("utf-8", "backslashreplace"), digest_size=8)
        return int.from_bytes(digest.digest(), "little") or 1


ScanResults = Iterable[Record | Skip]


def captions_in(values: dict[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Collect the captions under the given keys of a .json file or a table row."""
    found: list[Any] = []
    for key in keys:
        names = CAPTION_ALIASES if key == DEFAULT_CAPTION_KEY else (key,)
        value = next((values[n] for n in names if values.get(n)), ())
        found.extend(value if isinstance(value, list | tuple) else [value])
    return clean_captions(to_text(c) for c in found if c is not None)


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Strip captions; drop empty and duplicate ones, keeping the order."""
    return tuple(dict.fromkeys(c.strip() for c in captions if c.strip()))


def to_text(content: Any) -> str:
    """Return a caption as a string; bytes must be UTF-8, and JSON must not hold lone surrogates."""
    if isinstance(content, int):
        return str(content)
    if not isinstance(content, str | bytes):
        raise SampleProblem(f"caption is not text: {str(content)[:40]}")
    try:
        if isinstance(content, bytes):
            return content.decode("utf-8-sig")
        content.encode()
        return content
    except UnicodeDecodeError as error:
        raise SampleProblem(f"caption is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError as error:
        raise SampleProblem(f"caption is not UTF-8 (character {error.start})") from None
