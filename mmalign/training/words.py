"""A second task for the image tower while it trains: say which words its captions have.

B images, C captions, D dimensions, T tokens, U tokens of the tokenizer, V tokens that the captions
have.

A contrastive loss teaches an image only what tells it apart from the rest of its batch. Predicting
words compares it with the whole vocabulary at once, which is worth much where images are few and
nothing where they are billions. The head is thrown away after training.

Source: Huang et al. 2024, "Classification Done Right for Vision-Language Pre-Training".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARPNESS = 10.0


class WordHead(nn.Module):
    """Scores every token that the captions have, from an image vector; final."""

    idf_V: Tensor
    number_U: Tensor
    """Number of each token of the tokenizer among those of the captions."""

    def __init__(self, dim: int, count_U: Tensor, captions: int) -> None:
        """Weigh tokens by how rare they are: in so many of all captions each of them occurs."""
        super().__init__()
        there = count_U.nonzero()[:, 0]
        idf_V = torch.log(captions / (1 + count_U[there])).clamp(min=0)
        idf_V[there == 0] = 0
        number_U = torch.zeros(len(count_U), dtype=torch.int64)
        number_U[there] = torch.arange(len(there))
        self.score = nn.Linear(dim, len(there))
        self.register_buffer("idf_V", idf_V, persistent=False)
        self.register_buffer("number_U", number_U, persistent=False)

    def forward(self, image_BD: Tensor, tokens_BCT: Tensor) -> Tensor:
        """Return the cross entropy between the scores and the words of the drawn captions."""
        scores_BV: Tensor = self.score(SHARPNESS * image_BD)
        wanted_BV = torch.zeros_like(scores_BV).scatter_(
            1, self.number_U[tokens_BCT.flatten(1)], 1.0
        )
        wanted_BV = F.normalize(wanted_BV * self.idf_V, p=1, dim=1)
        per_image_B = (wanted_BV * scores_BV.log_softmax(dim=1)).sum(dim=1)
        return -per_image_B.mean()
