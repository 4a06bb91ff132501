"""A second objective for the image tower: predict which tokens occur in an image's captions.

Shapes: B images, C captions, D dimensions, T tokens of a caption, U tokens of the tokenizer, V
tokens that occur in the captions.

A contrastive loss teaches an image tower only what distinguishes an image from the rest of its
batch. Token prediction compares it with the whole vocabulary at once, which helps with few images
and does nothing with billions of them. The head is discarded after training.

Source: Huang et al. 2024, "Classification Done Right for Vision-Language Pre-Training".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_SCALE = 10.0


class TokenHead(nn.Module):
    """A linear classifier from image vectors to the tokens of the captions."""

    idf_V: Tensor
    class_U: Tensor
    """The class of each token of the tokenizer; 0 for tokens that no caption has."""

    def __init__(self, dim: int, count_U: Tensor, captions: int) -> None:
        """Build the head; tokens are weighted by inverse document frequency.

        Args:
            dim: Dimensions of an image vector.
            count_U: Number of captions in which each token occurs.
            captions: Number of captions.
        """
        super().__init__()
        present = count_U.nonzero()[:, 0]
        idf_V = torch.log(captions / (1 + count_U[present])).clamp(min=0)
        idf_V[present == 0] = 0
        class_U = torch.zeros(len(count_U), dtype=torch.int64)
        class_U[present] = torch.arange(len(present))
        self.score = nn.Linear(dim, len(present))
        self.register_buffer("idf_V", idf_V, persistent=False)
        self.register_buffer("class_U", class_U, persistent=False)

    def forward(self, image_BD: Tensor, tokens_BCT: Tensor) -> Tensor:
        """Return the cross entropy between the scores and the tokens of the captions, a scalar."""
        scores_BV: Tensor = self.score(LOGIT_SCALE * image_BD)
        target_BV = torch.zeros_like(scores_BV).scatter_(
            1, self.class_U[tokens_BCT.flatten(1)], 1.0
        )
        target_BV = F.normalize(target_BV * self.idf_V, p=1, dim=1)
        per_image_B = (target_BV * scores_BV.log_softmax(dim=1)).sum(dim=1)
        return -per_image_B.mean()
