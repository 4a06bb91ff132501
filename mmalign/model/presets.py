"""Our own presets for training from scratch; parameters are counted with a full vocabulary.

    nano    2.7M   drawings and icons at 64 px: minutes on two cores. Keeps a 4 x 4 grid of the
                   picture, so that left and above carry meaning
    tiny    7.3M   photos at 96 px: twenty minutes to some hours on a few cores. Its text tower is a
                   bag of words, which learns faster than a transformer in such a short time
                   (docs/history.md)
    small  24.3M   photos at 112 px, hundreds of thousands of pairs: a GPU, or a long CPU run

The convolutions are plain 3x3 and their widths multiples of 32 on purpose: on a CPU they train
twice as fast as a ResNet-10-T of the same size.
"""

from dataclasses import dataclass

from mmalign.model.encoder import Preprocess


@dataclass(frozen=True)
class Preset:
    """The architecture of a dual encoder."""

    image_size: int
    """Side of the input in pixels."""
    image_widths: tuple[int, ...]
    """Channels of the stages; each stage after the first halves the resolution."""
    image_blocks: tuple[int, ...]
    """Residual blocks in each stage."""
    stem_strides: int = 1
    """Strided convolutions before the first stage."""
    image_grid: int = 0
    """Side of the grid that the last maps are pooled to; 0 averages them and loses position."""
    text_width: int = 256
    text_layers: int = 1
    """Transformer layers; 0 is a bag of words."""
    text_heads: int = 4
    text_hidden: int = 512
    """Width of the layer between the pooled text and the shared space."""
    dim: int = 256
    """Dimensions of the shared space."""
    vocabulary: int = 4096
    """Maximum number of tokens besides the common Chinese characters, see tokenizer.py."""
    context: int = 64
    """Maximum number of tokens read from a text."""
    dropout: float = 0.1
    """Dropout rate of features during training."""
    word_dropout: float = 0.1
    """Fraction of tokens masked during training."""
    drop_path: float = 0.0
    """Probability of skipping the last residual block during training; less for earlier ones."""

    def preprocess(self) -> Preprocess:
        """Squash to the input size, so that nothing at the edges is cropped."""
        return Preprocess(size=self.image_size)


PRESETS: dict[str, Preset] = {
    "nano": Preset(
        image_size=64,
        image_widths=(32, 64, 128, 256),
        image_blocks=(1, 1, 1, 1),
        image_grid=4,
        text_width=128,
        text_layers=2,
        text_hidden=256,
        dim=128,
        vocabulary=1024,
    ),
    "tiny": Preset(
        image_size=96,
        image_widths=(64, 128, 256, 512),
        image_blocks=(1, 1, 1, 1),
        stem_strides=2,
        text_layers=0,
        dropout=0.2,
        word_dropout=0.2,
    ),
    "small": Preset(
        image_size=112,
        image_widths=(64, 128, 256, 512),
        image_blocks=(2, 2, 2, 2),
        stem_strides=2,
        text_width=384,
        text_layers=4,
        text_heads=6,
        dim=384,
        vocabulary=16_384,
    ),
}
"""The presets, for a laptop up to a workstation; `new_model` builds one by name."""
