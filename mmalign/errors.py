"""All errors that user input can cause.

    MmalignError             one clear line, no traceback; the command line exits with 1
    ├── UsageError           the arguments of a call are wrong; exits with 2
    │   ├── ConfigError      a configuration file or value is invalid
    │   └── ItemError        a value of a type that is not an item; also a TypeError
    ├── DataError            a source is missing, empty, or yields nothing usable
    ├── ModelError           a model cannot be found or loaded
    │   └── IdentityError    two things were made by different models
    ├── StoreError           a store is missing, damaged, or does not fit the request
    ├── VectorError          vectors or queries have a wrong shape, type or value
    ├── TrainingError        training cannot continue (NaN loss, batch larger than the data)
    └── InstallError         the installed packages are incompatible

Any other exception is a bug and keeps its traceback.
"""

import difflib
import re
import shlex
from collections.abc import Iterable

# A message lists this many of the known names if none is close.
SHOWN = 20


class MmalignError(Exception):
    """Base of all errors with a message for the user: what, where, and what to do."""

    exit_code = 1


class UsageError(MmalignError):
    """The arguments of a call are wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or value is invalid."""


class ItemError(UsageError, TypeError):
    """A value of a type that can be neither encoded nor used as a query."""


class DataError(MmalignError):
    """A source is missing, empty, or yields nothing usable."""


class ModelError(MmalignError):
    """A model cannot be found or loaded."""


class IdentityError(ModelError):
    """Two things that must come from the same model come from different ones."""


class StoreError(MmalignError):
    """A store is missing, damaged, or does not fit the request."""


class VectorError(MmalignError, ValueError):
    """Vectors or queries have a wrong shape, type or value."""


class TrainingError(MmalignError):
    """Training cannot continue."""


class InstallError(MmalignError):
    """The installed packages are incompatible."""


def reason_of(error: BaseException) -> str:
    """Return the full message of a library's exception in one line.

    Such messages often name the location first and explain the problem in the lines below.

    >>> reason_of(RuntimeError("Error(s) in loading:\\n\\tMissing key(s): 'a'.\\n"))
    "Error(s) in loading: Missing key(s): 'a'."
    """
    said = getattr(error, "strerror", None) or str(error)
    return one_line(str(said)) or type(error).__name__


def one_line(text: str) -> str:
    """Join the lines of a message."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text.strip())


def shell_command(*words: object) -> str:
    """Format a command that fixes a problem, ready to be pasted into a shell.

    >>> shell_command("repair", "my photos.store")
    "`mmalign repair 'my photos.store'`"
    """
    return f"`mmalign {shlex.join(map(str, words))}`"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest known name, or all of them.

    Case and separators between words are ignored.

    >>> nearest("tine", ["nano", "tiny", "small"])
    "did you mean 'tiny'? (nano, small, tiny)"
    >>> nearest("vit-b/32", ["ViT-S-32", "ViT-B-32", "RN50"])
    "did you mean 'ViT-B-32'? (RN50, ViT-B-32, ViT-S-32)"
    >>> nearest("?", ["nano", "tiny"])
    'known: nano, tiny'
    """
    names = sorted(known)
    plain = {_plain(each): each for each in reversed(names)}
    close = difflib.get_close_matches(_plain(name), plain, n=1)
    if close:
        rest = f" ({', '.join(names)})" if len(names) <= 12 else ""
        return f"did you mean {plain[close[0]]!r}?{rest}"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "known: " + ", ".join(names[:SHOWN]) + more


def same(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that differs only in case and separators between words.

    >>> same("vit_b_32:OPENAI", ["ViT-B-32:openai", "ViT-B-16:openai"])
    'ViT-B-32:openai'
    """
    return next((each for each in known if _plain(each) == _plain(name)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s/_.:]", "-", name.casefold())
