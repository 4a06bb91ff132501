"""Say which of some words fits each image of a folder best, without a store.

python examples/label_images.py MODEL photos/ "a dog" "a cat" "a car"
"""

import sys
from pathlib import Path

from mmalign import load_model


def main() -> None:
    """Encode images and words, and compare."""
    model, folder, *words = sys.argv[1:]
    encoder = load_model(model)
    images = sorted(p for p in Path(folder).iterdir() if p.suffix in (".jpg", ".png"))
    cosines = encoder.encode(images) @ encoder.encode(words).T
    for image, best in zip(images, cosines.argmax(axis=1), strict=True):
        print(f"{image.name}: {words[best]}")


if __name__ == "__main__":
    main()
