"""The coarse quantizer of an IVF: which list a vector is assigned to, in the metric of the queries.

N rows, M queries, D dimensions, L lists, B rows of a block.

A query q looks for vectors x with a large inner product q·x, and ranks lists by their centroids c,
so its error is q·(x - c). The mean squared error over all queries is (x - c)' S (x - c), where S is
the covariance of the queries. Text queries vary in other directions than images do, so the nearest
centroid in this metric differs from the Euclidean one. The square root of S works better than S,
whose small eigenvalues are unreliable with a few thousand queries (docs/log.md).

Source: the loss that takes the queries into account is that of Guo et al. 2020, "Accelerating
Large-Scale Inference with Anisotropic Vector Quantization"; learning it from queries, Tepper et al.
2023, "LeanVec" (its out-of-distribution form).
"""

from dataclasses import dataclass

import numpy as np
import torch

from mmalign.arrays import Floats, Ints

RIDGE = 0.1
# Vectors that are compared with all centroids at once.
AT_ONCE = 2_048


@dataclass(frozen=True)
class CoarseQuantizer:
    """Centroids of the lists, and the metric they were trained in; final."""

    centres_LD: Floats
    metric_DD: Floats | None = None
    """None means Euclidean."""

    def of(self, vectors_BD: Floats) -> Ints:
        """Return the list of each vector, shape (B,)."""
        centres_LD = torch.from_numpy(self.centres_LD)
        seen_LD = centres_LD
        if self.metric_DD is not None:
            seen_LD = centres_LD @ torch.from_numpy(self.metric_DD)
        # Of the squared distance |x|² - 2 x·c + |c|², the first term is equal for all centroids.
        half_L = (seen_LD * centres_LD).sum(dim=1) / 2
        parts = [
            torch.addmm(-half_L, part_BD, seen_LD.T).argmax(dim=1)
            for part_BD in torch.from_numpy(vectors_BD).split(AT_ONCE)
        ]
        return torch.cat(parts).numpy()


def query_metric(queries_MD: Floats) -> tuple[Floats, Floats]:
    """Return the query metric, shape (D, D), and its square root, which maps vectors into it."""
    spread_DD = np.cov(queries_MD, rowvar=False, bias=True)
    values_D, axes_DD = np.linalg.eigh(spread_DD)
    values_D = values_D.clip(0)
    # A single query has no covariance: all directions count equally.
    values_D += RIDGE * values_D.mean() if values_D.any() else 1.0
    values_D /= values_D.mean()
    metric_DD = (axes_DD * values_D**0.5) @ axes_DD.T
    root_DD = (axes_DD * values_D**0.25) @ axes_DD.T
    return metric_DD.astype(np.float32), root_DD.astype(np.float32)
