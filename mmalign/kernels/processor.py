"""Which fast matrix products this processor and this build of torch support.

The queries use private torch functions that not every build has: wheels for macOS and Windows on
ARM lack oneDNN's. If a function is missing, the answer is no, so that the plain path is taken.
"""

import platform
from functools import cache
from typing import Any

import torch

CPU = torch.device("cpu")


def has_bfloat16(device: torch.device = CPU) -> bool:
    """Return whether a device supports bfloat16 natively; emulated, it is slower than float32."""
    if device.type == "cuda":
        return True
    return device.type == "cpu" and _cpu_has_bfloat16()


@cache
def has_int8() -> bool:
    """Return whether oneDNN's int8 products are available, on a CPU."""
    names = ("qlinear_prepack", "qlinear_pointwise")
    return torch.backends.mkldnn.is_available() and has_operators("onednn", *names)


@cache
def has_vnni() -> bool:
    """Return whether a CPU sums int8 products in 32 bits, not pairs of them in 16."""
    return _call_if_present(torch.cpu, "_is_vnni_supported")


@cache
def has_amx() -> bool:
    """Return whether a CPU multiplies tiles of bfloat16 and int8 (AMX)."""
    return _call_if_present(torch.cpu, "_is_amx_tile_supported")


@cache
def packs_bfloat16() -> bool:
    """Return whether oneDNN's linear layer with prepacked weights is available."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return _cpu_has_bfloat16() and has_operators("mkldnn", *names)


def sums_float16_in_float32() -> bool:
    """Return whether a CPU is known to sum float16 products in float32; a user may change it."""
    function = getattr(torch._C, "_get_cpu_allow_fp16_reduced_precision_reduction", None)
    return function is not None and not function()


def has_operators(namespace: str, *names: str) -> bool:
    """Return whether this build of torch has all of the given operators."""
    space = getattr(torch.ops, namespace)
    return all(hasattr(space, name) for name in names)


@cache
def _cpu_has_bfloat16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return _call_if_present(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return _call_if_present(torch.cpu, "_is_avx512_bf16_supported")


def _call_if_present(namespace: Any, name: str) -> bool:
    """Call a function that this build of torch may not have."""
    function = getattr(namespace, name, None)
    return bool(function()) if function is not None else False
