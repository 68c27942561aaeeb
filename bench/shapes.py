"""Named shapes: layers of real models, and the four synthetic Linears every result table starts with.

A shape is (M, D, N): rows, in_features, out_features. Where a convolution is meant, `conv` has its geometry and
M = batch * height * width, D = in_channels * kh * kw, N = out_channels.
"""

import re
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Conv:
    """A square Conv2d with padding kernel // 2 and stride 1."""

    batch: int
    channels: int
    out_channels: int
    size: int
    kernel: int


@dataclass(frozen=True)
class Shape:
    name: str
    M: int
    D: int
    N: int
    conv: Conv | None = None

    def __str__(self) -> str:
        sizes = f"{self.M}x{self.D}x{self.N}"
        return sizes if self.name == sizes else f"{self.name} ({sizes})"

    def as_dict(self) -> dict:
        return asdict(self)


def linear(M: int, D: int, N: int, name: str | None = None) -> Shape:
    return Shape(name or f"{M}x{D}x{N}", M, D, N)


def conv2d(name: str, batch: int, channels: int, out_channels: int, size: int, kernel: int) -> Shape:
    geometry = Conv(batch, channels, out_channels, size, kernel)
    return Shape(name, batch * size * size, channels * kernel * kernel, out_channels, geometry)


STANDARD = [linear(512, 1024, 1024), linear(2048, 2048, 2048), linear(1024, 4096, 4096), linear(2048, 4096, 1024)]

# rows: 8192 tokens a step for the language models, 32 sentences of 128 tokens for DeBERTa, 8 images of 512 x 512
# (64 x 64 latents) for Stable Diffusion
MODELS = [
    linear(8192, 4096, 4096, "llama3-8b-q"),
    linear(8192, 4096, 1024, "llama3-8b-kv"),
    linear(8192, 4096, 14336, "llama3-8b-up"),
    linear(8192, 14336, 4096, "llama3-8b-down"),
    linear(8192, 8192, 8192, "llama3-70b-q"),
    linear(8192, 8192, 28672, "llama3-70b-up"),
    linear(8192, 28672, 8192, "llama3-70b-down"),
    linear(8192, 3584, 3584, "qwen2.5-7b-q"),
    linear(8192, 3584, 18944, "qwen2.5-7b-up"),
    linear(8192, 18944, 3584, "qwen2.5-7b-down"),
    linear(4096, 768, 768, "deberta-v3-base-q"),
    linear(4096, 768, 3072, "deberta-v3-base-up"),
    linear(4096, 3072, 768, "deberta-v3-base-down"),
    linear(8 * 4096, 320, 320, "sd1.5-attn-64"),
    linear(8 * 1024, 640, 640, "sd1.5-attn-32"),
    linear(8 * 256, 1280, 1280, "sd1.5-attn-16"),
    conv2d("sd1.5-conv-64", 8, 320, 320, 64, 3),
    conv2d("sd1.5-conv-32", 8, 640, 640, 32, 3),
    conv2d("sd1.5-conv-16", 8, 1280, 1280, 16, 3),
    conv2d("sd1.5-shortcut-32", 8, 320, 640, 32, 1),
]

DECODE = [linear(M, 4096, 4096, f"llama3-8b-q-{M}row") for M in (1, 16)]
"""Few rows: where host overhead decides."""

GROUPS = {"standard": STANDARD, "models": MODELS, "decode": DECODE}
BY_NAME = {shape.name: shape for group in GROUPS.values() for shape in group}


def parse(names: list[str]) -> list[Shape]:
    """Shapes from group names, shape names or MxDxN."""
    shapes: list[Shape] = []
    for name in names:
        sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)", name)
        if name in GROUPS:
            shapes += GROUPS[name]
        elif name in BY_NAME:
            shapes.append(BY_NAME[name])
        elif sizes and all(int(size) for size in sizes.groups()):
            shapes.append(linear(*(int(size) for size in sizes.groups())))
        else:
            known = ", ".join([*GROUPS, *BY_NAME])
            raise ValueError(f"shape: expected MxDxN with positive sizes or one of {known}, got {name!r}")
    return shapes
