"""A query of an open_clip model imports neither other networks nor torch's compiler."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mmalign import embed
from mmalign.model import openclip

SLOW = "{'timm','torchvision','open_clip','torch._dynamo','torch._inductor','sympy','triton'}"


@pytest.fixture(scope="module")
def store(small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two images, made by a model with open_clip's own random weights."""
    folder = tmp_path_factory.mktemp("imports")
    (folder / "model").mkdir()
    config = {"model_cfg": open_clip.get_model_config(small_clip)}
    (folder / "model" / "open_clip_config.json").write_text(json.dumps(config))
    weights = openclip.load(small_clip, None).towers.clip.state_dict()  # type: ignore[union-attr]
    torch.save(weights, folder / "model" / "open_clip_pytorch_model.bin")
    (folder / "pictures").mkdir()
    for shade in (0, 200):
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(folder / "pictures" / f"{shade}.png")
    embed(f"local-dir:{folder / 'model'}", [folder / "pictures"], folder / "a.store")
    return folder / "a.store"


def imported_by(*arguments: str) -> str:
    """Return which slow modules a command imports."""
    code = (
        "import sys\nfrom mmalign.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end.code\n"
        f"print(sorted({SLOW} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_text_query_imports_no_other_networks(store: Path) -> None:
    assert imported_by("search", str(store), "a red square") == "[]"


@pytest.mark.slow
def test_an_image_query_imports_no_other_networks(store: Path) -> None:
    picture = store.parent / "pictures" / "200.png"
    assert imported_by("search", str(store), str(picture)) == "[]"


def test_weights_are_read_when_a_tower_is_used(store: Path) -> None:
    from mmalign import load_model

    name = f"local-dir:{store.parent / 'model'}"
    lazy, whole = load_model(name, lazily=True), load_model(name)
    assert np.array_equal(lazy.encode_texts(["a"]), whole.encode_texts(["a"]))
    assert lazy.identity == whole.identity
