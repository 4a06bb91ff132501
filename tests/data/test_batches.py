"""Which rows come next, read ahead, and varied."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from data_samples import STILL

from mmalign.data import Augment, Sampler, read_ahead


def sampler(rows: int = 12, each: int = 3, batch: int = 4, drawn: int = 2) -> Sampler:
    return Sampler(
        np.arange(rows + 1, dtype=np.int64) * each, batch, seed=5, captions_per_image=drawn
    )


def test_every_row_once_an_epoch() -> None:
    draws = sampler().draws()
    orders = []
    for _ in range(3):
        rows = np.concatenate([next(draws).rows_B for _ in range(3)])
        assert sorted(rows) == list(range(12))
        orders.append(tuple(rows))
    assert len(set(orders)) == 3


def test_an_incomplete_batch_is_left_out_not_repeated() -> None:
    draws = sampler(rows=14).draws()
    rows = np.concatenate([next(draws).rows_B for _ in range(3)])
    assert len(set(rows.tolist())) == 12


def test_draws_resume_at_any_step() -> None:
    stream = sampler().draws()
    whole = [next(stream) for _ in range(10)]
    for first in range(10):
        resumed = sampler().draws(first)
        for wanted in whole[first:]:
            got = next(resumed)
            assert got.step == wanted.step
            assert np.array_equal(got.rows_B, wanted.rows_B)
            assert np.array_equal(got.captions_BC, wanted.captions_BC)
    other = next(Sampler(sampler().starts, 4, seed=6).draws())
    assert not np.array_equal(other.rows_B, whole[0].rows_B)


def test_captions_are_the_rows_own_without_repeats() -> None:
    counts = np.array([1, 2, 3, 7, 5, 4])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    seen: dict[int, set[int]] = {row: set() for row in range(6)}
    draws = Sampler(starts, 6, seed=0, captions_per_image=3).draws()
    for _ in range(60):
        draw = next(draws)
        assert draw.captions_BC.shape == (6, 3)
        for row, drawn in zip(draw.rows_B.tolist(), draw.captions_BC.tolist(), strict=True):
            assert all(starts[row] <= c < starts[row + 1] for c in drawn)
            assert len(set(drawn)) == min(3, counts[row])
            seen[row] |= set(drawn)
    assert [len(seen[row]) for row in range(6)] == counts.tolist()


def test_read_ahead_keeps_order_and_runs_ahead() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item * item

    stream = read_ahead(make, iter(range(20)), depth=3)
    assert next(stream) == 0
    time.sleep(0.3)
    assert 3 <= len(made) <= 6
    assert list(stream) == [i * i for i in range(1, 20)]


def test_read_ahead_passes_errors_on() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise ZeroDivisionError("at two")
        return item

    stream = read_ahead(make, iter(range(5)))
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match="at two"):
        next(stream)

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("source is gone")

    with pytest.raises(OSError, match="source is gone"):
        list(read_ahead(lambda i: i, broken()))


def test_read_ahead_closed_early_leaves_no_thread() -> None:
    stream = read_ahead(lambda i: i, iter(range(10**9)), depth=2)
    assert next(stream) == 0
    started = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 2
    assert not [t for t in threading.enumerate() if t.name == "read_ahead"]


def batch(count: int = 64, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def augmented(augment: Augment, images: torch.Tensor, side: int, seed: int = 0) -> torch.Tensor:
    drawn = augment.draw(len(images), torch.Generator().manual_seed(seed))
    return drawn.apply(images, side)


@pytest.mark.parametrize(
    "augment",
    [Augment(), Augment(flip=True, colour=0.9, erase=1.0), Augment(crop_min=0.05, aspect=3), STILL],
)
@pytest.mark.parametrize("side", [16, 24])
def test_augment_keeps_shape_and_range(augment: Augment, side: int) -> None:
    out = augmented(augment, batch(), side)
    assert out.shape == (64, 3, side, side)
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 255


def test_augment_with_everything_off_is_the_identity() -> None:
    assert torch.equal(augmented(STILL, batch(), 24), batch().float())
    flat = torch.full((2, 3, 24, 24), 77, dtype=torch.uint8)
    assert torch.allclose(augmented(STILL, flat, 16), torch.tensor(77.0), atol=1e-3)


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop_min=0.5, flip=False, colour=0),
        Augment(crop_min=1, flip=True, colour=0),
        Augment(crop_min=1, flip=False, colour=0.3),
        Augment(crop_min=1, flip=False, colour=0, erase=0.5),
    ],
)
def test_each_part_is_decided_by_the_generator_alone(augment: Augment) -> None:
    first = augmented(augment, batch(), 24, 3)
    torch.manual_seed(99)
    assert torch.equal(first, augmented(augment, batch(), 24, 3))
    assert not torch.equal(first, augmented(augment, batch(), 24, 4))
    assert not torch.equal(first, batch().float())


@pytest.mark.parametrize("augment", [Augment(flip=True), STILL])
@pytest.mark.parametrize("side", [16, 24])
def test_parts_of_a_batch_are_augmented_as_the_whole(augment: Augment, side: int) -> None:
    drawn, images = augment.draw(64, torch.Generator().manual_seed(5)), batch()
    parts = zip(drawn.split(28), images.split(28), strict=True)
    whole = torch.cat([changes.apply(part, side) for changes, part in parts])
    assert torch.allclose(whole, drawn.apply(images, side), atol=1e-3)


def test_changes_drawn_on_the_host_are_applied_on_the_device_of_the_images() -> None:
    # The meta device stands for any other: it refuses to compute with tensors of the host.
    drawn = Augment(flip=True).draw(64, torch.Generator())
    assert drawn.apply(batch().to("meta"), 16).device.type == "meta"


def test_flip_mirrors_about_half_and_nothing_else() -> None:
    images = batch()
    out = augmented(Augment(crop_min=1, flip=True, colour=0, erase=0), images, 24)
    same = torch.isclose(out, images.float(), atol=0.1).flatten(1).all(1)
    mirrored = torch.isclose(out, images.flip(3).float(), atol=0.1).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_erase_greys_a_box_in_its_share() -> None:
    out = augmented(Augment(crop_min=1, flip=False, colour=0, erase=0.5), batch(), 24)
    changed = (out != batch().float()).any(1)
    assert (out.permute(0, 2, 3, 1)[changed] == 127).all()
    touched = changed.flatten(1).any(1)
    assert 16 < touched.sum() < 48
    assert changed.flatten(1).float().mean(1).max() <= 0.3
