"""One of several processes: the gradient after averaging is that of one process with all pairs."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmalign import kernels
from mmalign.errors import VectorError

PAIRS_EACH = 6


def joined_batch(ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (ranks * PAIRS_EACH, 5)
    image, text = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "it")
    pair_ids = torch.arange(len(image)) // 2 * 2
    pair_ids[::5] = 1000  # one group that is spread over all ranks
    return image, text, pair_ids


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.image, self.text = (nn.Linear(5, 8, dtype=torch.float64) for _ in "it")
        self.scale, self.bias = (
            nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (17.0, -6.0)
        )

    def forward(
        self, kind: str, image: Tensor, text: Tensor, pair_ids: Tensor | None, ranks: object
    ) -> Tensor:
        vectors = [
            nn.functional.normalize(tower(x), dim=1)
            for tower, x in ((self.image, image), (self.text, text))
        ]
        options = {"pair_ids": pair_ids, "ranks": ranks, "impl": "blocked"}
        if kind == "infonce":
            return kernels.contrastive_loss(*vectors, self.scale, **options)  # type: ignore[arg-type]
        return kernels.sigmoid_loss(*vectors, self.scale, self.bias, **options)  # type: ignore[arg-type]


def main(rank: int, ranks: int, meeting: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    image, text, pair_ids = joined_batch(ranks)
    own = slice(rank * PAIRS_EACH, (rank + 1) * PAIRS_EACH)
    for kind in ("infonce", "sigmoid"):
        for grouped in (False, True):
            one, many = Towers(), Towers()
            truth = one(kind, image, text, pair_ids if grouped else None, None)
            truth.backward()
            mine = pair_ids[own] if grouped else None
            loss = many(kind, image[own], text[own], mine, dist.group.WORLD)
            loss.backward()
            assert torch.allclose(loss, truth, rtol=1e-12), (kind, grouped, loss, truth)
            for name, weight in many.named_parameters():
                expected = one.get_parameter(name).grad
                if expected is None:
                    assert weight.grad is None, name
                    continue
                assert weight.grad is not None, name
                if name in ("scale", "bias"):  # every rank holds the whole of these
                    assert torch.allclose(weight.grad, expected, rtol=1e-10), (kind, grouped, name)
                dist.all_reduce(weight.grad)
                weight.grad /= ranks
                close = torch.allclose(weight.grad, expected, rtol=1e-9, atol=1e-13)
                assert close, (kind, grouped, name)
    try:
        kernels.contrastive_loss(
            image[: rank + 1], text[: rank + 1], torch.tensor(1.0), ranks=dist.group.WORLD
        )
    except VectorError as problem:
        assert "every rank must have the same number" in str(problem)  # noqa: PT017
    else:
        raise AssertionError("ranks with different numbers of pairs must be refused")
    dist.barrier()
    print("all equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), str(Path(sys.argv[3])))
