"""An encoder: two towers that map images and texts to unit vectors in one space.

B items of a batch, D dimensions, S side of an image in pixels, T tokens.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mmalign.arrays import Floats
from mmalign.errors import ModelError
from mmalign.model.identity import MODALITIES, Origin, raw, space_after, tower_identity

MAX_LOGIT_SCALE = 100.0
TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing from a decoded image to the tower's input; part of a model's identity.

    The image decoder is not part of it: a JPEG decoded in full, at reduced scale or on a GPU
    differs by less than half a grey level on average after the resize.
    """

    size: int
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["squash", "shortest", "longest"] = "squash"


class Towers(nn.Module, ABC):
    """The two networks and the temperature; abstract."""

    log_scale: nn.Parameter
    """Logarithm of the logit scale, a scalar."""
    logit_bias: nn.Parameter
    """Added to every logit by the sigmoid loss, a scalar; InfoNCE does not use it."""
    any_size: bool = False
    """Whether images of a size other than the model's own can be encoded."""
    cuts_texts: bool = True
    """Whether padding after a text can be left out without changing its features."""

    takes_pixels: bool = False
    """Whether image input is raw pixels instead of normalised values."""

    def take_pixels(self, preprocess: Preprocess) -> None:
        """Fold normalisation into the first layer, for encoding only, where possible.

        `image_features` then takes uint8, and `takes_pixels` is set.
        """

    def read(self, *modalities: str) -> None:
        """Read the weights of these towers from their file, if that was put off."""

    @abstractmethod
    def image_features(self, images_B3SS: Tensor) -> Tensor:
        """Map normalised images to features (B, D), not normalised to unit length."""

    @abstractmethod
    def text_features(self, tokens_BT: Tensor) -> Tensor:
        """Map token ids, padded with 0, to features (B, D), not normalised to unit length."""

    @abstractmethod
    def architecture_of(self, modality: str, architecture: dict[str, Any]) -> dict[str, Any]:
        """Return the part of `Encoder.architecture` that decides the vectors of one tower."""

    @abstractmethod
    def weights_of(self, modality: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights and buffers on the embedding path of one tower.

        Args:
            modality: "image" or "text".
            weights: In the form of `state_dict`.

        Returns:
            Those from which the tower's vectors are computed, by their names inside the tower. A
            weight that both towers use is in both.
        """

    @property
    def logit_scale(self) -> Tensor:
        """Return the multiplier of the cosines, at most 100."""
        return self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)


class Tokenizer(ABC):
    """Texts to token ids; abstract."""

    @abstractmethod
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids (B, T) int64, padded with 0; T is as long as the longest text needs."""

    @abstractmethod
    def cut(self, texts: Sequence[str]) -> list[str]:
        """Return the texts that `__call__` truncates."""

    @abstractmethod
    def to_json(self) -> str:
        """Return everything needed to rebuild it, as JSON."""

    def decisive(self) -> str:
        """Return what decides the tokens, as JSON; part of the text tower's identity."""
        return self.to_json()


def fastest_device() -> torch.device:
    """Return the device to train on: a CUDA GPU if there is one, else the CPU.

    Not an Apple GPU: it lacks float64, which the losses sum in. `to_fastest` is for encoding.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(eq=False)
class Encoder:
    """Towers together with the preprocessing and the tokenizer they were trained with.

    Many threads may encode with one encoder: encoding changes nothing in it. The towers start in
    evaluation mode; training code sets training mode, and resets it afterwards.

    >>> from mmalign.model import new_model
    >>> encoder = new_model("nano", captions=["a red square", "a blue circle"])
    >>> encoder.encode_texts(["a red circle"]).shape
    (1, 128)
    """

    name: str
    towers: Towers
    tokenizer: Tokenizer
    preprocess: Preprocess
    architecture: dict[str, Any]
    """What `checkpoint.py` needs to build the towers again."""
    source: str = ""
    """The run folder or name it was loaded from; empty for a new encoder."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    origin: Origin | None = None
    """The model that the weights came from, before any training; None for random weights."""
    modality_encoders: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What encodes the items of each modality, as `encoding/modalities.py` made it."""
    _towers: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.towers.eval()

    def on(self, device: torch.device | str) -> "Encoder":
        """Move to a device and return self."""
        self.device = torch.device(device)
        self.towers.to(self.device)
        return self

    def encode(
        self, items: Sequence[Any], *, batch_size: int | None = None, progress: bool = False
    ) -> Floats:
        """Encode a mix of texts and images to unit vectors (N, D), in order.

        Args:
            items: A str is a text, a `Path` an image file, bytes an encoded image, a PIL image or a
                uint8 array (H, W, 3) a picture; see `mmalign.items`.
            batch_size: Images encoded at once; by default what suits the device.
            progress: Whether to show a progress bar.

        Raises:
            ItemError: An item is of another type, a `TypeError`.
            UsageError: A text is not UTF-8, or a file is missing.
            DataError: An image cannot be decoded.
        """
        # Imported by name: decoding and batching are in `encoding/`, which depends on this package.
        encode = import_module("mmalign.encoding.items").encode_items
        vectors: Floats = encode(self, items, batch_size=batch_size, progress=progress)
        return vectors

    @cached_property
    def dim(self) -> int:
        """Return the dimensions of the shared space."""
        return int(self.encode_texts(["a"]).shape[1])

    @cached_property
    def identity(self) -> str:
        """Return the name and a hash of architecture, weights, preprocessing and tokenizer.

        Stores of format 2 name it; `space` decides which embeddings can be compared.
        """
        return self.identity_with(self.towers.state_dict())

    def identity_with(self, weights: dict[str, Tensor]) -> str:
        """Return the identity that this encoder would have with other weights."""
        digest = hashlib.sha256(json.dumps(self.architecture, sort_keys=True).encode())
        digest.update(json.dumps(asdict(self.preprocess), sort_keys=True).encode())
        digest.update(self.tokenizer.to_json().encode())
        for name, tensor in sorted(weights.items()):
            digest.update(name.encode())
            digest.update(raw(tensor))
        return f"{self.name}-{digest.hexdigest()[:16]}"

    @property
    def tower_identities(self) -> dict[str, str]:
        """Return the identity of each tower, by modality."""
        return {modality: self.tower_identity(modality) for modality in MODALITIES}

    def tower_identity(self, modality: str) -> str:
        """Return the name of one tower: a hash over whatever decides its vectors, computed once."""
        if modality not in self._towers:
            self._towers[modality] = self.tower_identity_with(modality, self.towers.state_dict())
        return self._towers[modality]

    def tower_identity_with(self, modality: str, weights: Mapping[str, Tensor]) -> str:
        """Return the identity that a tower would have with other weights of the whole model."""
        image = json.dumps(asdict(self.preprocess), sort_keys=True)
        return tower_identity(
            modality,
            self.towers.architecture_of(modality, self.architecture),
            image if modality == "image" else self.tokenizer.decisive(),
            self.towers.weights_of(modality, weights),
        )

    @cached_property
    def space(self) -> str:
        """Return the name of the space that the towers share.

        Embeddings can be compared only if they have the same space.
        """
        return space_after(self.origin, self.tower_identity, self.name)

    def described(self, weights: Mapping[str, Tensor]) -> Origin:
        """Return space and towers that this encoder would have with other weights."""
        towers = {m: self.tower_identity_with(m, weights) for m in MODALITIES}
        return Origin(space_after(self.origin, towers.__getitem__, self.name), towers)

    def former_fault(self, identity: str) -> str:
        """Return what earlier versions got wrong with these weights, if that led to an identity."""
        plain = {k: v for k, v in self.architecture.items() if k != "quick_gelu"}
        size = self.preprocess.size
        for fault, former in (
            ("with the wrong activation (GELU, not QuickGELU)", replace(self, architecture=plain)),
            (
                "with the image preprocessing of other weights",
                replace(self, preprocess=Preprocess(size, resize_mode="shortest")),
            ),
        ):
            if former.identity == identity:
                return f"an earlier version of mmalign embedded {fault}: embed again"
        return ""

    def image_vectors(self, pixels_B3SS: Tensor) -> Tensor:
        """Embed pixels in [0, 255], shape (B, 3, S, S), to unit vectors (B, D); differentiable."""
        if self.towers.takes_pixels:
            return F.normalize(self.towers.image_features(pixels_B3SS).float(), dim=-1)
        mean = torch.tensor(self.preprocess.mean, device=pixels_B3SS.device).view(3, 1, 1)
        std = torch.tensor(self.preprocess.std, device=pixels_B3SS.device).view(3, 1, 1)
        images = (pixels_B3SS.float() / 255 - mean) / std
        return F.normalize(self.towers.image_features(images).float(), dim=-1)

    def text_vectors(self, tokens_BT: Tensor) -> Tensor:
        """Embed token ids (B, T), padded with 0, to unit vectors (B, D); differentiable."""
        return F.normalize(self.towers.text_features(tokens_BT).float(), dim=-1)

    def encode_images(self, pixels_BSS3: NDArray[np.uint8]) -> Floats:
        """Embed decoded images (B, S, S, 3) to unit vectors (B, D)."""
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_BSS3))
        if self.device.type == "cuda":
            # From pinned memory, a copy overlaps with what the device computes for another thread.
            pixels = pixels.pin_memory()
        return self.encode_pixels(pixels.permute(0, 3, 1, 2))

    def encode_pixels(self, pixels_B3SS: Tensor) -> Floats:
        """Embed decoded images (B, 3, S, S), uint8 on any device, to unit vectors (B, D)."""
        pixels = pixels_B3SS.to(self.device, non_blocking=True)
        return self._run(lambda: self.image_vectors(pixels))

    def encode_texts(self, texts: Sequence[str]) -> Floats:
        """Embed texts to unit vectors (B, D); those of similar length are encoded together."""
        tokens_BT = self.tokenizer(texts)
        lengths_B = self.text_lengths(tokens_BT)
        order_B = lengths_B.argsort()
        parts = [
            tokens_BT[rows, : lengths_B[rows[-1]]].to(self.device)
            for rows in order_B.split(TEXTS_AT_ONCE)
        ]
        vectors = [self._run(lambda part=part: self.text_vectors(part)) for part in parts]
        whole: Floats = np.concatenate(vectors)[order_B.argsort().numpy()]
        return whole

    def text_lengths(self, tokens_BT: Tensor) -> Tensor:
        """Return how many tokens of each text must be read, at least 1; the rest is padding."""
        width = tokens_BT.shape[1]
        if not self.towers.cuts_texts:
            return torch.full((len(tokens_BT),), width)
        return ((tokens_BT != 0) * torch.arange(1, width + 1)).amax(dim=1).clamp(min=1)

    def _run(self, embed: Any) -> Floats:
        # Never switched here: the mode is shared by all threads, and batch norms in training mode
        # update their running statistics with any batch.
        if self.towers.training:
            raise ModelError(f"{self.name}: in training mode: call towers.eval() before encoding")
        with torch.inference_mode():
            vectors: Floats = embed().cpu().numpy()
        return vectors
