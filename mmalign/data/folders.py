"""Images in a folder and below it, with same-named .txt or .json files beside them."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from mmalign.data.remote import walk as remote_walk
from mmalign.data.samples import (
    FOREIGN_SUFFIXES,
    IMAGE_SUFFIXES,
    Found,
    Record,
    SampleProblem,
    Skip,
    captions_beside,
    suffix,
)


def scan(folder: str, caption_keys: Sequence[str]) -> Found:
    """Yield one record an image, in the order of names; hidden files are passed over.

    Links to folders are followed, each folder once.
    """
    import fsspec

    remote = "://" in folder
    fs, root = fsspec.core.url_to_fs(folder)
    name = PurePosixPath(root).name
    unread: dict[str, str] = {}
    for parent, folders, files in remote_walk(fs, root, unread) if remote else _walk(root, unread):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        names = sorted(f for f in files if not f.startswith("."))
        stems = {os.path.splitext(f)[0] for f in names if suffix(f) in IMAGE_SUFFIXES}
        beside = {os.path.splitext(f)[0] + suffix(f): f for f in names}
        for file in names:
            path = f"{parent}/{file}"
            key = f"{name}/{os.path.relpath(path, root)}"
            uri = fs.unstrip_protocol(path) if remote else path
            stem, kind = os.path.splitext(file)[0], suffix(file)
            if kind in FOREIGN_SUFFIXES:
                yield Skip(key, uri, f"image type not supported: {kind}")
            elif kind == ".txt" and stem not in stems:
                yield Skip(key, uri, "caption without an image")
            if kind not in IMAGE_SUFFIXES:
                continue
            captions: tuple[str, ...] = ()
            meta: dict[str, Any] = {}
            try:
                txt, js = (
                    fs.cat_file(f"{parent}/{beside[stem + end]}") if stem + end in beside else None
                    for end in (".txt", ".json")
                )
                captions, meta = captions_beside(txt, js, caption_keys)
            except SampleProblem as problem:
                yield Skip(key, uri, str(problem), lost="captions")
            except OSError as error:
                reason = f"captions cannot be read: {error.strerror or error}"
                yield Skip(key, uri, reason, lost="captions")
            yield Record(key, uri, uri, captions=captions, meta=meta)
    for path, reason in unread.items():
        key = f"{name}/{os.path.relpath(path, root)}"
        uri = fs.unstrip_protocol(path) if remote else path
        yield Skip(key, uri, f"folder cannot be read: {reason}", lost="place")


def _walk(root: str, unread: dict[str, str]) -> Iterator[tuple[str, list[str], Iterable[str]]]:
    """Walk a local folder: what cannot be listed is kept, what links lead back to is not walked."""

    def note(error: OSError) -> None:
        unread[str(error.filename)] = error.strerror or str(error)

    seen: set[str] = set()
    for parent, folders, files in os.walk(root, onerror=note, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield parent, folders, files
