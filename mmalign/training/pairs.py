"""Training and validation pairs in memory: the pixels of images, the tokens of captions.

Shapes: N images, P captions, B images of a batch, C captions drawn for each, L maximum captions per
image, S side in pixels, T tokens of a caption, X tokens of all captions, U token ids.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmalign import files
from mmalign.arrays import Floats, Ints
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
from mmalign.encoding.batches import report_truncated
from mmalign.encoding.modalities import decode_workers
from mmalign.errors import TrainingError
from mmalign.model import Encoder

ENCODED_AT_ONCE = 256
TOKENIZED_AT_ONCE = 10_000
# Crops are taken from an image this much larger than the model's input.
CROP_ROOM = 1.125
# Words that mirroring makes wrong; 左右 ("about", or both sides) is not one of them.
LEFT_RIGHT = re.compile(
    r"(?<![a-z])(?:left|right)(?:most|wards?|hand|handed|side)?(?![a-z])|左(?!右)|(?<!左)右"
)
MIRROR_LIMIT = 0.01


@dataclass(frozen=True)
class Batch:
    """The data of one training step."""

    step: int
    images_B3SS: Tensor
    """uint8 pixels."""
    tokens_BCT: Tensor
    caption_ids_BC: Tensor
    """Equal captions have equal ids."""
    image_caption_ids_BL: Tensor
    """The ids of all captions of each image, drawn or not; padded with -1."""
    skips: tuple[Skip, ...] = ()

    def on(self, device: torch.device) -> "Batch":
        """Move the caption tensors to a device; the images stay where they are."""
        return replace(
            self,
            tokens_BCT=self.tokens_BCT.to(device),
            caption_ids_BC=self.caption_ids_BC.to(device),
            image_caption_ids_BL=self.image_caption_ids_BL.to(device),
        )


@dataclass(frozen=True)
class Pairs:
    """Decoded images and tokenized captions; the captions of an image are consecutive."""

    pixels: Pixels
    caption_starts: Ints
    """Where the captions of each image begin, and where the last ones end: (N + 1,)."""
    tokens_X: NDArray[np.uint16] | NDArray[np.int32]
    """Tokens of all captions, concatenated without padding."""
    token_starts: Ints
    """Where the tokens of each caption begin, and where the last ones end: (P + 1,)."""
    caption_ids_P: Ints
    """Id of each caption: equal captions have equal ids."""

    def __len__(self) -> int:
        return len(self.caption_starts) - 1

    @property
    def caption_count(self) -> int:
        """Return the number of captions."""
        return len(self.token_starts) - 1

    @property
    def owners_P(self) -> Ints:
        """Return the image of each caption."""
        return np.repeat(np.arange(len(self)), np.diff(self.caption_starts))

    def tokens(self, positions: Ints) -> Tensor:
        """Return the tokens of the captions at some positions, int64: (*positions.shape, T).

        They are padded with 0 to the longest of these captions.
        """
        firsts = self.token_starts[positions][..., None]
        lengths = self.token_starts[positions + 1][..., None] - firsts
        offsets_T = np.arange(lengths.max())
        offsets = np.minimum(firsts + offsets_T, len(self.tokens_X) - 1)
        return torch.from_numpy(np.where(offsets_T < lengths, self.tokens_X[offsets], 0)).long()

    def token_counts(self) -> Tensor:
        """Count the captions that contain each token, (U,) int64.

        The padding token, 0, counts as contained in all.
        """
        counts_U = np.zeros(int(self.tokens_X.max()) + 1, np.int64)
        for positions in _batches(self.caption_count, TOKENIZED_AT_ONCE):
            sorted_PT = np.sort(self.tokens(positions).numpy(), axis=1)
            is_first_PT = np.ones(sorted_PT.shape, np.bool_)
            is_first_PT[:, 1:] = sorted_PT[:, 1:] != sorted_PT[:, :-1]
            counts_U += np.bincount(sorted_PT[is_first_PT], minlength=len(counts_U))
        counts_U[0] = self.caption_count
        return torch.from_numpy(counts_U)

    def sampler(self, batch_size: int, captions_per_image: int, seed: int) -> Sampler:
        """Return a sampler of shuffled batches over the pairs."""
        if len(self) < 2:
            raise TrainingError(
                "there is only 1 training sample: contrastive training needs at least 2"
            )
        if batch_size > len(self):
            raise TrainingError(
                f"batch_size={batch_size} is larger than the {len(self)} training samples: "
                f"give --set batch_size={1 << (len(self).bit_length() - 1)} or add more data"
            )
        max_captions = int(np.diff(self.caption_starts).max())
        return Sampler(self.caption_starts, batch_size, seed, min(captions_per_image, max_captions))

    def batch(self, draw: Draw) -> Batch:
        """Gather the pixels and tokens of a draw."""
        pixels, good, skips = self.pixels.fetch(draw.rows_B)
        rows_B, captions_BC = draw.rows_B[good], draw.captions_BC[good]
        counts_B1 = (self.caption_starts[rows_B + 1] - self.caption_starts[rows_B])[:, None]
        offsets_L = np.arange(counts_B1.max())
        all_captions_BL = np.minimum(
            self.caption_starts[rows_B][:, None] + offsets_L, len(self.caption_ids_P) - 1
        )
        return Batch(
            draw.step,
            torch.from_numpy(pixels).permute(0, 3, 1, 2),
            self.tokens(captions_BC),
            torch.from_numpy(self.caption_ids_P[captions_BC]),
            torch.from_numpy(
                np.where(offsets_L < counts_B1, self.caption_ids_P[all_captions_BL], -1)
            ),
            tuple(skips),
        )


def load_pairs(
    encoder: Encoder, records: Sequence[Record], cache: Path, *, crops: bool, label: str
) -> tuple[Pairs, list[Skip]]:
    """Decode images into a cache and tokenize captions.

    Args:
        encoder: Defines the image size and the tokenizer.
        records: Samples, each with at least one caption.
        cache: The file to decode into.
        crops: Leave room around the model's input for random crops.
        label: Label of the progress bar.
    """
    preprocess = encoder.preprocess
    side = round(preprocess.size * CROP_ROOM) if crops else preprocess.size

    def decode(content: bytes) -> NDArray[np.uint8]:
        with decoded(content, side) as image:
            return fit_image(image, side, preprocess.resize_mode, preprocess.interpolation)

    workers = decode_workers()
    pixels, skips = decode_all(records, decode, side, cache, workers=workers, label=label)
    if not pixels.records:
        raise TrainingError(f"none of {len(records)} images can be decoded: {skips[0].reason}")
    captions = [c for r in pixels.records for c in r.captions]
    counts = [len(r.captions) for r in pixels.records]
    caption_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    # In order of appearance, which is the same in every process.
    ids: dict[str, int] = {}
    caption_ids_P = np.array([ids.setdefault(c, len(ids)) for c in captions], np.int64)
    return Pairs(pixels, caption_starts, *_tokenize(encoder, captions), caption_ids_P), skips


def _tokenize(encoder: Encoder, captions: Sequence[str]) -> tuple[NDArray[Any], Ints]:
    """Return all tokens, in two or four bytes each, and the offset of each caption's tokens."""
    token_arrays, lengths, truncated_count = [], [], 0
    for start in range(0, len(captions), TOKENIZED_AT_ONCE):
        texts = captions[start : start + TOKENIZED_AT_ONCE]
        truncated_count += len(encoder.tokenizer.cut(texts))
        tokens_PT = encoder.tokenizer(texts)
        lengths_P = encoder.text_lengths(tokens_PT)
        is_token_PT = torch.arange(tokens_PT.shape[1]) < lengths_P[:, None]
        tokens_X = tokens_PT[is_token_PT].numpy()
        fits_uint16 = int(tokens_X.max()) <= np.iinfo(np.uint16).max
        token_arrays.append(tokens_X.astype(np.uint16 if fits_uint16 else np.int32))
        lengths.append(lengths_P.numpy())
    report_truncated(encoder, truncated_count)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    return np.concatenate(token_arrays), starts


def encode_pairs(
    encoder: Encoder, pairs: Pairs, at_once: int = ENCODED_AT_ONCE
) -> tuple[Floats, Floats, Ints]:
    """Embed all images (N, D) and captions (P, D), and return the image of each caption (P,).

    Images that can no longer be decoded are left out together with their captions.
    """
    images, decoded_parts = [], []
    for rows in _batches(len(pairs), at_once):
        pixels, good, _ = pairs.pixels.fetch(rows)
        images.append(encoder.encode_images(pixels))
        decoded_parts.append(rows[good])
    texts = []
    with torch.inference_mode():
        for positions in _batches(pairs.caption_count, at_once):
            tokens = pairs.tokens(positions).to(encoder.device)
            texts.append(encoder.text_vectors(tokens).cpu().numpy())
    new_row = np.full(len(pairs), -1)
    decoded_rows = np.concatenate(decoded_parts)
    new_row[decoded_rows] = np.arange(len(decoded_rows))
    owners = new_row[pairs.owners_P]
    return np.concatenate(images), np.concatenate(texts)[owners >= 0], owners[owners >= 0]


def _batches(count: int, size: int) -> list[Ints]:
    return np.array_split(np.arange(count), -(-count // size))


def write_skipped(run: Path, skips: Sequence[Skip], *, found: int, used: int) -> None:
    """List samples not used for training in the run's skipped.jsonl, and report their number."""
    where = run / "skipped.jsonl"
    if skips:
        listed = set(where.read_text(encoding="utf-8").splitlines()) if where.exists() else set()
        rows = [{"id": s.id, "uri": s.uri, "reason": s.reason} for s in skips]
        # A resumed run finds the same samples again.
        new = [row for row in rows if json.dumps(row, ensure_ascii=False) not in listed]
        files.append_lines(where, new)
    report_skips(skips, found=found, used=used, where=where)


def can_mirror(records: Sequence[Record]) -> bool:
    """Return whether captions rarely say left or right, so that they also fit mirrored images.

    Only English and Chinese captions are checked; for others set `augment.flip`.
    """
    captions = [c.lower() for r in records for c in r.captions]
    mentions_side = sum(LEFT_RIGHT.search(c) is not None for c in captions)
    return mentions_side <= MIRROR_LIMIT * len(captions)
