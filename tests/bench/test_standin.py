"""The stand-in for CLIP vectors: its statistics at a small size, and what it promises."""

from pathlib import Path

import numpy as np
import pytest

from bench import standin
from bench.standin import StandIn

ROWS = 20_000


@pytest.fixture(scope="module")
def world() -> StandIn:
    return StandIn(ROWS)


@pytest.fixture(scope="module")
def images(world: StandIn) -> standin.Halves:
    return world.images()


def figures(images: standin.Halves, queries: standin.Floats) -> tuple[float, float]:
    distances, _, means = standin.neighbours(images, queries, 100)
    dimension = np.median(standin.local_dimension(distances))
    contrast = np.median(standin.relative_contrast(distances, means))
    return float(dimension), float(contrast)


@pytest.mark.slow
def test_statistics(world: StandIn, images: standin.Halves) -> None:
    # The published figures hold for a million rows, where the hundredth neighbour is nearer;
    # these were measured for 20,000 when the recipe was fitted.
    image, text = figures(images, world.held_out(500)), figures(images, world.texts(500)[0])
    print(f"local dimension, relative contrast: image {image}, text {text}")
    assert image == (pytest.approx(10.6, rel=0.1), pytest.approx(1.57, rel=0.03))
    assert text == (pytest.approx(52, rel=0.1), pytest.approx(1.15, rel=0.01))


@pytest.mark.slow
def test_texts_are_harder_for_an_inverted_file(world: StandIn, images: standin.Halves) -> None:
    index = standin.filled(images, "IVF128,Flat", 5_000)
    index.nprobe = 4
    shares = []
    for queries in (world.held_out(200), world.texts(200)[0]):
        distances, rows, _ = standin.neighbours(images, queries, 100)
        scores, found = index.search(queries, 100)
        near, exact = standin.recalls(found, scores, distances, rows)
        assert near >= exact
        shares.append(exact)
    assert shares[1] < shares[0] - 0.05


@pytest.mark.slow
def test_equal_arguments_give_equal_vectors(images: standin.Halves, tmp_path: Path) -> None:
    mapped = np.lib.format.open_memmap(
        tmp_path / "images.npy", mode="w+", dtype=np.float16, shape=(9_000, 512)
    )
    assert StandIn(9_000).images(mapped) is mapped
    # Fewer rows are the first of more.
    assert np.array_equal(mapped, images[:9_000])
    assert not np.array_equal(StandIn(9_000, seed=1).images(), images[:9_000])
    np.testing.assert_allclose(np.linalg.norm(mapped.astype(np.float32), axis=1), 1, atol=1e-3)


@pytest.mark.slow
def test_captions_tell_of_their_rows(world: StandIn, images: standin.Halves) -> None:
    numbers = [15_000, 3, 19_999, 8_191, 8_192]
    captions = world.captions(numbers)
    np.testing.assert_allclose(np.linalg.norm(captions, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(captions[[3, 1]], world.captions([8_191, 3]), atol=1e-6)
    assert np.abs(world.captions(numbers, seed=1) - captions).max() > 0.01

    texts, told = world.texts(500)
    scores = texts @ images.astype(np.float32).T
    own = scores[np.arange(500), told]
    assert np.mean(own) > 0.3 > np.mean(scores) + 0.1
    # Most texts find their image first among so few, and not all do.
    rank = (scores > own[:, None]).sum(axis=1)
    assert 0.4 < np.mean(rank == 0) < 0.8


def test_held_out_images_are_not_among_the_rows(world: StandIn, images: standin.Halves) -> None:
    queries = world.held_out(100)
    assert standin.neighbours(images, queries, 1)[0].min() > 1e-3
    assert not np.array_equal(world.held_out(100, seed=1), queries)
    assert np.array_equal(world.held_out(50), queries[:50])


def test_local_dimension_of_a_ball() -> None:
    # In d dimensions as many rows lie within r as r^d says.
    radii = np.sort(np.random.default_rng(0).random((2_000, 200)), axis=1) ** (1 / 12)
    found = standin.local_dimension(radii.astype(np.float32))
    assert np.median(found) == pytest.approx(12, rel=0.03)


def test_relative_contrast_by_hand() -> None:
    distances = np.array([[0.1, 0.2], [0.3, 0.5]], dtype=np.float32)
    means = np.array([0.4, 0.6], dtype=np.float32)
    assert standin.relative_contrast(distances, means) == pytest.approx([2.0, 1.2])
