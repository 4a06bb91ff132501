"""More like these, less like those: a query turned by examples.

Rocchio's rule: query + `MORE` * mean of more - `LESS` * mean of less. Rocchio 1971, "Relevance
feedback in information retrieval". The weights are higher than those published for words (.75 and
.15), as examples among the nearest rows of a query score like the query itself: decision 17.

Texts and images lie in different cones, so that neither lengths nor angles between them tell how
alike they are: images differ far more from each other than texts score them differently, and the
mean of some would outweigh every text. Therefore vectors are compared by the scores that they give
to random rows: the length of a vector is the standard deviation of its scores, the cosine of two is
the correlation of their scores. A part that all rows share has no length.

The gate: the query turns by `GATE` at most, in that measure, so that examples never lead away from
what was asked for.

Shapes: R random rows, E examples, D dimensions.
"""

import math

import numpy as np

from mmalign.arrays import Floats
from mmalign.search.combine import scaled

MORE, LESS = 3.0, 3.0
# Degrees.
GATE = 30.0


def turned(query_D: Floats, more_ED: Floats, less_ED: Floats, random_RD: Floats) -> Floats:
    """Return a query turned by examples, (D,), not of unit length.

    Args:
        query_D: Unit vector of the query.
        more_ED: Unit vectors of what is looked for; perhaps none.
        less_ED: Unit vectors of what is not; perhaps none.
        random_RD: Vectors of random rows; without any, nothing tells how alike vectors are, and
            the query is returned as it is.
    """
    if not len(random_RD):
        return query_D
    centred_RD = random_RD - random_RD.mean(0)
    start_D = scaled(query_D.astype(np.float64), centred_RD)
    turn_D = np.zeros_like(start_D)
    for weight, examples_ED in ((MORE, more_ED), (-LESS, less_ED)):
        if len(examples_ED):
            turn_D += weight * scaled(examples_ED.mean(0, dtype=np.float64), centred_RD)
    # In the plane of both, across the query: what is left of the turn without it.
    along = float(np.mean((centred_RD @ start_D) * (centred_RD @ turn_D)))
    across_D = turn_D - along * start_D
    across = float(np.std(centred_RD @ across_D))
    angle = min(math.atan2(across, 1 + along), math.radians(GATE))
    if across < 1e-6:
        return start_D.astype(np.float32)
    turned_D = math.cos(angle) * start_D + math.sin(angle) * across_D / across
    return turned_D.astype(np.float32)
