"""Every implementation of exact top-k against a full sort in float64, digit for digit."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign import kernels
from mmalign.errors import VectorError
from mmalign.kernels import exact, processor, screens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "single", "half", "bfloat16", "int8", "triton"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a few hundred rows need several."""
    monkeypatch.setattr("mmalign.kernels.reference.BLOCK_ROWS", 48)
    monkeypatch.setattr("mmalign.kernels.screens.CPU_BYTES", 1)
    monkeypatch.setattr("mmalign.kernels.screens.MIN_ROWS", 80)


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def full_sort(
    queries: Tensor, vectors: Tensor, k: int, allow: Tensor | None = None
) -> tuple[list[list[float]], list[list[int]]]:
    """The definition: scores in float64, rounded to float32, sorted by score and then by row."""
    scores = (queries.double() @ vectors.double().T).float()
    if allow is not None:
        scores[:, ~allow] = -math.inf
    rows = [
        sorted(range(len(vectors)), key=lambda j, s=line: (-s[j], j))[:k]
        for line in scores.tolist()
    ]
    best = [[float(scores[m, j]) for j in line] for m, line in enumerate(rows)]
    rows = [
        [j if math.isfinite(s) else -1 for j, s in zip(r, b, strict=True)]
        for r, b in zip(rows, best, strict=True)
    ]
    return best, rows


def stored(vectors: Tensor, impl: str) -> Tensor:
    """Vectors in a type that the implementation reads."""
    return vectors.half() if impl == "half" else vectors


def search(queries: Tensor, vectors: Any, k: int, impl: Any, **options: Any) -> tuple[Any, Any]:
    """Call an implementation as it wants to be: codes need a corpus, Triton the GPU if any."""
    if impl == "int8":
        vectors = kernels.prepare(vectors, with_codes=True)
    elif impl == "triton":
        queries = queries.to(DEVICE)
    scores, rows = kernels.topk(queries, vectors, k, impl=impl, **options)
    assert scores.dtype == torch.float32
    assert rows.dtype == torch.int64
    return scores.tolist(), rows.tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "dim"), [(1, 16), (2, 16), (63, 32), (65, 16), (257, 48), (1000, 16)]
)
def test_topk_is_a_full_sort(impl: str, dtype: torch.dtype, rows: int, dim: int) -> None:
    vectors, queries = stored(unit(rows, dim).to(dtype), impl), unit(5, dim, seed=1).float()
    k = min(7, rows)
    assert search(queries, vectors, k, impl) == full_sort(queries, vectors, k)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("queries", [1, 2, 17, 300])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_numbers_of_queries_and_neighbours(impl: str, queries: int, k: int) -> None:
    vectors = unit(400, 16).half()
    asked = unit(queries, 16, seed=2).float()
    assert search(asked, vectors, k, impl) == full_sort(asked, vectors, k)


@pytest.mark.parametrize("impl", ["reference", "single", "half", "bfloat16", "int8"])
@pytest.mark.parametrize("dim", [1, 5, 20, 48, 64, 100, 192])
@pytest.mark.parametrize("queries", [1, 9])
def test_widths_that_fit_no_register(impl: str, dim: int, queries: int) -> None:
    vectors, asked = unit(300, dim).half(), unit(queries, dim, seed=14).float()
    assert search(asked, vectors, 6, impl) == full_sort(asked, vectors, 6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [[400], [1, 399], [130, 0, 7, 263], [100] * 4])
def test_shards_are_numbered_on(impl: str, sizes: list[int]) -> None:
    vectors, queries = unit(400, 16).half(), unit(4, 16, seed=3).float()
    found = search(queries, list(vectors.split(sizes)), 5, impl)
    assert found == full_sort(queries, vectors, 5)


@pytest.mark.parametrize("impl", ["reference", "single", "bfloat16", "int8"])
def test_shards_of_several_types_lose_no_digit(impl: str) -> None:
    halves, briefs = unit(200, 16).half(), unit(200, 16, seed=15).bfloat16()
    briefs[7] = torch.linspace(1e-9, 1e-7, 16).bfloat16()  # too small for float16
    queries = unit(4, 16, seed=3).float()
    found = search(queries, [halves, briefs], 400, impl)
    assert found == full_sort(queries, torch.cat([halves.float(), briefs.float()]), 400)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_are_broken_by_row(impl: str) -> None:
    vectors = stored(torch.ones(300, 16) / 4, impl)
    vectors[[70, 211]] *= -1
    queries = torch.ones(2, 16) / 4
    _, rows = search(queries, vectors, 5, impl)
    assert rows == [[0, 1, 2, 3, 4]] * 2
    _, rows = search(-queries, vectors, 5, impl)
    assert rows == [[70, 211, 0, 1, 2]] * 2


@pytest.mark.parametrize("impl", IMPLS)
def test_near_ties_are_told_apart(impl: str) -> None:
    """Scores that differ in the last digits of float32, among vectors of one direction."""
    generator = torch.Generator().manual_seed(4)
    centre = unit(1, 64)
    vectors = stored(F.normalize(centre + 1e-4 * unit(500, 64, seed=5), dim=1).float(), impl)
    queries = F.normalize(centre + 0.1 * torch.randn(3, 64, generator=generator), dim=1).float()
    assert search(queries, vectors, 20, impl) == full_sort(queries, vectors, 20)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", [0.0, 0.005, 0.1, 0.5, 1.0])
def test_only_allowed_rows_are_found(impl: str, share: float) -> None:
    vectors, queries = unit(400, 16).half(), unit(6, 16, seed=6).float()
    allow = torch.rand(400, generator=torch.Generator().manual_seed(7)) < share
    found = search(queries, list(vectors.split(150)), 9, impl, allow=allow)
    assert found == full_sort(queries, vectors, 9, allow)


@pytest.mark.parametrize("impl", ["single", "half", "bfloat16", "int8"])
@pytest.mark.parametrize("crowded", [0, 1, 1_000])
def test_thinning_out_loses_nothing(
    impl: str, crowded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for hardly any waiting pair, and queries in several lots."""
    monkeypatch.setattr(exact, "PENDING", 8)
    monkeypatch.setattr(exact, "WAITING", min(crowded, 1))
    monkeypatch.setattr(exact, "CROWDED", crowded)
    monkeypatch.setattr(exact, "QUERIES_AT_ONCE", 3)
    vectors, queries = unit(1000, 16).half(), unit(8, 16, seed=8).float()
    vectors[500:520] = vectors[3]
    assert search(queries, vectors, 12, impl) == full_sort(queries, vectors, 12)


def test_lengths_other_than_one() -> None:
    """The bounds follow the norms, whatever these are."""
    vectors = unit(600, 16).float() * torch.logspace(-3, 3, 600)[:, None]
    queries = 50 * unit(4, 16, seed=9).float()
    for impl in IMPLS:
        given = stored(vectors, impl)
        assert search(queries, given, 10, impl) == full_sort(queries, given, 10), impl


@pytest.mark.parametrize("screen", ["single", "half", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("prepared", [True, False])
def test_no_error_exceeds_its_bound(
    screen: str, dtype: torch.dtype, count: int, prepared: bool
) -> None:
    """Hostile vectors: one large number among small ones, equal signs, clipped codes."""
    generator = torch.Generator().manual_seed(10)
    vectors = torch.randn(500, 64, generator=generator)
    vectors[::7, 3] += 40
    vectors[::11] = vectors[::11].abs()
    vectors[::13] = vectors[::13].sign()
    vectors = stored(F.normalize(vectors, dim=1).to(dtype), screen)
    queries = F.normalize(torch.randn(8, 64, generator=generator), dim=1)
    queries[0], queries[1] = vectors[7].float(), torch.ones(64) / 8
    queries = queries[:count]
    if prepared or screen == "int8":
        corpus = kernels.prepare(vectors, with_codes=screen == "int8")
    else:
        corpus = screens.as_corpus(vectors)
    make = exact._SCREENS[screen]
    seen = 0
    for block in make(queries, corpus, None):
        truth = vectors[block.rows_B].double() @ queries.double().T
        unit, offset, error = (
            x.repeat_interleave(16, dim=0)[: len(truth)].double()
            for x in (block.unit_XM, block.offset_XM, block.error_XM)
        )
        wrong = (unit * block.scores_BM.double() + offset - truth).abs()
        assert (wrong <= error).all()
        assert (error < {"single": 1e-4, "half": 2e-3, "bfloat16": 0.02, "int8": 0.2}[screen]).all()
        seen += len(block.rows_B)
    assert seen == 500


def test_memory_maps_work(tmp_path: Path) -> None:
    vectors, queries = unit(300, 16).half(), unit(3, 16, seed=11).float()
    np.save(tmp_path / "v.npy", vectors.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "v.npy", mmap_mode="c"))
    for impl in IMPLS:
        assert search(queries, mapped, 3, impl) == full_sort(queries, vectors, 3)


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_torch_may_round_products(setting: str) -> None:
    """Where the user lets torch make float32 products in less, the bounds widen."""
    vectors, queries = unit(300, 64).float(), unit(3, 64, seed=12).float()
    torch.set_float32_matmul_precision(setting)
    try:
        assert search(queries, vectors, 5, "single") == full_sort(queries, vectors, 5)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_auto_says_what_it_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, query = unit(3000, 16).half(), unit(1, 16).float()
    many, allow = unit(20, 16).float(), torch.arange(3000) < 90
    coded, plain = (kernels.prepare(vectors, with_codes=codes) for codes in (True, False))
    monkeypatch.setattr(exact, "has_amx", lambda: False)
    assert kernels.choose_topk(query, plain) == "half"
    assert kernels.choose_topk(query, coded) == "int8"
    assert kernels.choose_topk(many, plain) == "single"
    brief = "bfloat16" if processor.has_bfloat16() else "single"
    assert kernels.choose_topk(unit(200, 16).float(), plain) == brief
    assert kernels.choose_topk(many, coded) == "int8"
    assert kernels.choose_topk(many, coded, allow) == "single"
    assert kernels.choose_topk(query, kernels.prepare(vectors.float())) == "single"
    few = kernels.prepare(vectors[:300], with_codes=True)
    assert kernels.choose_topk(query, few) == "reference"
    assert kernels.choose_topk(unit(200, 16).float(), few) == "int8"
    monkeypatch.setattr(exact, "has_amx", lambda: True)
    assert kernels.choose_topk(query, plain) == "single"
    assert kernels.choose_topk(unit(64, 16).float(), plain) == brief


def test_answers_carry_no_gradients() -> None:
    vectors, queries = torch.nn.Parameter(unit(300, 16).float()), unit(3, 16, seed=11).float()
    for impl in IMPLS:
        if impl != "half":
            found = search(queries, vectors, 3, impl)
            assert found == full_sort(queries, vectors.detach(), 3), impl


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_gpus() -> None:
    vectors, queries = unit(4000, 64).half(), unit(20, 64, seed=13).float()
    shards = [part.to(f"cuda:{i % 2}") for i, part in enumerate(vectors.split(1111))]
    scores, rows = kernels.topk(queries.cuda(), shards, 10)
    assert (scores.tolist(), rows.tolist()) == full_sort(queries, vectors, 10)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("resident", [False, True])
def test_resident_and_streamed(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.kernels.triton_topk.STREAMED_BYTES", 64 * 2 * 256)
    vectors, queries = unit(4000, 64).half(), unit(20, 64, seed=13).float()
    given = vectors.cuda() if resident else vectors
    scores, rows = kernels.topk(queries.cuda(), given, 10, impl="triton")
    assert (scores.tolist(), rows.tolist()) == full_sort(queries, vectors, 10)


V = torch.ones(3, 4)
Q = torch.ones(1, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q, V, 4), {}, "k=4 must lie between 1 and the number of rows, 3"),
        ((Q, V, 0), {}, "k=0"),
        ((Q, torch.ones(3, 5), 1), {}, "queries_MD has 4 dims, vectors_ND has 5"),
        ((Q, [V, torch.ones(3, 5)], 1), {}, "vectors_ND has shards with different numbers of dims"),
        ((Q, [], 1), {}, "vectors_ND must be one or more"),
        ((Q, torch.ones(0, 4), 1), {}, "vectors_ND has no rows"),
        ((Q, V.long(), 1), {}, "vectors_ND must be one or more floating-point matrices"),
        ((torch.ones(4), V, 1), {}, "queries_MD must be a matrix"),
        ((torch.ones(0, 4), V, 1), {}, "queries_MD must be a matrix"),
        ((Q.long(), V, 1), {}, "queries_MD must have a floating-point type"),
        ((Q * math.nan, V, 1), {}, "queries_MD holds NaN or infinite values in row 0"),
        ((Q * 0, V, 1), {}, "queries_MD holds a zero vector in row 0"),
        ((Q, V * math.nan, 1), {}, "vectors_ND holds NaN"),
        ((Q, V, 1), {"impl": "int"}, "did you mean 'int8'"),
        ((Q, V, 1), {"impl": "int8"}, "vectors_ND has no codes: pass kernels.prepare"),
        ((Q, V, 1), {"impl": "half"}, "vectors_ND is torch.float32, not float16"),
        ((Q, V, 1), {"impl": "triton"}, "impl='triton' does not work here"),
        ((Q, V, 1), {"allow": torch.ones(3)}, "allow must be boolean"),
        ((Q, V, 1), {"allow": torch.ones(2).bool()}, "allow must be boolean of shape"),
    ],
)
def test_bad_input_names_the_argument(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(VectorError, match=message):
        kernels.topk(*arguments, **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "NaN or infinite values"), (math.inf, "NaN or inf"), (0.0, "a zero vector")],
)
def test_prepare_names_bad_rows(value: float, message: str) -> None:
    vectors = torch.ones(200, 16)
    vectors[131] = value
    with pytest.raises(VectorError, match=f"vectors_ND holds {message}.* in row 131"):
        kernels.prepare(list(vectors.split(100)))


def test_the_call_that_tunes_the_screen_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration runs on the buffers of the first call; the widest then wins."""
    triton_topk = pytest.importorskip("mmalign.kernels.triton_topk")
    import triton

    tiles = [triton.Config({"HIGH": 16, "WIDE": wide, "DEEP": 16}) for wide in (128, 256)]
    kernel, tried = triton_topk._best_kernel, []

    def bench(call: Any, **_: Any) -> list[float]:
        call()
        tried.append(call)
        return [-len(tried)] * 3

    monkeypatch.setattr(kernel, "configs", tiles)
    monkeypatch.setattr(kernel, "cache", {})
    monkeypatch.setitem(vars(kernel), "do_bench", bench)
    vectors, queries = unit(400, 16).half(), unit(4, 16, seed=3).float()
    assert search(queries, vectors, 5, "triton") == full_sort(queries, vectors, 5)
    assert len(tried) == 2
