"""A folder is looked at again and again, and its store is kept up to date."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmalign.cli.errors import told_of
from mmalign.cli.folder import create, is_store
from mmalign.errors import DataError, StoreError, shell_command
from mmalign.locks import sole_user
from mmalign.progress import only_news, say

if TYPE_CHECKING:
    from mmalign.embedding.embed import EmbedReport
    from mmalign.embedding.pending import Pending
    from mmalign.model import Encoder
    from mmalign.store import Store

# A folder is read while it still changes if it has not settled for so long.
PATIENCE_S = 60.0
# What failed is tried again after a pause that doubles up to this one.
LONGEST_PAUSE_S = 300.0
# A model that was not needed for so long is released.
IDLE_S = 600.0
# The share of the time in which the folder is read, at most: a scan of a slow drive is no load.
SHARE = 0.1


@dataclass
class Watcher:
    """Looks at a folder and keeps its store up to date; final."""

    folder: Path
    """As it was given, for messages."""
    source: str
    store: Path
    every: float
    model: str | None = None
    yes: bool = False
    columns: dict[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    _encoder: "Encoder | None" = None
    _used_at: float = 0.0
    _before: str = ""
    """The fingerprint of the folder at the last look."""
    _tried: str = ""
    """That of the last attempt to bring the store up to date."""
    _restless_since: float | None = None
    _retry_at: float | None = None
    _pause: float = 0.0
    _away: str = ""
    _told: set[str] = field(default_factory=set)
    _failed: int = 0

    def run(self) -> NoReturn:
        """Bring the store up to date, then look again and again until interrupted.

        Raises:
            DataError: There is no store yet, and no image to begin with.
            StoreError: Another process watches the folder for this store.
            ModelError: The model of the store is not found, or is another one.
        """
        if not is_store(self.store):
            self._create()
        self._begin()
        while True:
            with self._alone():
                while is_store(self.store):
                    self.sleep(self.look())
            say(f"warning: {self.store}: no such store any more; waiting until it is back")
            while not is_store(self.store):
                self.sleep(self.every)

    def _create(self) -> None:
        from mmalign.data import fingerprint, refuse_own_sources

        self._tried = fingerprint(self.source)
        refuse_own_sources(self.store, [self.source], option="--store")
        create(self.folder, self.source, self.store, self.model, yes=self.yes, **self.columns)

    def _begin(self) -> None:
        """Bring the store up to date at once, with all messages and bars."""
        from mmalign.search.model import model_of
        from mmalign.store import open_store

        with self._alone():
            if self.model is not None:
                model_of(open_store(self.store), self.model)
            say(f"{self.folder}: watched until Ctrl-C, kept in {self.store}")
            self._before = self._look_at_folder()
            if self._before not in ("", self._tried):
                self._attempt(self._before, nullcontext())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with sole_user(self.store) as alone:
            if not alone:
                raise StoreError(
                    f"{self.store}: another watch keeps it up to date: end that one first"
                )
            yield

    def look(self) -> float:
        """Look at the folder once, bring the store up to date if need be; return the pause."""
        started = self.clock()
        now = self._look_at_folder()
        pause = max(self.every, (self.clock() - started) * (1 / SHARE - 1))
        if now and self._is_due(now):
            self._attempt(now, only_news(self._told))
        self._before = now
        if self.clock() - self._used_at > IDLE_S:
            self._encoder = None
        return pause

    def _look_at_folder(self) -> str:
        """Return the fingerprint of the folder; empty if it is away, which is said once."""
        from mmalign.data import fingerprint

        try:
            now = fingerprint(self.source)
        except DataError as error:
            if str(error) != self._away:
                say(f"warning: {error}; all rows stay, and it is watched when it is back")
            self._away = str(error)
            return ""
        if self._away:
            say(f"{self.folder}: it is back")
        self._away = ""
        return now

    def _is_due(self, now: str) -> bool:
        """Return whether the folder differs from that of the last attempt, and has settled."""
        retry = self._retry_at is not None and self.clock() >= self._retry_at
        if now == self._tried and not retry:
            self._restless_since = None
            return False
        if now == self._before:
            return True
        if self._restless_since is None:
            self._restless_since = self.clock()
        return self.clock() - self._restless_since >= PATIENCE_S

    def _attempt(self, now: str, messages: AbstractContextManager[None]) -> None:
        """Bring the store up to date; what fails for a while is said, and tried again later."""
        self._tried, self._restless_since, self._retry_at = now, None, None
        line = ""
        with messages:
            try:
                line, is_done = self._bring_up_to_date()
            except (DataError, StoreError, OSError) as error:
                reason = told_of(error) if isinstance(error, OSError) else str(error)
                if reason is None:
                    raise
                say(f"warning: {reason}; the rows stay, and it is tried again")
                is_done = False
        self._pause = 0.0 if is_done else min(max(2 * self._pause, self.every), LONGEST_PAUSE_S)
        if not is_done:
            self._retry_at = self.clock() + self._pause
        if line:
            say(line)

    def _bring_up_to_date(self) -> tuple[str, bool]:
        """Embed what is new or changed and drop what is gone.

        Returns:
            What was done, in a line, and whether no file is left that may be readable later.
        """
        from mmalign.embedding.embed import embed
        from mmalign.embedding.pending import find_pending
        from mmalign.store import open_store

        pending, report = find_pending(self.store, self.source, **self.columns), None
        if pending.samples:
            report = embed(self._loaded(pending.store), self.source, self.store, **self.columns)
            if pending.gone:  # some may have been moved
                pending = find_pending(self.store, self.source, **self.columns)
        gone = self._drop(pending) if pending.gone else 0
        store = open_store(self.store)
        failed = report.failed if report else 0
        is_news = gone or failed > self._failed or (report and (report.added or report.changed))
        self._failed = failed
        line = _line(report, gone, len(store), store.path) if is_news else ""
        is_done = not failed or not any(map(_may_be_readable_later, store.failures()))
        return line, is_done

    def _loaded(self, store: "Store") -> "Encoder":
        """Return the model of the store; it is loaded when it is first needed."""
        from mmalign.encoding.modalities import is_model_of
        from mmalign.search.model import model_of

        if self._encoder is None or not is_model_of(self._encoder, store.manifest.model):
            self._encoder = model_of(store, self.model)
        self._used_at = self.clock()
        return self._encoder

    def _drop(self, pending: "Pending") -> int:
        """Drop rows whose images are gone; many only if their folders are there and in use."""
        from mmalign.store import ManyDeletions, delete_rows, require_few

        store, gone = pending.store, pending.gone
        uris = [row["uri"] for row in store.rows(gone, ("uri",))]
        is_sure = self.yes and all(map(_is_in_use, {_holder(uri) for uri in uris}))
        try:
            require_few(self.store, len(gone), len(store), is_sure)
        except ManyDeletions:
            model = store.manifest.model.source or "MODEL"
            words = ("--model", model, "--data", self.source, "--out", self.store)
            drop = shell_command("embed", *words, "--drop-removed", "--yes")
            say(
                f"warning: {self.store}: {len(gone):,} of {len(store):,} rows stay although their "
                f"images are gone, as that looks like an unplugged drive; {drop} drops them"
            )
            return 0
        return delete_rows(store, gone)


def _line(report: "EmbedReport | None", gone: int, rows: int, store: Path) -> str:
    """Return what happened in one change set.

    >>> _line(None, 3, 1204, Path("photos.store"))
    '0 new, 0 changed, 3 gone; 1,204 rows'
    """
    new, changed, moved, failed = (
        (report.added, report.changed, report.moved, report.failed) if report else (0, 0, 0, 0)
    )
    parts = (
        f"{new:,} new",
        f"{changed:,} changed" + (f" ({moved:,} moved)" if moved else ""),
        f"{gone:,} gone",
        *([f"{failed:,} failed (listed in {store / 'failures.jsonl'})"] if failed else []),
    )
    return f"{', '.join(parts)}; {rows:,} rows"


def _may_be_readable_later(failure: dict[str, Any]) -> bool:
    return str(failure["reason"]).startswith("cannot be read")


def _holder(uri: str) -> str:
    """Return the table that a row is in, or the folder of an image."""
    table = uri.rpartition("#")[0]
    return table if os.path.isfile(table) else os.path.dirname(uri)


def _is_in_use(holder: str) -> bool:
    """Return whether a table is there, or a folder with images in it.

    The mount point of a drive that is unplugged is gone, or an empty folder.
    """
    from mmalign.data.kinds import PICTURE_SUFFIXES, suffix

    try:
        names = os.listdir(holder)
    except NotADirectoryError:
        return True
    except OSError:
        return False
    return any(suffix(name) in PICTURE_SUFFIXES for name in names if not name.startswith("."))
