"""Contrastive losses forward and backward: ours beside what others do, in one run.

    python -m bench loss [--rows 8192] [--dim 512] [--dtype float32] [--rounds 5] [--scale 100]

On a GPU the defaults are 32,768 rows in bfloat16, and ours alone runs at 131,072 too. A row tells
time, TFLOP/s by the FLOPs that the implementation does itself, the share of what this machine
reaches in a plain product, the bytes/s of inputs and gradients (each moved once), the peak memory
beside the inputs, and the largest error of a gradient against float64, relative to its largest
value. Baselines: dense torch with one product, the same compiled, open_clip's own loss, and rows in
chunks with checkpointing.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import measure
from mmalign import kernels

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BIAS = -10.0


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """One product, two cross entropies."""
    logits = scale * (image @ text.T)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def dense_sigmoid(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """One product, N x N questions."""
    logits = scale * (image @ text.T) + BIAS
    sign = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def chunked(image: Tensor, text: Tensor, scale: Tensor, rows: int = 1024) -> Tensor:
    """Both directions in chunks whose logits are made again on the way back."""

    def part(queries: Tensor, others: Tensor, own: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(scale * (queries @ others.T), own, reduction="sum")

    total = image.new_zeros((), dtype=torch.float32)
    own = torch.arange(len(image), device=image.device)
    for one, other in ((image, text), (text, image)):
        for queries, labels in zip(one.split(rows), own.split(rows), strict=True):
            total = total + checkpoint(part, queries, other, labels, scale, use_reentrant=False)
    return total / (2 * len(image))


def open_clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """What open_clip's trainer calls."""
    from open_clip.loss import ClipLoss

    loss: Tensor = ClipLoss()(image, text, scale)
    return loss


def open_clip_sigmoid(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """What open_clip's trainer calls with --siglip."""
    from open_clip.loss import SigLipLoss

    loss: Tensor = SigLipLoss()(image, text, scale, torch.tensor(BIAS, device=image.device))
    return loss


def ours(impl: Any) -> Loss:
    """Our InfoNCE."""
    return lambda image, text, scale: kernels.contrastive_loss(image, text, scale, impl=impl)


def ours_sigmoid(impl: Any) -> Loss:
    """Our sigmoid loss."""
    return lambda image, text, scale: kernels.sigmoid_loss(
        image, text, scale, torch.tensor(BIAS, device=image.device), impl=impl
    )


def losses(impl: str) -> dict[str, tuple[str, Loss, int]]:
    """Every loss by name: its kind, itself, and the FLOPs it does over N N D."""
    fused = f"mmalign {impl}"
    found = {
        fused: ("infonce", ours(impl), 8),
        "dense torch": ("infonce", dense, 6),
        "dense torch, compiled": ("infonce", torch.compile(dense), 6),
        "open_clip ClipLoss": ("infonce", open_clip_loss, 12),
        "chunked with checkpointing": ("infonce", chunked, 16),
        f"{fused} sigmoid": ("sigmoid", ours_sigmoid(impl), 6),
        "dense torch sigmoid": ("sigmoid", dense_sigmoid, 6),
        "open_clip SigLipLoss": ("sigmoid", open_clip_sigmoid, 6),
    }
    if importlib.util.find_spec("open_clip") is None:
        found = {name: loss for name, loss in found.items() if "open_clip" not in name}
    return found


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Forward and backward; the gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss(*leaves).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest error of a gradient of the matrices, relative to the largest true value."""
    return max(
        float((f.double() - t).abs().max() / t.abs().max())
        for f, t in zip(found[:2], truth[:2], strict=True)
    )


def main(words: list[str]) -> None:
    """Measure every loss in turn."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench loss")
    parser.add_argument("--rows", type=int, default=32_768 if on_gpu else 8192)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--scale", type=float, default=100.0)
    parser.add_argument("--only", help="losses whose names hold this")
    options = parser.parse_args(words)
    device, impl = ("cuda", "triton") if on_gpu else ("cpu", "blocked")
    if not on_gpu:
        torch.set_num_threads(2)
    dtype = getattr(torch, options.dtype)
    limit = measure.product_limit(dtype, device)
    chosen = {k: v for k, v in losses(impl).items() if not options.only or options.only in k}
    report(chosen, options.rows, options, dtype, device, limit)
    if on_gpu and not options.only:
        large = {k: v for k, v in chosen.items() if k.startswith("mmalign")}
        report(large, 4 * options.rows, options, dtype, device, limit)


def report(
    chosen: dict[str, tuple[str, Loss, int]],
    rows: int,
    options: argparse.Namespace,
    dtype: torch.dtype,
    device: str,
    limit: float,
) -> None:
    """Time the losses in turn, then measure memory and error of each."""
    inputs = batch(rows, options.dim, dtype, device, options.scale)
    tasks = {n: (lambda f=loss: step(f, inputs)) for n, (_, loss, _) in chosen.items()}
    timings = measure.in_turn(tasks, options.rounds)
    exact = (inputs[0].double(), inputs[1].double(), inputs[2].double())
    truths = {
        kind: step(make("blocked"), exact)
        for kind, make in (("infonce", ours), ("sigmoid", ours_sigmoid))
        if any(kind == chosen_kind for chosen_kind, _, _ in chosen.values())
    }
    for name, (kind, loss, products) in chosen.items():
        flops = products * rows**2 * options.dim / (timings[name]["p50_ms"] / 1000)
        row = {"loss": name, "rows": rows, "dim": options.dim, "dtype": str(dtype)[6:]}
        row |= {"scale": options.scale, **timings[name], "tflops": round(flops / 1e12, 3)}
        row["share_of_limit"] = round(flops / limit, 3)
        # What no loss can avoid: both matrices read once, both gradients written once.
        row["gb_per_s"] = round(4 * inputs[0].nbytes / (timings[name]["p50_ms"] / 1000) / 1e9, 3)
        row["peak_mib"] = round(measure.peak_bytes(tasks[name]) / 2**20, 1)
        row["error"] = f"{error(step(loss, inputs), truths[kind]):.2e}"
        measure.append("loss", row)


def batch(
    rows: int, dim: int, dtype: torch.dtype, device: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs that match about as well as in training: cosines of 0.3 or so with their own."""
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(rows, dim, generator=generator) for _ in range(2))
    text = 0.3 * image + noise
    image, text = (F.normalize(x, dim=1).to(device, dtype) for x in (image, text))
    return image, text, torch.tensor(scale, device=device)
