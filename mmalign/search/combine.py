"""The vector of a query of several items: `dress - stripes`, `@cat.jpg + snow`.

Items of one modality are added up by their weights. Texts and images lie in different cones: images
differ far more from each other than texts score them differently, so in a plain sum of both a
picture would outweigh all words. Items of several modalities are therefore scaled first, so that
the scores that each gives to random rows have the standard deviation 1. What else was tried:
docs/decisions/0018-exclusion-and-mixed-queries.md.

Shapes: E items, R random rows, D dimensions.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mmalign.arrays import Floats
from mmalign.errors import VectorError
from mmalign.items import unit_vector


def combined(
    vectors_ED: Floats, weights: Sequence[float], kinds: Sequence[str], random: Callable[[], Floats]
) -> Floats:
    """Return the unit vector (D,) of a query.

    Args:
        vectors_ED: Unit vectors of its items.
        weights: Of the items.
        kinds: The modality of each; what is neither a text nor an image is one of its own.
        random: Returns vectors of random rows, (R, D); only called for items of several kinds.

    Raises:
        VectorError: The items cancel out.
    """
    if list(weights) == [1]:
        only_D: Floats = vectors_ED[0]
        return only_D
    wide_ED = vectors_ED.astype(np.float64)
    if len(set(kinds)) > 1 and len(random_RD := random()):
        centred_RD = random_RD - random_RD.mean(0)
        wide_ED = np.array([scaled(vector_D, centred_RD) for vector_D in wide_ED])
    sum_D = np.asarray(weights, np.float32) @ wide_ED.astype(np.float32)
    if not sum_D.any():
        raise VectorError("the items of the query cancel out: give them other weights")
    return unit_vector(sum_D, vectors_ED.shape[1])


def scaled(vector_D: Floats, centred_RD: Floats) -> Floats:
    """Scale a vector so that its scores have the standard deviation 1.

    Args:
        vector_D: The vector.
        centred_RD: Vectors of random rows, less their mean.
    """
    return vector_D / max(float(np.std(centred_RD @ vector_D)), 1e-6)
