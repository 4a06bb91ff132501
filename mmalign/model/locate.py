"""Find the model of a store by its identity or space, wherever either was moved.

Models that were used are remembered in small files, one for each identity and space, in
$MMALIGN_HOME, else in mmalign's folder in the system's cache folder. Any of them may be deleted.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.errors import IdentityError, ModelError, reason_of
from mmalign.files import require_regular, write_json
from mmalign.measured import user_folder
from mmalign.model.checkpoint import describes, load_model
from mmalign.model.encoder import Encoder

VARIABLE, FOLDER = "MMALIGN_HOME", "models"


def remember(encoder: Encoder) -> None:
    """Record where an encoder was loaded from, so that `find_model` finds it from any folder.

    Encoders that were never saved are not recorded. A folder that cannot be written is no error.
    """
    if encoder.source:
        for name in (encoder.space, encoder.identity):
            _write(name, encoder.source)


def find_model(
    source: str,
    wanted: str,
    *,
    towers: Mapping[str, str] | None = None,
    near: Path | None = None,
) -> Encoder:
    """Load the model of a store.

    Looks at the recorded source, where it would be if store and run were moved together, at runs
    beside the store, and where a model of this name was last loaded from.

    Args:
        source: What the store recorded: a run folder, or a name as `load_model` takes it.
        wanted: The identity or space that the model must have.
        towers: Identities of towers by modality, if known: a model with these is accepted without
            hashing its other towers.
        near: The store's folder.

    Raises:
        ModelError: None has this identity or space; the message names each place and what is wrong
            there. It is an `IdentityError` if there is a model in one of them.
        InstallError: The model needs a package that is not installed.
    """
    problems: dict[str, str] = {}
    kind = ModelError
    for place in _places(source, wanted, near):
        if place in problems:
            continue
        try:
            encoder = _load(place, wanted, towers or {})
        except ModelError as error:
            problems[place] = str(error)
            kind = IdentityError if isinstance(error, IdentityError) else kind
        except OSError as error:
            problems[place] = f"{place}: {reason_of(error)}"
        else:
            _write(wanted, encoder.source)
            return encoder
    looked = "; ".join([*problems.values(), *([f"no other run near {near}"] if near else [])])
    raise kind(
        f"the model {wanted} is not found: {looked}; give its folder or name with --model "
        "(Python: model=)"
    )


def _load(place: str, wanted: str, towers: Mapping[str, str]) -> Encoder:
    """Load a model that must be the wanted one."""
    run = Path(place)
    if run.is_absolute() and not run.exists():
        raise ModelError(f"{place} does not exist")
    if run.is_dir() and describes(run, wanted) is False:
        raise IdentityError(f"{place} holds another model")
    encoder = load_model(place, wanted, lazily=True)
    if not _fits(encoder, wanted, towers):
        fault = encoder.former_fault(wanted)
        raise IdentityError(f"{place} is {encoder.space}" + (f" ({fault})" if fault else ""))
    return encoder


def _fits(encoder: Encoder, wanted: str, towers: Mapping[str, str]) -> bool:
    # The cheapest first: the identity is a hash over everything.
    if towers and all(encoder.tower_identity(m) == name for m, name in towers.items()):
        return True
    if encoder.space == wanted:
        return True
    return encoder.identity == wanted


def _places(source: str, wanted: str, near: Path | None) -> Iterator[str]:
    yield source
    if near is not None:
        store = Path(os.path.abspath(near))
        yield from _moved_together(source, store, wanted)
        yield from _beside(store, wanted)
    remembered = _read(wanted)
    if remembered:
        yield remembered


def _moved_together(source: str, store: Path, wanted: str) -> Iterator[str]:
    """Yield runs that lie to the store as the recorded one may have lain to it."""
    parts = [part for part in re.split(r"[\\/]", source) if part not in ("", ".", "..")]
    for folder in store.parents:
        for first in range(len(parts)):
            yield from _if_wanted(folder.joinpath(*parts[first:]), wanted, unsure=True)


def _beside(store: Path, wanted: str) -> Iterator[str]:
    folders: list[Path] = []
    with contextlib.suppress(OSError):
        folders = sorted(store.parent.iterdir())
    for folder in folders:
        yield from _if_wanted(folder, wanted, unsure=False)


def _if_wanted(run: Path, wanted: str, *, unsure: bool) -> Iterator[str]:
    """Yield a folder whose description says that it is the wanted model.

    With `unsure`, also one from a version that recorded neither identity nor space.
    """
    with contextlib.suppress(OSError):
        if (run / "model.json").is_file():
            found = describes(run, wanted)
            if found or (found is None and unsure):
                yield str(run)


def _file(wanted: str) -> Path | None:
    chosen = os.environ.get(VARIABLE, "")
    home = Path(chosen) if chosen else user_folder()
    name = hashlib.sha256(wanted.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return home / FOLDER / f"{name}.json" if home else None


def _read(wanted: str) -> str:
    """Return where a model was last loaded from; empty if that is unknown."""
    file = _file(wanted)
    if file is None:
        return ""
    try:
        require_regular(file)
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    source = content.get("source") if isinstance(content, dict) else None
    return source if isinstance(source, str) else ""


def _write(wanted: str, source: str) -> None:
    file = _file(wanted)
    if file is None or _read(wanted) == source:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"model": wanted, "source": source})
