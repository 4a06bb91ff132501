"""Scan images in a folder and its subfolders, with the files beside them that describe them."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from mmalign.data import places, sidecars, tables
from mmalign.data.columns import ReadOptions
from mmalign.data.kinds import (
    CAPTION_SUFFIXES,
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    OTHER_SUFFIXES,
    SIDECAR_SUFFIXES,
    reason_to_skip,
    suffix,
)
from mmalign.data.samples import Affected, JoinedSkips, Record, ScanResults, Skip
from mmalign.errors import DataError
from mmalign.modality import IMAGE, of_file

# Tables with the captions of many images, as used by Hugging Face image folders.
TABLES_BESIDE = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def scan(folder: str, caption_keys: Sequence[str]) -> ScanResults:
    """Yield one record per image, folder by folder, sorted by name.

    Hidden files are skipped silently. Links to folders are followed, each folder once. A folder
    that cannot be listed is a skip of a place; the others are still scanned.

    Raises:
        DataError: The folder does not exist.
    """
    try:
        if places.is_url(folder):
            fs, root = places.file_system(folder)
            # An earlier listing may be out of date.
            fs.invalidate_cache()
            list_folder = partial(places.list_remote, fs)
            found = _Folders(root, list_folder, fs.unstrip_protocol, str, caption_keys)
        else:
            found = _local(folder, caption_keys)
        yield from found.scan_folders()
    except FileNotFoundError:
        raise DataError(f"{folder}: no such folder") from None


def fingerprint(folder: str) -> str:
    """Return a digest that changes when a scan of a local folder may find something else.

    It covers the names, sizes and times of all files that a scan uses or looks into. None is
    opened.

    Raises:
        DataError: The folder does not exist, or cannot be listed.
    """
    digest = hashlib.blake2b(digest_size=16)
    scanned = _local(folder, ())
    try:
        for parent, entries in scanned.walk():
            if not isinstance(entries, Skip):
                used = (entry for entry in entries if not _is_passed_over(entry.name))
                known: object = [_properties(parent, entry) for entry in used]
            elif parent == scanned.root:
                raise DataError(f"{folder}: {entries.reason}")
            else:
                known = entries.reason
            digest.update(repr((parent, known)).encode("utf-8", "backslashreplace"))
    except FileNotFoundError:
        raise DataError(f"{folder}: no such folder") from None
    return digest.hexdigest()


def _local(folder: str, caption_keys: Sequence[str]) -> "_Folders":
    root = places.local_path(folder)
    return _Folders(root, places.list_local, str, os.path.realpath, caption_keys)


def _properties(parent: str, entry: places.Entry) -> tuple[str | int, ...]:
    if entry.kind == "other":
        return entry.name, entry.why
    try:
        # Not those of the listing: Windows updates them when the file is closed.
        status = os.stat(_join(parent, entry.name))
    except OSError as error:
        return entry.name, places.reason(error)
    return entry.name, status.st_size, status.st_mtime_ns, status.st_mode


def _is_passed_over(name: str) -> bool:
    end = suffix(name)
    return end in OTHER_SUFFIXES and end not in SIDECAR_SUFFIXES and of_file(name) is IMAGE


@dataclass
class _Folders:
    """A scan of one source."""

    root: str
    list_folder: Callable[[str], list[places.Entry]]
    uri: Callable[[str], str]
    real_path: Callable[[str], str]
    """The name of a folder that all links to it share."""
    keys: Sequence[str]
    table_records: dict[str, Record] = field(default_factory=dict)
    """Table values about images, by uri, until the image is found."""

    def scan_folders(self) -> ScanResults:
        """Yield the records and skips of all folders."""
        for parent, entries in self.walk():
            if isinstance(entries, Skip):
                yield entries
            else:
                yield from self._one_folder(parent, entries)
        for record in self.table_records.values():
            yield Skip(record.id, record.uri, "listed in a table beside the images, but missing")

    def walk(self) -> Iterator[tuple[str, list[places.Entry] | Skip]]:
        """Yield each folder with its files; a folder that cannot be listed is a skip."""
        seen: set[str] = set()
        pending = [self.root]
        while pending:
            parent = pending.pop()
            real_path = self.real_path(parent)
            if real_path in seen:
                continue
            seen.add(real_path)
            try:
                entries = self.list_folder(parent)
            except FileNotFoundError:
                if parent == self.root:
                    raise
                yield parent, self._skip(parent, "folder was removed during the scan", "place")
                continue
            except OSError as error:
                reason = f"folder cannot be read: {places.reason(error)}"
                yield parent, self._skip(parent, reason, "place")
                continue
            entries = [e for e in entries if not e.name.startswith(".")]
            yield parent, [e for e in entries if e.kind != "folder"]
            folders = [_join(parent, e.name) for e in entries if e.kind == "folder"]
            pending += reversed(folders)

    def _one_folder(self, parent: str, entries: list[places.Entry]) -> ScanResults:
        images: list[str] = []
        sidecar_files: dict[str, str] = {}
        skips = JoinedSkips()
        for entry in entries:
            path = _join(parent, entry.name)
            if suffix(entry.name) in SIDECAR_SUFFIXES:
                sidecar_files[sidecars.with_lower_suffix(entry.name)] = entry.name
            elif entry.kind == "file" and entry.name.lower() in TABLES_BESIDE:
                yield from self._read_table(path)
            elif skip := self._skip_if_no_image(path, entry):
                skips.add(skip)
            else:
                images.append(entry.name)
        claimed: set[str] = set()
        for image in images:
            names = [n for n in sidecars.sidecar_names(image) if n in sidecar_files]
            caption_files = sidecars.caption_files(image, self.keys)
            caption_files = {k: n for k, n in caption_files.items() if n in sidecar_files}
            claimed.update(names, caption_files.values())
            path = _join(parent, image)
            yield from self._image(
                path,
                [sidecar_files[n] for n in names],
                {k: sidecar_files[n] for k, n in caption_files.items()},
            )
        for lower_name, name in sidecar_files.items():
            if lower_name not in claimed:
                skips.add(self._orphan(_join(parent, name)))
        yield from skips

    def _image(self, path: str, names: list[str], caption_files: dict[str, str]) -> ScanResults:
        contents: dict[str, bytes] = {}
        for name in dict.fromkeys((*names, *caption_files.values())):
            try:
                sidecar_path = _join(path.rpartition("/")[0], name)
                most = places.MOST_SIDECAR_BYTES
                contents[name] = places.read(self.uri(sidecar_path), most=most)
            except OSError as error:
                reason = f"captions cannot be read: {places.reason(error)}"
                yield self._skip(path, reason, "captions")
        sidecar = sidecars.read_sidecars(
            [(name, contents[name]) for name in names if name in contents],
            self.keys,
            {key: contents[name] for key, name in caption_files.items() if name in contents},
        )
        if sidecar.problem:
            yield self._skip(path, sidecar.problem, "captions")
        uri = self.uri(path)
        record = Record(self._key(path), uri, uri)
        from_table = self.table_records.pop(uri, record)
        yield replace(
            record,
            captions=sidecar.captions or from_table.captions,
            meta={**from_table.meta, **sidecar.meta},
        )

    def _read_table(self, path: str) -> ScanResults:
        """Store what a table says about images in its folder and subfolders."""
        uri = self.uri(path)
        try:
            for found in tables.scan(uri, ReadOptions(self.keys)):
                if isinstance(found, Skip):
                    yield found
                else:
                    self.table_records[found.uri] = found
        except DataError as error:
            yield self._skip(path, f"captions cannot be read: {error}", "captions")

    def _skip_if_no_image(self, path: str, entry: places.Entry) -> Skip | None:
        if entry.kind == "other":
            # A link to an unmounted disk may have led to a folder, unless it is named like an
            # image: the files there are not gone.
            folder = entry.hides and suffix(path) not in IMAGE_SUFFIXES
            return self._skip(path, entry.why, "place" if folder else "sample")
        try:
            why = reason_to_skip(path, lambda: places.read(self.uri(path), 0, HEAD_BYTES))
        except OSError as error:
            return self._skip(path, f"cannot be read: {places.reason(error)}")
        return self._skip(path, *why) if why else None

    def _orphan(self, path: str) -> Skip:
        if suffix(path) in CAPTION_SUFFIXES:
            return self._skip(path, "caption without an image")
        return self._skip(path, f"not an image by its extension: {suffix(path)}", "extension")

    def _key(self, path: str) -> str:
        relative_path = path[len(self.root) :].strip("/")
        return f"{os.path.basename(self.root.rstrip('/'))}/{relative_path}".rstrip("/")

    def _skip(self, path: str, reason: str, affects: Affected = "sample") -> Skip:
        return Skip(self._key(path), self.uri(path), reason, affects)


def _join(parent: str, name: str) -> str:
    return f"{parent.rstrip('/')}/{name}"
