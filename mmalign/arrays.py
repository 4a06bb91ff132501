"""Names of array types; shapes stand in the suffixes of variables."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
"""Vectors as a store keeps them."""
Ints = NDArray[np.int64]
"""Row numbers and counts."""
Bools = NDArray[np.bool_]
Hashes = NDArray[np.uint64]
PixelArray = NDArray[np.uint8]
