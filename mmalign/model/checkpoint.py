"""Run folders: how a model is made, saved and found again. Nothing is ever unpickled.

RUN/model.json          name, architecture, preprocessing, identity
RUN/model.safetensors   weights
RUN/tokenizer.json      tokenizer
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmalign import files
from mmalign.errors import ModelError, nearest
from mmalign.model import openclip, tokenizer
from mmalign.model.encoder import Encoder, Preprocess
from mmalign.model.presets import PRESETS, Preset
from mmalign.model.towers import OwnTowers


def new_model(preset: str, captions: Iterable[str]) -> Encoder:
    """Build one of our presets with random weights and a tokenizer trained on the captions.

    Raises:
        ModelError: No preset has this name.
    """
    if preset not in PRESETS:
        raise ModelError(f"no preset is called {preset!r}: {nearest(preset, PRESETS)}")
    size = PRESETS[preset]
    words = tokenizer.train(captions, size.vocabulary, size.context)
    architecture = {"kind": "preset", **asdict(size), "vocabulary": words.size}
    return Encoder(preset, _towers(architecture), words, size.preprocess(), architecture)


def load_model(name: str | Path) -> Encoder:
    """Load a run folder, or an open_clip model written `NAME:TAG` or `NAME:FILE`.

    Raises:
        ModelError: There is no such model, or its files are damaged.
    """
    run = Path(name)
    if run.is_dir():
        return _load_run(run)
    architecture, colon, pretrained = str(name).partition(":")
    if "/" in architecture or architecture.startswith("."):
        raise ModelError(f"{name}: no such run folder")
    if colon:
        return openclip.load(architecture, pretrained)
    if architecture in openclip.names():
        known = ", ".join(openclip.tags(architecture))
        raise ModelError(f"{name}: say which weights, as {name}:TAG with one of {known}")
    raise ModelError(
        f"{name}: neither a run folder nor an open_clip model: "
        f"{nearest(architecture, openclip.names())}"
    )


def save_model(encoder: Encoder, run: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write an encoder into a run folder, whole or not at all (`model.json` comes last).

    Args:
        encoder: What to save.
        run: An existing folder.
        weights: Saved in place of the encoder's own (an average of them, say).
    """
    state = weights if weights is not None else encoder.towers.state_dict()
    state = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    files.write_through(run / "model.safetensors", lambda path: save_file(state, path))
    files.write_text(run / "tokenizer.json", encoder.tokenizer.to_json())
    description = {
        "name": encoder.name,
        "architecture": encoder.architecture,
        "preprocess": asdict(encoder.preprocess),
    }
    files.write_json(run / "model.json", description)


def _load_run(run: Path) -> Encoder:
    weights = run / "model.safetensors"
    for file in (run / "model.json", weights, run / "tokenizer.json"):
        if not file.exists():
            raise ModelError(f"{run}: not a run folder: {file.name} is missing")
    try:
        description = json.loads((run / "model.json").read_text(encoding="utf-8"))
        architecture = description["architecture"]
        values = description["preprocess"]
        values |= {"mean": tuple(values["mean"]), "std": tuple(values["std"])}
        state = load_file(weights)
        if architecture["kind"] == "open_clip":
            encoder = openclip.wrap(openclip.blank(architecture["name"]), architecture["name"])
        else:
            text = (run / "tokenizer.json").read_text(encoding="utf-8")
            words = tokenizer.from_json(text)
            encoder = Encoder(
                description["name"],
                _towers(architecture),
                words,
                Preprocess(**values),
                architecture,
            )
        encoder.towers.load_state_dict(state)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{run}: the model is damaged or of another version: {reason}") from error
    encoder.source = str(run.absolute())
    return encoder


def _towers(architecture: dict[str, Any]) -> OwnTowers:
    own = {k: v for k, v in architecture.items() if k not in ("kind", "vocabulary")}
    return OwnTowers(Preset(**own), architecture["vocabulary"])
