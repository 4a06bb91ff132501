"""The arithmetic that a trained model encodes in: float32, bfloat16, or eight bits on request.

The model stays the same one: its identity is that of its float32 weights, and vectors of all
precisions lie in one space. How far they lie apart is measured, not assumed.

B items, S side of an image in pixels, D dimensions.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmalign.errors import UsageError
from mmalign.kernels.processor import has_bfloat16, has_int8, packs_bfloat16
from mmalign.model import int8, lean
from mmalign.model.encoder import Encoder, Towers, Vectors

Precision = Literal["auto", "float32", "bfloat16", "int8"]
PROBED, TRIES = 8, 3
# What `auto` must gain to leave float32, and how near it must stay.
WORTH, CLOSE = 1.1, 0.999
PROBE_WORDS = "a photo of a brown dog that runs on the beach beside the sea"


class CastTowers(Towers):
    """Towers whose weights are in another type; final."""

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


def in_precision(encoder: Encoder, precision: Precision) -> tuple[Encoder, str]:
    """Return the same model for encoding only, and the precision it got.

    Args:
        encoder: In float32; it is left as it is.
        precision: "auto" is bfloat16 where the machine multiplies it faster and the vectors of
            some noise keep a cosine of 0.999, else float32. "int8" needs a CPU.

    Raises:
        UsageError: "int8" is asked for on a GPU or a build of torch that cannot.
    """
    if precision == "int8":
        if encoder.device.type != "cpu" or not has_int8():
            raise UsageError("--precision int8 needs a CPU and a torch with oneDNN")
        towers = _lean(encoder, torch.bfloat16 if has_bfloat16(encoder.device) else torch.float32)
        int8.quantize(towers)
        return _same_model(encoder, towers), "int8"
    if precision == "float32" or (precision == "auto" and not has_bfloat16(encoder.device)):
        return encoder, "float32"
    cast = CastTowers(_lean(encoder, torch.bfloat16), torch.bfloat16)
    if encoder.device.type == "cpu" and packs_bfloat16():
        lean.pack(cast)
    candidate = _same_model(encoder, cast)
    if precision == "auto" and not _better(candidate, encoder):
        return encoder, "float32"
    return candidate, "bfloat16"


def cosines(some_BD: Vectors, other_BD: Vectors) -> Vectors:
    """Cosine of each pair of unit vectors, shape (B,)."""
    products_B: Vectors = np.einsum("bd,bd->b", some_BD, other_BD)
    return products_B


def _lean(encoder: Encoder, dtype: torch.dtype) -> Towers:
    """Copy the towers, to encode; on a CPU in the form that takes it the fewest steps."""
    towers = copy.deepcopy(encoder.towers).eval()
    if encoder.device.type == "cpu":
        towers.take_pixels(encoder.preprocess)
        lean.expose_attention(towers, dtype)
    return towers


def _same_model(encoder: Encoder, towers: Towers) -> Encoder:
    other = replace(encoder, towers=towers)
    other.__dict__.update(identity=encoder.identity, dim=encoder.dim)
    return other


def _better(candidate: Encoder, encoder: Encoder) -> bool:
    """Try both on noise and one text: the candidate must be faster and hardly differ."""
    side = encoder.preprocess.size
    shape = (PROBED, side, side, 3)
    pixels_BSS3 = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    words = [PROBE_WORDS] * PROBED

    def encode(model: Encoder) -> Vectors:
        return np.concatenate([model.encode_images(pixels_BSS3), model.encode_texts(words)])

    near = cosines(encode(candidate), encode(encoder)).mean() >= CLOSE
    return bool(near) and _seconds(lambda: encode(encoder)) > WORTH * _seconds(
        lambda: encode(candidate)
    )


def _seconds(run: Callable[[], object]) -> float:
    """Time the best of some tries: a busy moment must not decide which numbers are stored."""
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
