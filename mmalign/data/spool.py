"""Samples on disk while a source is scanned: as many as there are, in the memory of a few."""

import pickle
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import replace

from mmalign.data.samples import Record, Skip


class Names:
    """Makes ids unique among all that were seen; final.

    Two files of one id are told apart by their uri. SQLite keeps the names in a temporary file of
    its own, which is gone with the process.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("")
        self._db.execute("CREATE TABLE name (id TEXT PRIMARY KEY, uri TEXT) WITHOUT ROWID")

    def unique(self, found: Record) -> Record | Skip:
        """Return the record under a free id, or a skip where it was seen before."""
        held = self._uri(found.id)
        if held is not None and held != found.uri:
            found = replace(found, id=found.uri, given_id=False)
            held = self._uri(found.id)
        if held is not None:
            return Skip(found.id, found.uri, "given twice")
        self._db.execute("INSERT INTO name VALUES (?, ?)", (found.id, found.uri))
        return found

    def close(self) -> None:
        """Forget all names."""
        self._db.close()

    def _uri(self, name: str) -> str | None:
        row = self._db.execute("SELECT uri FROM name WHERE id = ?", (name,)).fetchone()
        return None if row is None else row[0]


class Spool:
    """A list of records in a temporary file; final. Used as a context manager it is closed."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 closed by `close`
        self._count = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._count

    def add(self, record: Record) -> None:
        """Put a record at the end."""
        pickle.dump(record, self._file)
        self._count += 1

    def __iter__(self) -> Iterator[Record]:
        """Yield the records in the order they came."""
        self._file.seek(0)
        for _ in range(self._count):
            # Written by this process a moment ago, into a file that has no name.
            yield pickle.load(self._file)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()
