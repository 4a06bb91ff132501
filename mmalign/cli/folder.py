"""A store of a folder: made, or brought up to date, before `mmalign search FOLDER` searches it.

It lies in the user's cache, under a name that follows from the folder's place, or hidden in the
folder itself. It can be deleted at any time: the next search makes it again.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from mmalign.errors import UsageError
from mmalign.measured import user_folder
from mmalign.progress import say

HERE = ".mmalign.store"
"""The store in the folder itself; a scan passes over hidden folders."""
VARIABLE = "MMALIGN_STORES"
NAME, TAG = "xlm-roberta-base-ViT-B-32", "laion5b_s13b_b90k"
"""The model without `--model`: the smallest in open_clip's list whose texts are multilingual."""
FACTS = "1.5 GB, licence MIT, about 100 languages"
NEEDS = "transformers"


def is_plain_folder(path: Path) -> bool:
    """Return whether a path is a folder that holds no store, nor what is left of one."""
    parts = ("manifest-*.json", "shards/*.arrow")
    return path.is_dir() and not any(next(path.glob(part), None) for part in parts)


def place_of(folder: Path, *, here: bool) -> Path:
    """Return where the store of a folder lies, or will lie.

    Raises:
        UsageError: There is no folder for caches.
    """
    if here or (folder / HERE).is_dir():
        return folder / HERE
    cache = os.environ.get(VARIABLE) or user_folder()
    if not cache:
        raise UsageError(f"no folder for caches is known: set {VARIABLE}, or add --here")
    # Two folders of one name differ in the digest, and so does a folder that was moved.
    place = os.path.realpath(folder)
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    name = os.path.basename(place)[:40] or "root"
    return Path(cache) / ("" if os.environ.get(VARIABLE) else "stores") / f"{name}-{digest}.store"


def up_to_date(folder: Path, model: str | None, *, here: bool, yes: bool) -> Path:
    """Embed what is new or changed in a folder, drop what is gone, and return its store.

    Args:
        folder: Holds images, and is no store.
        model: As `--model`; None for that of the store, or the default of a new one.
        here: Keep the store in the folder.
        yes: Download the default model and drop many rows without a question.

    Raises:
        DataError: There is no image in the folder.
        UsageError: No model was named, and none may be downloaded.
    """
    from mmalign.embedding.embed import embed
    from mmalign.embedding.pending import find_pending
    from mmalign.search.model import model_of
    from mmalign.store import ManyDeletions, open_store

    store, source = place_of(folder, here=here), source_of(folder)
    if not is_store(store):
        create(folder, source, store, model, yes=yes)
    elif model is not None or find_pending(store, source):
        encoder = model or model_of(open_store(store))
        try:
            embed(encoder, source, store, drop_removed=True, yes=yes)
        except ManyDeletions as refused:
            # An unplugged drive looks like this: everything else is done, and what is there is
            # found.
            say(str(refused))
    return store


def source_of(folder: Path) -> str:
    """Return a folder as a source of its own store: under a link it has the same paths."""
    return os.path.realpath(folder)


def create(
    folder: Path, source: str, store: Path, model: str | None, *, yes: bool, **columns: Any
) -> None:
    """Embed a folder into a new store.

    Args:
        folder: The folder as it was given.
        source: The same as a source.
        store: Does not exist.
        model: As `--model`; None for the default.
        yes: Download the default model without a question.
        columns: Arguments of `embed` that name captions and columns.

    Raises:
        DataError: There is no image in the folder.
        UsageError: No model was named, and none may be downloaded.
    """
    from mmalign.embedding.embed import embed

    require_samples(source, **columns)
    encoder = model or default_model(folder, yes=yes)
    say(f"{folder}: embedded once, kept in {store}")
    store.parent.mkdir(parents=True, exist_ok=True)
    embed(encoder, source, store, **columns)


def require_samples(
    source: str, *, caption_keys: Sequence[str] = ("captions",), image_column: str | None = None
) -> None:
    """Refuse a source that has nothing to embed, before a model is asked for.

    Raises:
        DataError: It has none.
    """
    from mmalign.data import Skip, nothing_usable, stream

    skips = []
    with closing(stream([source], caption_keys, image_column)) as scanned:
        for found in scanned:
            if not isinstance(found, Skip):
                return
            skips.append(found)
    raise nothing_usable([source], skips, caption_keys, image_column)


def is_store(path: Path) -> bool:
    """Return whether there is a store at a path."""
    return path.is_dir() and not is_plain_folder(path)


def default_model(folder: Path, *, yes: bool) -> str:
    """Return the name of the default model, after a question if it must be downloaded.

    Raises:
        UsageError: It is not to be downloaded, or a package is missing that it needs.
    """
    from mmalign.model import openclip

    name = f"{NAME}:{TAG}"
    if openclip.has_weights(NAME, TAG):
        return name
    other = "name a model of yours with --model RUN, --model NAME:TAG or --model NAME:FILE"
    if find_spec(NEEDS) is None:
        raise UsageError(
            f"{folder}: no model was named, and {name} ({FACTS}) needs the package {NEEDS}: "
            f"pip install {NEEDS}, or {other}"
        )
    say(f"{folder}: no model was named; {name} would be downloaded: {FACTS}")
    if yes:
        return name
    if not is_answered():
        raise UsageError(f"{folder}: add --yes to download {name}, or {other}")
    if not click.confirm("Download it?", default=True, err=True):
        raise UsageError(f"{folder}: without a model nothing is searched: {other}")
    return name


def is_answered() -> bool:
    """Return whether somebody is there to answer a question."""
    return sys.stdin.isatty()
