"""Apply random crops, flips and colour changes to a whole batch at once.

B images, S side of the input, T side of the output. This takes one resampling and one affine map of
the colours, so that augmenting 256 small images costs milliseconds.
"""

import math
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

    def __call__(self, images_B3SS: Tensor, side: int, generator: torch.Generator) -> Tensor:
        """Return float pixels in [0, 255], shape (B, 3, side, side)."""
        images = _crop(images_B3SS.float(), side, self, generator)
        if self.colour:
            images = _recolour(images, self.colour, generator)
        if self.erase:
            images = _erase(images, self.erase, generator)
        return images


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def _crop(images: Tensor, side: int, config: Augment, generator: torch.Generator) -> Tensor:
    """Resize a random box of each image (or its mirror) to (side, side)."""
    count = len(images)
    if config.crop_min >= 1 and not config.flip:
        if images.shape[-1] == side:
            return images
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    # Without cropping (crop_min of 1) there is no room to change the aspect either.
    area = _uniform(count, min(config.crop_min, 1.0), 1.0, generator)
    log_aspect = math.log(config.aspect) if config.crop_min < 1 else 0.0
    stretch = _uniform(count, -log_aspect, log_aspect, generator).exp().sqrt()
    width = (area.sqrt() * stretch).clamp(max=1.0)
    height = (area.sqrt() / stretch).clamp(max=1.0)
    # In grid_sample's coordinates the image spans [-1, 1].
    x = _uniform(count, -1.0, 1.0, generator) * (1 - width)
    y = _uniform(count, -1.0, 1.0, generator) * (1 - height)
    if config.flip:
        width = width * torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = width, x, height, y
    grid = F.affine_grid(theta, [count, 3, side, side], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _recolour(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation as one affine map per image."""
    shape = (len(images), 1, 1, 1)
    brightness, contrast, saturation = (
        _uniform(len(images), 1 - amount, 1 + amount, generator).view(shape) for _ in range(3)
    )
    grey = images.mean(dim=1, keepdim=True)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    images = grey + (images - grey) * saturation
    images = mean + (images - mean) * contrast
    return (images * brightness).clamp_(0, 255)


def _erase(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Grey out one box of up to half the side in a share of the images."""
    count, side = len(images), images.shape[-1]
    centre = torch.rand(count, 2, generator=generator) * side
    half = _uniform(count, 0.1, 0.25, generator)[:, None] * side
    half = half * (torch.rand(count, 1, generator=generator) < share)
    positions = torch.arange(side)
    inside_y, inside_x = ((positions - centre[:, i : i + 1]).abs() < half for i in (0, 1))
    box = inside_y[:, None, :, None] & inside_x[:, None, None, :]
    return images.masked_fill(box, 127.0)
