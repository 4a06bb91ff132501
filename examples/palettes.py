"""A third modality beside images and texts: colour palettes, found by words and by images.

python examples/palettes.py runs/photos folder palettes.store "a red circle"

A `.palette` file has one colour a line, such as `#c83c3c`. Each becomes one vector of its row: that
of a picture of nothing but this colour, so palettes share the space of images and texts.
"""

import sys
from collections.abc import Sequence

import numpy as np
from PIL import ImageColor

import mmalign


class PaletteEncoder(mmalign.ModalityEncoder):
    """Encodes the colours of a palette with the image tower of a model."""

    def __init__(self, encoder: mmalign.Encoder) -> None:
        self.encoder, self.side = encoder, encoder.preprocess.size
        self.identity = f"palette-{encoder.tower_identity('image')}"

    def decode(self, content: bytes, *, thumbnail: bool = False) -> mmalign.Decoded:
        """Read the colours as (red, green, blue)."""
        try:
            return mmalign.Decoded([ImageColor.getrgb(c)[:3] for c in content.decode().split()])
        except ValueError as error:
            raise mmalign.SampleProblem(f"not a palette: {error}") from None

    def encode(self, parts: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Encode colours to unit vectors, (B, D)."""
        colours_B113 = np.array(parts, np.uint8)[:, None, None]
        return self.encoder.encode_images(colours_B113.repeat(self.side, 1).repeat(self.side, 2))


def main() -> None:
    """Embed a folder of images, captions and palettes; print the nearest of each modality."""
    model, folder, store, text = sys.argv[1:]
    palette = mmalign.Modality("palette", position="number", suffixes=(".palette",))
    mmalign.register_modality(palette, PaletteEncoder)
    mmalign.embed(model, folder, store)
    searcher = mmalign.Searcher.open(store)
    for modality in searcher.store.modalities:
        for hit in searcher.search(text, 3, to=modality):
            print(f"{modality:8} {hit.score:.3f}  {hit.id}  {hit.position or ''}")


if __name__ == "__main__":
    main()
