"""What open_clip knows of its models: names, configurations, tags; without its networks.

Importing open_clip takes seconds, as it imports timm, torchvision and torch's compiler. A model
whose networks are ours needs its files and single modules only, which are read here.
"""

import json
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from mmalign.errors import InstallError

PACKAGE = "open_clip"
# The name under which its modules are imported without the package itself.
PARTS = "_mmalign_open_clip_parts"
# Settings of open_clip that change no vector of a built network.
TRAINING_ONLY = (
    "timm_drop", "timm_drop_path", "patch_dropout", "timm_model_pretrained", "hf_model_pretrained",
    "output_tokens",
)  # fmt: skip
# Those that belong to one tower, to heads, or to the class that holds both towers.
NOT_SHARED = (
    "vision_cfg", "text_cfg", "multimodal_cfg", "custom_text", "quick_gelu", "init_logit_scale",
    "init_logit_bias", "nonscalar_logit_scale",
)  # fmt: skip


def part(name: str) -> Any:
    """Import one module of open_clip that does not need its networks: `pretrained`, `tokenizer`."""
    if PACKAGE in sys.modules:
        return import_module(f"{PACKAGE}.{name}")
    if PARTS not in sys.modules:
        package = ModuleType(PARTS)
        package.__path__ = [str(_folder())]
        sys.modules.setdefault(PARTS, package)
    return import_module(f"{PARTS}.{name}")


def names() -> list[str]:
    """Return the names of all model architectures that open_clip knows."""
    if PACKAGE in sys.modules:
        return list(import_module(PACKAGE).list_models())
    return list(_own_names())


def tags(name: str) -> list[str]:
    """Return the tags of the pretrained weights that open_clip knows for a model."""
    return list(part("pretrained").list_pretrained_tags_by_model(name))


def tag_config(name: str, tag: str) -> dict[str, Any]:
    """Return what open_clip knows of a tag: where its weights are, and the preprocessing."""
    return dict(part("pretrained").get_pretrained_cfg(name, tag))


def config_of(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return open_clip's model_cfg of an architecture, empty if it is unknown."""
    if architecture.get("config"):
        return dict(architecture["config"])
    name = architecture["name"].replace("/", "-")
    if PACKAGE in sys.modules:
        return import_module(PACKAGE).get_model_config(name) or {}
    if name not in _own_names():
        return {}
    found: dict[str, Any] = json.loads(_file(name).read_text(encoding="utf-8"))
    return found


def tower_config(modality: str, architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the vectors of one tower, with its activation."""
    config = config_of(architecture)
    tower = config["vision_cfg" if modality == "image" else "text_cfg"]
    # Networks of other libraries and ResNets have an activation of their own.
    others = tower.get("timm_model_name") or tower.get("hf_model_name")
    takes_activation = not others and not isinstance(tower.get("layers"), list)
    quick = architecture.get("quick_gelu") or config.get("quick_gelu")
    return {
        "kind": architecture["kind"],
        "tower": {k: v for k, v in tower.items() if k not in TRAINING_ONLY},
        "quick_gelu": bool(takes_activation and quick),
        **{k: v for k, v in config.items() if k not in NOT_SHARED},
    }


@cache
def _own_names() -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in (_folder() / "model_configs").glob("*.json")))


def _file(name: str) -> Path:
    return _folder() / "model_configs" / f"{name}.json"


@cache
def _folder() -> Path:
    """Return the folder of the installed package."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise InstallError("open_clip is not installed: pip install open_clip_torch")
    return Path(found.submodule_search_locations[0])
