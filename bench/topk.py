"""Exact top-10: ours beside faiss and plain torch, in one run, each answer held against float64.

    python -m bench topk [--rows 1000000] [--dim 512] [--queries 1 16 256] [--rounds 5]

Vectors are float16, as a store holds them; faiss and plain torch on a CPU have their own float32
copies. On a GPU the defaults are 10 million rows and 1, 16 and 1,024 queries. Vectors and queries
come from two clouds with a gap between them and a spectrum that falls off, as those of images and
texts do. `wrong_ids` counts answers other than those of the reference on some of the queries.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from mmalign import kernels

K = 10
CHECKED = 32
Search = Callable[[Tensor], Any]


def cloud(rows: int, dim: int, seed: int, device: str) -> Tensor:
    """Unit vectors around an own centre, with variances that fall off; float16."""
    generator = torch.Generator(device).manual_seed(seed)
    spread = torch.arange(1, dim + 1, device=device).pow(-0.35)
    centre = torch.randn(dim, generator=generator, device=device)
    centre = 0.7 * spread.norm() * F.normalize(centre, dim=0)
    made = torch.empty(rows, dim, dtype=torch.float16, device=device)
    for part in made.split(1 << 17):
        noise = torch.randn(part.shape, generator=generator, device=device)
        part.copy_(F.normalize(centre + spread * noise, dim=1))
    return made


def matmul_topk(vectors: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """All scores, then the k best."""
    values, rows = (queries.to(vectors.dtype) @ vectors.T).topk(K, dim=1)
    return values, rows


def searches(vectors: Tensor) -> dict[str, Search]:
    """Every way of searching, by name."""
    if vectors.is_cuda:
        corpus = kernels.prepare(vectors)
        return {
            "mmalign triton": lambda q: kernels.topk(q, corpus, K),
            "torch matmul + topk": lambda q: [matmul_topk(vectors, x)[1] for x in q.split(64)],
        }
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    whole = vectors.float()
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(whole.numpy())
    coded, uncoded = (kernels.prepare(vectors, with_codes=codes) for codes in (True, False))
    return {
        "mmalign, prepared with codes": lambda q: kernels.topk(q, coded, K),
        "mmalign, prepared": lambda q: kernels.topk(q, uncoded, K),
        "faiss IndexFlatIP": lambda q: flat.search(q.numpy(), K),
        "torch matmul + topk": lambda q: matmul_topk(whole, q),
    }


def ids(answer: Any) -> Tensor:
    """The rows of any kind of answer."""
    if isinstance(answer, list):
        return torch.cat(answer)
    return torch.as_tensor(answer[1])


def main(words: list[str]) -> None:
    """Measure every search with every number of queries."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench topk")
    parser.add_argument("--rows", type=int, default=10_000_000 if on_gpu else 1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument(
        "--queries", type=int, nargs="+", default=[1, 16, 1024] if on_gpu else [1, 16, 256]
    )
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 5)
    options = parser.parse_args(words)
    if not on_gpu:
        torch.set_num_threads(2)
    flop_limit = measure.product_limit(torch.float16 if on_gpu else torch.float32, device)
    byte_limit = measure.read_limit(device)
    vectors = cloud(options.rows, options.dim, 0, device)
    queries = cloud(max(*options.queries, CHECKED), options.dim, 1, device).float()
    truth = kernels.topk(queries[:CHECKED], vectors, K, impl="reference")[1]
    ways = searches(vectors)
    for count in options.queries:
        asked = queries[:count].contiguous()
        tasks = {name: partial(search, asked) for name, search in ways.items()}
        timings = measure.in_turn(tasks, options.rounds)
        flops = 2 * count * vectors.numel()
        for name, timing in timings.items():
            seconds = timing["p50_ms"] / 1000
            row = {"search": name, "rows": options.rows, "dim": options.dim, "queries": count}
            row |= {**timing, "tflops": round(flops / seconds / 1e12, 3)}
            row["share_of_flops"] = round(flops / seconds / flop_limit, 3)
            row["gb_per_s"] = round(vectors.nbytes / seconds / 1e9, 1)
            row["share_of_bytes"] = round(vectors.nbytes / seconds / byte_limit, 3)
            row["peak_mib"] = round(measure.peak_bytes(tasks[name]) / 2**20, 1)
            checked = min(count, CHECKED)
            wrong = ids(tasks[name]()).to(device)[:checked] != truth[:checked]
            row["wrong_ids"] = f"{int(wrong.sum())} of {wrong.numel()}"
            measure.append("topk", row)
