"""The gradient across ranks: ours and every combination of open_clip's flags beside one process.

    python -m bench ranks [--ranks 4]

Processes joined by gloo, in float64. After averaging over the ranks, as data-parallel training
does: by what factor the gradients of weights and of the logit scale differ from those of one
process with the joined batch (the projection on the true gradient), and the cosine of the two.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench import measure
from mmalign import kernels

PAIRS_EACH, WIDTH = 16, 8


class Towers(nn.Module):
    """Two linear towers and a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(12, WIDTH, dtype=torch.float64) for _ in "it")
        self.scale = nn.Parameter(torch.tensor(10.0, dtype=torch.float64))

    def vectors(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of both sides."""
        return (
            nn.functional.normalize(self.image(image), dim=1),
            nn.functional.normalize(self.text(text), dim=1),
        )

    def averaged(self, ranks: int) -> tuple[Tensor, Tensor]:
        """Gradients of all weights, and of the scale, averaged over the ranks."""
        for weight in self.parameters():
            if weight.grad is not None and ranks > 1:
                dist.all_reduce(weight.grad)
                weight.grad /= ranks
        grads = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        scale = grads.pop("scale")
        return torch.cat([g.flatten() for g in grads.values()]), scale


def compare(name: str, found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> list[str]:
    """One line of the table."""
    weights, true = found[0], truth[0]
    ratio = float(weights @ true / (true @ true))
    cosine = float(weights @ true / (weights.norm() * true.norm()))
    error = float((weights - true).abs().max() / true.abs().max())
    scale = float(found[1] / truth[1])
    return [name, f"{ratio:.6f}", f"{cosine:.6f}", f"{scale:.6f}", f"{error:.1e}"]


def work(rank: int, ranks: int, meeting: str) -> None:
    """Compute every variant on one rank; the first prints the lines."""
    from open_clip.loss import ClipLoss

    torch.set_num_threads(1)
    store = dist.FileStore(meeting, ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(1)
    shape = (ranks * PAIRS_EACH, 12)
    image, text = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "it")
    own = slice(rank * PAIRS_EACH, (rank + 1) * PAIRS_EACH)
    one = Towers()
    kernels.contrastive_loss(*one.vectors(image, text), one.scale).backward()
    truth = one.averaged(1)
    many = Towers()
    vectors = many.vectors(image[own], text[own])
    kernels.contrastive_loss(*vectors, many.scale, ranks=dist.group.WORLD).backward()
    lines = [compare("mmalign", many.averaged(ranks), truth)]
    for local, with_grad in product((False, True), repeat=2):
        theirs = Towers()
        loss = ClipLoss(local, with_grad, rank=rank, world_size=ranks)
        loss(*theirs.vectors(image[own], text[own]), theirs.scale).backward()
        flags = " --local-loss" * local + " --gather-with-grad" * with_grad or " no flags"
        lines.append(compare("open_clip" + flags, theirs.averaged(ranks), truth))
    if rank == 0:
        csv.writer(sys.stdout).writerows(lines)
    dist.barrier()
    dist.destroy_process_group()


def main(words: list[str]) -> None:
    """Start the processes, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench ranks")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.worker is not None:
        work(options.worker, options.ranks, options.meeting)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench", "ranks", "--ranks", str(options.ranks)]
        command += ["--meeting", str(Path(folder) / "meet"), "--worker"]
        workers = [
            subprocess.Popen(
                [*command, str(rank)], stdout=subprocess.PIPE, text=True, env=os.environ
            )
            for rank in range(options.ranks)
        ]
        outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit("a worker failed")
    names = ("weights_ratio", "weights_cosine", "scale_ratio", "weights_error")
    for line in csv.reader(outputs[0].splitlines()):
        values = dict(zip(names, line[1:], strict=True))
        measure.append("ranks", {"ranks": options.ranks, "trainer": line[0], **values})
