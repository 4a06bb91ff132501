"""Which pairs are not negatives of each other: an image and a text that share an id.

Shapes: N pairs, B of them local, at most L ids per image and M ids per text.

One caption may fit several images, and an image may have several captions. So each side has a set
of ids, and a pair whose two sets intersect is masked. Negative ids mean no id.
"""

from typing import TypeAlias

import torch
from torch import Tensor

# One id per pair, (N,); or ids of the images (N, L) and of the texts (N, M).
PairIds: TypeAlias = Tensor | tuple[Tensor, Tensor]
# Padding for the ids of images and of texts: never equal.
NO_IMAGE_ID, NO_TEXT_ID = -1, -2


def image_and_text_ids(pair_ids: PairIds) -> tuple[Tensor, Tensor]:
    """Return ids of the images (N, L) and of the texts (N, M); negative means no id."""
    if isinstance(pair_ids, tuple):
        return pair_ids
    ids_N1 = pair_ids.unique(return_inverse=True)[1][:, None]
    return ids_N1, ids_N1


def share_an_id(image_ids_RL: Tensor, text_ids_CM: Tensor) -> Tensor:
    """Return whether each image and each text share an id, (R, C)."""
    same_RC = torch.zeros(
        (len(image_ids_RL), len(text_ids_CM)), dtype=torch.bool, device=image_ids_RL.device
    )
    for image_id_R in image_ids_RL.unbind(1):
        has_id_R1 = (image_id_R >= 0)[:, None]
        for text_id_C in text_ids_CM.unbind(1):
            same_RC |= (image_id_R[:, None] == text_id_C) & has_id_R1
    return same_RC


def masking_ids(
    image_ids_BL: Tensor, text_ids_NM: Tensor, first: int
) -> tuple[Tensor, Tensor] | None:
    """Keep only ids that mask a pair, as int32 in few columns; None if there are none.

    Args:
        image_ids_BL: Ids of the local images.
        text_ids_NM: Ids of all texts.
        first: Image i belongs to text `first + i`, and that positive pair is never masked.
    """
    ids, numbers = torch.cat([image_ids_BL.flatten(), text_ids_NM.flatten()]).unique(
        return_inverse=True
    )
    valid = ids >= 0
    image_numbers_BL = numbers[: image_ids_BL.numel()].view_as(image_ids_BL)
    text_numbers_NM = numbers[image_ids_BL.numel() :].view_as(text_ids_NM)
    positives = slice(first, first + len(image_numbers_BL))
    # Ids shared only within a positive pair mask nothing.
    in_positive_BL = (image_numbers_BL[:, :, None] == text_numbers_NM[positives, None, :]).sum(2)
    image_counts = torch.bincount(image_numbers_BL.flatten(), minlength=len(ids))
    text_counts = torch.bincount(text_numbers_NM.flatten(), minlength=len(ids))
    masks_BL = valid[image_numbers_BL] & (text_counts[image_numbers_BL] > in_positive_BL)
    in_positive_NM = torch.zeros_like(text_numbers_NM)
    in_positive_NM[positives] = (
        text_numbers_NM[positives, :, None] == image_numbers_BL[:, None, :]
    ).sum(2)
    masks_NM = valid[text_numbers_NM] & (image_counts[text_numbers_NM] > in_positive_NM)
    images, texts = (
        _pack(image_numbers_BL, masks_BL, NO_IMAGE_ID),
        _pack(text_numbers_NM, masks_NM, NO_TEXT_ID),
    )
    return (images, texts) if images.shape[1] and texts.shape[1] else None


def _pack(ids_NL: Tensor, masks_NL: Tensor, padding: int) -> Tensor:
    """Move wanted ids to the left, and drop the columns without any."""
    order_NL = masks_NL.int().argsort(dim=1, descending=True, stable=True)
    width = int(masks_NL.sum(1).max())
    ids_NL = ids_NL.masked_fill(~masks_NL, padding).gather(1, order_NL)
    return ids_NL[:, :width].int().contiguous()
