"""Optimization: learning rate, weight averages, and the fastest arithmetic on a machine."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from mmalign.kernels.processor import has_bfloat16

PROBE_REPEATS = 2


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Return the learning rate: linear warm-up, then cosine decay to zero.

    >>> [round(learning_rate(p, 1.0, 0.1), 3) for p in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def adamw(towers: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices only: not on norms, biases or temperatures."""
    trained = [p for p in towers.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Fused: one pass over the weights, three times as fast on a CPU as the plain loop.
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


class Average:
    """Exponential moving average of weights; its decay warms up with the number of steps."""

    def __init__(self, towers: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.weights = {k: v.detach().clone() for k, v in towers.state_dict().items()}

    @torch.no_grad()
    def update(self, towers: nn.Module) -> None:
        """Move one step towards the weights of the towers."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in towers.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, share)
            else:
                self.weights[name].copy_(value)

    @contextlib.contextmanager
    def applied(self, towers: nn.Module) -> Iterator[None]:
        """Put the averaged weights into the towers, in evaluation mode, within a block."""
        mode = towers.training
        trained_weights = {k: v.detach().clone() for k, v in towers.state_dict().items()}
        towers.load_state_dict(self.weights)
        towers.eval()
        try:
            yield
        finally:
            towers.load_state_dict(trained_weights)
            towers.train(mode)


@dataclass(frozen=True)
class Arithmetic:
    """The data type and memory layout in which a tower is trained."""

    bfloat16: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        layout = " channels-last" if self.channels_last else ""
        return ("bfloat16" if self.bfloat16 else "float32") + layout

    def apply(self, network: nn.Module, run: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Run a tower in this arithmetic; the result is float32."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            return run().float()


def fastest_arithmetic(
    network: nn.Module, run: Callable[[], Tensor], device: torch.device, *, is_image: bool
) -> Arithmetic:
    """Measure a forward and backward pass of one tower in every arithmetic; return the fastest.

    bfloat16 and channels-last speed up some networks and slow down others, depending on the
    machine; half a second of measuring is cheaper than a rule.
    """
    # Without hardware support bfloat16 is emulated, and never worth trying.
    layouts = (False, True) if is_image else (False,)
    times: dict[Arithmetic, float] = {}
    for bfloat16, channels_last in product(
        (False, True) if has_bfloat16(device) else (False,), layouts
    ):
        arithmetic = Arithmetic(bfloat16, channels_last)
        if not channels_last:
            network.to(memory_format=torch.contiguous_format)
        times[arithmetic] = _time_step(arithmetic, network, run, device)
    chosen = min(times, key=lambda a: times[a])
    if not chosen.channels_last:
        network.to(memory_format=torch.contiguous_format)
    return chosen


def _time_step(
    arithmetic: Arithmetic, network: nn.Module, run: Callable[[], Tensor], device: torch.device
) -> float:
    state = {k: v.clone() for k, v in network.state_dict().items()}
    best = math.inf
    for repeat in range(PROBE_REPEATS + 1):
        started = time.perf_counter()
        arithmetic.apply(network, run, device).square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repeat:  # the first one is a warm-up
            best = min(best, time.perf_counter() - started)
    network.zero_grad(set_to_none=True)
    network.load_state_dict(state)  # batch norm statistics changed
    return best
