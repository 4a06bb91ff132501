"""Reference implementation of the similarity core, in plain torch.

Shapes: N rows, M queries, D dimensions, K neighbours, B rows of a block.

The slow counterpart of every kernel: the fallback, the ground truth of the tests and the baseline
of the benchmarks. Logits are computed in at least float32, also under autocast: at a logit scale of
100 a bfloat16 logit would be off by up to a quarter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.errors import VectorError
from mmalign.kernels.pair_ids import PairIds, image_and_text_ids, share_an_id

BLOCK_ROWS = 16_384


def contrastive_loss(
    image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor, *, pair_ids: PairIds | None = None
) -> Tensor:
    """Symmetric InfoNCE; see `kernels.contrastive_loss`."""
    logits_NN = logit_scale * _similarity(image_ND, text_ND)
    if pair_ids is not None:
        logits_NN = logits_NN.masked_fill(_share_an_id(pair_ids), -torch.inf)
    targets_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return (F.cross_entropy(logits_NN, targets_N) + F.cross_entropy(logits_NN.T, targets_N)) / 2


def sigmoid_loss(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    pair_ids: PairIds | None = None,
) -> Tensor:
    """Pairwise sigmoid loss; see `kernels.sigmoid_loss`."""
    logits_NN = logit_scale * _similarity(image_ND, text_ND) + logit_bias
    sign_NN = 2 * torch.eye(len(logits_NN), device=logits_NN.device, dtype=logits_NN.dtype) - 1
    terms_NN = F.logsigmoid(sign_NN * logits_NN)
    if pair_ids is not None:
        terms_NN = terms_NN.masked_fill(_share_an_id(pair_ids), 0.0)
    return -terms_NN.sum() / len(logits_NN)


def topk(
    queries_MD: Tensor, shards: list[Tensor], k: int, *, allow: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact top-k, block by block; see `kernels.topk`.

    A score is the float32 nearest to the float64 inner product. So it depends only on the two
    vectors, not on batch, block or machine, and faster implementations can be checked against it.
    """
    queries_MD = queries_MD.double()
    device = queries_MD.device
    scores_MK = torch.full((len(queries_MD), k), -torch.inf, device=device)
    rows_MK = torch.full((len(queries_MD), k), -1, dtype=torch.int64, device=device)
    first = 0
    for shard in shards:
        for block_BD in shard.split(BLOCK_ROWS):
            scores_MB = (queries_MD @ block_BD.to(device).double().T).float()
            if torch.isnan(scores_MB).any():
                raise VectorError(
                    f"vectors_ND holds NaN in rows {first} to {first + len(block_BD) - 1}"
                )
            if allow is not None:
                excluded = ~allow[first : first + len(block_BD)].to(device)
                scores_MB = scores_MB.masked_fill(excluded, -torch.inf)
            rows_B = torch.arange(first, first + len(block_BD), device=device)
            # Earlier rows stand on the left, so a stable sort breaks ties by row number.
            scores_MB = torch.cat([scores_MK, scores_MB], dim=1)
            rows_MB = torch.cat([rows_MK, rows_B.expand(len(queries_MD), -1)], dim=1)
            scores_MK, order_MK = scores_MB.sort(dim=1, descending=True, stable=True)
            scores_MK = scores_MK[:, :k]
            rows_MK = rows_MB.gather(1, order_MK[:, :k])
            first += len(block_BD)
    return scores_MK, rows_MK.masked_fill(scores_MK == -torch.inf, -1)


def _similarity(image_ND: Tensor, text_ND: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(image_ND.dtype, text_ND.dtype), torch.float32)
    with torch.autocast(image_ND.device.type, enabled=False):
        return image_ND.to(dtype) @ text_ND.to(dtype).T


def _share_an_id(pair_ids: PairIds) -> Tensor:
    """Return an (N, N) mask of different images and texts that share an id."""
    return share_an_id(*image_and_text_ids(pair_ids)).fill_diagonal_(False)
