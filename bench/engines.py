"""Our image encoder on a CPU beside OpenVINO and ONNX Runtime: the same weights, the same batches.

    python -m bench engines --weights ViT-B-32.pt [--model ViT-B-32] [--batch 16] [--rounds 3]

Why there is no other engine behind ours. Every engine encodes batches that are ready, `--threads`
of them at once with a thread each, as the pipeline does; all take turns. ONNX Runtime's eight bits
are its dynamic quantization. `cosine` is the mean with open_clip's float32, for the images timed;
images are noise. The engines are no part of mmalign; install them beside it:

    pip install openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.23.2 onnxscript==0.7.2
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench import measure
from mmalign.arrays import Floats
from mmalign.data import in_threads
from mmalign.memory import keep_free_memory
from mmalign.model import Encoder, Precision, in_precision, load_model

Encode = Callable[[int], Floats]
"""Encodes the batch in one of several places that compute at the same time."""
BATCHES = 8
"""Timed for each thread."""


def ours(encoder: Encoder, precision: Precision, pixels_BSS3: Any) -> Encode:
    """mmalign."""
    encoder, got = in_precision(encoder, precision)
    assert got == precision
    return lambda place: encoder.encode_images(pixels_BSS3)


def openvino(path: Path, precision: str, images_B3SS: Any, threads: int) -> Encode:
    """OpenVINO, a stream for each thread."""
    import openvino as ov

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": threads,
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = ov.Core().compile_model(path, "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(threads)]
    return lambda place: requests[place].infer({0: images_B3SS})[0]


def onnxruntime(path: Path, images_B3SS: Any, threads: int) -> Encode:
    """ONNX Runtime, a session for each thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(threads)
    ]
    return lambda place: sessions[place].run(None, {"images": images_B3SS})[0]


def export(encoder: Encoder, images_B3SS: torch.Tensor, folder: Path) -> tuple[Path, Path]:
    """Write the image tower as ONNX, in float32 and in eight bits."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class Images(torch.nn.Module):
        """The towers, asked for images."""

        def __init__(self) -> None:
            super().__init__()
            self.towers = encoder.towers

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            """Embed normalised pixels."""
            return self.towers.image_features(images)

    whole, small = folder / "whole.onnx", folder / "small.onnx"
    torch.onnx.export(
        Images().eval(), (images_B3SS,), whole, input_names=["images"], external_data=False
    )
    quantize_dynamic(whole, small, weight_type=QuantType.QInt8)
    return whole, small


def images_per_s(encode: Encode, batch: int, threads: int) -> float:
    """Images a second with all threads busy."""

    def work(place: int) -> None:
        for _ in range(BATCHES):
            encode(place)

    alone = partial(torch.set_num_threads, 1)
    started = time.perf_counter()
    list(in_threads(work, range(threads), threads, ahead=threads, prepare=alone))
    return batch * BATCHES * threads / (time.perf_counter() - started)


def main(words: list[str]) -> None:
    """Let all engines take turns."""
    parser = argparse.ArgumentParser(prog="python -m bench engines")
    parser.add_argument("--model", default="ViT-B-32", help="as open_clip calls it")
    parser.add_argument("--weights", required=True, help="a file")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(words)
    threads = options.threads
    torch.set_num_threads(threads)
    keep_free_memory()
    encoder = load_model(f"{options.model}:{options.weights}")
    encoder.towers.eval()
    shape, side = encoder.preprocess, encoder.preprocess.size
    pixels_BSS3 = np.random.default_rng(0).integers(
        0, 256, (options.batch, side, side, 3), dtype=np.uint8
    )
    mean, spread = np.array(shape.mean, np.float32), np.array(shape.std, np.float32)
    scaled_BSS3 = (pixels_BSS3.astype(np.float32) / 255 - mean) / spread
    images_B3SS = np.ascontiguousarray(scaled_BSS3.transpose(0, 3, 1, 2))
    with tempfile.TemporaryDirectory() as name:
        whole, small = export(encoder, torch.from_numpy(images_B3SS), Path(name))
        engines: dict[str, Encode] = {
            "mmalign, bfloat16": ours(encoder, "bfloat16", pixels_BSS3),
            "OpenVINO, bfloat16": openvino(whole, "bf16", images_B3SS, threads),
            "mmalign, int8": ours(encoder, "int8", pixels_BSS3),
            "ONNX Runtime, int8": onnxruntime(small, images_B3SS, threads),
        }
        true_BD = encoder.encode_images(pixels_BSS3)
        speeds: dict[str, list[float]] = {engine: [] for engine in engines}
        for _ in range(options.rounds + 1):
            for engine, encode in engines.items():
                speeds[engine].append(images_per_s(encode, options.batch, threads))
        versions = " ".join(f"{p} {version(p)}" for p in ("openvino", "onnxruntime"))
        for engine, found in speeds.items():
            vectors_BD = engines[engine](0)
            vectors_BD = vectors_BD / np.linalg.norm(vectors_BD, axis=1, keepdims=True)
            row = {"engine": engine, "model": options.model, "batch": options.batch}
            row["images_per_s"] = round(median(found[1:]), 1)
            row["spread"] = round(max(found[1:]) / min(found[1:]), 3)
            row["cosine"] = f"{float((vectors_BD * true_BD).sum(1).mean()):.6f}"
            measure.append("engines", row | {"versions": versions})
