"""open_clip's models by name: which network, which weights, which preprocessing.

NAME:TAG, NAME:FILE, hf-hub:ORG/REPO, local-dir:FOLDER
-> architecture, preprocessing, tokenizer, weight file -> Encoder
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mmalign.errors import ModelError, nearest
from mmalign.model import weights as weight_files
from mmalign.model.clip_catalog import config_of, names, part, tag_config, tags
from mmalign.model.clip_networks import (
    CONFIG,
    FOLDER,
    OpenClipTokenizer,
    blank,
    build,
    cached,
    create,
    module,
    quiet,
    require_network,
    with_memory,
)
from mmalign.model.clip_towers import OpenClipTowers, adopted, own_towers
from mmalign.model.encoder import Encoder, Preprocess
from mmalign.model.presets import PRESETS
from mmalign.model.torchscript import is_archive, read_archive
from mmalign.progress import say

__all__ = [
    "FOLDER",
    "HUB",
    "OpenClipTokenizer",
    "OpenClipTowers",
    "blank",
    "build",
    "load",
    "module",
    "names",
    "plan_of_file",
    "plan_of_tag",
    "preprocess_of",
    "tags",
    "unfilled",
    "with_memory",
    "wrap",
]

HUB = "hf-hub"
# The names open_clip looks for in a folder and on the hub, in order.
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
INTERPOLATIONS: dict[str, Literal["bicubic", "bilinear"]] = {
    "bicubic": "bicubic",
    "bilinear": "bilinear",
    "random": "bicubic",  # open_clip's choice for untrained models
}


# open_clip's preprocessing where neither tag nor configuration says otherwise.
DEFAULTS: dict[str, Any] = {
    "size": 224,
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


@dataclass
class Plan:
    """What to build, and with which weights."""

    shown: str
    """The name as the user wrote it."""
    name: str
    """The first part of the identity."""
    architecture: dict[str, Any]
    """What `build` needs; part of the identity."""
    preprocess: dict[str, Any] = field(default_factory=dict)
    """Differences from open_clip's defaults."""
    file: Path | None = None
    """The weights; None for random ones."""
    source: str = ""
    """The name under which the model can be loaded again, from any folder."""


def require_name(name: str) -> None:
    """Reject a name that is not an open_clip architecture.

    Raises:
        ModelError: It does not exist; the message suggests the nearest name.
    """
    known = names()
    if name in known:
        return
    hint = nearest(name, known)
    if name in PRESETS:
        hint = f"it is a preset: give it as preset (--preset {name})"
    elif ":" in name:
        alone, _, pretrained = name.partition(":")
        hint = f"give model and pretrained separately (--model {alone} --pretrained {pretrained})"
    raise ModelError(f"no open_clip model is called {name!r}: {hint}")


def require(name: str, pretrained: str | None) -> None:
    """Reject what `load` cannot get, before any work is done for it.

    Raises:
        ModelError: No such architecture or weights; the message suggests the nearest name. Or the
            weights are neither on this machine nor reachable.
    """
    if name.partition(":")[0] in (HUB, FOLDER):
        return
    _require_known(name, pretrained)
    if pretrained in tags(name):
        _require_tag(name, pretrained)


def _require_known(name: str, pretrained: str | None) -> None:
    require_name(name)
    if pretrained is None or pretrained in tags(name):
        return
    file = Path(pretrained)
    if file.is_file():
        weight_files.require_weights(file)
        return
    if file.is_dir():
        raise ModelError(
            f"{pretrained}: a folder; give {name}:FILE with a weight file in it, or "
            f"{FOLDER}:{pretrained} if it contains {CONFIG}"
        )
    if file.parent != Path() or file.suffix in (*weight_files.TORCH_ENDINGS, ".safetensors"):
        raise ModelError(f"{pretrained}: no such weight file")
    wanted = nearest(pretrained.removeprefix(f"{name}:"), tags(name))
    known = wanted if tags(name) else "it has no tags"
    raise ModelError(
        f"{name} has no pretrained weights {pretrained!r}: {known} (or give {name}:FILE)"
    )


def _require_tag(name: str, tag: str) -> None:
    """Reject a tag whose weights are neither on this machine nor reachable."""
    plan, cfg = plan_of_tag(name, tag), tag_config(name, tag)
    if not cfg.get("file") and _cached_tag(cfg) is None:
        where = cfg.get("hf_hub") or cfg.get("url", "")
        require_network(plan.shown, where, f"{_with_activation(plan)}:FILE")


def load(name: str, pretrained: str | None) -> Encoder:
    """Build an open_clip model; its towers are read from a file when `Towers.read` says so.

    Args:
        name: An architecture of open_clip; or `hf-hub:ORG/REPO`, `local-dir:FOLDER`.
        pretrained: A tag, a local file, or None for random weights. For `hf-hub` or `local-dir`,
            the part after the colon may be given here.

    Raises:
        InstallError: The tokenizer needs a package that is not installed.
        ModelError: Unknown name or tag, or the weights are unavailable or do not fit.
    """
    scheme, _, rest = name.partition(":")
    if scheme in (HUB, FOLDER):
        place = rest or pretrained or ""
        plan = _from_hub(place) if scheme == HUB else _from_folder(Path(place))
        folder = str(plan.file.parent) if scheme == FOLDER and plan.file else None
        return _encoder(plan, OpenClipTokenizer(plan.architecture, folder))
    _require_known(name, pretrained)
    tokenizer = OpenClipTokenizer({"name": name})
    if pretrained is None:
        plan = Plan(name, name, {"kind": "open_clip", "name": name})
    elif pretrained in tags(name):
        plan = _from_tag(name, pretrained)
    else:
        plan = plan_of_file(name, Path(pretrained))
    return _encoder(plan, tokenizer)


def plan_of_tag(name: str, tag: str) -> Plan:
    """Return what a tag specifies for a network, without its weights."""
    cfg = tag_config(name, tag)
    return Plan(
        f"{name}:{tag}",
        name,
        _architecture(name, quick_gelu=bool(cfg.get("quick_gelu"))),
        _preprocess_config(cfg),
        source=f"{name}:{tag}",
    )


def wrap(
    clip: Any, name: str, architecture: dict[str, Any], tokenizer: OpenClipTokenizer | None = None
) -> Encoder:
    """Wrap a network that open_clip built, with its weights, in an encoder."""
    preprocess = preprocess_of(name, module().get_model_preprocess_cfg(clip))
    words = tokenizer or OpenClipTokenizer(architecture)
    return Encoder(name, adopted(clip, architecture, name), words, preprocess, architecture)


def unfilled(architecture: dict[str, Any]) -> OpenClipTowers:
    """Build towers without weights: parameters without memory, or NaN if a tower is open_clip's."""
    towers = own_towers(architecture)
    if towers is not None:
        return towers
    clip = blank(architecture)
    towers = own_towers(architecture, clip.visual, getattr(clip, "text", None))
    return OpenClipTowers(clip) if towers is None else with_memory(towers)


def _encoder(plan: Plan, tokenizer: OpenClipTokenizer) -> Encoder:
    """Build, load the weights, and check both."""
    encoder = _mapped(plan, tokenizer) or _built(plan, tokenizer)
    encoder.source = plan.source
    return encoder


def _mapped(plan: Plan, tokenizer: OpenClipTokenizer) -> Encoder | None:
    """Build our networks around the weights of a file; None if open_clip is needed for either."""
    towers = own_towers(plan.architecture) if plan.file else None
    if towers is None or plan.file is None:
        return None
    size = config_of(plan.architecture)["vision_cfg"].get("image_size", DEFAULTS["size"])
    # Check before gigabytes are read.
    preprocess = preprocess_of(plan.name, {**DEFAULTS, **plan.preprocess, "size": size})
    try:
        weights = _plain_weights(plan.file)
        if weights is None:
            return None
        towers.map_file(weights, plan.file)
    except Exception:  # open_clip converts other forms, and says what is wrong
        return None
    return Encoder(plan.name, towers, tokenizer, preprocess, plan.architecture)


def _plain_weights(file: Path) -> dict[str, Tensor] | None:
    if not is_archive(file):
        return weight_files.mapped(file)
    others = {"input_resolution", "context_length", "vocab_size", "attn_mask"}
    return {k: v.float() for k, v in read_archive(file)[0].items() if k not in others}


def _built(plan: Plan, tokenizer: OpenClipTokenizer) -> Encoder:
    """Let open_clip build the networks and load the weights."""
    try:
        if plan.file is None:
            clip = create(plan.architecture, plan.preprocess, device="cpu")
        else:
            clip = build(plan.architecture, plan.preprocess)
    except Exception as error:  # of timm, transformers, the hub
        weight_files.refuse(plan.shown, error)
    preprocess_of(plan.name, module().get_model_preprocess_cfg(clip))
    if plan.file is not None:
        _fill(with_memory(clip), plan)
    return wrap(clip, plan.name, plan.architecture, tokenizer)


def _fill(clip: Any, plan: Plan) -> None:
    assert plan.file is not None
    where = f"{plan.shown} with weights {str(plan.file)!r}"
    try:
        if is_archive(plan.file):
            clip.load_state_dict(_archived(clip, plan.file))
        else:
            with quiet():
                module().load_checkpoint(clip, str(plan.file), strict=True, weights_only=True)
    except ModelError:
        raise
    except Exception as error:  # pickle, safetensors and shape errors of many libraries
        weight_files.refuse(where, error)
    weight_files.require_numbers(clip.state_dict(), str(plan.file))


def _archived(clip: Any, file: Path) -> dict[str, Tensor]:
    """Read an archive's weights, without computed buffers and OpenAI's integer settings."""
    computed = {name for name, _ in clip.named_buffers()} - clip.state_dict().keys()
    others = {"input_resolution", "context_length", "vocab_size", *computed}
    return {k: v for k, v in read_archive(file)[0].items() if k not in others}


def _architecture(name: str, *, quick_gelu: bool) -> dict[str, Any]:
    """Record an activation only if it is not the name's default, to keep other identities."""
    own = bool(config_of({"name": name}).get("quick_gelu"))
    noted = {"quick_gelu": True} if quick_gelu and not own else {}
    return {"kind": "open_clip", "name": name, **noted}


def _from_tag(name: str, tag: str) -> Plan:
    plan, cfg = plan_of_tag(name, tag), tag_config(name, tag)
    _require_tag(name, tag)
    file = _cached_tag(cfg)
    if file is None:
        try:
            with quiet():
                file = Path(part("pretrained").download_pretrained(cfg))
        except Exception as error:  # from the hub or urllib
            why = weight_files.reason(error)
            raise ModelError(
                f"{plan.shown}: the weights cannot be downloaded: {why}; "
                f"download them yourself and give {_with_activation(plan)}:FILE"
            ) from error
    plan.file = file
    return plan


def _with_activation(plan: Plan) -> str:
    """Return the name under which a file of the same weights gets the activation of their tag."""
    return f"{plan.name}-quickgelu" if plan.architecture.get("quick_gelu") else plan.name


def plan_of_file(name: str, file: Path) -> Plan:
    """Use what most tags of a name share; a file states neither activation nor preprocessing."""
    weight_files.require_weights(file)
    shown, quick = f"{name}:{file}", False
    cfgs = [tag_config(name, tag) for tag in tags(name)]
    if is_archive(file):
        quick = read_archive(file)[1]
    elif any(c.get("quick_gelu") for c in cfgs) and f"{name}-quickgelu" in names():
        say(
            f"{shown}: computed with GELU; weights of OpenAI, MetaCLIP or DFN need QuickGELU: "
            f"give {name}-quickgelu:{file}"
        )
    ways = [_preprocess_config(c) for c in cfgs]
    usual = max(ways, key=ways.count, default={})
    odd = [tag for tag, way in zip(tags(name), ways, strict=True) if way != usual]
    if odd:
        say(
            f"{shown}: images are preprocessed as for most tags of {name}, "
            f"not as for {', '.join(odd)}"
        )
    architecture = _architecture(name, quick_gelu=quick)
    return Plan(shown, name, architecture, usual, file, f"{name}:{file.absolute()}")


def _from_folder(folder: Path) -> Plan:
    shown = f"{FOLDER}:{folder}"
    if not folder.is_dir():
        raise ModelError(f"{shown}: no such folder")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{shown}: {CONFIG} is missing")
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        found = [f for end in ("safetensors", "bin", "pth") for f in folder.glob(f"*.{end}")]
        if len(found) != 1:
            there = ", ".join(sorted(f.name for f in found)[:5]) or "none"
            raise ModelError(
                f"{shown}: no weight file with a known name (found: {there}): "
                f"rename it to {WEIGHTS[0]}"
            )
    weight_files.require_weights(found[0])
    return _configured(shown, folder / CONFIG, found[0], f"{FOLDER}:{folder.absolute()}")


def _from_hub(repo: str) -> Plan:
    shown = f"{HUB}:{repo}"
    if repo.count("/") != 1:
        raise ModelError(f"{shown}: write {HUB}:ORG/REPO")
    config, file = cached(repo, (CONFIG,)), cached(repo, HUB_WEIGHTS)
    if config is None or file is None:
        require_network(shown, repo, f"{FOLDER}:FOLDER")
        fetch = part("pretrained").download_pretrained_from_hf
        try:
            with quiet():
                config, file = Path(fetch(repo, CONFIG)), Path(fetch(repo))
        except Exception as error:  # from the hub
            why = weight_files.reason(error)
            raise ModelError(f"{shown}: cannot be downloaded: {why}") from error
    return _configured(shown, config, file, shown)


def _configured(shown: str, config: Path, file: Path, source: str) -> Plan:
    """Read a model that has its own configuration."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        network = content["model_cfg"]
        preprocess = _preprocess_config(content.get("preprocess_cfg") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ModelError(f"{shown}: {config.name} cannot be used: {why}") from None
    # Without its name: a model that moves to another folder keeps its identity.
    architecture = {"kind": "open_clip", "config": network}
    return Plan(shown, "open_clip", architecture, preprocess, file, source)


def _preprocess_config(cfg: dict[str, Any]) -> dict[str, Any]:
    keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    return {key: cfg[key] for key in keys if cfg.get(key) is not None}


def preprocess_of(name: str, cfg: dict[str, Any]) -> Preprocess:
    """Read open_clip's preprocessing.

    Raises:
        ModelError: This program does not support it.
    """
    sides = cfg["size"] if isinstance(cfg["size"], (tuple, list)) else (cfg["size"],)
    problem = ""
    if len(set(sides)) > 1:
        problem = f"images of {' x '.join(map(str, sides))} pixels; only squares are supported"
    elif cfg["interpolation"] not in INTERPOLATIONS:
        problem = f"interpolation {cfg['interpolation']!r}; only bicubic and bilinear are supported"
    elif cfg["resize_mode"] == "longest" and cfg.get("fill_color"):
        problem = f"borders of colour {cfg['fill_color']}; only black is supported"
    if problem:
        raise ModelError(f"{name}: not supported: {problem}")
    mean, std = (
        tuple(values) if isinstance(values, (tuple, list)) else (values,) * 3
        for values in (cfg["mean"], cfg["std"])
    )
    return Preprocess(
        size=int(sides[0]),
        mean=mean,
        std=std,
        interpolation=INTERPOLATIONS[cfg["interpolation"]],
        resize_mode=cfg["resize_mode"],
    )


def _cached_tag(cfg: dict[str, Any]) -> Path | None:
    """Find the weights of a tag on this machine, from an earlier download."""
    repo, file = os.path.split(cfg.get("hf_hub", ""))
    if not repo:
        return None
    safe = f"{os.path.splitext(file)[0]}.safetensors"
    wanted = HUB_WEIGHTS if file in ("", HUB_WEIGHTS[1]) else (safe, file)
    return cached(repo, wanted)
