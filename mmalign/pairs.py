"""Training and validation pairs in memory: pixels by row, tokens by caption, all joined by number.

N images, P captions, B images of a batch, C captions drawn for each, S side in pixels, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmalign import files, modality
from mmalign.data import (
    Draw,
    Pixels,
    Record,
    Sampler,
    Skip,
    decode_all,
    decoded,
    fit_image,
    report_skips,
)
from mmalign.encoding import report_cut
from mmalign.errors import TrainingError
from mmalign.model import Encoder

Ints = NDArray[np.int64]
Vectors = NDArray[np.float32]
ENCODED_AT_ONCE = 256
# A crop is taken from an image this much larger than the model's input.
CROP_ROOM = 1.125
LEFT_RIGHT = ("left", "right", "左", "右")
MIRROR_LIMIT = 0.01


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    step: int
    images_B3SS: Tensor
    """uint8 pixels."""
    tokens_BCT: Tensor
    groups_BC: Tensor
    """Equal captions have equal numbers: they are no negatives of each other."""
    lost: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Pairs:
    """Decoded images and tokenized captions; image i owns captions starts[i] to starts[i + 1]."""

    pixels: Pixels
    starts: Ints
    tokens_PT: Tensor
    lengths_P: Tensor
    groups_P: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def owners_P(self) -> Ints:
        """The image of each caption."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def sampler(self, batch_size: int, captions_per_image: int, seed: int) -> Sampler:
        """Shuffled batches over the pairs."""
        if batch_size > len(self):
            raise TrainingError(
                f"batch_size={batch_size} is larger than the {len(self)} training samples: "
                f"give --set batch_size={1 << (len(self).bit_length() - 1)} or bring more data"
            )
        most = int(np.diff(self.starts).max())
        return Sampler(self.starts, batch_size, seed, min(captions_per_image, most))

    def batch(self, draw: Draw) -> Batch:
        """Gather the pixels and tokens of a draw."""
        pixels, good, lost = self.pixels.fetch(draw.rows_B)
        captions_BC = torch.from_numpy(draw.captions_BC[good])
        longest = max(1, int(self.lengths_P[captions_BC].max()))
        return Batch(
            draw.step,
            torch.from_numpy(pixels).permute(0, 3, 1, 2),
            self.tokens_PT[captions_BC][:, :, :longest].long(),
            self.groups_P[captions_BC],
            tuple(lost),
        )


def load_pairs(
    encoder: Encoder, records: Sequence[Record], cache: Path, *, crops: bool, label: str
) -> tuple[Pairs, list[Skip]]:
    """Decode images into a cache and tokenize captions.

    Args:
        encoder: Gives the image size and the tokenizer.
        records: Samples, each with at least one caption.
        cache: The file to decode into.
        crops: Leave room around the model's input for random crops.
        label: What the progress bar says.
    """
    shape = encoder.preprocess
    side = round(shape.size * CROP_ROOM) if crops else shape.size

    def decode(content: bytes) -> NDArray[np.uint8]:
        with decoded(content, side) as image:
            return fit_image(image, side, shape.resize_mode, shape.interpolation)

    workers = modality.decode_workers()
    pixels, skips = decode_all(records, decode, side, cache, workers=workers, label=label)
    if not pixels.records:
        raise TrainingError(f"none of {len(records)} images can be decoded: {skips[0].reason}")
    captions = [c for r in pixels.records for c in r.captions]
    report_cut(encoder, len(encoder.tokenizer.cut(list(dict.fromkeys(captions)))))
    tokens = encoder.tokenizer(captions)
    counts = [len(r.captions) for r in pixels.records]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    number = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    groups = torch.tensor([number[c] for c in captions])
    lengths = encoder.text_lengths(tokens)
    return Pairs(pixels, starts, tokens.int(), lengths, groups), skips


def encode_pairs(encoder: Encoder, pairs: Pairs) -> tuple[Vectors, Vectors, Ints]:
    """Embed all images (N, D) and captions (P, D); the third array is the image of each caption.

    Images that cannot be decoded any more are left out together with their captions.
    """
    images, decoded = [], []
    for rows in _parts(len(pairs)):
        pixels, good, _ = pairs.pixels.fetch(rows)
        images.append(encoder.encode_images(pixels))
        decoded.append(rows[good])
    texts = []
    with torch.inference_mode():
        for rows in _parts(len(pairs.tokens_PT)):
            longest = max(1, int(pairs.lengths_P[rows].max()))
            tokens = pairs.tokens_PT[rows][:, :longest].long().to(encoder.device)
            texts.append(encoder.text_vectors(tokens).cpu().numpy())
    number = np.full(len(pairs), -1)
    kept = np.concatenate(decoded)
    number[kept] = np.arange(len(kept))
    owners = number[pairs.owners_P]
    return np.concatenate(images), np.concatenate(texts)[owners >= 0], owners[owners >= 0]


def _parts(count: int) -> list[Ints]:
    return np.array_split(np.arange(count), -(-count // ENCODED_AT_ONCE))


def report_losses(run: Path, skips: Sequence[Skip], total: int) -> None:
    """List what is not trained on in the run's skipped.jsonl, and say how much it is."""
    where = run / "skipped.jsonl"
    if skips:
        files.append_lines(where, [{"id": s.id, "uri": s.uri, "reason": s.reason} for s in skips])
    report_skips(skips, total, where)


def can_mirror(records: Sequence[Record]) -> bool:
    """Say whether mirrored images still fit their captions: not where these say left and right."""
    captions = [c.lower() for r in records for c in r.captions]
    sided = sum(any(word in c for word in LEFT_RIGHT) for c in captions)
    return sided <= MIRROR_LIMIT * len(captions)
