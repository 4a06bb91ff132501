"""The arithmetic that a trained model encodes in: float32, bfloat16, or int8 on request.

The model stays the same: its identity is that of its float32 weights, and vectors of all precisions
share one space. The difference between them is measured, not assumed. The same measurement compares
the replacement layers (fused.py, int8.py) with the network's own layers.

Shapes: B items, S side of an image in pixels, D dimensions.
"""

import copy
import hashlib
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mmalign.arrays import Floats
from mmalign.errors import UsageError, reason_of
from mmalign.kernels.processor import has_bfloat16, has_int8, packs_bfloat16
from mmalign.measured import Figures, measured
from mmalign.model import fused, int8
from mmalign.model.encoder import Encoder, Towers
from mmalign.progress import say

Precision = Literal["auto", "float32", "bfloat16", "int8"]
# Lowest cosine that any vector of the probe may have: CLOSE for `auto` to leave float32, ROUNDED
# for a precision requested by name to count as rounding rather than a fault.
CLOSE, ROUNDED = 0.999, 0.99
ROUNDS = 5
PROBE_TEXTS = (
    "a", "!", "a photo of a brown dog that runs on the beach beside the sea",
    "two people, one of them with a red umbrella, wait at a crossing in the rain", "No. 4711",
    "一只狗在海滩上奔跑", "ein Fahrrad lehnt an der Wand", "sea " * 40,
)  # fmt: skip
# Errors that show that a network is not built as this program expects.
OTHERWISE = (
    AttributeError, TypeError, RuntimeError, ValueError, IndexError, KeyError, AssertionError,
)  # fmt: skip


class CastTowers(Towers):
    """Towers with their weights cast to another dtype."""

    def __init__(self, towers: Towers, dtype: torch.dtype) -> None:
        super().__init__()
        self.towers = towers.to(dtype)
        self.dtype = dtype
        self.cuts_texts, self.takes_pixels = towers.cuts_texts, towers.takes_pixels

    def image_features(self, images_B3SS: Tensor) -> Tensor:
        """See `Towers`."""
        images = images_B3SS if self.takes_pixels else images_B3SS.to(self.dtype)
        return self.towers.image_features(images)

    def text_features(self, tokens_BT: Tensor) -> Tensor:
        """See `Towers`."""
        return self.towers.text_features(tokens_BT)

    def architecture_of(self, modality: str, architecture: dict[str, Any]) -> dict[str, Any]:
        """See `Towers`."""
        return self.towers.architecture_of(modality, architecture)

    def weights_of(self, modality: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Towers`."""
        inner = {k.removeprefix("towers."): v for k, v in weights.items()}
        return self.towers.weights_of(modality, inner)


def in_precision(encoder: Encoder, precision: Precision) -> tuple[Encoder, str]:
    """Return the same model for encoding only, and the precision it got.

    Some images and texts are first encoded in both precisions. If a network is not built as this
    program expects, or a vector is more than a rounding away from float32, one warning says so and
    the encoder is returned unchanged.

    Args:
        encoder: In float32; it is not modified.
        precision: "auto" is bfloat16 if the processor supports it natively and every vector of
            the probe keeps a cosine of 0.999, else float32. "int8" needs a CPU; a message says
            if it is slower there than bfloat16 or float32.

    Raises:
        UsageError: "int8" is requested on a GPU or with a build of torch that lacks it.
    """
    if precision == "int8" and (encoder.device.type != "cpu" or not has_int8()):
        raise UsageError("--precision int8 needs a CPU and a torch with oneDNN")
    if precision == "float32" or (precision == "auto" and not has_bfloat16(encoder.device)):
        return encoder, "float32"
    kind: Literal["bfloat16", "int8"] = "int8" if precision == "int8" else "bfloat16"
    plain_BD = _probe(encoder)
    try:
        candidate = _in_eight_bits(encoder) if kind == "int8" else _in_bfloat16(encoder)
        least = float(cosines(_probe(candidate), plain_BD).min())
        problem = "" if least >= ROUNDED else f"the smallest cosine between the two is {least:.3f}"
    except OTHERWISE as error:
        least, problem = 0.0, reason_of(error)
    if problem:
        say(f"warning: {encoder.name} is encoded in float32, not in {kind}: {problem}")
    if problem or (precision == "auto" and least < CLOSE):
        return encoder, "float32"
    if kind == "int8":
        _say_whether_it_pays(encoder, candidate)
    return candidate, kind


def cosines(some_BD: Floats, other_BD: Floats) -> Floats:
    """Return the cosine of each pair of unit vectors, shape (B,)."""
    products_B: Floats = np.einsum("bd,bd->b", some_BD, other_BD)
    return products_B


def _in_bfloat16(encoder: Encoder) -> Encoder:
    towers = CastTowers(_fused(encoder, torch.bfloat16), torch.bfloat16)
    if encoder.device.type == "cpu" and packs_bfloat16():
        fused.pack(towers)
    return _same_model(encoder, towers)


def _in_eight_bits(encoder: Encoder) -> Encoder:
    towers = _fused(encoder, torch.bfloat16 if has_bfloat16(encoder.device) else torch.float32)
    eight = _same_model(encoder, towers)
    int8.quantize(towers, lambda: _probe(eight))
    return eight


def _fused(encoder: Encoder, dtype: torch.dtype) -> Towers:
    """Copy the towers for encoding; on a CPU with fused layers."""
    towers = copy.deepcopy(encoder.towers).eval()
    if encoder.device.type == "cpu":
        towers.take_pixels(encoder.preprocess)
        fused.replace_attention(towers, dtype)
    return towers


def _same_model(encoder: Encoder, towers: Towers) -> Encoder:
    other = replace(encoder, towers=towers)
    other.__dict__.update(
        identity=encoder.identity, dim=encoder.dim, _towers=encoder.tower_identities
    )
    return other


def _probe(encoder: Encoder) -> Floats:
    """Encode some images and texts that differ strongly from each other."""
    images = encoder.encode_images(_probe_images(encoder.preprocess.size))
    return np.concatenate([images, encoder.encode_texts(PROBE_TEXTS)])


def _probe_images(side: int) -> NDArray[np.uint8]:
    """Return noise, gradients, and surfaces with edges as in photographs, (B, S, S, 3)."""
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, side, side, generator=random)
    along = torch.linspace(0, 1, side)
    slope = along[:, None].expand(3, side, side)
    colours = torch.stack([along.expand(side, side), along[:, None].expand(side, side),
                           (along[:, None] + along) / 2])  # fmt: skip
    coarse = torch.rand(2, 3, 5, 5, generator=random)
    smooth, blocks = (F.interpolate(coarse, (side, side), mode=m) for m in ("bicubic", "nearest"))
    slopes = torch.stack([slope, colours])
    images_B3SS = torch.cat([noise, slopes, smooth, blocks]).mul(255).round_().clamp_(0, 255)
    return images_B3SS.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _say_whether_it_pays(encoder: Encoder, eight: Encoder) -> None:
    """Report if int8 is slower than what `auto` may use; measured once per machine."""
    usual = "bfloat16" if has_bfloat16(encoder.device) else "float32"
    architecture = json.dumps([encoder.architecture, encoder.preprocess.size], sort_keys=True)
    figures = measured(
        "encoding",
        {
            "model": f"{encoder.name}-{hashlib.sha256(architecture.encode()).hexdigest()[:8]}",
            "threads": torch.get_num_threads(),
            "unit": "seconds of some images, median",
        },
        (usual, "int8"),
        lambda: _seconds({
            usual: _in_bfloat16(encoder) if usual == "bfloat16" else encoder, "int8": eight,
        }),
    )  # fmt: skip
    share = figures[usual] / figures["int8"]
    if share < 1:
        say(
            f"--precision int8 is slower on this machine: {encoder.name} encodes images at "
            f"{share:.2f} of its speed in {usual}; leave out --precision"
        )


def _seconds(encoders: dict[str, Encoder]) -> Figures:
    """Time the encoding of some images, alternating between encoders for equal conditions."""
    images_BSS3 = _probe_images(next(iter(encoders.values())).preprocess.size)
    taken: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(ROUNDS):
        for name, encoder in encoders.items():
            started = time.perf_counter()
            encoder.encode_images(images_BSS3)
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}
