"""The similarity core against independent float64 arithmetic, awkward shapes and bad input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign import kernels
from mmalign.errors import VectorError

SHAPES = [(1, 16), (2, 16), (63, 24), (65, 16), (257, 8)]


def pairs(rows: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(rows, dim, generator=generator, dtype=torch.float64) for _ in "it")
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def plain_infonce(image: Tensor, text: Tensor, scale: float, groups: list[int]) -> float:
    """The definition, one pair at a time."""
    rows, total = len(image), 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(rows):
            logits = [
                scale * float(a[i] @ b[j]) for j in range(rows) if j == i or groups[j] != groups[i]
            ]
            top = max(logits)
            log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
            total += log_sum - scale * float(a[i] @ b[i])
    return total / (2 * rows)


@pytest.mark.parametrize(("rows", "dim"), SHAPES[:4])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_infonce_is_its_definition(rows: int, dim: int, scale: float, grouped: bool) -> None:
    image, text = pairs(rows, dim)
    groups = [i // 2 for i in range(rows)] if grouped else list(range(rows))
    given = torch.tensor(groups) if grouped else None
    loss = kernels.contrastive_loss(
        image, text, torch.tensor(scale, dtype=torch.float64), groups=given
    )
    assert float(loss) == pytest.approx(plain_infonce(image, text, scale, groups), rel=1e-9)


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients(grouped: bool) -> None:
    image, text = (t.requires_grad_() for t in pairs(7, 5))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 0, 1, 2, 3, 3, 3]) if grouped else None

    def infonce(*inputs: Tensor) -> Tensor:
        return kernels.contrastive_loss(*inputs, groups=groups)

    def sigmoid(*inputs: Tensor) -> Tensor:
        return kernels.sigmoid_loss(*inputs, groups=groups)

    assert torch.autograd.gradcheck(infonce, (image, text, scale))
    assert torch.autograd.gradcheck(sigmoid, (image, text, scale, bias))


def test_equal_captions_are_no_negatives() -> None:
    """Two rows with one caption: with groups, swapping their images costs nothing more."""
    image, text = pairs(4, 8)
    text = torch.cat([text[:1], text[:1], text[2:]])
    scale = torch.tensor(20.0)
    groups = torch.tensor([0, 0, 1, 2])
    plain = kernels.contrastive_loss(image, text, scale)
    masked = kernels.contrastive_loss(image, text, scale, groups=groups)
    swapped = kernels.contrastive_loss(image[[1, 0, 2, 3]], text, scale, groups=groups)
    assert masked < plain
    assert torch.isclose(masked, swapped)


def test_sigmoid_is_its_definition() -> None:
    image, text = pairs(6, 4)
    loss = kernels.sigmoid_loss(image, text, torch.tensor(10.0), torch.tensor(-10.0))
    total = 0.0
    for i in range(6):
        for j in range(6):
            logit = 10 * float(image[i] @ text[j]) - 10
            total += math.log1p(math.exp(-logit if i == j else logit))
    assert float(loss) == pytest.approx(total / 6, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs_make_float32_logits(dtype: torch.dtype) -> None:
    image, text = (t.to(dtype) for t in pairs(65, 16))
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernels.contrastive_loss(image, text, scale)
    truth = kernels.contrastive_loss(image.double(), text.double(), scale.double())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)


def plain_topk(queries: Tensor, vectors: Tensor, k: int) -> list[list[int]]:
    scores = (queries.float() @ vectors.float().T).numpy()
    return [sorted(range(len(vectors)), key=lambda j, r=row: (-r[j], j))[:k] for row in scores]


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_topk_is_a_full_sort(rows: int, dim: int) -> None:
    vectors, queries = pairs(rows, dim)
    queries = queries[:5].float()
    k = min(7, rows)
    shards = list(vectors.half().split(20))
    scores, found = kernels.topk(queries, shards, k)
    assert found.tolist() == plain_topk(queries, vectors.half(), k)
    truth = (queries.double() @ vectors.half().double().T).gather(1, found)
    assert torch.allclose(scores.double(), truth, atol=1e-6)


def test_topk_breaks_ties_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.kernels.reference.BLOCK_ROWS", 16)
    vectors = torch.ones(100, 4) / 2
    vectors[70] *= 1.5
    scores, rows = kernels.topk(torch.ones(2, 4) / 2, vectors, 5)
    assert rows.tolist() == [[70, 0, 1, 2, 3]] * 2
    assert scores[0].tolist() == [1.5, 1.0, 1.0, 1.0, 1.0]


def test_topk_finds_only_allowed_rows() -> None:
    vectors, queries = pairs(50, 8)
    allow = torch.zeros(50, dtype=torch.bool)
    allow[[3, 30]] = True
    scores, rows = kernels.topk(queries[:4].float(), vectors.float(), 3, allow=allow)
    assert all(set(r[:2]) == {3, 30} for r in rows.tolist())
    assert rows[:, 2].tolist() == [-1] * 4
    assert torch.isinf(scores[:, 2]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.topk(torch.ones(1, 4), torch.ones(3, 4), 4), "k=4"),
        (lambda: kernels.topk(torch.ones(1, 4), torch.ones(3, 4), 0), "k=0"),
        (lambda: kernels.topk(torch.ones(1, 4), torch.ones(3, 5), 1), "queries_MD has 4 dims"),
        (lambda: kernels.topk(torch.full((1, 2), math.nan), torch.ones(3, 2), 1), "queries_MD"),
        (lambda: kernels.topk(torch.ones(1, 2), torch.full((3, 2), math.nan), 1), "vectors_ND"),
        (lambda: kernels.topk(torch.ones(1, 2), torch.ones(3, 2), 1, impl="x"), "impl"),
        (lambda: kernels.topk(torch.ones(1, 2), torch.ones(3, 2), 1, allow=torch.ones(3)), "allow"),
        (
            lambda: kernels.contrastive_loss(torch.ones(2, 4), torch.ones(3, 4), torch.ones(())),
            "image_ND and text_ND",
        ),
        (
            lambda: kernels.contrastive_loss(torch.ones(0, 4), torch.ones(0, 4), torch.ones(())),
            "N and D at least 1",
        ),
        (
            lambda: kernels.contrastive_loss(
                torch.ones(2, 4).long(), torch.ones(2, 4), torch.ones(())
            ),
            "image_ND must be of a floating type",
        ),
        (
            lambda: kernels.contrastive_loss(
                torch.ones(2, 4), torch.ones(2, 4), torch.ones(()), groups=torch.ones(2)
            ),
            "groups",
        ),
    ],
)
def test_bad_input_names_the_argument(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(VectorError, match=message):
        call()


def test_numpy_memory_maps_work(tmp_path) -> None:  # type: ignore[no-untyped-def]
    vectors, queries = pairs(30, 8)
    np.save(tmp_path / "v.npy", vectors.half().numpy())
    mapped = np.load(tmp_path / "v.npy", mmap_mode="c")
    _, rows = kernels.topk(queries.float(), torch.from_numpy(mapped), 3)
    assert rows.tolist() == plain_topk(queries.float(), vectors.half(), 3)
