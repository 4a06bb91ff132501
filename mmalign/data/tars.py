"""WebDataset tars, local or behind any fsspec URL.

A tar is read once from end to end for its small members (.txt, .json) and for the place of each
image. Training then reads images at random by offset, so that shuffling is over the whole set and
the number of shards has nothing to do with the number of workers.
"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from webdataset.tariterators import base_plus_ext

from mmalign.data.samples import (
    FOREIGN_SUFFIXES,
    IMAGE_SUFFIXES,
    Found,
    Record,
    SampleProblem,
    Skip,
    captions_beside,
)
from mmalign.errors import DataError


def scan(path: str, caption_keys: Sequence[str]) -> Found:
    """Yield one record a sample, in the tar's order."""
    import fsspec

    name = PurePosixPath(path).stem
    problems: list[Skip] = []
    try:
        with fsspec.open(path, "rb") as file:
            samples = _members(file, name, path, problems)
    except (OSError, tarfile.ReadError) as error:
        raise DataError(f"{path}: cannot be read as a tar: {error}") from None
    yield from problems
    shared = {k.partition(".")[0] for k, s in samples.items() if "image" in s and "." in k}
    for key, sample in samples.items():
        if key in shared and "image" not in sample:
            continue  # its captions serve the images that add an extension to its key
        yield from _record(f"{name}/{key}", path, key, sample, caption_keys)


def _members(file: Any, name: str, path: str, problems: list[Skip]) -> dict[str, dict[str, Any]]:
    """Group the members by key: {'txt': bytes, 'json': bytes, 'image': (offset, size, name)}.

    A key ends at the first dot of a name, as in WebDataset. Where an image has more than one
    extension (`a.left.jpg`), the others belong to its key, and `a.txt` serves it too.
    """
    samples: dict[str, dict[str, Any]] = {}
    size = file.seek(0, 2)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in _until_torn(tar, path, problems):
            base, extension = base_plus_ext(member.name)
            if not member.isfile() or base is None or PurePosixPath(base).name.startswith("."):
                continue
            middle, _, end = extension.rpartition(".")
            base, end = (f"{base}.{middle}" if middle else base), "." + end.lower()
            sample = samples.setdefault(base, {})
            place = "image" if end in IMAGE_SUFFIXES else end[1:]
            uri = f"{path}#{member.name}"
            if end in FOREIGN_SUFFIXES:
                problems.append(Skip(f"{name}/{base}", uri, f"image type not supported: {end}"))
            elif place in sample:
                problems.append(Skip(f"{name}/{base}", uri, "duplicate key"))
            elif member.offset_data + member.size > size:
                problems.append(Skip(f"{name}/{base}", uri, "tar ends in the middle of it"))
            elif place == "image":
                sample[place] = (member.offset_data, member.size, member.name)
            elif place in ("txt", "json"):
                content = tar.extractfile(member)
                sample[place] = content.read() if content else b""
        if size - tar.offset < tarfile.BLOCKSIZE:
            problems.append(
                Skip(path, path, "tar has no end mark: it may be cut short", lost="captions")
            )
    for key, sample in samples.items():
        # `a.txt` describes `a.left.jpg`, unless `a.left.txt` does.
        for place, content in samples.get(key.partition(".")[0], {}).items():
            if "image" in sample and place in ("txt", "json"):
                sample.setdefault(place, content)
    return samples


def _until_torn(tar: tarfile.TarFile, path: str, problems: list[Skip]) -> Iterator[tarfile.TarInfo]:
    """Pass members on until the tar ends, or breaks off."""
    try:
        yield from tar
    except (tarfile.TarError, EOFError) as error:
        problems.append(Skip(path, path, f"tar breaks off: {error}", lost="place"))


def _record(
    key: str, path: str, base: str, sample: dict[str, Any], caption_keys: Sequence[str]
) -> Found:
    if "image" not in sample:
        yield Skip(key, f"{path}#{base}", "caption without an image")
        return
    offset, length, member = sample["image"]
    uri = f"{path}#{member}"
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = {}
    try:
        captions, meta = captions_beside(sample.get("txt"), sample.get("json"), caption_keys)
    except SampleProblem as problem:
        yield Skip(key, uri, str(problem), lost="captions")
    yield Record(key, uri, path, offset, length, captions=captions, meta=meta)
