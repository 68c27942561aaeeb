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

FEW_ROWS = 1024
WIDE = 2**40

C = LaunchConfig
CONFIGS = {
    ("reflect", 2, 16): [(FEW_ROWS, WIDE, C(16, 256, 4, 3)), (WIDE, 2048, C(64, 128, 4, 3)), (WIDE, 8192, C(32, 128, 4, 3)), (WIDE, WIDE, C(16, 256, 4, 3))],
    ("reflect", 2, 32): [(FEW_ROWS, WIDE, C(16, 128, 4, 3)), (WIDE, 4096, C(64, 64, 4, 3)), (WIDE, WIDE, C(32, 64, 4, 3))],
    ("reflect", 2, 64): [(FEW_ROWS, WIDE, C(16, 64, 4, 3)), (WIDE, WIDE, C(64, 64, 8, 2))],
    ("reflect", 4, 16): [(FEW_ROWS, WIDE, C(16, 64, 4, 3)), (WIDE, WIDE, C(32, 64, 4, 3))],
    ("reflect", 4, 32): [(WIDE, WIDE, C(32, 64, 8, 2))],
    ("reflect", 4, 64): [(WIDE, WIDE, C(32, 32, 8, 2))],
    ("project", 2, 64): [(WIDE, WIDE, C(64, 64, 4, 2))],
    ("project", 4, 64): [(WIDE, WIDE, C(64, 32, 4, 2))],
    ("combine", 2, 64): [(WIDE, WIDE, C(64, 64, 4, 2))],
    ("combine", 4, 64): [(WIDE, WIDE, C(64, 32, 8, 2))],
    ("backward_rows", 2, 16): [(FEW_ROWS, WIDE, C(16, 64, 4, 3)), (WIDE, WIDE, C(64, 128, 4, 2))],
    ("backward_rows", 2, 32): [(FEW_ROWS, WIDE, C(16, 64, 4, 3)), (WIDE, WIDE, C(32, 32, 8, 2))],
    ("backward_rows", 4, 16): [(FEW_ROWS, WIDE, C(16, 64, 4, 3)), (WIDE, WIDE, C(32, 64, 4, 3))],
    ("backward_rows", 4, 32): [(WIDE, WIDE, C(32, 32, 8, 2))],
    ("backward_columns", 2, 16): [(WIDE, WIDE, C(32, 128, 4, 2))],
    ("backward_columns", 2, 32): [(WIDE, WIDE, C(32, 128, 8, 2))],
    ("backward_columns", 2, 64): [(WIDE, WIDE, C(32, 64, 8, 2))],
    ("backward_columns", 4, 16): [(WIDE, WIDE, C(32, 64, 8, 2))],
    ("backward_columns", 4, 32): [(WIDE, WIDE, C(32, 64, 8, 2))],
    ("backward_columns", 4, 64): [(WIDE, WIDE, C(32, 32, 8, 2))],
}


def select_config(kernel: str, element_size: int, block_r: int, M: int, D: int) -> LaunchConfig:
    for most_m, most_d, config in CONFIGS[kernel, element_size, block_r]:
        if M <= most_m and D <= most_d:
            return config
    raise AssertionError


def shapes_of_every_config():
    return [(64, 4096), (8192, 2048), (8192, 4096), (8192, 16384)]
