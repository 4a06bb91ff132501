"""The coarse quantizer of an IVF: which list a vector is assigned to, in the metric of the queries.

Shapes: N rows, M queries, D dimensions, L lists, B rows of a block.

A query q looks for vectors x with a large inner product q·x, and ranks lists by their centroids c,
so its error is q·(x - c). The mean squared error over all queries is (x - c)' S (x - c), where S is
the covariance of the queries. Text queries vary in other directions than images do, so the nearest
centroid in this metric differs from the Euclidean one. The square root of S works better than S,
whose small eigenvalues are unreliable with a few thousand queries (docs/history.md).

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
    """Centroids of the lists, and the metric they were trained in."""

    centroids_LD: Floats
    metric_DD: Floats | None = None
    """None means Euclidean."""

    def assign(self, vectors_BD: Floats) -> Ints:
        """Return the list of each vector, shape (B,)."""
        centroids_LD = torch.from_numpy(self.centroids_LD)
        projected_LD = centroids_LD
        if self.metric_DD is not None:
            projected_LD = centroids_LD @ torch.from_numpy(self.metric_DD)
        # Of the squared distance |x|² - 2 x·c + |c|², the first term is equal for all centroids.
        half_norm_L = (projected_LD * centroids_LD).sum(dim=1) / 2
        parts = [
            torch.addmm(-half_norm_L, part_BD, projected_LD.T).argmax(dim=1)
            for part_BD in torch.from_numpy(vectors_BD).split(AT_ONCE)
        ]
        return torch.cat(parts).numpy()


def query_metric_and_root(queries_MD: Floats) -> tuple[Floats, Floats]:
    """Return the query metric, shape (D, D), and its square root, which maps vectors into it."""
    covariance_DD = np.cov(queries_MD, rowvar=False, bias=True)
    eigenvalues_D, eigenvectors_DD = np.linalg.eigh(covariance_DD)
    eigenvalues_D = eigenvalues_D.clip(0)
    # A single query has no covariance: all directions count equally.
    eigenvalues_D += RIDGE * eigenvalues_D.mean() if eigenvalues_D.any() else 1.0
    eigenvalues_D /= eigenvalues_D.mean()
    metric_DD = (eigenvectors_DD * eigenvalues_D**0.5) @ eigenvectors_DD.T
    root_DD = (eigenvectors_DD * eigenvalues_D**0.25) @ eigenvectors_DD.T
    return metric_DD.astype(np.float32), root_DD.astype(np.float32)
