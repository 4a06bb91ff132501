"""Folders behind URLs: what can be listed, and what cannot."""

from collections.abc import Iterator
from typing import Any

Listing = tuple[str, list[str], dict[str, dict[str, Any]]]


def spelled(url: str) -> str:
    """Return a URL as the uris of what lies below it begin: `memory://a` becomes `memory:///a`."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    return str(fs.unstrip_protocol(path))


def walk(fs: Any, root: str, unread: dict[str, str]) -> Iterator[Listing]:
    """Walk a remote folder from the top; yield (folder, names of folders, its files by name).

    fsspec's own walk passes over a folder whose listing fails, and so could not be told from one
    that is empty.

    Args:
        fs: The file system.
        root: A path of it.
        unread: Takes the folders that cannot be listed, and why.
    """
    try:
        entries = fs.ls(root, detail=True)
    except Exception as error:  # each file system has errors of its own
        gone = isinstance(error, FileNotFoundError)
        unread[root] = "no such folder" if gone else str(error) or type(error).__name__
        return
    folders: list[str] = []
    files: dict[str, dict[str, Any]] = {}
    for entry in entries:
        path = entry["name"].rstrip("/")
        if path == root.rstrip("/"):
            continue  # some stores list a folder among its own files
        name = path.rpartition("/")[2]
        if entry["type"] == "directory":
            folders.append(name)
        else:
            files[name] = entry
    yield root, folders, files
    for name in folders:
        yield from walk(fs, f"{root.rstrip('/')}/{name}", unread)
