"""Store samples on disk while a source is scanned: any number, in little memory."""

import pickle
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from mmalign import files
from mmalign.data.samples import Record, Skip


class UniqueIds:
    """Makes record ids unique, and detects skips that two sources share.

    Two files with one id are distinguished by their uri. SQLite keeps the names in its own
    temporary file, which disappears with the process.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("")
        self._db.execute("CREATE TABLE name (id TEXT PRIMARY KEY, uri TEXT) WITHOUT ROWID")
        self._db.execute("CREATE TABLE place (uri TEXT PRIMARY KEY) WITHOUT ROWID")
        key = "PRIMARY KEY (uri, reason)"
        self._db.execute(f"CREATE TABLE skip (uri, reason, source, {key}) WITHOUT ROWID")

    def with_unique_id(self, record: Record) -> Record | Skip:
        """Return the record under a free id, or a skip if it was seen before."""
        known_uri = self._uri(record.id)
        if known_uri is not None and known_uri != record.uri:
            record = replace(record, id=fallback_id(record))
            known_uri = self._uri(record.id)
        if known_uri is not None or (
            is_derived_id(record.id, record.uri) and not self._is_new(record.uri)
        ):
            return Skip(record.id, record.uri, "given twice", affects="nothing")
        self._db.execute("INSERT INTO name VALUES (?, ?)", (record.id, record.uri))
        return record

    def without_repeats(self, skip: Skip, source: int) -> Skip:
        """Return a skip, or one that affects nothing if an earlier source had the same.

        Args:
            skip: An unusable item of a source.
            source: The number of the source: within one source, a name may occur twice.
        """
        self._db.execute(
            "INSERT OR IGNORE INTO skip VALUES (?, ?, ?)", (skip.uri, skip.reason, source)
        )
        query = "SELECT source FROM skip WHERE uri = ? AND reason = ?"
        (first,) = self._db.execute(query, (skip.uri, skip.reason)).fetchone()
        return skip if first == source else replace(skip, reason="given twice", affects="nothing")

    def _is_new(self, uri: str) -> bool:
        """Register a file known only by its place: a folder and a source inside it share it."""
        return self._db.execute("INSERT OR IGNORE INTO place VALUES (?)", (uri,)).rowcount == 1

    def close(self) -> None:
        """Discard all names."""
        self._db.close()

    def _uri(self, name: str) -> str | None:
        row = self._db.execute("SELECT uri FROM name WHERE id = ?", (name,)).fetchone()
        return None if row is None else row[0]


def fallback_id(record: Record) -> str:
    """Return a record's alternative id if its own is taken: that of its row, or its uri.

    Called with that id in the record, it returns the original one if that can be determined.
    """
    if not (record.id_from_source and record.row >= 0):
        return record.uri
    table = f"{record.path}#"
    return record.id.removeprefix(table) if record.id.startswith(table) else table + record.id


def is_derived_id(name: str, uri: str) -> bool:
    """Return whether an id was made from the place alone: a name in a folder or tar, or the uri."""
    if name == uri or uri.endswith(f"/{name}"):
        return True
    container, _, member = uri.partition(".tar#")
    source, _, key = name.partition("/")
    return bool(member) and PurePosixPath(container).name == source and member.startswith(f"{key}.")


class SpilledRecords:
    """A list of records in a temporary file. As a context manager, it closes itself."""

    def __init__(self) -> None:
        self._folder = files.scratch_folder()
        self._file = files.scratch_file()
        self._count = 0

    def __enter__(self) -> "SpilledRecords":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._count

    def add(self, record: Record) -> int:
        """Append a record; return its place, for `at`."""
        place = self._file.tell()
        with files.name_in_errors(self._folder):
            pickle.dump(record, self._file)
        self._count += 1
        return place

    def at(self, place: int) -> Record:
        """Return the record at a place; call it when all records have been added."""
        self._file.seek(place)
        found: Record = pickle.load(self._file)
        return found

    def __iter__(self) -> Iterator[Record]:
        """Yield the records in insertion order."""
        self._file.seek(0)
        for _ in range(self._count):
            # This process has just written it to an unnamed file.
            yield pickle.load(self._file)

    def close(self) -> None:
        """Release the disk space."""
        self._file.close()
