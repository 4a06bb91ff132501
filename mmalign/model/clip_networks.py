"""open_clip's networks, tokenizers and hub; the only file that imports open_clip as a whole.

torchvision and torch must come from the same source; otherwise open_clip's import fails with an
unhelpful message, which is replaced here.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mmalign.errors import InstallError, ModelError
from mmalign.model import weights as weight_files
from mmalign.model.clip_catalog import config_of, part
from mmalign.model.encoder import Tokenizer

TORCH_MISMATCH = (
    "torch and torchvision do not match: install both from the same index, for example "
    "`pip install --force-reinstall torch torchvision`, or for a CPU-only pair "
    "`pip install --force-reinstall torch torchvision "
    "--index-url https://download.pytorch.org/whl/cpu`"
)
FOLDER, CONFIG = "local-dir", "open_clip_config.json"
REACH_SECONDS = 5


def module() -> Any:
    """Import open_clip, or explain in one line why it cannot be imported."""
    try:
        import open_clip
    except RuntimeError as error:
        if "torchvision::" in str(error):
            raise InstallError(f"{TORCH_MISMATCH} ({error})") from None
        raise
    return open_clip


class OpenClipTokenizer(Tokenizer):
    """The tokenizer that belongs to an open_clip model."""

    def __init__(self, architecture: dict[str, Any], folder: str | None = None) -> None:
        """Take an architecture as in `build`, and the folder of its vocabulary files.

        Raises:
            InstallError: It needs the package transformers.
            ModelError: Its vocabulary is not available.
        """
        self.name = str(architecture.get("name", ""))
        self.text = _text_config(architecture)
        try:
            with quiet():
                self.backend = self._backend(folder)
        except ImportError as error:
            raise InstallError(
                f"the tokenizer of {self.name or 'this model'} needs a package that is not "
                f"installed: pip install {error.name or 'transformers'}"
            ) from None
        except Exception as error:  # hub errors of many libraries
            weight_files.refuse(f"the tokenizer of {self.name or 'this model'}", error)

    def _backend(self, folder: str | None) -> Any:
        hub = self.text.get("hf_tokenizer_name")
        if self.name and hub:
            if not cached(hub, ("tokenizer_config.json",)):
                if find_spec("transformers") is None:
                    raise ImportError(name="transformers")
                require_network(hub, "the tokenizer's files")
            return module().get_tokenizer(self.name)
        kept = {k: v for k, v in self.text.items() if k != "hf_tokenizer_name"}
        words = {**kept.pop("tokenizer_kwargs", {}), **kept}
        if hub:
            return module().tokenizer.HFTokenizer(folder or hub, **words)
        words.pop("tokenizer_mode", None)
        return part("tokenizer").SimpleTokenizer(**words)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids (B, T), T the model's context length."""
        return self.backend(list(texts))  # type: ignore[no-any-return]

    def cut(self, texts: Sequence[str]) -> list[str]:
        """See `Tokenizer`."""
        most = self.backend.context_length
        # No text has more tokens than bytes, plus its start and end tokens.
        return [t for t in texts if len(t.encode()) + 2 > most and self._length(t) > most]

    def _length(self, text: str) -> int:
        """Count the tokens of a whole text with its start and end; 0 if open_clip does not tell."""
        if hasattr(self.backend, "encode"):
            return len(self.backend.encode(text)) + 2
        if hasattr(self.backend, "tokenizer"):
            return len(self.backend.tokenizer(text)["input_ids"])
        return 0

    def to_json(self) -> str:
        """Return the name, which is enough: open_clip holds the vocabulary."""
        return json.dumps({"open_clip": self.name or self.text}, sort_keys=True)

    def decisive(self) -> str:
        """Return the settings that an architecture's name stands for: other names share them."""
        return json.dumps({"open_clip": self.text}, sort_keys=True)


def _text_config(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the tokens of a text."""
    text = config_of(architecture).get("text_cfg", {})
    keys = ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")
    return {
        "context_length": text.get("context_length", 77),
        **{key: text[key] for key in keys if text.get(key)},
    }


def blank(architecture: dict[str, Any], preprocess: dict[str, Any] | None = None) -> Any:
    """Build an open_clip network without weights: all are NaN until some are loaded.

    Args:
        architecture: `name`, or `config` (open_clip's model_cfg), and `quick_gelu` if the weights
            need this activation and it is not the architecture's default.
        preprocess: Differences from open_clip's defaults.
    """
    return with_memory(build(architecture, preprocess))


def build(architecture: dict[str, Any], preprocess: dict[str, Any] | None = None) -> Any:
    """Build an open_clip network whose parameters have no memory yet; see `blank`.

    Random initialization, which takes seconds for a large network, is skipped. Buffers exist.
    """
    thread = threading.get_ident()

    def without_memory(_: nn.Module, __: str, weight: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or weight is None or weight.is_meta:
            return None
        return nn.Parameter(weight.to("meta"), weight.requires_grad)

    hook = register_module_parameter_registration_hook(without_memory)  # type: ignore[arg-type]
    try:
        # No device, as parameters without memory cannot be moved.
        return create(architecture, preprocess, device=None)
    except RuntimeError:
        pass  # some timm networks run during construction to infer their shapes
    finally:
        hook.remove()
    return create(architecture, preprocess, device="cpu")


def with_memory(network: Any) -> Any:
    """Allocate the parameters of `build`, all NaN; those that layers share stay shared."""
    given: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for layer in network.modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            if id(weight) not in given:
                full = torch.full_like(weight, torch.nan, device="cpu")
                given[id(weight)] = weight, nn.Parameter(full, weight.requires_grad)
            setattr(layer, name, given[id(weight)][1])
    return network


def create(
    architecture: dict[str, Any], preprocess: dict[str, Any] | None, device: str | None
) -> Any:
    """Build with open_clip's own function and its random weights; see `blank`."""
    words = {
        "load_weights": False,
        "pretrained_text": False,
        "device": device,
        "force_quick_gelu": architecture.get("quick_gelu", False),
        "force_preprocess_cfg": preprocess or {},
    }
    with quiet():
        if "config" not in architecture:
            return module().create_model(architecture["name"], **words)
        with TemporaryDirectory() as folder:
            (Path(folder) / CONFIG).write_text(
                json.dumps({"model_cfg": architecture["config"]}), encoding="utf-8"
            )
            return module().create_model(f"{FOLDER}:{folder}", **words)


def cached(repo: str, wanted: Sequence[str]) -> Path | None:
    """Find the first of some files of a repository in the hub's cache, without network access."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repo, name) for name in wanted)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def require_network(shown: str, where: str, instead: str = "") -> None:
    """Check within seconds whether a download can start; libraries try for a minute.

    Raises:
        ModelError: It cannot.
    """
    from huggingface_hub import constants

    host = constants.ENDPOINT
    if where.startswith("http"):
        host = "/".join(where.split("/")[:3])
    why = ""
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    else:
        try:
            urlopen(Request(host, method="HEAD"), timeout=REACH_SECONDS).close()
        except HTTPError:
            pass  # it answers
        except (OSError, ValueError) as error:
            why = f"{host} cannot be reached: {getattr(error, 'reason', error)}"
    if why:
        other = f"; download {where} on another machine and give {instead}" if instead else ""
        raise ModelError(f"{shown}: not on this machine, and {why}{other}")


class _NotOpenClip(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}open_clip{os.sep}" not in record.pathname


@contextmanager
def quiet() -> Iterator[None]:
    """Keep open_clip's messages out of the root logger: our own errors report what matters."""
    root, no_lines, nowhere = logging.getLogger(), _NotOpenClip(), logging.NullHandler()
    root.addFilter(no_lines)
    # Without a handler, its first message would configure logging for the whole program.
    root.addHandler(nowhere)
    try:
        yield
    finally:
        root.removeFilter(no_lines)
        root.removeHandler(nowhere)
