"""Launch configurations of the Triton kernels: frozen data, chosen by shape alone, no autotuning on a user's call."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes (rows, columns of x), warps a program and stages of the software pipeline."""

    block_m: int
    block_d: int
    num_warps: int
    num_stages: int


COLUMN_PROGRAMS = 1024
ROW_PROGRAMS = 512
GRAM_BLOCK_D = 16
GRAM_SPLITS = 16
SCALE_BLOCK_D = 128
SUM_BLOCK = 512
PRODUCT_CONFIG = LaunchConfig(64, 32, 4, 2)


def select_config(kernel: str, element_size: int, block_r: int, M: int, D: int) -> LaunchConfig:
    return LaunchConfig(32, 64, 4, 2)
