"""Random crops, flips and colour changes, each image by its own numbers, a whole batch at once.

Shapes: B images, S side of the input.

A batch takes one resampling and one affine map of the colours. The transforms of torchvision draw
one set of numbers for a batch, so they would run image by image.

Random numbers are drawn on the host and applied on the device of the images: a run sees the same
crops on any device, and however its batches are divided.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.config import require


@dataclass(frozen=True)
class Augment:
    """The strength of training augmentation. `none()` leaves images unchanged."""

    crop_min: float = 0.35
    """Smallest share of the image's area that a random crop keeps; 1 turns cropping off."""
    aspect: float = 1.25
    """Largest change of a crop's aspect ratio."""
    flip: bool | None = None
    """Mirror half of the images; if unset, only if the captions do not mention left and right."""
    colour: float = 0.4
    """Largest relative change of brightness, contrast and saturation."""
    erase: float = 0.3
    """Share of images in which one random box is greyed out."""

    def __post_init__(self) -> None:
        """Refuse invalid values, naming the option."""
        require(self.crop_min > 0, "augment.crop_min", self.crop_min, "above 0")
        require(self.aspect >= 1, "augment.aspect", self.aspect, "at least 1")
        require(self.colour >= 0, "augment.colour", self.colour, "at least 0")
        require(0 <= self.erase <= 1, "augment.erase", self.erase, "in [0, 1]")

    def draw(self, count: int, generator: torch.Generator) -> "Augmentation":
        """Draw the changes of a batch of images."""

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(count, generator=generator) * (high - low) + low

        crops = colours = boxes = None
        if self.crop_min < 1 or self.flip:
            crops = self._crops(uniform, generator)
        if self.colour:
            low, high = 1 - self.colour, 1 + self.colour
            colours = torch.stack([uniform(low, high) for _ in range(3)], dim=1)
        if self.erase:
            centres_B2 = torch.rand(count, 2, generator=generator)
            halves_B1 = uniform(0.1, 0.25)[:, None]
            erased_B1 = torch.rand(count, 1, generator=generator) < self.erase
            boxes = torch.cat([centres_B2, halves_B1 * erased_B1], dim=1)
        return Augmentation(count, crops, colours, boxes)

    def _crops(
        self, uniform: Callable[[float, float], Tensor], generator: torch.Generator
    ) -> Tensor:
        # Without cropping (crop_min of 1) there is no room to change the aspect either.
        area_B = uniform(min(self.crop_min, 1.0), 1.0)
        log_aspect = math.log(self.aspect) if self.crop_min < 1 else 0.0
        stretch_B = uniform(-log_aspect, log_aspect).exp().sqrt()
        width_B = (area_B.sqrt() * stretch_B).clamp(max=1.0)
        height_B = (area_B.sqrt() / stretch_B).clamp(max=1.0)
        # In grid_sample's coordinates the image spans [-1, 1].
        x_B = uniform(-1.0, 1.0) * (1 - width_B)
        y_B = uniform(-1.0, 1.0) * (1 - height_B)
        if self.flip:
            mirrored_B = torch.rand(len(area_B), generator=generator) < 0.5
            width_B = width_B * torch.where(mirrored_B, -1.0, 1.0)
        crops_B23 = torch.zeros(len(area_B), 2, 3)
        crops_B23[:, 0, 0], crops_B23[:, 0, 2] = width_B, x_B
        crops_B23[:, 1, 1], crops_B23[:, 1, 2] = height_B, y_B
        return crops_B23


@dataclass(frozen=True)
class Augmentation:
    """The changes drawn for each image of a batch; None where a change is turned off."""

    count: int
    crops_B23: Tensor | None
    """Affine maps from the output to the input, mirrored or not."""
    colours_B3: Tensor | None
    """Factors of brightness, contrast and saturation."""
    boxes_B3: Tensor | None
    """Centre (y, x) and half side of the box to grey out, as shares of the side."""

    def split(self, size: int) -> list["Augmentation"]:
        """Divide the changes as `Tensor.split` divides the images."""
        drawn = (self.crops_B23, self.colours_B3, self.boxes_B3)
        parts = []
        for start in range(0, self.count, size):
            rows = slice(start, min(start + size, self.count))
            columns = (None if column is None else column[rows] for column in drawn)
            parts.append(Augmentation(rows.stop - start, *columns))
        return parts

    def apply(self, images_B3SS: Tensor, side: int) -> Tensor:
        """Return floats in [0, 255], (B, 3, side, side), on the device of the images."""
        images = _crop(images_B3SS.float(), side, self.crops_B23)
        if self.colours_B3 is not None:
            images = _recolour(images, self.colours_B3.to(images.device))
        if self.boxes_B3 is not None:
            images = _erase(images, self.boxes_B3.to(images.device))
        return images


def _crop(images: Tensor, side: int, crops_B23: Tensor | None) -> Tensor:
    """Resize a box of each image (or its mirror image) to (side, side)."""
    if crops_B23 is None:
        if images.shape[-1] == side:
            return images
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    crops = crops_B23.to(images.device)
    grid = F.affine_grid(crops, [len(images), 3, side, side], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _recolour(images: Tensor, colours_B3: Tensor) -> Tensor:
    """Change brightness, contrast and saturation as one affine map per image."""
    brightness, contrast, saturation = (c.view(-1, 1, 1, 1) for c in colours_B3.unbind(1))
    grey = images.mean(dim=1, keepdim=True)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    images = grey + (images - grey) * saturation
    images = mean + (images - mean) * contrast
    return (images * brightness).clamp_(0, 255)


def _erase(images: Tensor, boxes_B3: Tensor) -> Tensor:
    """Grey out one box of each image; it may be empty."""
    side = images.shape[-1]
    positions = torch.arange(side, device=images.device)
    centres_B2, halves_B1 = boxes_B3[:, :2] * side, boxes_B3[:, 2:] * side
    inside_y, inside_x = ((positions - centres_B2[:, i : i + 1]).abs() < halves_B1 for i in (0, 1))
    box = inside_y[:, None, :, None] & inside_x[:, None, None, :]
    return images.masked_fill(box, 127.0)
