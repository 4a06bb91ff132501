"""open_clip's pretrained models: the networks, activations and preprocessing that their tags say.

MMALIGN_ALL_PRETRAINED=1 checks every name of open_clip's list, in some minutes; without it, one of
each kind.
"""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmalign import load_model
from mmalign.errors import IdentityError, InstallError, ModelError
from mmalign.model import Encoder, clip_networks, openclip, require_preset, save_model
from mmalign.store import ModelCard
from mmalign.store.manifest import Manifest
from mmalign.store.reader import Store
from mmalign.training.settings import configure
from mmalign.training.train import train

open_clip = openclip.module()
TEXTS = ["a dog", "two dogs run on a beach", "!"]
EVERY = bool(os.environ.get("MMALIGN_ALL_PRETRAINED"))


def kind_of(name: str, tag: str) -> str:
    """What can go wrong for one name and not for another."""
    config, cfg = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
    text, vision = config["text_cfg"], config["vision_cfg"]
    return str((
        bool(config.get("quick_gelu")), bool(cfg.get("quick_gelu")), cfg["mean"],
        cfg["interpolation"], cfg["resize_mode"], text.get("hf_tokenizer_name", "")[:9],
        str(vision.get("timm_model_name", ""))[:4], "multimodal_cfg" in config,
    ))  # fmt: skip


def pairs() -> list[tuple[str, str]]:
    """Every name with its tags, or the smallest of each kind; those with a text tower of the hub
    are apart."""
    listed = [p for p in open_clip.list_pretrained() if not needs_hub(p[0])]
    if EVERY:
        return listed
    listed.sort(key=lambda p: open_clip.get_model_config(p[0])["embed_dim"])
    return sorted({kind_of(*pair): pair for pair in reversed(listed)}.values())


def needs_hub(name: str) -> bool:
    return "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]


def reference(name: str, tag: str) -> Any:
    """What open_clip builds for a tag, without memory and without a download."""
    quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"), clip_networks.quiet():
        patch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: "/no/weights")
        return open_clip.create_model(
            name, pretrained=tag, load_weights=False, force_quick_gelu=quick, device="meta"
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")  # of what open_clip's own recipe does
@pytest.mark.parametrize(("name", "tag"), pairs())
def test_a_tag_builds_the_network_that_open_clip_builds(name: str, tag: str) -> None:
    wanted, plan = reference(name, tag), openclip.plan_of_tag(name, tag)
    found = openclip.build(plan.architecture, plan.preprocess)
    assert str(found) == str(wanted)
    assert [(k, v.shape) for k, v in found.state_dict().items()] == [
        (k, v.shape) for k, v in wanted.state_dict().items()
    ]
    cfg = open_clip.get_model_preprocess_cfg(wanted)
    assert open_clip.get_model_preprocess_cfg(found) == cfg
    ours = openclip.preprocess_of(name, cfg)
    assert (ours.mean, ours.std) == (tuple(cfg["mean"]), tuple(cfg["std"]))
    assert (ours.interpolation, ours.resize_mode) == (cfg["interpolation"], cfg["resize_mode"])
    if not open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name"):
        tokens = openclip.OpenClipTokenizer({"name": name})(TEXTS)
        assert torch.equal(tokens, open_clip.get_tokenizer(name)(TEXTS))


def test_names_whose_text_tower_is_on_the_hub_take_activation_and_preprocessing() -> None:
    apart = [pair for pair in open_clip.list_pretrained() if needs_hub(pair[0])]
    assert {name for name, _ in apart} == {
        "roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32", "xlm-roberta-large-ViT-H-14",
        "nllb-clip-base", "nllb-clip-large", "nllb-clip-base-siglip", "nllb-clip-large-siglip",
    }  # fmt: skip
    for name, tag in apart:
        cfg, plan = open_clip.get_pretrained_cfg(name, tag), openclip.plan_of_tag(name, tag)
        own = bool(open_clip.get_model_config(name).get("quick_gelu"))
        assert bool(plan.architecture.get("quick_gelu")) == (
            bool(cfg.get("quick_gelu")) and not own
        )
        assert all(plan.preprocess[key] == cfg[key] for key in ("mean", "std", "resize_mode"))


@pytest.fixture
def weights(small_clip: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    with clip_networks.quiet():
        state: dict[str, torch.Tensor] = open_clip.create_model(small_clip).state_dict()
    return state


@pytest.fixture
def quick_tag(
    small_clip: str, weights: dict[str, torch.Tensor], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:  # fmt: skip
    """A name and tag as open_clip lists them, of a small network and weights that are here."""
    torch.save(weights, tmp_path / "tag.pt")
    cfg = {
        **open_clip.get_pretrained_cfg("ViT-B-32", "openai"), "mean": (0.5, 0.5, 0.5),
        "resize_mode": "squash", "file": str(tmp_path / "tag.pt"), "hf_hub": "", "url": "",
    }  # fmt: skip
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, small_clip, {"quick": cfg})
    return f"{small_clip}:quick"


def test_a_tag_decides_activation_and_preprocessing(
    quick_tag: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    encoder = load_model(quick_tag)
    name = quick_tag.partition(":")[0]
    with clip_networks.quiet():
        public = open_clip.create_model(name, force_quick_gelu=True).eval()
        plain = open_clip.create_model(name).eval()
    public.load_state_dict(weights)
    plain.load_state_dict(weights)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    with torch.no_grad():
        wanted = public.encode_text(tokens, normalize=True).numpy()
        other = plain.encode_text(tokens, normalize=True).numpy()
    assert np.allclose(encoder.encode_texts(TEXTS), wanted, atol=1e-5)
    assert not np.allclose(wanted, other, atol=1e-5)
    assert encoder.preprocess.mean == (0.5, 0.5, 0.5)
    assert encoder.preprocess.resize_mode == "squash"
    # A run folder builds the same network again.
    (tmp_path / "run").mkdir()
    save_model(encoder, tmp_path / "run")
    again = load_model(tmp_path / "run")
    assert again.identity == encoder.identity
    assert again.preprocess == encoder.preprocess
    assert np.array_equal(again.encode_texts(TEXTS), encoder.encode_texts(TEXTS))


def test_a_store_of_the_wrong_activation_is_refused_with_the_reason(
    quick_tag: str, tmp_path: Path
) -> None:
    from mmalign import Searcher

    encoder = load_model(quick_tag)
    architecture = {"kind": "open_clip", "name": quick_tag.partition(":")[0]}
    before = Encoder(
        encoder.name, encoder.towers, encoder.tokenizer, encoder.preprocess, architecture
    )
    assert before.identity != encoder.identity
    store = Store(tmp_path, Manifest(1, ModelCard(before.identity, quick_tag, 32)))
    with pytest.raises(IdentityError, match="GELU, not QuickGELU.*: embed again"):
        Searcher(store, encoder)


def test_an_identity_without_a_forced_activation_is_what_it_was(
    small_clip: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Stores of other models stay searchable."""
    torch.save(weights, tmp_path / "w.pt")
    encoder = load_model(f"{small_clip}:{tmp_path / 'w.pt'}")
    assert encoder.architecture == {"kind": "open_clip", "name": small_clip}
    assert encoder.tokenizer.to_json() == json.dumps({"open_clip": small_clip})


def archive(network: nn.Module, file: Path) -> None:
    """Write a TorchScript archive as OpenAI's, with its numbers beside the weights."""
    image, tokens = torch.rand(1, 3, 64, 64), torch.zeros(1, 16, dtype=torch.long)
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(network).pop(name, None)
        network.register_buffer(name, torch.tensor(1))
    ways = {"encode_image": (image,), "encode_text": (tokens,)}
    torch.jit.trace_module(network, ways, strict=False).half().save(str(file))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch deprecates what OpenAI's files are
@pytest.mark.parametrize("quick", [True, False])
def test_openais_archives_load_with_their_activation(
    quick: bool, small_clip: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with clip_networks.quiet():
        network = open_clip.create_model(small_clip, force_quick_gelu=quick).eval()
    network.load_state_dict({k: v.half().float() for k, v in weights.items()})
    archive(network, tmp_path / "ViT.pt")
    encoder = load_model(f"{small_clip}:{tmp_path / 'ViT.pt'}")
    network.load_state_dict({k: v.half().float() for k, v in weights.items()}, strict=False)
    tokens = open_clip.get_tokenizer(small_clip)(TEXTS)
    with torch.no_grad():
        wanted = network.float().encode_text(tokens, normalize=True).numpy()  # type: ignore[operator]
    assert np.allclose(encoder.encode_texts(TEXTS), wanted, atol=1e-4)
    assert encoder.architecture.get("quick_gelu", False) == quick


@pytest.mark.parametrize("ending", ["pt", "bin", "safetensors"])
def test_a_file_is_found_again_from_another_folder(
    ending: str, small_clip: str, weights: dict[str, torch.Tensor], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = tmp_path / "w" / f"sd.{ending}"
    file.parent.mkdir()
    (save_file if ending == "safetensors" else torch.save)(weights, file)
    monkeypatch.chdir(tmp_path)
    encoder = load_model(f"{small_clip}:w/sd.{ending}")
    monkeypatch.chdir(file.parent)
    assert load_model(encoder.source).identity == encoder.identity


def damage(what: str, weights: dict[str, torch.Tensor], folder: Path) -> Path:
    file = folder / "broken.pt"
    if what == "module":
        torch.save(nn.Linear(2, 2), file)
    elif what == "pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif what == "jpeg":
        file.write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    elif what == "noise":
        file.write_bytes(b"weights" * 20)
    elif what == "empty":
        file.write_bytes(b"")
    elif what in ("lfs", "lfs.safetensors"):
        file = file.with_suffix(Path(what).suffix or ".pt")
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif what == "cut.safetensors":
        file = file.with_suffix(".safetensors")
        save_file(weights, file)
        file.write_bytes(file.read_bytes()[:-50])
    elif what == "misnamed":
        save_file(weights, file)
    elif what == "lacks":
        torch.save({k: v for k, v in weights.items() if "visual" not in k}, file)
    elif what == "shape":
        torch.save({**weights, "text_projection": torch.zeros(2, 2)}, file)
    elif what == "nan":
        weights["visual.proj"][0, 0] = torch.nan
        torch.save(weights, file)
    return file


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("module", "contains other Python objects than weights"),
        ("pickle", "cannot be loaded"),
        ("jpeg", "a JPEG image"),
        ("noise", "not a file written by torch.save"),
        ("empty", "is empty"),
        ("lfs", "a Git LFS pointer"),
        ("lfs.safetensors", "a Git LFS pointer"),
        ("cut.safetensors", "cannot be loaded"),
        ("misnamed", "rename it so that its name ends in .safetensors"),
        ("lacks", r"missing: .*visual.* and \d+ more"),
        ("shape", r"text_projection is \[2, 2\], but the model has \[32, 32\]"),
        ("nan", "NaN or infinity, first in visual.proj"),
    ],
)
def test_what_cannot_be_loaded_says_why_in_one_line(
    what: str, message: str, small_clip: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = damage(what, weights, tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(f"{small_clip}:{file}")
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_run_whose_weights_are_no_numbers_is_refused(
    small_clip: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "w.pt")
    encoder = load_model(f"{small_clip}:{tmp_path / 'w.pt'}")
    with torch.no_grad():
        encoder.towers.clip.text_projection[0] = torch.inf  # type: ignore[union-attr,index]
    (tmp_path / "run").mkdir()
    save_model(encoder, tmp_path / "run")
    with pytest.raises(ModelError, match="NaN or infinity"):
        load_model(tmp_path / "run")


def test_a_file_keeps_the_preprocessing_of_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({}, tmp_path / "w.pt")
    for name in dict.fromkeys(name for name, _ in open_clip.list_pretrained()):
        plan = openclip.plan_of_file(name, tmp_path / "w.pt")
        cfgs = [openclip.plan_of_tag(name, tag).preprocess for tag in openclip.tags(name)]
        assert plan.preprocess in cfgs
        said = capsys.readouterr().err
        assert ("not as for" in said) == any(c != plan.preprocess for c in cfgs)
    assert openclip.plan_of_file("MobileCLIP2-S0", tmp_path / "w.pt").preprocess["mean"] == (
        0,
        0,
        0,
    )
    openclip.plan_of_file("ViT-B-32", tmp_path / "w.pt")
    assert "give ViT-B-32-quickgelu:" in capsys.readouterr().err


@pytest.fixture
def own_config(small_clip: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A folder as `local-dir:` and the hub have them."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    config = {
        "model_cfg": {**open_clip.get_model_config(small_clip), "quick_gelu": True},
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "resize_mode": "squash",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def test_a_local_folder_loads_as_in_open_clip(
    own_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_config.parent)
    encoder = load_model(f"local-dir:{own_config.name}")
    with clip_networks.quiet():
        public = open_clip.create_model(f"local-dir:{own_config}").eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{own_config}")(TEXTS)
    with torch.no_grad():
        wanted = public.encode_text(tokens, normalize=True).numpy()
    assert np.allclose(encoder.encode_texts(TEXTS), wanted, atol=1e-5)
    assert encoder.preprocess.mean == (0.5, 0.5, 0.5)
    (tmp_path / "run").mkdir()
    save_model(encoder, tmp_path / "run")
    moved = shutil.move(own_config, tmp_path / "moved")
    assert load_model(f"local-dir:{moved}").identity == encoder.identity
    again = load_model(tmp_path / "run")
    assert again.identity == encoder.identity
    assert np.array_equal(again.encode_texts(TEXTS), encoder.encode_texts(TEXTS))


def test_a_hub_model_comes_from_the_cache_without_a_network(
    own_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(own_config, cache / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(clip_networks, "urlopen", unreachable)
    encoder = load_model("hf-hub:some/model")
    assert encoder.identity == load_model(f"local-dir:{own_config}").identity
    assert load_model(encoder.source).identity == encoder.identity


def unreachable(*_: object, **__: object) -> None:
    raise URLError("Name or service not known")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("ViT-B-32:openai", "give ViT-B-32-quickgelu:FILE"),
        ("ViT-B-32:laion2b_s34b_b79k", "give ViT-B-32:FILE"),
        ("hf-hub:some/model", "give local-dir:FOLDER"),
    ],
)
def test_without_a_network_the_way_with_a_file_is_said(
    name: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> str:
        raise AssertionError("a download was begun")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(clip_networks, "urlopen", unreachable)
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", never)
    with pytest.raises(ModelError, match=f"cannot be reached.*{instead}") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_needs_a_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_networks, "find_spec", lambda name: None)
    monkeypatch.setattr(clip_networks, "cached", lambda *_: None)
    with pytest.raises(InstallError, match="pip install transformers"):
        load_model("ViT-B-16-SigLIP:webli")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local-dir:/no/such", "no such folder"),
        ("hf-hub:model", "write hf-hub:ORG/REPO"),
        ("vit-b-32:openai", "did you mean 'ViT-B-32:openai'"),
        ("ViT-B/32:openai", "did you mean 'ViT-B-32:openai'"),
        ("ViT-B-32:opena", "did you mean 'openai'"),
        ("vit_b_32:OPENAI", "did you mean 'ViT-B-32:openai'"),
        ("ViT-B-32/openai", "did you mean 'ViT-B-32:openai'"),
        ("ViT-B-32 openai", "did you mean 'ViT-B-32:openai'"),
        ("ViT-B/32:no/such.pt", "did you mean 'ViT-B-32:no/such.pt'"),
        ("ViT-B/32", "write ViT-B-32:TAG with one of openai"),
        ("ViT-B-32:", "write ViT-B-32:TAG with one of openai"),
        ("ViT-B-32:no/such.pt", "no/such.pt: no such weight file"),
        ("ViT-B-32:such.safetensors", "such.safetensors: no such weight file"),
        ("nano", "a preset, which has no weights.*--preset nano"),
        ("nano:openai", "a preset, which has no weights.*--preset nano"),
        ("qqqqqqqq", r"known: .* and \d+ more"),
        ("ViT-B-32", "write ViT-B-32:TAG with one of .* and \\d+ more"),
    ],
)
def test_a_name_that_is_nearly_right_gets_the_right_one(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(name)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("nano", None, "it is a preset: .*--preset nano"),
        ("ViT-B/32", "openai", "did you mean 'ViT-B-32'"),
        ("ViT-B-32:openai", None, "--model ViT-B-32 --pretrained openai"),
        ("ViT-B-32", "ViT-B-32:OpenAI", "did you mean 'openai'"),
        ("ViT-B-32", "openai", "cannot be reached.*give ViT-B-32-quickgelu:FILE"),
    ],
)
def test_fine_tuning_refuses_a_model_that_it_cannot_have_before_sources_are_read(
    model: str,
    pretrained: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(clip_networks, "urlopen", unreachable)
    with pytest.raises(ModelError, match=message) as caught:
        openclip.require(model, pretrained)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=message):
        train(["/no/source"], tmp_path, configure({"model": model, "pretrained": pretrained}))


def test_a_folder_or_a_file_in_the_wrong_place_is_said(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(b"no weights")
    with pytest.raises(ModelError, match="a file, not a run folder.*NAME:FILE"):
        load_model(file)
    with pytest.raises(ModelError, match="a folder; give ViT-B-32:FILE"):
        load_model(f"ViT-B-32:{tmp_path}")
    for pretrained, message in ((tmp_path, "a folder"), (file, "not a file written by torch.save")):
        with pytest.raises(ModelError, match=message):
            openclip.require("ViT-B-32", str(pretrained))


def test_a_model_given_as_a_preset_is_said() -> None:
    with pytest.raises(ModelError, match=r"it is an open_clip model: .*--model"):
        require_preset("vit-b/32")


def test_a_configuration_that_is_not_supported_is_said(own_config: Path) -> None:
    file = own_config / "open_clip_config.json"
    content = json.loads(file.read_text())
    content["model_cfg"]["vision_cfg"]["image_size"] = [64, 32]
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="64 x 32 pixels; only squares are supported"):
        load_model(f"local-dir:{own_config}")
    file.write_text("{}")
    with pytest.raises(ModelError, match="cannot be used: KeyError: 'model_cfg'"):
        load_model(f"local-dir:{own_config}")


def test_loading_leaves_the_programs_logging_alone(
    small_clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = list(root.handlers), list(root.filters), root.level
    openclip.load(small_clip, None)
    assert (list(root.handlers), list(root.filters), root.level) == before
    assert capsys.readouterr().err == ""
