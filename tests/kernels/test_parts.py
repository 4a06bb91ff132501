"""Batches made of parts: in turn on one process, or side by side on several."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmalign import kernels

WORKER = Path(__file__).parents[1] / "helpers" / "rank_worker.py"


class Tiny(nn.Module):
    """Two towers with dropout, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 8))
        self.scale = nn.Parameter(torch.tensor(12.0))
        self.bias = nn.Parameter(torch.tensor(-4.0))
        self.double()

    def vectors(self, part: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        outputs = (self.image(part[0]), self.text(part[1]))
        return tuple(nn.functional.normalize(x, dim=1) for x in outputs)

    def loss(self, kind: str) -> Callable[..., Tensor]:
        if kind == "infonce":
            return lambda i, t: kernels.contrastive_loss(i, t, self.scale, impl="blocked")
        return lambda i, t: kernels.sigmoid_loss(i, t, self.scale, self.bias, impl="blocked")


def grads(network: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("sizes", [[24], [8, 8, 8], [5, 19], [1] * 24])
def test_parts_are_one_batch(kind: str, sizes: list[int]) -> None:
    """Loss and gradients, the scale's too, and the random numbers that follow."""
    network = Tiny()
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(24, d, generator=generator, dtype=torch.float64) for d in (6, 5))
    parts = list(zip(images.split(sizes), texts.split(sizes), strict=True))
    torch.manual_seed(2)
    encoded = [network.vectors(part) for part in parts]
    whole = network.loss(kind)(*(torch.cat(pieces) for pieces in zip(*encoded, strict=True)))
    whole.backward()
    truth, next_truth = grads(network), torch.rand(())
    network.zero_grad()
    torch.manual_seed(2)
    loss = kernels.backward_in_parts(network, parts, network.vectors, network.loss(kind))
    assert torch.rand(()) == next_truth
    assert torch.allclose(loss, whole.detach(), rtol=1e-12)
    found = grads(network)
    assert found.keys() == truth.keys()
    for name, grad in found.items():
        assert torch.allclose(grad, truth[name], rtol=1e-10, atol=1e-14), name


def test_batch_norm_moves_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    other.load_state_dict(network.state_dict())
    parts = list(torch.randn(32, 4).split(8))

    def square(vectors: Tensor) -> Tensor:
        return vectors.square().sum()

    kernels.backward_in_parts(network, parts, lambda x: (network(x),), square)
    for part in parts:
        other(part)
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_are_one_batch(count: int, tmp_path: Path) -> None:
    """Processes joined by gloo, in float64: see rank_worker.py for what each of them checks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(count), str(tmp_path / "meet")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=180)
        assert worker.returncode == 0, output
        assert "all equal" in output
