"""Decode and resize JPEGs on a GPU where decoding on the CPU's cores could not keep it busy.

Shapes: B images, H height, W width, S side of the result in pixels.

torchvision decodes with nvJPEG on a CUDA device and with libjpeg on a CPU; torch does the resizing,
antialiased, which differs by a grey level from `decode.fit_image`. Anything but a plain JPEG is
decoded on the CPU. torchvision warns that its decoders will move to TorchCodec, whose wheels do not
work with all of its versions yet.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.data.colours import is_srgb
from mmalign.data.decode import Fit, fit, open_header
from mmalign.data.exif import ORIENTATION, read_exif

# A batch of larger ones would not fit in memory; the CPU decodes them at reduced scale.
MOST_PIXELS = 1 << 25
END_OF_IMAGE = b"\xff\xd9"


def suits_device(content: bytes) -> bool:
    """Return whether an image is a complete upright sRGB JPEG; only its header is read."""
    if not content.startswith(b"\xff\xd8") or END_OF_IMAGE not in content[-64:]:
        return False
    try:
        image = open_header(content)
        return (
            image is not None
            and image.format == "JPEG"
            and image.mode == "RGB"
            and is_srgb(image.info.get("icc_profile"))
            and read_exif(image).get(ORIENTATION, 1) == 1
            and image.width * image.height <= MOST_PIXELS
        )
    except Exception:  # decoders raise anything; the CPU path reports the reason
        return False


def decode_on(
    device: torch.device, contents: Sequence[bytes], size: int, mode: str, interpolation: str
) -> Tensor:
    """Decode JPEGs and resize them to (B, 3, S, S) uint8 on a device; see `decode.fit_image`.

    Raises:
        RuntimeError: One of them cannot be decoded.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.frombuffer(bytearray(c), dtype=torch.uint8) for c in contents]
    images = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    return torch.stack([_resize(image, size, mode, interpolation) for image in images])


def _resize(image_3HW: Tensor, size: int, mode: str, interpolation: str) -> Tensor:
    height, width = image_3HW.shape[1:]
    plan: Fit = fit(width, height, size, mode)
    scaled = F.interpolate(
        image_3HW[None].float(), (plan.height, plan.width), mode=interpolation, antialias=True
    )
    pixels = scaled[0].round_().clamp_(0, 255).to(torch.uint8)
    if mode != "longest":
        return pixels[:, plan.top : plan.top + size, plan.left : plan.left + size]
    right, below = size - plan.width - plan.left, size - plan.height - plan.top
    return F.pad(pixels, (plan.left, right, plan.top, below))
