"""Pictures in files, their edges, and sheets of them. Pictures are (channels, height, width) in [0, 1]."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from hra_kernels.recipes import RecipeError, reason

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
LOW, HIGH = 100, 200
"""Thresholds of the edges, as in the authors' evaluation."""
_TILE, _GAP, _LINE = 64, 2, 14


def read(path: Path, size: int | None, channels: int, nearest: bool = False) -> Tensor:
    """The middle square, resized.

    Args:
        size: of the square; None leaves the picture as it is.
        nearest: keep its colors, as of a map of segments.

    Raises:
        RecipeError: no image is there, or it does not open.
    """
    with _opened(path) as found:
        picture = ImageOps.exif_transpose(found).convert("RGB" if channels == 3 else "L")
    if size is not None:
        method = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
        picture = ImageOps.fit(picture, (size, size), method)
    array = torch.from_numpy(numpy.asarray(picture).copy())
    return (array[None] if array.dim() == 2 else array.permute(2, 0, 1)).float() / 255


def labels(path: Path) -> Tensor:
    """A map of labels (height, width) as it is stored, one number for each pixel, int64.

    Raises:
        RecipeError: no image is there, it does not open, or it has colors.
    """
    with _opened(path) as found:
        array = torch.from_numpy(numpy.asarray(found).copy())
    if array.dim() != 2:
        raise RecipeError(f"{path}: expected one label for each pixel, got {array.shape[-1]} channels")
    return array.long()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as found:
            yield found
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecipeError(f"{path}: expected an image, got a file that does not open ({reason(error)})") from error


def listed(folder: Path, what: str) -> list[Path]:
    """The images of a folder by name.

    Raises:
        RecipeError: no such folder, or none in it; `what` is the option that named it.
    """
    if not folder.is_dir():
        raise RecipeError(
            f"{what} {folder}: expected a folder with images, got {'a file' if folder.exists() else 'none'}"
        )
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise RecipeError(f"{what} {folder}: expected {', '.join(sorted(SUFFIXES))} files, got {there}")
    return found


def _bytes(picture: Tensor) -> numpy.ndarray:
    """(height, width, 3) of 0 to 255."""
    colored = picture.expand(3, -1, -1) if len(picture) == 1 else picture
    return (colored.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def save(picture: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_bytes(picture)).save(path)


def edges(picture: Tensor) -> Tensor:
    """Canny's of a picture, (3, height, width) of 0 and 1."""
    found = cv2.Canny(_bytes(picture), LOW, HIGH)
    return (torch.from_numpy(found) > 0).float().expand(3, -1, -1).contiguous()


def sheet(rows: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """A row of pictures, (n, channels, height, width), under each title."""
    side = max(_TILE, *(pictures.shape[-1] for _, pictures in rows))
    across = max(len(pictures) for _, pictures in rows)
    canvas = Image.new("RGB", (across * (side + _GAP), len(rows) * (side + _GAP + _LINE)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (title, pictures) in enumerate(rows):
        top = number * (side + _GAP + _LINE)
        pen.text((2, top + 1), title, fill="black")
        for column, picture in enumerate(interpolate(pictures, (side, side), mode="nearest")):
            canvas.paste(Image.fromarray(_bytes(picture)), (column * (side + _GAP), top + _LINE))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
