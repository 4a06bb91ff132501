"""The encoders: our own presets and open_clip models behind one `Encoder`.

encoder.py        Encoder: images and texts in, unit vectors out; its preprocessing and identity
identity.py       the identity of a tower; the space that towers share
towers.py         the networks of our own presets
presets.py        nano, tiny, small: architecture, size and target machine of each
tokenizer.py      byte-level BPE trained on captions
openclip.py       open_clip's models by name: network, weights and preprocessing
clip_catalog.py   what open_clip knows of its models, without importing its networks
clip_networks.py  the only file that imports open_clip as a whole
clip_layers.py    CLIP's vision and text transformers, with open_clip's names of weights
clip_towers.py    open_clip models as towers: our networks, or open_clip's where it has others
weights.py        weight files: what they are, or why they cannot be loaded
torchscript.py    weights from OpenAI's archives
devices.py        the device that an encoder runs on
precision.py      float32, bfloat16 or int8 for encoding
fused.py          fused transformer layers for encoding on a CPU
int8.py           linear layers in int8
checkpoint.py     run folders: weights as safetensors, everything else as text
locate.py         the model of a store, wherever either was moved
"""

from mmalign.model.checkpoint import blank_model as blank_model
from mmalign.model.checkpoint import drop_weights as drop_weights
from mmalign.model.checkpoint import has_weights as has_weights
from mmalign.model.checkpoint import keep_weights as keep_weights
from mmalign.model.checkpoint import load_model as load_model
from mmalign.model.checkpoint import new_model as new_model
from mmalign.model.checkpoint import require_preset as require_preset
from mmalign.model.checkpoint import save_description as save_description
from mmalign.model.checkpoint import save_model as save_model
from mmalign.model.devices import to_fastest as to_fastest
from mmalign.model.encoder import Encoder as Encoder
from mmalign.model.encoder import Preprocess as Preprocess
from mmalign.model.encoder import fastest_device as fastest_device
from mmalign.model.identity import MODALITIES as MODALITIES
from mmalign.model.identity import Origin as Origin
from mmalign.model.identity import space_after as space_after
from mmalign.model.locate import find_model as find_model
from mmalign.model.locate import remember as remember
from mmalign.model.precision import Precision as Precision
from mmalign.model.precision import cosines as cosines
from mmalign.model.precision import in_precision as in_precision
from mmalign.model.presets import PRESETS as PRESETS

__all__ = [
    "MODALITIES",
    "PRESETS",
    "Encoder",
    "Origin",
    "Precision",
    "Preprocess",
    "blank_model",
    "cosines",
    "drop_weights",
    "fastest_device",
    "find_model",
    "has_weights",
    "in_precision",
    "keep_weights",
    "load_model",
    "new_model",
    "remember",
    "require_preset",
    "save_description",
    "save_model",
    "space_after",
    "to_fastest",
]
