"""What the tests share: drawn scenes, a small trained run, and a store made with it."""

import importlib.util
import io
import json
import os
import secrets
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if importlib.util.find_spec("mmalign") is None or importlib.util.find_spec("mmalign.index") is None:
    pytest.exit("mmalign is not installed: run `make setup`, then `make test`", returncode=1)

import torch

from mmalign.data import places
from mmalign.data.scenes import write_scenes
from mmalign.embedding.embed import embed
from mmalign.model.presets import PRESETS
from mmalign.progress import to_stderr
from mmalign.training.train import TrainConfig, train

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)
# Tests neither read nor leave what was measured on this machine.
os.environ["MMALIGN_CACHE"] = "off"
# As the command line does: tests read what is said.
to_stderr()
# A service that tests made up gets no better by waiting for it.
places.PAUSE_S = 0.001
if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, on the CPU; they read this when they are imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what fixtures of the session remember, and of the homes of all tests."""
    folder = tmp_path_factory.mktemp("homes")
    os.environ["MMALIGN_HOME"] = str(folder / "session")
    return folder


@pytest.fixture(autouse=True)
def home(homes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of each test's own: models that others remembered are not found."""
    folder = homes / secrets.token_hex(8)
    monkeypatch.setenv("MMALIGN_HOME", str(folder))
    return folder


def jpeg(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    """Encode a small noisy picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a tar from (name, content) pairs, in order, duplicates included."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_pairs(folder: Path, count: int) -> Path:
    """Write a folder of pictures, each with two captions in its .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.jpg").write_bytes(jpeg(i))
        captions = {"captions": [f"picture {i}", f"number {i}"], "captions_zh": [f"图片{i}"]}
        (folder / f"{i:03d}.json").write_text(json.dumps(captions), encoding="utf-8")
    return folder


def weights_of(run: Path) -> Path:
    """The file of weights that a run's model.json names."""
    return run / str(json.loads((run / "model.json").read_text(encoding="utf-8"))["weights"])


QUICK = TrainConfig(
    preset="nano",
    caption_keys=("captions", "captions_zh"),
    epochs=3,
    batch_size=32,
    captions_per_image=2,
    validations=1,
    word_loss=0.0,
    caption_loss=0.0,
    # Not measured in every test.
    arithmetic="float32",
)


# A fiftieth of nano, with all kinds of its layers: for tests of how training goes, not how well.
PICO = replace(
    PRESETS["nano"], image_size=32, image_widths=(8, 16), image_blocks=(1, 1), image_grid=2,
    text_width=16, text_layers=1, text_heads=2, text_hidden=16, dim=16, vocabulary=64, context=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def pico() -> Iterator[str]:
    """The name of a preset that takes milliseconds a step."""
    PRESETS["pico"] = PICO
    yield "pico"
    del PRESETS["pico"]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of 96 drawn scenes with captions in two languages."""
    tar = tmp_path_factory.mktemp("scenes") / "scenes.tar"
    write_scenes(tar, 96, seed=3, tick=lambda: None)
    return tar


@pytest.fixture(scope="session")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, trained for a few steps."""
    out = tmp_path_factory.mktemp("run") / "run"
    train([str(scenes)], out, QUICK, val=[str(scenes)])
    return out


@pytest.fixture(scope="session")
def store(run: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the scenes. Tests that change a store copy it."""
    out = tmp_path_factory.mktemp("store") / "scenes.store"
    embed(run, [str(scenes)], out, caption_keys=("captions", "captions_zh"))
    return out


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of an open_clip architecture that is small enough to test with."""
    from mmalign.model import openclip

    shape = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 32},
        "text_cfg": {
            "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
        },
    }  # fmt: skip
    file = tmp_path_factory.mktemp("clip") / "small-clip.json"
    file.write_text(json.dumps(shape))
    openclip.module().add_model_config(file)
    return "small-clip"
