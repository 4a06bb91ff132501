"""How the items of a query are added up."""

import numpy as np
import pytest
from topic_store import unit

from mmalign.errors import VectorError
from mmalign.search.combine import combined

DIM, TOPICS = 33, unit(np.random.default_rng(0).normal(size=(20, 32)))


def in_cone(topic: int, noise: float, share: float, side: float, seed: int = 0) -> np.ndarray:
    """Draw a vector of a topic; the last number is what all of its modality have in common."""
    rng = np.random.default_rng((topic, seed))
    about_D = share * unit(TOPICS[topic] + noise * rng.normal(size=32) / np.sqrt(32))
    return unit(np.append(about_D, side * np.sqrt(1 - share**2)))


ROWS_RD = np.array([in_cone(n % 20, 0.5, 0.9, -1, n) for n in range(200)])
# A text says little of its topic beside what all texts share, a picture much.
PICTURE, TEXT, OTHER = ROWS_RD[3], in_cone(5, 0, 0.2, 1), in_cone(9, 0, 0.2, 1)


def correlation(vector_D: np.ndarray, with_D: np.ndarray) -> float:
    return float(np.corrcoef(ROWS_RD @ vector_D, ROWS_RD @ with_D)[0, 1])


def never() -> np.ndarray:
    raise AssertionError("no random rows are needed")


def rows() -> np.ndarray:
    return ROWS_RD


def test_items_of_one_kind_are_added_up_as_they_are() -> None:
    both = np.array([TEXT, OTHER])
    wanted = unit(2 * TEXT - 0.5 * OTHER)
    assert np.allclose(combined(both, [2, -0.5], ["text", "text"], never), wanted, atol=1e-6)
    assert combined(both[:1], [1], ["text"], never) is not None
    assert np.array_equal(combined(both[:1], [1], ["text"], never), TEXT)


def test_a_picture_and_words_have_an_equal_say() -> None:
    parts = np.array([PICTURE, TEXT])
    mixed = combined(parts, [1, 1], ["image", "text"], rows)
    assert np.linalg.norm(mixed) == pytest.approx(1, abs=1e-6)
    by_picture, by_words = correlation(mixed, PICTURE), correlation(mixed, TEXT)
    assert by_picture == pytest.approx(by_words, abs=1e-5)
    # The plain sum goes by the picture alone.
    plain = PICTURE + TEXT
    assert correlation(plain, PICTURE) > 0.9
    assert correlation(plain, TEXT) < 0.5


def test_the_best_rows_have_what_the_words_add() -> None:
    """Each row shows two topics; all pairs of ten are there."""
    pairs = [(a, b) for a in range(10) for b in range(a)]
    shown = unit(np.array([TOPICS[a] + TOPICS[b] for a, b in pairs]))
    scenes_RD = np.hstack([0.9 * shown, np.full((len(pairs), 1), -0.436)]).astype(np.float32)
    asked = pairs.index((7, 3))
    parts = np.array([scenes_RD[asked], in_cone(3, 0, 0.04, 1), in_cone(5, 0, 0.04, 1)])
    kinds, weights = ["image", "text", "text"], (1, -1, 1)

    def best(query_D: np.ndarray) -> tuple[int, int]:
        scores = scenes_RD @ query_D
        scores[asked] = -1
        return pairs[int(scores.argmax())]

    assert best(combined(parts, weights, kinds, lambda: scenes_RD)) == (7, 5)
    # In the plain sum, words whose scores differ so little change nothing.
    assert best(weights @ parts) != (7, 5)


def test_weights_count_and_a_weight_of_one_kind_less_leans_to_the_other() -> None:
    parts, kinds = np.array([PICTURE, TEXT]), ["image", "text"]
    leaning = combined(parts, [1, 2], kinds, rows)
    assert correlation(leaning, TEXT) > 0.85 > correlation(leaning, PICTURE)


def test_a_store_without_rows_adds_up_what_there_is() -> None:
    parts = np.array([PICTURE, TEXT])
    wanted = unit(PICTURE + TEXT)
    sums = combined(parts, [1, 1], ["image", "text"], lambda: np.zeros((0, DIM), np.float32))
    assert np.allclose(sums, wanted, atol=1e-6)


@pytest.mark.parametrize("kinds", [["text", "text"], ["text", "vector"]])
def test_items_that_cancel_out_are_refused(kinds: list[str]) -> None:
    with pytest.raises(VectorError, match="cancel out"):
        combined(np.array([TEXT, TEXT]), [1, -1], kinds, rows)
