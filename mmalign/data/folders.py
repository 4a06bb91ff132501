"""Images in a folder and below it, with same-named .txt or .json files beside them."""

import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

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
    """Yield one record an image, in the order of names; hidden files are passed over."""
    import fsspec

    remote = "://" in folder
    fs, root = fsspec.core.url_to_fs(folder)
    name = PurePosixPath(root).name
    for parent, folders, files in fs.walk(root):
        if isinstance(folders, list):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
        names = sorted(f for f in files if not f.startswith("."))
        stems = {os.path.splitext(f)[0] for f in names if suffix(f) in IMAGE_SUFFIXES}
        present = set(names)
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
                    fs.cat_file(f"{parent}/{stem}{end}") if f"{stem}{end}" in present else None
                    for end in (".txt", ".json")
                )
                captions, meta = captions_beside(txt, js, caption_keys)
            except SampleProblem as problem:
                yield Skip(key, uri, str(problem), kept=True)
            yield Record(key, uri, uri, captions=captions, meta=meta)
