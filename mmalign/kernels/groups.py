"""Which pairs are not negatives of each other: an image and a text that share an id.

N pairs, B of them local, at most L ids per image and M ids per text.

One caption may fit several images, and an image may have several captions. So each side has a set
of ids, and a pair whose two sets intersect is masked. Negative ids mean no id.
"""

from typing import TypeAlias

import torch
from torch import Tensor

# One id per pair, (N,); or ids of the images (N, L) and of the texts (N, M).
Groups: TypeAlias = Tensor | tuple[Tensor, Tensor]
# Padding for the ids of images and of texts: never equal.
NO_IMAGE, NO_TEXT = -1, -2


def id_sets(groups: Groups) -> tuple[Tensor, Tensor]:
    """Return ids of the images (N, L) and of the texts (N, M); negative means no id."""
    if isinstance(groups, tuple):
        return groups
    ids_N1 = groups.unique(return_inverse=True)[1][:, None]
    return ids_N1, ids_N1


def sharing(image_ids_RL: Tensor, text_ids_CM: Tensor) -> Tensor:
    """Return whether each image and each text share an id, (R, C)."""
    same_RC = torch.zeros(
        (len(image_ids_RL), len(text_ids_CM)), dtype=torch.bool, device=image_ids_RL.device
    )
    for image_id_R in image_ids_RL.unbind(1):
        there_R1 = (image_id_R >= 0)[:, None]
        for text_id_C in text_ids_CM.unbind(1):
            same_RC |= (image_id_R[:, None] == text_id_C) & there_R1
    return same_RC


def useful_ids(
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
    known = ids >= 0
    images_BL = numbers[: image_ids_BL.numel()].view_as(image_ids_BL)
    texts_NM = numbers[image_ids_BL.numel() :].view_as(text_ids_NM)
    own = slice(first, first + len(images_BL))
    # Ids shared only within a positive pair mask nothing.
    met_BL = (images_BL[:, :, None] == texts_NM[own, None, :]).sum(2)
    image_counts = torch.bincount(images_BL.flatten(), minlength=len(ids))
    text_counts = torch.bincount(texts_NM.flatten(), minlength=len(ids))
    wanted_BL = known[images_BL] & (text_counts[images_BL] > met_BL)
    met_NM = torch.zeros_like(texts_NM)
    met_NM[own] = (texts_NM[own, :, None] == images_BL[:, None, :]).sum(2)
    wanted_NM = known[texts_NM] & (image_counts[texts_NM] > met_NM)
    images, texts = _packed(images_BL, wanted_BL, NO_IMAGE), _packed(texts_NM, wanted_NM, NO_TEXT)
    return (images, texts) if images.shape[1] and texts.shape[1] else None


def _packed(ids_NL: Tensor, wanted_NL: Tensor, nothing: int) -> Tensor:
    """Move wanted ids to the left, and drop the columns without any."""
    order_NL = wanted_NL.int().argsort(dim=1, descending=True, stable=True)
    width = int(wanted_NL.sum(1).max())
    ids_NL = ids_NL.masked_fill(~wanted_NL, nothing).gather(1, order_NL)
    return ids_NL[:, :width].int().contiguous()
