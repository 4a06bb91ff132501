"""failures.jsonl: every sample without an embedding, and why.

Each line has its own checksum, so a damaged line is detected, and only that line is lost. The last
line for a sample counts; a reason of null means that it is resolved.
"""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmalign import files
from mmalign.errors import StoreError, shell_command
from mmalign.progress import say
from mmalign.store.manifest import canonical


def path_of(store: Path) -> Path:
    """Return the file that lists the failures of a store."""
    return store / "failures.jsonl"


def read_failures(store: Path) -> list[dict[str, Any]]:
    """Read every sample without an embedding: id, uri, reason, embedded."""
    good, bad = read(path_of(store))
    if bad:
        told = (
            f"lines that cannot be read: {len(bad)}; {shell_command('repair', store)} removes them"
        )
        say(f"warning: {path_of(store)}: {told}")
    return [f for f in _last_by_uri(good).values() if f["reason"] is not None]


def add_failures(store: Path, failures: Iterable[dict[str, Any]]) -> int:
    """Append samples (id, uri, reason, embedded) that are not listed yet; return how many.

    A reason of None marks a listed sample as resolved.
    """
    if path_of(store).is_symlink():
        raise StoreError(f"{path_of(store)}: a link to another file; replace it by the file itself")
    listed = _last_by_uri(read(path_of(store))[0])
    fresh = []
    for failure in failures:
        before = listed.get(failure["uri"], {"reason": None})
        if before["reason"] != failure["reason"]:
            fresh.append(failure)
            listed[failure["uri"]] = failure
    if fresh or listed:
        # Make existing lines durable too: their writer may have died before doing so.
        files.append_lines(path_of(store), map(_with_checksum, fresh))
    return len(fresh)


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the undamaged lines; return them and the errors of the others."""
    if not path.exists():
        return [], []
    files.require_regular(path)
    return _parse(path.read_bytes())


def _parse(content: bytes) -> tuple[list[dict[str, Any]], list[str]]:
    good: list[dict[str, Any]] = []
    bad: list[str] = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line:
            try:
                values = json.loads(line)
                if values.pop("check") != _checksum(values):
                    raise ValueError("its checksum does not match")
                good.append(values)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                bad.append(f"line {number}: {error}")
    return good, bad


def readable_lines_of(content: bytes) -> bytes:
    """Return only the lines that can be read."""
    lines = (json.dumps(_with_checksum(f), ensure_ascii=False) + "\n" for f in _parse(content)[0])
    return "".join(lines).encode("utf-8", "backslashreplace")


def _last_by_uri(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {line["uri"]: line for line in lines}


def _with_checksum(failure: dict[str, Any]) -> dict[str, Any]:
    return {**failure, "check": _checksum(failure)}


def _checksum(failure: dict[str, Any]) -> str:
    return f"{zlib.crc32(canonical(failure)):08x}"
