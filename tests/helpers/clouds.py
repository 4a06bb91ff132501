"""Vectors as embeddings are, and queries that lie elsewhere."""

import numpy as np

DIM = 32


def vectors(count: int, seed: int = 0) -> np.ndarray:
    """Clustered unit vectors, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, DIM))
    drawn = centres[rng.integers(40, size=count)] + 0.4 * rng.normal(size=(count, DIM))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn.astype(np.float16)


def texts(count: int, seed: int = 1) -> np.ndarray:
    """Queries that lie elsewhere: shifted, and spread in a few directions only."""
    rng = np.random.default_rng(seed)
    drawn = vectors(count, seed).astype(np.float32)
    drawn = (
        0.6 * drawn + 0.5 * np.eye(DIM)[0] + rng.normal(size=(count, DIM)) * 0.9 ** np.arange(DIM)
    )
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
