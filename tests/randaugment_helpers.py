"""RandAugment's operations, one image at a time, by Pillow if it has the operation."""

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

OPERATIONS = (
    "AutoContrast Equalize Invert Rotate Posterize Solarize Color Contrast Brightness Sharpness "
    "ShearX ShearY TranslateX TranslateY Cutout SolarizeAdd"
).split()


def slow_operation(
    name: str, image: Tensor, m: int, sign: int, center: tuple[float, float]
) -> Tensor:
    """Return uint8 `image` [3, H, W] after an operation of magnitude `m`."""
    picture, (height, width) = to_pil_image(image), image.shape[1:]
    m, scale = m / 10, width / 224

    def affine(*matrix: float) -> Image.Image:
        how = Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST
        return picture.transform(picture.size, *how, fillcolor=(128, 128, 128))

    def rotated() -> Image.Image:
        return picture.rotate(30 * m * sign, Image.Resampling.NEAREST, fillcolor=(128, 128, 128))

    def posterized(bits: int) -> Image.Image:  # Pillow refuses 0 bits
        return ImageOps.posterize(picture, bits) if bits else picture.point(lambda _: 0)

    def cut() -> Image.Image:
        pixels, half = np.array(picture), round(40 * m * scale)
        row, column = int(center[0] * height), int(center[1] * width)
        for y in range(max(0, row - half), min(height, row + half)):
            for x in range(max(0, column - half), min(width, column + half)):
                pixels[y, x] = 128
        return Image.fromarray(pixels)

    shear, shift = 0.3 * m * sign, 100 * m * scale * sign
    enhanced = 1.8 * m + 0.1
    operations = {
        "AutoContrast": lambda: ImageOps.autocontrast(picture),
        "Equalize": lambda: ImageOps.equalize(picture),
        "Invert": lambda: ImageOps.invert(picture),
        "Rotate": rotated,
        "Posterize": lambda: posterized(int(4 * m)),
        "Solarize": lambda: ImageOps.solarize(picture, int(256 * m)),
        "Color": lambda: ImageEnhance.Color(picture).enhance(enhanced),
        "Contrast": lambda: ImageEnhance.Contrast(picture).enhance(enhanced),
        "Brightness": lambda: ImageEnhance.Brightness(picture).enhance(enhanced),
        "Sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(enhanced),
        # Pillow transforms the centers of pixels, at (.5, .5), TensorFlow their corners
        "ShearX": lambda: affine(1, shear, -shear / 2, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, shear, 1, -shear / 2),
        "TranslateX": lambda: affine(1, 0, shift, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, shift),
        "Cutout": cut,
        "SolarizeAdd": lambda: picture.point(
            lambda v: min(255, v + int(110 * m)) if v < 128 else v
        ),
    }
    return pil_to_tensor(operations[name]())


def slow_randaugment(image: Tensor, draws: Tensor, m: int) -> Tensor:
    """Return the image [3, H, W] in [0, 1] after the drawn operations [N, 4]."""
    levels = (255 * image).round().to(torch.uint8)
    for index, sign, *center in draws.tolist():
        name = OPERATIONS[int(16 * index)]
        levels = slow_operation(name, levels, m, -1 if sign < 0.5 else 1, center)
    return levels.float() / 255
