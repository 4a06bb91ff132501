"""Find damaged files: compare every file of a store with the hash in its generations."""

import errno
import json
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from mmalign import files
from mmalign.errors import StoreError, UsageError
from mmalign.store import failures
from mmalign.store import manifest as manifests
from mmalign.store.groups import Groups, both
from mmalign.store.manifest import Manifest

INDEX_FILE_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9]+)*")


@dataclass
class Findings:
    """The result of checking all files of a store; final."""

    readable: list[Manifest] = field(default_factory=list)
    """Readable generations, newest first."""
    damage: dict[Path, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    """Unreadable lines of failures.jsonl."""

    @property
    def unreadable(self) -> list[Path]:
        """Unreadable generations, oldest first."""
        return sorted(f for f in self.damage if f.name.startswith("manifest-"))

    def damaged_entries(self, folder: Path) -> set[str]:
        """Return the names of entries of a folder that are damaged or hold damaged files."""
        return {f.relative_to(folder).parts[0] for f in self.damage if f.is_relative_to(folder)}


def verify(path: str | Path, sample: float = 1.0) -> list[str]:
    """Check the files of every generation; return a line per damage that starts with the file.

    Args:
        path: The store.
        sample: Fraction of the large files (shards, FAISS files), drawn at random, that are fully
            read and compared with their hashes. Files that name them are always read.

    Raises:
        StoreError: A file cannot be read but may be intact, e.g. for lack of permission.
    """
    if not 0 < sample <= 1:
        raise UsageError(f"sample={sample} must be above 0 and at most 1")
    store = Path(path)
    manifests.newest(store)
    return describe_damage(store, find_damage(store, sample))


def describe_damage(store: Path, findings: Findings) -> list[str]:
    """Return one line for each damage."""
    listed = failures.path_of(store)
    damage = [f"{file}: {what}" for file, what in findings.damage.items()]
    return damage + [f"{listed}: {line}" for line in findings.lines]


def find_damage(store: Path, sample: float = 1.0) -> Findings:
    """Compare files with their hashes; see `verify`."""
    findings = Findings()
    generations = manifests.generations(store)
    groups = Groups(store)
    for file in generations:
        try:
            findings.readable.append(manifests.read(file, groups))
        except (ValueError, OSError) as error:
            findings.damage[file] = f"unreadable: {error}"
    names = {name for manifest in findings.readable for name in manifest.groups}
    # A readable group may still have a damaged copy.
    copies = {path: name for name in names for path in both(groups.folder, name)}
    findings.damage |= _mismatches(copies)
    shards = {s for manifest in findings.readable for s in manifest.shards}
    hash_by_file = {store / "shards" / f.name: f.sha256 for s in shards for f in s.files.values()}
    for card in {manifest.index for manifest in findings.readable if manifest.index}:
        description = store / "index" / card.name / "index.json"
        wrong = _mismatches({description: card.sha256})
        findings.damage |= wrong
        if not wrong:
            # A description with the right hash is still untrusted: anyone may have written it.
            try:
                hashes = dict(json.loads(description.read_bytes())["sha256"])
            except (ValueError, KeyError, TypeError, RecursionError):
                findings.damage[description] = "not made by mmalign"
                continue
            if all(INDEX_FILE_NAME.fullmatch(name) for name in hashes):
                hash_by_file |= {
                    description.parent / name: sha256 for name, sha256 in hashes.items()
                }
            else:
                findings.damage[description] = (
                    f"names files that cannot belong to an index: {[*hashes]}"
                )
    sampled = random.sample(sorted(hash_by_file), math.ceil(len(hash_by_file) * sample))
    findings.damage |= _mismatches({file: hash_by_file[file] for file in sampled})
    findings.lines = failures.read(failures.path_of(store))[1]
    if findings.damage and not all(map(Path.exists, generations)):
        # A compaction ran meanwhile: missing files were garbage, or may have been.
        return find_damage(store, sample)
    return findings


def _mismatches(hashes: dict[Path, str]) -> dict[Path, str]:
    """Return the files that differ from what was written, with the reason."""
    wrong = {}
    for file, sha256 in hashes.items():
        try:
            if files.sha256(file) != sha256:
                wrong[file] = "its content does not match its hash"
        except FileNotFoundError:
            wrong[file] = "missing"
        except OSError as error:
            if error.errno != errno.EIO:
                raise StoreError(f"{file}: cannot be read: {error.strerror}") from None
            wrong[file] = f"unreadable: {error.strerror}"
    return wrong
