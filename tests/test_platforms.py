"""What other platforms lack, taken away here: the same commands run, by the plain path."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign import kernels
from mmalign.data.scenes import write_scenes
from mmalign.embedding.embed import embed
from mmalign.encoding.modalities import encoder_of
from mmalign.encoding.pipeline import Pipeline
from mmalign.errors import MmalignError
from mmalign.kernels import processor
from mmalign.model import devices, load_model, new_model, to_fastest
from mmalign.search.searcher import Searcher
from mmalign.training.train import train

from conftest import QUICK, jpeg  # isort: skip

ROOT = Path(__file__).parents[1]
ANSWERS = (
    processor.has_int8,
    processor.has_vnni,
    processor.packs_bfloat16,
    processor._cpu_has_bfloat16,
)


class Without:
    """Something of torch without some of its names."""

    def __init__(self, whole: Any, *missing: str) -> None:
        self._whole, self._missing = whole, missing

    def __getattr__(self, name: str) -> Any:
        if any(name.startswith(m) for m in self._missing):
            raise AttributeError(f"this build of torch has no {name}")
        return getattr(self._whole, name)


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A build without oneDNN and without private questions, as wheels for Apple's processors."""
    monkeypatch.setattr(torch, "ops", Without(torch.ops, "mkldnn", "onednn", "quantized"))
    monkeypatch.setattr(torch, "cpu", Without(torch.cpu, "_is_"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch._C, "_get_cpu_allow_fp16_reduced_precision_reduction")
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    for answer in ANSWERS:
        answer.cache_clear()
    yield
    for answer in ANSWERS:
        answer.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("plain_torch")
def test_a_torch_without_onednn_trains_embeds_and_searches(tmp_path: Path) -> None:
    scenes = tmp_path / "scenes.tar"
    write_scenes(scenes, 40, seed=5, tick=lambda: None)
    train([str(scenes)], tmp_path / "run", QUICK, val=[str(scenes)])
    report = embed(tmp_path / "run", [str(scenes)], tmp_path / "s.store")
    hits = Searcher.open(tmp_path / "s.store").search("a red circle", k=3)
    assert (report.precision, len(hits)) == ("float32", 3)
    with pytest.raises(MmalignError, match="int8 needs a CPU and a torch with oneDNN"):
        embed(tmp_path / "run", [str(scenes)], tmp_path / "t.store", precision="int8")


@pytest.mark.usefixtures("plain_torch")
def test_a_torch_without_onednn_finds_the_same_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(5_000, 64, generator=generator)).half()
    queries = torch.nn.functional.normalize(torch.randn(3, 64, generator=generator))
    corpus = kernels.prepare(vectors)
    assert not kernels.has_int8()
    wanted = kernels.topk(queries, corpus, 5, impl="reference")
    for impl in ("auto", "single", "bfloat16"):
        assert torch.equal(kernels.topk(queries, corpus, 5, impl=impl)[1], wanted[1])  # type: ignore[arg-type]
    with pytest.raises(MmalignError, match="oneDNN"):
        kernels.prepare(vectors, with_codes=True)


def private_operators(tree: ast.Module) -> set[str]:
    """Private names of torch that a module uses, and names of `torch.ops`."""
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    starts = ("torch.ops.mkldnn", "torch.ops.onednn", "torch._", "torch.cpu._")
    return {n for n in names if n.startswith(starts) and not n.startswith("torch.__")}


def test_private_operators_of_torch_are_used_where_they_are_asked_for_only() -> None:
    allowed = {"processor.py", "codes.py", "fused.py", "int8.py"}
    users = {
        file.name
        for folder in ("mmalign", "index", "bench")
        for file in (ROOT / folder).rglob("*.py")
        if private_operators(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert users <= allowed
    assert private_operators(ast.parse("torch.ops.mkldnn._is_mkldnn_bf16_supported()"))


def test_an_apple_gpu_that_does_not_work_is_left_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    encoder = to_fastest(new_model("nano", captions=["a red square"]))
    assert encoder.device == torch.device("cpu")
    assert capsys.readouterr().err.startswith("the CPU is used instead of the Apple GPU: ")
    assert np.isfinite(encoder.encode_texts(["a red square"])).all()


def test_an_apple_gpu_with_other_vectors_is_left_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    places: list[str] = []
    encoder = new_model("nano", captions=["a red square"])

    def on(device: torch.device) -> Any:
        places.append(device.type)
        return encoder

    monkeypatch.setattr(encoder, "on", on)
    vectors = iter([np.eye(5, dtype=np.float32), np.roll(np.eye(5, dtype=np.float32), 1, 0)])
    monkeypatch.setattr(devices, "_probe", lambda _: next(vectors))
    to_fastest(encoder)
    assert places == ["cpu", "mps", "cpu"]
    assert "a cosine of 0.0000 with the CPU's" in capsys.readouterr().err
    vectors = iter([np.eye(5, dtype=np.float32)] * 2)
    assert to_fastest(encoder) is encoder
    assert places[3:] == ["cpu", "mps"]


def test_only_cuda_decodes_on_the_device(run: Path) -> None:
    encoder = load_model(run)
    encoder.device = torch.device("mps")
    assert Pipeline(encoder, thumbnails=False).encoding.workers == 1
    (part,) = encoder_of(encoder, "image").decode(jpeg()).parts
    assert isinstance(part, np.ndarray)
    encoder.device = torch.device("cuda")
    (part,) = encoder_of(encoder, "image").decode(jpeg()).parts
    assert isinstance(part, bytes)
