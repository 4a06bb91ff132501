"""The training objective: a weighted sum of contrastive losses and token prediction.

Shapes: B images of a batch, C captions drawn for each, L maximum captions per image, D dimensions,
T tokens of a caption.
"""

import torch
from torch import Tensor, nn

from mmalign import kernels
from mmalign.training.pairs import Batch
from mmalign.training.settings import TrainConfig
from mmalign.training.token_prediction import TokenHead


class Objective:
    """The loss of a batch.

    Images are contrasted with captions, captions of an image with each other (`caption_loss`), and
    images predict the tokens of their captions (`word_loss`).
    """

    def __init__(self, config: TrainConfig, towers: nn.Module, head: TokenHead) -> None:
        self.config, self.towers, self.head = config, towers, head

    def __call__(self, image_BD: Tensor, text_BCD: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the vectors of a batch, a scalar."""
        caption_ids_BC, image_caption_ids_BL = batch.caption_ids_BC, batch.image_caption_ids_BL
        drawn = range(text_BCD.shape[1])
        # No caption of an image is a negative for it, whether it was drawn or not.
        losses = [
            self.contrast(
                image_BD, text_BCD[:, c], (image_caption_ids_BL, caption_ids_BC[:, c, None])
            )
            for c in drawn
        ]
        loss = torch.stack(losses).mean()
        if self.config.caption_loss and len(drawn) > 1:
            losses = [
                self.contrast(
                    text_BCD[:, c - 1],
                    text_BCD[:, c],
                    _caption_pair_ids(
                        caption_ids_BC[:, c - 1], caption_ids_BC[:, c], image_caption_ids_BL
                    ),
                )
                for c in drawn
            ]
            loss = loss + self.config.caption_loss * torch.stack(losses).mean()
        if self.config.word_loss:
            loss = loss + self.config.word_loss * self.head(image_BD, batch.tokens_BCT)
        return loss

    def contrast(
        self, one_BD: Tensor, other_BD: Tensor, pair_ids: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return the contrastive loss of B positive pairs; `pair_ids` are those of `kernels`."""
        scale, bias = self.towers.logit_scale, self.towers.logit_bias
        if self.config.loss == "infonce":
            return kernels.contrastive_loss(one_BD, other_BD, scale, pair_ids=pair_ids)  # type: ignore[arg-type]
        return kernels.sigmoid_loss(one_BD, other_BD, scale, bias, pair_ids=pair_ids)  # type: ignore[arg-type]


def _caption_pair_ids(
    one_B: Tensor, other_B: Tensor, image_caption_ids_BL: Tensor
) -> tuple[Tensor, Tensor]:
    """Return pair ids; two captions share one if either is also a caption of the other's image.

    Even ids match the second caption with all captions of the first one's image; odd ids match the
    first caption with all captions of the second one's image.
    """
    even_BL, odd_BL = (
        torch.where(image_caption_ids_BL < 0, -1, 2 * image_caption_ids_BL + odd) for odd in (0, 1)
    )
    rows = torch.cat([even_BL, 2 * one_B[:, None] + 1], dim=1)
    return rows, torch.cat([2 * other_B[:, None], odd_BL], dim=1)
