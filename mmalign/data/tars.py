"""Read WebDataset tars, local or at any fsspec URL.

A tar is read once from end to end for its small members (captions, metadata) and the position of
each image. Training then reads images at random by offset, so that shuffling covers the whole set
and the number of shards is independent of the number of workers.
"""

import stat
import tarfile
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

from mmalign.data import places, sidecars
from mmalign.data.kinds import (
    CAPTION_SUFFIXES,
    HEAD_BYTES,
    SIDECAR_SUFFIXES,
    reason_to_skip,
    suffix,
)
from mmalign.data.samples import Affected, JoinedSkips, Record, ScanResults, Skip
from mmalign.errors import DataError

# The number of bytes checked after the end mark: tars are padded to whole records.
_PADDING = 1 << 20
_MODES = {
    tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
}


def scan(path: str, caption_keys: Sequence[str]) -> ScanResults:
    """Yield one record per sample, in tar order; sidecars follow the same rules as in folders.

    Samples found in a truncated tar are used; the tar is then a skip that loses a place.

    Raises:
        DataError: The file does not exist.
    """
    found = _Tar(path, PurePosixPath(path).stem, caption_keys)
    try:
        with places.open_file(path) as file:
            found.read(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        start = (
            "tar cannot be read to its end"
            if found.images or found.sidecar_files
            else "cannot be read as a tar"
        )
        found.skips.add(Skip(path, path, f"{start}: {places.reason(error)}", affects="place"))
    yield from found.samples()


@dataclass(frozen=True)
class _Image:
    offset: int
    length: int
    member: str


@dataclass
class _Tar:
    """The content of one tar."""

    path: str
    name: str
    caption_keys: Sequence[str]
    skips: JoinedSkips = field(default_factory=JoinedSkips)
    images: dict[str, _Image] = field(default_factory=dict)
    """Keyed by the member's name without its last extension."""
    sidecar_files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Sidecars by name, its extension in lower case: the name in the tar, and the content."""

    def read(self, file: BinaryIO) -> None:
        """Collect images and sidecars.

        Raises:
            OSError: The tar is truncated, damaged, or has no end mark; collected members are kept.
        """
        size = file.seek(0, 2)
        file.seek(0)
        with places.foreign_errors(), tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if not (member.isdir() or _hidden(member.name)):
                    self._add_member(tar, member, size)
            _check_end(file, tar.offset)

    def samples(self) -> ScanResults:
        """Yield a record for each image, and a skip for each sidecar without an image."""
        claimed: set[str] = set()
        for base, image in self.images.items():
            id_, uri = f"{self.name}/{base}", f"{self.path}#{image.member}"
            names = [n for n in sidecars.sidecar_names(image.member) if n in self.sidecar_files]
            kinds = {suffix(n) for n in names}
            shared = [
                n for n in sidecars.shared_sidecar_names(image.member) if n in self.sidecar_files
            ]
            caption_files = sidecars.caption_files(image.member, self.caption_keys)
            caption_files = {k: n for k, n in caption_files.items() if n in self.sidecar_files}
            claimed.update(names, shared, caption_files.values())
            # `a.txt` describes `a.left.jpg`, unless `a.left.txt` does.
            names += [n for n in shared if suffix(n) not in kinds]
            sidecar = sidecars.read_sidecars(
                [self.sidecar_files[n] for n in names],
                self.caption_keys,
                {k: self.sidecar_files[n][1] for k, n in caption_files.items()},
            )
            if sidecar.problem:
                yield Skip(id_, uri, sidecar.problem, affects="captions")
            yield Record(
                id_, uri, self.path, image.offset, image.length,
                captions=sidecar.captions, meta=sidecar.meta,
            )  # fmt: skip
        keys = {sidecars.webdataset_key(image.member) for image in self.images.values()}
        for lower_name, (name, _) in self.sidecar_files.items():
            if lower_name not in claimed:
                self.skips.add(self._orphan(name, keys))
        yield from self.skips

    def _add_member(self, tar: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> None:
        name = member.name
        if not member.isfile() or member.issparse():
            self.skips.add(self._skip(name, f"not a regular file: {_special(member)}"))
        elif member.offset_data + member.size > size:
            self.skips.add(self._skip(name, "tar ends in the middle of this file"))
        elif suffix(name) in SIDECAR_SUFFIXES:
            lower_name = sidecars.with_lower_suffix(name)
            if lower_name in self.sidecar_files:
                self.skips.add(self._skip(name, "duplicate key"))
            elif member.size > places.MOST_SIDECAR_BYTES:
                reason = f"captions cannot be read: too large: {member.size / 1e6:,.0f} MB"
                self.skips.add(self._skip(name, reason, "captions"))
            else:
                self.sidecar_files[lower_name] = name, _content(tar, member)
        elif why := reason_to_skip(name, lambda: _content(tar, member, HEAD_BYTES)):
            self.skips.add(self._skip(name, *why))
        elif _without_extension(name) in self.images:
            self.skips.add(self._skip(name, "duplicate key"))
        else:
            self.images[_without_extension(name)] = _Image(member.offset_data, member.size, name)

    def _orphan(self, name: str, keys: Container[str]) -> Skip:
        if suffix(name) not in CAPTION_SUFFIXES:
            return self._skip(name, f"not an image by its extension: {suffix(name)}", "extension")
        key = sidecars.webdataset_key(name)
        if key in keys:
            reason = f"caption file of another key: add --caption-key {name[len(key) + 1 :]}"
            return self._skip(name, reason)
        return self._skip(name, "caption without an image")

    def _skip(self, name: str, reason: str, affects: Affected = "sample") -> Skip:
        return Skip(
            f"{self.name}/{_without_extension(name)}", f"{self.path}#{name}", reason, affects
        )


def _without_extension(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.rpartition('.')[0] or file}"


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/") if part not in (".", ".."))


def _special(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "link in a tar"
    return (
        "sparse file in a tar" if member.issparse() else places.special(_MODES.get(member.type, 0))
    )


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, length: int = -1) -> bytes:
    content = tar.extractfile(member)
    return content.read(length) if content else b""


def _check_end(file: BinaryIO, offset: int) -> None:
    """Refuse a tar that does not end after its last member."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise OSError("it has no end mark, so it may be truncated")
    if block.strip(b"\0"):
        raise OSError(f"no valid header at byte {offset}")
    if file.read(_PADDING).strip(b"\0"):
        raise OSError("data follows its end mark; join tars with `tar -A`, not with `cat`")
