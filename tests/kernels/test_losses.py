"""Every implementation of the losses against float64 definitions, gradients and bad input."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign import kernels
from mmalign.errors import VectorError
from mmalign.kernels.pair_ids import masking_ids, share_an_id

IMPLS = ["reference", "blocked", "triton"]
ROWS = [1, 2, 63, 65, 257]
# The interpreter of Triton runs on a CPU; with a GPU the kernels themselves are tested.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Grads = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that the awkward sizes need several, the last one cut."""
    monkeypatch.setattr("mmalign.kernels.blocked.CPU_TILE", (24, 40))
    monkeypatch.setattr("mmalign.kernels.blocked.GPU_TILE", (24, 40))


@pytest.fixture(autouse=True, scope="module")
def untuned() -> None:
    """On a GPU every type and width would be tuned anew, for an hour: take the first shape."""
    if DEVICE == "cuda":
        from mmalign.kernels import triton_loss

        for name in ("_log_sum_exps_kernel", "_infonce_kernel", "_sigmoid_kernel"):
            kernel = getattr(triton_loss, name)
            kernel.configs = kernel.configs[:1]


def pairs(rows: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors; half of the pairs match well."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(rows, dim, generator=generator, dtype=torch.float64) for _ in "it")
    text[::2] += 2 * image[::2]
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def some_groups(rows: int) -> Tensor:
    """Groups of one, two and many."""
    return torch.tensor([i // 2 if i % 5 else -7 for i in range(rows)])


def evaluate(
    kind: str, inputs: tuple[Tensor, Tensor], scale: float, bias: float, **options: Any
) -> tuple[Tensor, Grads]:
    """A loss, and its gradients by name."""
    leaves = {"image": inputs[0], "text": inputs[1]}
    high = torch.promote_types(inputs[0].dtype, torch.float32)
    leaves["scale"] = torch.tensor(scale, dtype=high, device=inputs[0].device)
    if kind == "sigmoid":
        leaves["bias"] = torch.tensor(bias, dtype=high, device=inputs[0].device)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    function = kernels.contrastive_loss if kind == "infonce" else kernels.sigmoid_loss
    loss = function(*leaves.values(), **options)  # type: ignore[operator]
    # A factor, as the gradient that comes from above is not always one.
    (3 * loss).backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    return loss.detach(), {name: grad for name, grad in grads.items() if grad is not None}


def plain_infonce(image: Tensor, text: Tensor, scale: float, pair_ids: list[int]) -> float:
    """The definition, one pair at a time."""
    rows, total = len(image), 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(rows):
            logits = [
                scale * float(a[i] @ b[j])
                for j in range(rows)
                if j == i or pair_ids[j] != pair_ids[i]
            ]
            top = max(logits)
            log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
            total += log_sum - scale * float(a[i] @ b[i])
    return total / (2 * rows)


def plain_sigmoid(
    image: Tensor, text: Tensor, scale: float, bias: float, pair_ids: list[int]
) -> float:
    """The definition, one pair at a time."""
    total = 0.0
    for i in range(len(image)):
        for j in range(len(image)):
            if i == j or pair_ids[i] != pair_ids[j]:
                logit = scale * float(image[i] @ text[j]) + bias
                total += math.log1p(math.exp(-logit if i == j else logit))
    return total / len(image)


@pytest.mark.parametrize("rows", ROWS[:4])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_reference_is_the_definition(rows: int, scale: float, grouped: bool) -> None:
    image, text = pairs(rows, 16)
    given = some_groups(rows) if grouped else None
    pair_ids = given.tolist() if given is not None else list(range(rows))
    loss, _ = evaluate("infonce", (image, text), scale, 0.0, pair_ids=given, impl="reference")
    assert float(loss) == pytest.approx(plain_infonce(image, text, scale, pair_ids), rel=1e-9)
    loss, _ = evaluate("sigmoid", (image, text), scale, -10.0, pair_ids=given, impl="reference")
    assert float(loss) == pytest.approx(plain_sigmoid(image, text, scale, -10, pair_ids), rel=1e-9)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("rows", [*ROWS, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_blocked_is_the_reference(kind: str, rows: int, scale: float, grouped: bool) -> None:
    """In float64, to rounding: the loss and every gradient."""
    pair_ids = some_groups(rows) if grouped else None
    inputs = pairs(rows, 16)
    truth, true_grads = evaluate(
        kind, inputs, scale, -scale / 3, pair_ids=pair_ids, impl="reference"
    )
    loss, grads = evaluate(kind, inputs, scale, -scale / 3, pair_ids=pair_ids, impl="blocked")
    assert torch.allclose(loss, truth, rtol=1e-11, atol=1e-12)
    assert grads.keys() == true_grads.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, true_grads[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("lowest", [-100.0, 100.0])
def test_maxima_far_apart(lowest: float) -> None:
    """A row whose best logit is 200 below another's: no sum over- or underflows in float32."""
    image = torch.eye(4)[[0, 0, 1, 2]]
    text = torch.eye(4)[[0, 0, 1, 3]]
    text[0] *= -1
    image[0] *= math.copysign(1, lowest)
    for impl in ("blocked", "reference"):
        loss, grads = evaluate("infonce", (image, text), 100.0, 0.0, impl=impl)
        truth, true_grads = evaluate("infonce", (image.double(), text.double()), 100.0, 0.0)
        assert float(loss) == pytest.approx(float(truth), rel=1e-6)
        for name, grad in grads.items():
            assert torch.allclose(grad.double(), true_grads[name], atol=1e-5), (impl, name)


def error(given: tuple[Tensor, Grads], truth: tuple[Tensor, Grads]) -> dict[str, float]:
    """Largest error of the loss and of each gradient, relative to the largest true value."""
    pairs_of = {name: (grad, truth[1][name]) for name, grad in given[1].items()}
    return {
        name: float((found.double() - true).abs().max() / true.abs().max().clamp(min=1e-3))
        for name, (found, true) in ({"loss": (given[0], truth[0])} | pairs_of).items()
    }


def plain(
    kind: str, inputs: tuple[Tensor, Tensor], scale: float, bias: float, pair_ids: Any
) -> Any:
    """What plain torch makes of inputs of a type, logits and all in that type."""
    dtype = inputs[0].dtype
    names = ["image", "text", "scale", "bias"][: 3 if kind == "infonce" else 4]
    values = [*inputs, torch.tensor(scale), torch.tensor(bias)][: len(names)]
    leaves = [v.detach().clone().to(inputs[0].device, dtype).requires_grad_() for v in values]
    logits = leaves[2] * (leaves[0] @ leaves[1].T)
    own = torch.arange(len(logits), device=logits.device)
    same = torch.zeros_like(logits, dtype=torch.bool)
    if pair_ids is not None:
        pair_ids = pair_ids.to(logits.device)
        same = (pair_ids[:, None] == pair_ids).fill_diagonal_(False)
    if kind == "infonce":
        logits = logits.masked_fill(same, -torch.inf)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    else:
        sign = 2 * torch.eye(len(logits), dtype=dtype, device=logits.device) - 1
        terms = F.logsigmoid(sign * (logits + leaves[3])).masked_fill(same, 0)
        loss = -terms.sum() / len(logits)
    (3 * loss).backward()
    return loss.detach(), {n: leaf.grad for n, leaf in zip(names, leaves, strict=True)}


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("impl", ["blocked", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (2, 32), (63, 48), (65, 16), (257, 32)])
@pytest.mark.parametrize("grouped", [False, True])
def test_error_is_that_of_honest_arithmetic(
    kind: str, impl: str, dtype: torch.dtype, rows: int, dim: int, grouped: bool
) -> None:
    """Against float64, no worse than plain torch with logits in the type of the inputs."""
    pair_ids = some_groups(rows) if grouped else None
    image, text = (t.to(DEVICE, dtype) for t in pairs(rows, dim))
    scale, bias = 20.0, -8.0
    truth = evaluate(
        kind,
        (image.double(), text.double()),
        scale,
        bias,
        pair_ids=pair_ids.to(DEVICE) if pair_ids is not None else None,
        impl="reference",
    )
    ours = error(
        evaluate(
            kind,
            (image, text),
            scale,
            bias,
            pair_ids=pair_ids.to(DEVICE) if pair_ids is not None else None,
            impl=impl,
        ),
        truth,
    )
    theirs = error(plain(kind, (image, text), scale, bias, pair_ids), truth)
    # Rounding a result to its type is never an error, and float32 sums may differ in their order. A
    # loss near zero is a difference of logits near the scale.
    floor = (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    floors = {"loss": max(floor, scale * torch.finfo(torch.float32).eps / 1e-3)}
    for name, mistake in ours.items():
        assert mistake <= max(theirs[name], floors.get(name, floor)), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize(("scale", "grouped"), [(1.0, True), (100.0, False)])
def test_triton_over_many_tiles(kind: str, scale: float, grouped: bool, monkeypatch: Any) -> None:
    """1,000 rows: several slabs, several parts of the log-sum-exps, edges that fit nothing."""
    triton_loss = pytest.importorskip("mmalign.kernels.triton_loss")
    monkeypatch.setattr(triton_loss, "SLAB_BYTES", 1000 * 4 * 300)
    monkeypatch.setattr(triton_loss, "PARTS", 3)
    pair_ids = some_groups(1000).to(DEVICE) if grouped else None
    inputs = tuple(t.float().to(DEVICE) for t in pairs(1000, 16))
    truth = evaluate(
        kind,
        (inputs[0].double(), inputs[1].double()),
        scale,
        -5.0,
        pair_ids=pair_ids,
        impl="reference",
    )
    found = error(evaluate(kind, inputs, scale, -5.0, pair_ids=pair_ids, impl="triton"), truth)
    assert max(found.values()) < 3e-5, found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("wanted", range(16))
def test_only_the_gradients_asked_for(impl: str, kind: str, wanted: int) -> None:
    image, text = (t.float().to(DEVICE) for t in pairs(7, 16))
    leaves = [image, text, torch.tensor(9.0, device=DEVICE), torch.tensor(-3.0, device=DEVICE)]
    leaves = leaves[: 3 if kind == "infonce" else 4]
    function = kernels.contrastive_loss if kind == "infonce" else kernels.sigmoid_loss
    full = [leaf.clone().requires_grad_() for leaf in leaves]
    function(*full, impl=impl).backward()  # type: ignore[operator]
    some = [leaf.clone().requires_grad_(bool(wanted >> i & 1)) for i, leaf in enumerate(leaves)]
    loss = function(*some, impl=impl)  # type: ignore[operator]
    assert loss.requires_grad == any(leaf.requires_grad for leaf in some)
    if loss.requires_grad:
        loss.backward()
    for leaf, whole in zip(some, full, strict=True):
        if leaf.requires_grad:
            assert torch.allclose(leaf.grad, whole.grad, rtol=1e-4, atol=1e-7)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("grouped", [False, True])
def test_gradcheck(impl: Any, grouped: bool) -> None:
    image, text = (t.requires_grad_() for t in pairs(7, 5))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    pair_ids = torch.tensor([0, 0, 1, 2, 3, 3, 3]) if grouped else None

    def infonce(*inputs: Tensor) -> Tensor:
        return kernels.contrastive_loss(*inputs, pair_ids=pair_ids, impl=impl)

    def sigmoid(*inputs: Tensor) -> Tensor:
        return kernels.sigmoid_loss(*inputs, pair_ids=pair_ids, impl=impl)

    assert torch.autograd.gradcheck(infonce, (image, text, scale))
    assert torch.autograd.gradcheck(sigmoid, (image, text, scale, bias))


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_captions_are_no_negatives(impl: Any) -> None:
    """Two rows with one caption: with groups, swapping their images costs nothing more."""
    image, text = (t.float().to(DEVICE) for t in pairs(4, 16))
    text = torch.cat([text[:1], text[:1], text[2:]])
    scale = torch.tensor(20.0, device=DEVICE)
    pair_ids = torch.tensor([0, 0, 1, 2], device=DEVICE)
    plain_loss = kernels.contrastive_loss(image, text, scale, impl=impl)
    masked = kernels.contrastive_loss(image, text, scale, pair_ids=pair_ids, impl=impl)
    swapped = kernels.contrastive_loss(
        image[[1, 0, 2, 3]], text, scale, pair_ids=pair_ids, impl=impl
    )
    assert masked < plain_loss
    assert torch.isclose(masked, swapped)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_float32_under_autocast(impl: Any, dtype: torch.dtype) -> None:
    image, text = (t.to(DEVICE, dtype) for t in pairs(65, 16))
    scale = torch.tensor(100.0, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = kernels.contrastive_loss(image, text, scale, impl=impl)
    truth = kernels.contrastive_loss(image.double(), text.double(), scale.double())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_scale_may_be_a_vector_of_one(impl: Any) -> None:
    """As a parameter of shape (1,) is."""
    image, text = (t.float().to(DEVICE) for t in pairs(5, 16))
    scale, bias = (torch.full((1,), v, device=DEVICE, requires_grad=True) for v in (9.0, -2.0))
    kernels.sigmoid_loss(image, text, scale, bias, impl=impl).backward()
    kernels.contrastive_loss(image, text, scale, impl=impl).backward()
    assert scale.grad is not None
    assert bias.grad is not None
    assert scale.grad.shape == bias.grad.shape == (1,)


def test_auto_says_what_it_picks() -> None:
    few, many = torch.ones(8, 16), torch.ones(2000, 16)
    assert kernels.choose_loss(few, few) == "reference"
    assert kernels.choose_loss(many, many) == "blocked"


ONES = torch.ones(2, 4)
ONE = torch.ones(())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ONES, torch.ones(3, 4), ONE), {}, "image_ND and text_ND must have the same shape"),
        ((torch.ones(0, 4), torch.ones(0, 4), ONE), {}, "N and D at least 1"),
        ((torch.ones(4), torch.ones(4), ONE), {}, "image_ND and text_ND"),
        ((ONES.long(), ONES, ONE), {}, "image_ND must have a floating-point type"),
        ((ONES, ONES.long(), ONE), {}, "text_ND must have a floating-point type"),
        ((ONES * math.nan, ONES, ONE), {}, "image_ND holds NaN or infinite values in row 0"),
        ((ONES, ONES * math.inf, ONE), {}, "text_ND holds NaN or infinite values in row 0"),
        (
            (ONES, ONES * torch.tensor([[1.0], [0]]), ONE),
            {},
            "text_ND holds a zero vector in row 1",
        ),
        ((ONES, ONES, 14.3), {}, "logit_scale must be a floating-point tensor with one element"),
        ((ONES, ONES, torch.ones(2)), {}, "logit_scale"),
        ((ONES, ONES, ONE), {"pair_ids": torch.ones(2)}, "pair_ids must be integers"),
        ((ONES, ONES, ONE), {"pair_ids": torch.ones(3).long()}, "pair_ids must be integers"),
        ((ONES, ONES, ONE), {"impl": "bloked"}, "did you mean 'blocked'"),
        ((ONES, ONES, ONE), {"impl": "triton"}, "impl='triton' does not work here: image_ND has 4"),
        ((ONES.double(), ONES.double(), ONE), {"impl": "triton"}, "image_ND is torch.float64"),
    ],
)
def test_bad_input_names_the_argument(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    moved = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(VectorError, match=message):
        kernels.contrastive_loss(*moved, **options)
    with pytest.raises(VectorError, match=message):
        kernels.sigmoid_loss(*moved, torch.zeros((), device=DEVICE), **options)


@pytest.mark.parametrize("name", ["_log_sum_exps_kernel", "_infonce_kernel", "_sigmoid_kernel"])
def test_the_call_that_tunes_a_kernel_is_right(name: str, monkeypatch: Any) -> None:
    """Every configuration runs on the buffers of the first call; the widest then wins."""
    triton_loss = pytest.importorskip("mmalign.kernels.triton_loss")
    import triton

    tiles = [triton.Config({"HIGH": 64, "WIDE": wide, "DEEP": 16}) for wide in (128, 256)]
    kernel, tried = getattr(triton_loss, name), []

    def bench(call: Any, **_: Any) -> list[float]:
        call()
        tried.append(call)
        return [-len(tried)] * 3

    monkeypatch.setattr(kernel, "configs", tiles)
    monkeypatch.setattr(kernel, "cache", {})
    monkeypatch.setitem(vars(kernel), "do_bench", bench)
    loss = "sigmoid" if name == "_sigmoid_kernel" else "infonce"
    inputs = tuple(m.float().to(DEVICE) for m in pairs(300, 16))
    pair_ids = some_groups(300).to(DEVICE)
    truth = evaluate(loss, inputs, 10.0, -5.0, pair_ids=pair_ids, impl="reference")
    found = evaluate(loss, inputs, 10.0, -5.0, pair_ids=pair_ids, impl="triton")
    assert len(tried) == 2
    assert kernel.best_config.kwargs["WIDE"] == 256
    assert torch.allclose(found[0], truth[0], rtol=1e-5)
    for gradient, grad in truth[1].items():
        assert torch.allclose(found[1][gradient], grad, rtol=1e-3, atol=1e-6), gradient


def some_sets(rows: int) -> tuple[Tensor, Tensor]:
    """Up to three captions that an image has, and the one of them that is drawn."""
    generator = torch.Generator().manual_seed(7)
    owned = torch.randint(0, rows, (rows, 3), generator=generator)
    owned[::2, 2] = -1
    return owned, owned[:, :1]


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_caption_is_no_negative_of_an_image_that_has_it(kind: str, impl: str) -> None:
    """Also where another of the image's captions was drawn; every implementation by definition."""
    image, text = (m.float().to(DEVICE) for m in pairs(90, 16))
    owned, drawn = some_sets(90)
    struck = (owned[:, None, :] == drawn[None]).any(2).fill_diagonal_(False).to(DEVICE)
    assert (struck != struck.T).any()
    logits = 10 * image @ text.T - (5 if kind == "sigmoid" else 0)
    if kind == "infonce":
        logits, own = logits.masked_fill(struck, -math.inf), torch.arange(90, device=DEVICE)
        truth = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    else:
        signs = 2 * torch.eye(90, device=DEVICE) - 1
        truth = -F.logsigmoid(signs * logits).masked_fill(struck, 0).sum() / 90
    pair_ids = (owned.to(DEVICE), drawn.to(DEVICE))
    loss, grads = evaluate(kind, (image, text), 10.0, -5.0, pair_ids=pair_ids, impl=impl)
    assert torch.allclose(loss, truth, rtol=1e-5)
    wanted = evaluate(kind, (image, text), 10.0, -5.0, pair_ids=pair_ids, impl="reference")[1]
    assert all(torch.allclose(grads[k], wanted[k], rtol=1e-3, atol=1e-6) for k in wanted)


def test_ids_that_strike_nothing_out_are_dropped() -> None:
    owned = torch.tensor([[1, 2, -1], [2, 3, 4], [5, -1, -1]])
    found = masking_ids(owned, torch.tensor([[1], [2], [5]]), 0)
    assert found is not None
    assert [ids.shape[1] for ids in found] == [1, 1]
    assert share_an_id(*found).nonzero().tolist() == [[0, 1]]
    assert masking_ids(owned, torch.tensor([[1], [3], [5]]), 0) is None
