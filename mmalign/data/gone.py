"""Determine whether the target of a uri no longer exists, as far as possible."""

import os

from mmalign.data import places

# An escaped lone surrogate from a name that is not UTF-8: the name itself is unknown.
ESCAPED = "\\udc"


def is_gone(uri: str, *, inside: bool) -> bool:
    """Return whether a sample that a scan did not find is gone; False if in doubt.

    Args:
        uri: A path, a URL, or a member of a tar or row of a table behind `#`.
        inside: It lies in what was scanned, and the scan was complete: a member that was not found
            in its tar, or a file of a remote folder that was not listed, is gone.
    """
    if places.is_url(uri):
        return inside or not places.exists(uri.partition("#")[0])
    if ESCAPED in uri:
        return inside and "#" in uri
    if _exists(uri):
        return False
    # A name may contain `#` itself.
    cuts = (i for i, sign in enumerate(uri) if sign == "#")
    return inside or not any(_exists(uri[:cut]) for cut in cuts)


def _is_foreign(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return True
    return False


def _exists(path: str) -> bool:
    try:
        # The locale of this process may be unable to encode a name recorded in UTF-8.
        name: str | bytes = path.encode() if _is_foreign(path) else path
        os.lstat(name)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True
