"""CLIP models in the form that open_clip gives their weights: our own networks, or open_clip's.

`own_network` builds both towers as networks of ours, without open_clip. A tower of another
architecture (ResNets, timm's, transformers') is open_clip's own.
"""

import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.errors import ModelError
from mmalign.model.clip_catalog import config_of, tower_config
from mmalign.model.clip_layers import TextTower, VisionTower
from mmalign.model.encoder import Preprocess, Towers
from mmalign.model.fused import Patches
from mmalign.model.identity import MODALITIES
from mmalign.model.weights import reason, require_numbers
from mmalign.progress import say

# Settings that describe the class which holds both towers.
BOTH = {
    "custom_text", "embed_dim", "init_logit_bias", "init_logit_scale", "nonscalar_logit_scale",
    "quick_gelu", "text_cfg", "vision_cfg",
}  # fmt: skip
FIRST_TEMPERATURE = 0.07
# Largest distance between the unit vectors of our networks and open_clip's: both round in float32.
TOLERANCE = 1e-3
_reading = threading.Lock()


class Clip(nn.Module):
    """Two towers and the temperature, under open_clip's names; its class CustomTextCLIP."""

    def __init__(self, visual: nn.Module, text: nn.Module, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.text = text
        _complete(self, visual, config)
        self.cuts_texts = getattr(text, "cuts_texts", False)

    def encode_image(self, images_B3SS: Tensor) -> Tensor:
        """Map normalised images to features (B, D)."""
        return self.visual(images_B3SS)  # type: ignore[no-any-return,operator]

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Map token ids to features (B, D)."""
        return self.text(tokens_BT)  # type: ignore[no-any-return]


class FlatClip(TextTower):
    """The same with the parts of the text tower beside the image tower; open_clip's class CLIP."""

    def __init__(self, visual: nn.Module, config: Mapping[str, Any], *, quick: bool) -> None:
        super().__init__(config["text_cfg"], config["embed_dim"], quick=quick)
        _complete(self, visual, config)

    def encode_image(self, images_B3SS: Tensor) -> Tensor:
        """Map normalised images to features (B, D)."""
        return self.visual(images_B3SS)  # type: ignore[no-any-return,operator]

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Map token ids to features (B, D)."""
        return self(tokens_BT)  # type: ignore[no-any-return]


def own_network(
    architecture: dict[str, Any], visual: nn.Module | None = None, text: nn.Module | None = None
) -> nn.Module | None:
    """Build the network of an open_clip model; None if a tower is not ours and not given.

    Its parameters have no memory (device "meta"): `load_state_dict(..., assign=True)` gives it.

    Args:
        architecture: As in `clip_networks.build`.
        visual: The image tower, if it is open_clip's.
        text: The text tower, if it is open_clip's.
    """
    config = config_of(architecture)
    if any(key not in BOTH and value for key, value in config.items()):
        return None
    quick = bool(architecture.get("quick_gelu") or config.get("quick_gelu"))
    dim, text_cfg, vision_cfg = (config[key] for key in ("embed_dim", "text_cfg", "vision_cfg"))
    with torch.device("meta"):
        if VisionTower.fits(vision_cfg):
            visual = VisionTower(vision_cfg, dim, quick=quick)
        if visual is None:
            return None
        if not TextTower.fits(text_cfg):
            return None if text is None else Clip(visual, text, config)
        if not config.get("custom_text"):
            return FlatClip(visual, config, quick=quick)
        return Clip(visual, TextTower(text_cfg, dim, quick=quick), config)


def _complete(clip: Any, visual: nn.Module, config: Mapping[str, Any]) -> None:
    """Add the image tower and the temperature."""
    shape = [1] if config.get("nonscalar_logit_scale") else []
    scale, bias = config.get("init_logit_scale"), config.get("init_logit_bias")
    first = math.log(1 / FIRST_TEMPERATURE) if scale is None else scale
    clip.visual = visual
    clip.logit_scale = nn.Parameter(torch.full(shape, float(first)))
    clip.logit_bias = None if bias is None else nn.Parameter(torch.full(shape, float(bias)))


class OpenClipTowers(Towers):
    """Any CLIP-like model of open_clip's names and weights."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip
        bias = getattr(clip, "logit_bias", None)
        self._bias = None if bias is not None else nn.Parameter(torch.zeros(()))
        self.cuts_texts = getattr(clip, "cuts_texts", False)
        self._unread: dict[str, tuple[Path, tuple[int, int]]] = {}

    @property
    def log_scale(self) -> nn.Parameter:  # type: ignore[override]
        """Return open_clip's parameter, which is a logarithm too."""
        return self.clip.logit_scale  # type: ignore[no-any-return]

    @property
    def logit_bias(self) -> nn.Parameter:  # type: ignore[override]
        """Return open_clip's own bias if the model has one."""
        return self.clip.logit_bias if self._bias is None else self._bias

    def take_pixels(self, preprocess: Preprocess) -> None:
        """See `Towers`."""
        visual = self.clip.visual
        if isinstance(visual, VisionTower) and Patches.fits(visual.conv1):
            visual.conv1 = Patches(visual.conv1, preprocess.mean, preprocess.std)  # type: ignore[assignment]
            self.takes_pixels = True

    def image_features(self, images_B3SS: Tensor) -> Tensor:
        """See `Towers`."""
        self.read("image")
        return self.clip.encode_image(images_B3SS)  # type: ignore[no-any-return]

    def text_features(self, tokens_BT: Tensor) -> Tensor:
        """See `Towers`."""
        self.read("text")
        return self.clip.encode_text(tokens_BT)  # type: ignore[no-any-return]

    def architecture_of(self, modality: str, architecture: dict[str, Any]) -> dict[str, Any]:
        """See `Towers`."""
        return tower_config(modality, architecture)

    def weights_of(self, modality: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Towers`."""
        if modality == "text" and not hasattr(self.clip, "text"):
            # open_clip's class CLIP holds the parts of its text tower directly.
            rest = {k.removeprefix("clip."): v for k, v in weights.items() if k != "_bias"}
            return {k: v for k, v in rest.items() if not k.startswith(("visual.", "logit_"))}
        start = "clip.visual." if modality == "image" else "clip.text."
        return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}

    def map_file(self, weights: Mapping[str, Tensor], file: Path) -> None:
        """Take weights that are views of a file, which `read` copies when they are needed.

        Args:
            weights: Those of the network, by open_clip's names.
            file: The file.

        Raises:
            RuntimeError: They are those of another network.
        """
        self.clip.load_state_dict(dict(weights), assign=True)
        self._unread = dict.fromkeys(MODALITIES, (file, _stamp(file)))

    def read(self, *modalities: str) -> None:
        """Read the weights of towers from their file, unless they were read before.

        Raises:
            ModelError: A weight is NaN or infinite, or the file was changed.
        """
        if not self._unread:
            return
        with _reading, torch.inference_mode(False), torch.no_grad():
            for modality in modalities:
                if modality in self._unread:
                    self._read(modality, *self._unread[modality])
                    del self._unread[modality]

    def _read(self, modality: str, file: Path, stamp: tuple[int, int]) -> None:
        if _stamp(file) != stamp:
            raise ModelError(f"{file}: was changed while it was in use: load the model again")
        named = self.clip.state_dict(keep_vars=True)
        own = {k: v for k, v in named.items() if k.startswith("visual.") == (modality == "image")}
        require_numbers(own, str(file))
        for weight in own.values():
            weight.data = weight.detach().clone()


def own_towers(
    architecture: dict[str, Any], visual: nn.Module | None = None, text: nn.Module | None = None
) -> OpenClipTowers | None:
    """Wrap what `own_network` builds; None if it builds nothing."""
    network = own_network(architecture, visual, text)
    return None if network is None else OpenClipTowers(network)


def adopted(clip: Any, architecture: dict[str, Any], shown: str) -> OpenClipTowers:
    """Take over the weights of an open_clip network, in our networks where its towers have one.

    If these differ from open_clip's, a warning says so, and open_clip's are used.
    """
    own = own_network(architecture, clip.visual, getattr(clip, "text", None))
    if own is None:
        return OpenClipTowers(clip)
    try:
        own.load_state_dict(clip.state_dict(), assign=True)
        problem = compare_with_public(own.eval(), clip.eval(), config_of(architecture))
    except RuntimeError as error:  # other names or shapes
        problem = reason(error)
    if not problem:
        return OpenClipTowers(own)
    say(
        f"warning: {shown}: encoded by open_clip's own slower networks: mmalign's do not fit the "
        f"installed version ({problem})"
    )
    return OpenClipTowers(clip)


def compare_with_public(own: Any, clip: Any, config: Mapping[str, Any]) -> str:
    """Describe how the vectors of our networks differ from open_clip's; empty if they do not.

    Args:
        own: The network of ours, with its weights.
        clip: open_clip's, with the same.
        config: Its model_cfg.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    random = torch.Generator().manual_seed(0)
    problems = []
    if isinstance(own.visual, VisionTower):
        side = vision.get("image_size", 224)
        image_13SS = torch.randn(1, 3, side, side, generator=random)
        off = _distance(own.encode_image(image_13SS), clip.encode_image(image_13SS))
        problems += [f"images by {off:.2g}"] if not off <= TOLERANCE else []
    if isinstance(getattr(own, "text", own), TextTower):
        words, length = text.get("vocab_size", 49408), text.get("context_length", 77)
        tokens_2T = torch.randint(3, words - 1, (2, length), generator=random)
        ends = text.get("eos_id", 2) if text.get("pool_type") == "eos" else words - 1
        tokens_2T[0, length // 2], tokens_2T[1, -1] = ends, ends
        tokens_2T[0, length // 2 + 1 :] = 0
        off = _distance(own.encode_text(tokens_2T), clip.encode_text(tokens_2T))
        problems += [f"texts by {off:.2g}"] if not off <= TOLERANCE else []
    return " and ".join(problems)


def _distance(some_BD: Tensor, other_BD: Tensor) -> float:
    some_BD, other_BD = (F.normalize(each.detach().float(), dim=-1) for each in (some_BD, other_BD))
    return float((some_BD - other_BD).abs().max())


def _stamp(file: Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns
