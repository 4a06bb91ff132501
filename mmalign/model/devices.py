"""The device that an encoder runs on: a GPU that reproduces the CPU's vectors, else the CPU."""

import numpy as np
import torch

from mmalign.arrays import Floats
from mmalign.model.encoder import Encoder
from mmalign.progress import say

# Images to probe a device with, and the minimum cosine between its vectors and the CPU's.
PROBED, NEAR = 4, 0.999
PROBE_TEXT = "a photo of a brown dog that runs on the beach"
CPU = torch.device("cpu")


def to_fastest(encoder: Encoder) -> Encoder:
    """Move an encoder to the fastest device that can encode with it, and return it.

    A CUDA GPU is used without a check. An Apple GPU must first reproduce the CPU's vectors on some
    noise images and a text, as torch lacks some operators there; if it does not, a message says so
    and the CPU is used.
    """
    if torch.cuda.is_available():
        return encoder.on(torch.device("cuda"))
    if not torch.backends.mps.is_available():
        return encoder.on(CPU)
    wanted = _probe(encoder.on(CPU))
    try:
        nearest = float((_probe(encoder.on(torch.device("mps"))) * wanted).sum(axis=1).min())
        problem = (
            "" if nearest >= NEAR else f"its vectors have a cosine of {nearest:.4f} with the CPU's"
        )
    except Exception as error:  # a missing operator, no memory, an old system
        problem = " ".join(str(error).split()) or type(error).__name__
    if problem:
        say(f"the CPU is used instead of the Apple GPU: {problem}")
        encoder.on(CPU)
    return encoder


def _probe(encoder: Encoder) -> Floats:
    side = encoder.preprocess.size
    noise = np.random.default_rng(0).integers(0, 256, (PROBED, side, side, 3), dtype=np.uint8)
    return np.concatenate([encoder.encode_images(noise), encoder.encode_texts([PROBE_TEXT])])
