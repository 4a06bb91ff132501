"""What a sample is before it is decoded: a record that says where its image and captions are."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mmalign.data.places import is_url, local_path, version
from mmalign.errors import DataError

DEFAULT_CAPTION_KEY = "captions"
# Where the default key is absent, these are read in its place.
CAPTION_ALIASES = ("captions", "caption", "text", "txt", "title")


# What a skip costs: one sample; only the captions of one, which is used without them; an unknown
# number of samples of a place that cannot be listed to its end (a folder, a tar, a table), none of
# which may be taken as removed; a file passed over because its ending is on no list; or nothing, as
# the sample was found once before.
Lost = Literal["sample", "captions", "place", "ending", "nothing"]


class SampleProblem(DataError):
    """Why one sample, or a part of it, cannot be used; a scan turns it into a `Skip`."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sample: where its image lies, and its captions.

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
    given_id: bool = False
    """The source itself names the sample (a table with an id column): the id decides which sample
    this is, wherever its row has moved to. Else an id is made from names of files or rows, and
    says no more than the uri does."""
    stamp: int = 0
    """What `Stamps` said of it when it was scanned; 0 where nobody asked."""


@dataclass(frozen=True, slots=True)
class Skip:
    """Something that a source holds and that is not used, and why."""

    id: str
    uri: str
    reason: str
    lost: Lost = "sample"
    count: int = 1
    """Files it stands for: those of one folder or tar that are passed over by ending are one skip
    for each ending, with the first of them as its uri."""

    @property
    def kept(self) -> bool:
        """Whether the sample is used all the same, without its captions."""
        return self.lost == "captions"


class JoinedSkips:
    """The skips of one folder or tar; those that lose an ending are joined by their reasons."""

    def __init__(self) -> None:
        """Begin without any."""
        self._skips: dict[str, Skip] = {}

    def add(self, skip: Skip) -> None:
        """Take one more."""
        key = skip.reason if skip.lost == "ending" else f"{len(self._skips)} {skip.uri}"
        first = self._skips.get(key)
        self._skips[key] = replace(first, count=first.count + skip.count) if first else skip

    def __iter__(self) -> Iterator[Skip]:
        """Yield them in the order of their first."""
        return iter(self._skips.values())


class Stamps:
    """Says when samples have changed, without reading them; final. Safe to use in threads."""

    def __init__(self) -> None:
        """Know nothing of any place yet: what is said of a tar or a table is asked once."""
        self._versions: dict[str, list[str]] = {}

    def of(self, record: Record) -> int:
        """Return 64 bits that change when a sample does, as far as can be told without its image.

        They cover captions, metadata, length and what is known of the file: size and time of the
        last change; behind a URL ETag, time and size, as far as its server tells them. Never 0. A
        member of a tar carries the time of its tar.

        Raises:
            OSError: The file cannot be looked at.
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


Found = Iterable[Record | Skip]


def captions_in(values: dict[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Collect the captions under the given keys of a .json file or a table row."""
    found: list[Any] = []
    for key in keys:
        names = CAPTION_ALIASES if key == DEFAULT_CAPTION_KEY else (key,)
        value = next((values[n] for n in names if values.get(n)), ())
        found.extend(value if isinstance(value, list | tuple) else [value])
    return clean(text(c) for c in found if c is not None)


def clean(captions: Iterable[str]) -> tuple[str, ...]:
    """Strip captions; drop empty and repeated ones, keeping the order."""
    return tuple(dict.fromkeys(c.strip() for c in captions if c.strip()))


def text(content: Any) -> str:
    """Return a caption as a string; bytes must be UTF-8, and JSON may not hold half a character."""
    if isinstance(content, int):
        return str(content)
    if not isinstance(content, str | bytes):
        raise SampleProblem(f"caption is no text: {str(content)[:40]}")
    try:
        if isinstance(content, bytes):
            return content.decode("utf-8-sig")
        content.encode()
        return content
    except UnicodeDecodeError as error:
        raise SampleProblem(f"caption is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError as error:
        raise SampleProblem(f"caption is not UTF-8 (character {error.start})") from None
