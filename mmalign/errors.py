"""Every error that a person's input can cause.

    MmalignError             one clear line, no traceback; the command line exits with 1
    ├── UsageError           the words of the call are off; exits with 2
    │   ├── ConfigError      a configuration file or value is off
    │   └── ItemError        something of a type that is no item; also a TypeError
    ├── DataError            a source is missing, empty, or yields nothing usable
    ├── ModelError           a model cannot be found or loaded
    │   └── IdentityError    two things were made by different models
    ├── StoreError           a store is missing, damaged, or at odds with what is asked of it
    ├── VectorError          vectors or queries have a wrong shape, type or value
    ├── TrainingError        training cannot go on (NaN loss, batch larger than the data)
    └── InstallError         the installed packages do not go together

Anything else that escapes is a bug and keeps its traceback.
"""

import difflib
import re
import shlex
from collections.abc import Iterable

# A message names so many of the known names where none is close.
SHOWN = 20


class MmalignError(Exception):
    """Base of all errors with a message for a person: what, where, and what to do."""

    exit_code = 1


class UsageError(MmalignError):
    """The words of a call are off."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or value is off."""


class ItemError(UsageError, TypeError):
    """Something of a type that can be neither encoded nor searched by."""


class DataError(MmalignError):
    """A source is missing, empty, or yields nothing usable."""


class ModelError(MmalignError):
    """A model cannot be found or loaded."""


class IdentityError(ModelError):
    """Two things that must come from one model come from two."""


class StoreError(MmalignError):
    """A store is missing, damaged, or at odds with what is asked of it."""


class VectorError(MmalignError, ValueError):
    """Vectors or queries have a wrong shape, type or value."""


class TrainingError(MmalignError):
    """Training cannot go on."""


class InstallError(MmalignError):
    """The installed packages do not go together."""


def reason_of(error: BaseException) -> str:
    """Return the reason that a foreign exception gives, whole, in one line.

    Messages of libraries often name the place first and tell what is wrong in the lines below.

    >>> reason_of(RuntimeError("Error(s) in loading:\\n\\tMissing key(s): 'a'.\\n"))
    "Error(s) in loading: Missing key(s): 'a'."
    """
    said = getattr(error, "strerror", None) or str(error)
    return one_line(str(said)) or type(error).__name__


def one_line(text: str) -> str:
    """Join the lines of a message."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text.strip())


def shell_command(*words: object) -> str:
    """Write a command that mends something, so that it can be pasted into a shell as it stands.

    >>> shell_command("repair", "my photos.store")
    "`mmalign repair 'my photos.store'`"
    """
    return f"`mmalign {shlex.join(map(str, words))}`"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the close one, or all of them.

    Case and the marks between words do not make names differ.

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
    """Return the name that differs by nothing but case and the marks between words.

    >>> same("vit_b_32:OPENAI", ["ViT-B-32:openai", "ViT-B-16:openai"])
    'ViT-B-32:openai'
    """
    return next((each for each in known if _plain(each) == _plain(name)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s/_.:]", "-", name.casefold())
