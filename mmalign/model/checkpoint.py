"""Run folders: how a model is created, saved and loaded. Nothing is ever unpickled.

RUN/model.json                name, architecture, preprocessing; which weights are the run's, the
                              identity and space they give the model
RUN/model-HASH.safetensors    weights; HASH is the end of the identity they give the model
RUN/model-HASH.kept           a store was made with these weights, in the space that is named inside
RUN/tokenizer.json            tokenizer

Weights are never overwritten: a store made with earlier ones finds them by identity or space.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmalign import files
from mmalign.errors import ModelError, nearest, same, shell_command
from mmalign.model import openclip, tokenizer
from mmalign.model.encoder import Encoder, Preprocess, Towers
from mmalign.model.identity import MODALITIES, Origin
from mmalign.model.presets import PRESETS, Preset
from mmalign.model.towers import OwnTowers
from mmalign.model.weights import reason, require_numbers


def require_preset(preset: str) -> None:
    """Reject an unknown preset.

    Raises:
        ModelError: The preset does not exist; the message suggests the nearest name.
    """
    if preset not in PRESETS:
        hint = nearest(preset, PRESETS)
        if same(preset, openclip.names()):
            hint = "it is an open_clip model: give it as model (--model)"
        raise ModelError(f"no preset is called {preset!r}: {hint}")


def new_model(preset: str, captions: Iterable[str]) -> Encoder:
    """Build one of our presets with random weights and a tokenizer trained on the captions.

    Raises:
        ModelError: No preset has this name.
    """
    require_preset(preset)
    size = PRESETS[preset]
    words = tokenizer.train(captions, size.vocabulary, size.context)
    architecture = {"kind": "preset", **asdict(size), "vocabulary": words.size}
    return Encoder(preset, _towers(architecture), words, size.preprocess(), architecture)


# Errors from reading a damaged file, or the weights of another network.
UNFIT = (SafetensorError, KeyError, ValueError, TypeError, RuntimeError)
# The name of a weight file, and the one used by runs that held only one.
WEIGHTS, ONLY_WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors"), "model.safetensors"


def load_model(name: str | Path, wanted: str | None = None, *, lazily: bool = False) -> Encoder:
    """Load a run folder, or an open_clip model.

    The latter are written `NAME:TAG`, `NAME:FILE`, `hf-hub:ORG/REPO` or `local-dir:FOLDER`.

    Args:
        name: The model's name or folder.
        wanted: An identity or space. For a run that has been trained further since: load the
            weights that give it to the model, if the run has them, else the newest.
        lazily: Read the weights of an image tower when the first image is encoded, where possible.

    Raises:
        ModelError: The model does not exist, has no trained weights yet, or its files are damaged.
    """
    encoder = _loaded(name, wanted)
    # A text tower is read now: it is what tells a model apart.
    encoder.towers.read(*(("text",) if lazily else MODALITIES))
    return encoder


def _loaded(name: str | Path, wanted: str | None) -> Encoder:
    run = Path(name)
    if run.is_dir():
        return _load_run(run, wanted)
    architecture, _, pretrained = str(name).partition(":")
    if architecture in (openclip.HUB, openclip.FOLDER):
        return openclip.load(architecture, pretrained)
    if run.is_file():
        raise ModelError(
            f"{name}: a file, not a run folder; for weights of an open_clip model, write "
            f"NAME:FILE, for example ViT-B-32:{name}"
        )
    if architecture in PRESETS:
        raise ModelError(
            f"{name}: {architecture} is a preset, which has no weights: train it "
            f"(--preset {architecture}) and give the run folder"
        )
    if pretrained and architecture in openclip.names():
        return openclip.load(architecture, pretrained)
    raise _unknown(str(name))


def _unknown(name: str) -> ModelError:
    """Suggest what was meant by a name that is neither a run folder nor a model."""
    known = openclip.names()
    listed = same(name, (f"{each}:{tag}" for each in known for tag in openclip.tags(each)))
    architecture, _, pretrained = name.partition(":")
    meant = same(architecture, known)
    if listed is None and pretrained and meant:
        known_tag = same(pretrained, openclip.tags(meant))
        listed = f"{meant}:{known_tag or pretrained}"
    if listed:
        hint = f"did you mean {listed!r}?"
    elif meant:
        tags = _some_tags(meant)
        return ModelError(f"{name}: no weights given: write {meant}:TAG with one of {tags}")
    elif "/" in architecture or architecture.startswith("."):
        return ModelError(f"{name}: no such run folder")
    else:
        hint = nearest(architecture, known)
    return ModelError(f"{name}: neither a run folder nor an open_clip model: {hint}")


def _some_tags(name: str, most: int = 8) -> str:
    tags = openclip.tags(name)
    more = f" and {len(tags) - most} more" if len(tags) > most else ""
    return ", ".join(tags[:most]) + more


def save_model(encoder: Encoder, run: Path, *, steps: int | None = None) -> str:
    """Write an encoder into a run folder atomically (`model.json` comes last).

    Earlier weights are kept. Returns the name of the weight file.

    Args:
        encoder: The encoder to save.
        run: An existing folder.
        steps: Training steps that led to these weights.

    Raises:
        OSError: A file cannot be written; it is named.
    """
    state = {
        k: v.detach().cpu().contiguous().clone() for k, v in encoder.towers.state_dict().items()
    }
    identity = encoder.identity_with(state)
    name = _weights_name(identity)
    files.write_through(run / name, lambda path: save_file(state, files.utf8_name(path)))
    made = {"identity": identity, **asdict(encoder.described(state))}
    save_description(encoder, run, weights=name, steps=steps, made=made)
    return name


def save_description(
    encoder: Encoder,
    run: Path,
    *,
    weights: str | None = None,
    steps: int | None = None,
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's description, without weights as long as none are worth saving.

    Args:
        encoder: The encoder to describe.
        run: An existing folder.
        weights: The name of the weight file.
        steps: Training steps that led to these weights.
        made: The identity, space and towers that the weights give the model.
    """
    files.write_text(run / "tokenizer.json", encoder.tokenizer.to_json())
    description = {
        "name": encoder.name,
        "architecture": encoder.architecture,
        "preprocess": asdict(encoder.preprocess),
        "weights": weights,
        "trained_steps": steps,
        "identity": None,
        "space": None,
        "towers": None,
        **(made or {}),
        "origin": asdict(encoder.origin) if encoder.origin else None,
    }
    files.write_json(run / "model.json", description)


def has_weights(run: Path) -> bool:
    """Return whether a run folder holds a model that can be loaded."""
    if not (run / "model.json").exists():
        return False
    try:
        return _weights(run, _description(run)) is not None
    except ModelError:  # damaged, but it is somebody's model
        return True


def keep_weights(encoder: Encoder) -> None:
    """Make the run an encoder was loaded from keep its weights, even after finding better ones.

    Anything that records the encoder's identity or space (a store) calls this: training removes
    only those of its own weights that nothing needs.
    """
    file = Path(encoder.source or ".") / _weights_name(encoder.identity)
    if file.exists():
        with contextlib.suppress(OSError):  # a run folder that is not writable is not being trained
            files.write_text(_keeper(file), encoder.space)


def drop_weights(run: Path, name: str) -> None:
    """Remove weights that better ones have replaced, unless they were marked to be kept."""
    if not _keeper(run / name).exists():
        files.remove(run / name)


def blank_model(run: Path) -> Encoder:
    """Build the encoder of a run without loading weights: until then all are NaN.

    Raises:
        ModelError: Its files are missing or damaged.
    """
    description = _description(run)
    try:
        encoder = _build(run, description)
        encoder.origin = Origin.from_json(description.get("origin"))
    except UNFIT as error:
        _damaged(run, error)
    openclip.with_memory(encoder.towers)
    return encoder


def describes(run: Path, wanted: str) -> bool | None:
    """Return whether a run has weights of an identity or space; reads only names and descriptions.

    None if that cannot be told: the run has no description that can be read, or is from a version
    that recorded neither.
    """
    try:
        description = _description(run)
        named = _weights(run, description)
    except (ModelError, OSError):
        return None
    if _kept_as(run, wanted) or (named and wanted in _recorded(description)):
        return True
    return False if description.get("space") else None


def _recorded(description: Mapping[str, Any]) -> tuple[Any, Any]:
    return description.get("identity"), description.get("space")


def _kept_as(run: Path, wanted: str) -> Path | None:
    """Find weights of an identity or space that are not, or may not be, the newest."""
    named = run / _weights_name(wanted)
    if named.exists():
        return named
    with contextlib.suppress(OSError, ValueError):
        for keeper in sorted(run.glob("model-*.kept")):
            weights = keeper.with_suffix(".safetensors")
            if keeper.read_text(encoding="utf-8") == wanted and weights.exists():
                return weights
    return None


def _load_run(run: Path, wanted: str | None) -> Encoder:
    description = _description(run)
    named = weights = _weights(run, description)
    if wanted and wanted not in _recorded(description):
        weights = _kept_as(run, wanted) or weights
    if weights is None:
        raise ModelError(
            f"{run}: no trained weights yet: its first validation saves some; "
            f"continue with {shell_command('train', '--out', run, '--resume')}"
        )
    if not weights.exists():
        raise ModelError(f"{run}: not a run folder: {weights.name} is missing")
    try:
        encoder = _build(run, description)
        _fill(encoder.towers, weights)
        # Earlier weights have the space that follows from where the run started.
        recorded = description if weights == named else description.get("origin")
        encoder.origin = Origin.from_json(recorded)
    except UNFIT as error:
        _damaged(run, error)
    encoder.source = str(run.absolute())
    return encoder


def _fill(towers: Towers, weights: Path) -> None:
    state = load_file(files.utf8_name(weights))
    if isinstance(towers, openclip.OpenClipTowers) and towers.log_scale.is_meta:
        inner = {k.removeprefix("clip."): v for k, v in state.items() if k != "_bias"}
        towers.map_file(inner, weights)
        if "_bias" in state:
            towers.load_state_dict({"_bias": state["_bias"]}, strict=False)
        return
    towers.load_state_dict(state)
    require_numbers(towers.state_dict(), str(weights))


def _description(run: Path) -> dict[str, Any]:
    for file in (run / "model.json", run / "tokenizer.json"):
        if not file.exists():
            raise ModelError(f"{run}: not a run folder: {file.name} is missing")
    try:
        description: dict[str, Any] = json.loads((run / "model.json").read_text(encoding="utf-8"))
        values = description["preprocess"]
        values |= {"mean": tuple(values["mean"]), "std": tuple(values["std"])}
    except (KeyError, ValueError, TypeError) as error:
        _damaged(run, error)
    return description


def _weights(run: Path, description: dict[str, Any]) -> Path | None:
    """Find the weight file that a description names; None if it says there is none."""
    name = description.get("weights", ONLY_WEIGHTS)
    if name is None:
        return None
    if name != ONLY_WEIGHTS and not (isinstance(name, str) and WEIGHTS.fullmatch(name)):
        raise ModelError(f"{run}: the model is damaged: {name!r} is not the name of a weight file")
    return run / str(name)


def _weights_name(identity: str) -> str:
    return f"model-{identity.rpartition('-')[2]}.safetensors"


def _keeper(weights: Path) -> Path:
    return weights.with_suffix(".kept")


def _build(run: Path, description: dict[str, Any]) -> Encoder:
    architecture = description["architecture"]
    # The preprocessing used in training, whatever open_clip's current default is.
    preprocess = Preprocess(**description["preprocess"])
    if architecture["kind"] == "open_clip":
        towers, own_words = (
            openclip.unfilled(architecture),
            openclip.OpenClipTokenizer(architecture),
        )
        return Encoder(description["name"], towers, own_words, preprocess, architecture)
    words = tokenizer.from_json((run / "tokenizer.json").read_text(encoding="utf-8"))
    return Encoder(description["name"], _towers(architecture), words, preprocess, architecture)


def _damaged(run: Path, error: Exception) -> NoReturn:
    what = f"{run}: the model is damaged or was saved by another version"
    raise ModelError(f"{what}: {reason(error)}") from error


def _towers(architecture: dict[str, Any]) -> OwnTowers:
    own = {k: v for k, v in architecture.items() if k not in ("kind", "vocabulary")}
    return OwnTowers(Preset(**own), architecture["vocabulary"])
