"""Exact top-10: ours beside faiss and plain torch, in one run, each answer held against float64.

    python -m bench topk [--rows 300000] [--dim 512] [--queries 1 16 256] [--rounds 5]
        [--clouds gap common] [--vectors STORE | IMAGES.npy [QUERIES.npy]] [--threads 2]

Vectors are float16, as a store holds them; faiss and plain torch on a CPU have their own float32
copies. On a GPU the defaults are 10 million rows and 1, 16 and 1,024 queries. All searches of a
number of queries run in turn, over and over, and a row gives the 20th, 50th and 80th percentile.
`times_faiss` and `times_torch` are their median time beside that of the row: above 1, the row is
faster. `screen` is what ours takes. `wrong_ids` counts answers other than those of the reference
on some of the queries.

"gap" is two clouds, of vectors and queries, with a gap between them and a spectrum that falls off,
as those of images and texts have; in "common" all vectors are nearly alike: a large common mean,
and 32 directions beside it. `--vectors` adds real ones: image vectors of a store, with its captions
as queries, or arrays; without queries, some of the vectors are asked, and left out.

Ours on a CPU are `Exact`, which `Searcher` asks where there is no index, without codes, and after
so many queries that it has made codes where they pay; and `topk` with codes.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from mmalign import kernels
from mmalign.index import Exact
from mmalign.index.exact import CODED_AFTER
from mmalign.store import open_store

K = 10
CHECKED = 32
FAISS, TORCH = "faiss IndexFlatIP", "torch matmul + topk"
Search = Callable[[], Any]


def cloud(rows: int, dim: int, seed: int, device: str) -> Tensor:
    """Unit vectors around an own centre, with variances that fall off; float16."""
    generator = torch.Generator(device).manual_seed(seed)
    spread = torch.arange(1, dim + 1, device=device).pow(-0.35)
    centre = torch.randn(dim, generator=generator, device=device)
    centre = 0.7 * spread.norm() * F.normalize(centre, dim=0)
    return _drawn(rows, dim, generator, lambda noise: centre + spread * noise)


def common_cloud(rows: int, dim: int, seed: int, device: str) -> Tensor:
    """Unit vectors around one centre, whatever the seed, mostly in 32 directions; float16.

    Any two have a cosine of about 0.9.
    """
    shared = torch.Generator(device).manual_seed(0)
    basis = F.normalize(torch.randn(32, dim, generator=shared, device=device), dim=1)
    centre = F.normalize(torch.randn(dim, generator=shared, device=device), dim=0)
    generator = torch.Generator(device).manual_seed(1 + seed)

    def around(noise: Tensor) -> Any:
        return centre + 0.3 * (noise[:, :32] @ basis) / 32**0.5 + 0.03 * noise / dim**0.5

    return _drawn(rows, dim, generator, around)


def _drawn(
    rows: int, dim: int, generator: torch.Generator, of_noise: Callable[[Tensor], Any]
) -> Tensor:
    made = torch.empty(rows, dim, dtype=torch.float16, device=generator.device)
    for part in made.split(1 << 17):
        noise = torch.randn(part.shape, generator=generator, device=generator.device)
        part.copy_(F.normalize(of_noise(noise), dim=1))
    return made


CLOUDS = {"gap": cloud, "common": common_cloud}


def real(paths: list[Path], queries: int) -> tuple[str, Tensor, Tensor]:
    """Vectors and queries of a store, or of one or two arrays."""
    if paths[0].is_dir():
        store = open_store(paths[0])
        images, texts = (np.concatenate(store.vectors(name)) for name in ("image", "text"))
    else:
        images, texts = np.load(paths[0]), np.load(paths[-1])
    if not len(texts) or (len(paths) == 1 and not paths[0].is_dir()):
        images, texts = images[queries:], images[:queries]
    if len(texts) > queries:
        texts = texts[np.random.default_rng(0).permutation(len(texts))[:queries]]
    vectors = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float16))
    return paths[0].stem, vectors, torch.from_numpy(texts.astype(np.float32))


def matmul_topk(vectors: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """All scores, then the k best."""
    values, rows = (queries.to(vectors.dtype) @ vectors.T).topk(K, dim=1)
    return values, rows


@dataclass(frozen=True)
class Way:
    """One way to search, and the screen that it takes, if it is ours."""

    search: Search
    screen: str = ""


def ways_on_gpu(vectors: Tensor, queries: Tensor) -> dict[str, Way]:
    """Ours and torch."""
    corpus = kernels.prepare(vectors)
    taken = kernels.choose_topk(queries, corpus)
    return {
        "mmalign topk": Way(lambda: kernels.topk(queries, corpus, K), taken),
        TORCH: Way(lambda: [matmul_topk(vectors, part)[1] for part in queries.split(64)]),
    }


class OnCpu:
    """Ours, faiss and torch, with what each keeps of the vectors."""

    def __init__(self, vectors: Tensor) -> None:
        """Prepare all but what depends on the number of queries."""
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        self.vectors, self.whole = vectors, vectors.float()
        self.flat = faiss.IndexFlatIP(vectors.shape[1])
        self.flat.add(self.whole.numpy())
        self.uncoded = Exact([vectors.numpy()], max_code_bytes=0)
        self.with_codes = kernels.prepare(vectors, with_codes=True)

    def ways(self, queries: Tensor) -> dict[str, Way]:
        """Every way to search; `Exact` has been asked so often that it has codes where they pay."""
        asked = queries.numpy()
        usual = Exact([self.vectors.numpy()])
        while usual.queries_seen <= CODED_AFTER:
            usual.search(asked, K)
        if usual.coding_thread:
            usual.coding_thread.join()
        self.uncoded.search(asked, K)
        assert self.uncoded.corpus
        assert usual.corpus
        without, having, coded = (
            kernels.choose_topk(queries, corpus)
            for corpus in (self.uncoded.corpus, usual.corpus, self.with_codes)
        )
        return {
            "mmalign Exact, without codes": Way(lambda: self.uncoded.search(asked, K), without),
            "mmalign Exact": Way(lambda: usual.search(asked, K), having),
            "mmalign topk, with codes": Way(
                lambda: kernels.topk(queries, self.with_codes, K), coded
            ),
            FAISS: Way(lambda: self.flat.search(asked, K)),
            TORCH: Way(lambda: matmul_topk(self.whole, queries)),
        }


def ids(answer: Any) -> Tensor:
    """The rows of any kind of answer."""
    if isinstance(answer, list):
        return torch.cat(answer)
    return torch.as_tensor(answer[1])


def main(words: list[str]) -> None:
    """Measure every search with every number of queries over all vectors asked for."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench topk")
    parser.add_argument("--rows", type=int, default=10_000_000 if on_gpu else 300_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument(
        "--queries", type=int, nargs="+", default=[1, 16, 1024] if on_gpu else [1, 16, 256]
    )
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--clouds", nargs="*", choices=CLOUDS, default=list(CLOUDS))
    parser.add_argument("--vectors", type=Path, nargs="+", metavar="PATH")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(words)
    if not on_gpu:
        torch.set_num_threads(options.threads)
    limits = (
        measure.product_limit(torch.float16 if on_gpu else torch.float32, device),
        measure.read_limit(device),
    )
    most = max(*options.queries, CHECKED)
    for name in options.clouds:
        vectors = CLOUDS[name](options.rows, options.dim, 0, device)
        queries = CLOUDS[name](most, options.dim, 1, device).float()
        compare(name, vectors, queries, options.queries, options.rounds, limits)
        del vectors
    if options.vectors:
        name, vectors, queries = real(options.vectors, most)
        compare(
            name, vectors.to(device), queries.to(device), options.queries, options.rounds, limits
        )


def compare(
    name: str, vectors: Tensor, queries: Tensor, counts: list[int], rounds: int,
    limits: tuple[float, float],
) -> None:  # fmt: skip
    """Time all ways in turn, and write a row of each; limits are FLOP/s and bytes/s."""
    truth = kernels.topk(queries[:CHECKED], vectors, K, impl="reference")[1]
    on_cpu = None if vectors.is_cuda else OnCpu(vectors)
    for count in counts:
        asked = queries[:count].contiguous()
        ways = on_cpu.ways(asked) if on_cpu else ways_on_gpu(vectors, asked)
        timings = measure.in_turn({way: ways[way].search for way in ways}, rounds)
        flops = 2 * count * vectors.numel()
        for way, timing in timings.items():
            seconds = timing["p50_ms"] / 1000
            row: dict[str, Any] = {"vectors": name, "search": way, "screen": ways[way].screen}
            row |= {"rows": len(vectors), "dim": vectors.shape[1], "queries": count, **timing}
            for column, other in (("times_faiss", FAISS), ("times_torch", TORCH)):
                known = other in timings
                row[column] = round(timings[other]["p50_ms"] / timing["p50_ms"], 2) if known else ""
            row["tflops"] = round(flops / seconds / 1e12, 3)
            row["share_of_flops"] = round(flops / seconds / limits[0], 3)
            row["gb_per_s"] = round(vectors.nbytes / seconds / 1e9, 1)
            row["share_of_bytes"] = round(vectors.nbytes / seconds / limits[1], 3)
            row["peak_mib"] = round(measure.peak_bytes(ways[way].search) / 2**20, 1)
            checked = min(count, CHECKED)
            wrong = ids(ways[way].search()).to(truth.device)[:checked] != truth[:checked]
            row["wrong_ids"] = f"{int(wrong.sum())} of {wrong.numel()}"
            measure.append("topk", row)
