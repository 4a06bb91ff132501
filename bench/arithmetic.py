"""Which arithmetic pays for which image network, forward and backward, on this machine.

    python -m bench arithmetic [--size 64] [--batch 128]

Our presets beside small timm networks: images per second in float32 and bfloat16, contiguous and
channels-last. Why training measures this anew at every start instead of following a rule.
"""

import argparse
import time
from itertools import product

import torch
from torch import nn

from bench import measure
from mmalign.kernels.processor import has_bfloat16
from mmalign.model import PRESETS
from mmalign.model.towers import ConvTower
from mmalign.training.optimization import Arithmetic

TIMM = ("resnet10t", "mobilenetv4_conv_small_035", "test_resnet")
STEPS = 5


def images_per_s(network: nn.Module, arithmetic: Arithmetic, images: torch.Tensor) -> float:
    """Fastest of a few steps, after a warm-up."""
    layout = torch.channels_last if arithmetic.channels_last else torch.contiguous_format
    network.to(memory_format=layout)
    best = float("inf")
    for step in range(STEPS + 1):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic.bfloat16):
            network(images.to(memory_format=layout)).float().square().sum().backward()
        if step:
            best = min(best, time.perf_counter() - started)
    return len(images) / best


def main(words: list[str]) -> None:
    """Measure every network in every arithmetic."""
    import timm

    parser = argparse.ArgumentParser(prog="python -m bench arithmetic")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args(words)
    torch.set_num_threads(2)
    networks: dict[str, nn.Module] = {n: ConvTower(PRESETS[n]) for n in ("nano", "tiny")}
    networks |= {n: timm.create_model(n, num_classes=0) for n in TIMM}
    images = torch.randn(options.batch, 3, options.size, options.size)
    for name, network in networks.items():
        row: dict[str, object] = {"network": name, "size": options.size, "batch": options.batch}
        row["parameters"] = sum(p.numel() for p in network.parameters())
        for bfloat16, channels_last in product((False, True), (False, True)):
            arithmetic = Arithmetic(bfloat16, channels_last)
            # Without hardware for it bfloat16 is emulated, a hundred times slower.
            measured = not bfloat16 or has_bfloat16()
            speed = images_per_s(network, arithmetic, images) if measured else None
            row[f"{arithmetic} images/s"] = round(speed) if speed else ""
        measure.append("arithmetic", row)
