"""How the GPU kernels are launched: frozen data, chosen by shape alone, no autotuning on a user's call.

`CONFIGS` is for Triton, `SLICES` for CUDA.

NOT YET MEASURED ON A GPU. Each line's comment is the reasoning it rests on; `python -m bench.gpu.tune` measures and
writes both tables anew. What CI checks today: every line compiles for sm_80, sm_90, sm_100, sm_120 and gfx942 with no
spill, with matrix instructions and 16-byte accesses; `python -m tests.triton.machine_code` prints the registers.

The reasoning, for an H100 (132 multiprocessors, 50 MB of L2, 3.0 TB/s):
  * the second sweep finds x in L2 only while the rows in flight fit: 132 * block_m * D * 2 bytes against about 30 MB,
    of which the reverse order saves part where they do not: block_m * D of 2^17 to 2^18 elements;
  * a program reads all of v (4 R D bytes) in each sweep, from L2: with R = 8 as many bytes as 16 rows of bfloat16 x, so
    a larger block_m halves that traffic; L2 gives about twice what device memory does;
  * few rows are few programs: the smallest block_m, and wide tiles for fewer steps, because latency is all there is;
  * a tile of x, its float32 update and v's two halves live in 255 registers a thread.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes (rows, columns of x), warps of 32 threads a program, and stages of the software pipeline."""

    block_m: int
    block_d: int
    num_warps: int
    num_stages: int


FEW_ROWS = 1024
"""Rows up to which 64-row blocks would leave most multiprocessors without work."""

WIDE = 2**40
"""No limit."""

# {(kernel, bytes an element of x, BLOCK_R): [(largest M, largest D, config), ...]}; the first line that fits serves
CONFIGS = {
    ("reflect", 2, 16): [
        (FEW_ROWS, WIDE, LaunchConfig(16, 256, 4, 3)),  # 8 KB tiles, 3 in flight: 24 KB; 16 steps a sweep at D = 4096
        (WIDE, 2048, LaunchConfig(64, 128, 4, 3)),  # 64 rows x 2048 x 132 = 35 MB in L2; wgmma on sm_90
        (WIDE, 8192, LaunchConfig(32, 128, 4, 3)),  # 35 MB at D = 4096; 102 registers on sm_90, 4 programs each
        (WIDE, WIDE, LaunchConfig(16, 256, 4, 3)),  # 69 MB at D = 16384: half of the second sweep from L2
    ],
    ("reflect", 2, 32): [
        (FEW_ROWS, WIDE, LaunchConfig(16, 128, 4, 3)),  # as above; v's tile is twice as tall, so half as wide
        (WIDE, 4096, LaunchConfig(64, 64, 4, 3)),  # v is 128 D bytes a sweep: 64 rows of x for it to be no more than x
        (WIDE, WIDE, LaunchConfig(32, 64, 4, 3)),  # 35 to 69 MB of rows in flight
    ],
    ("reflect", 2, 64): [
        (FEW_ROWS, WIDE, LaunchConfig(16, 64, 8, 3)),  # as above; 4 warps spill on sm_120
        (WIDE, WIDE, LaunchConfig(32, 64, 8, 2)),  # 64 rows spill on sm_80, where the operands of mma are registers
    ],
    ("reflect", 4, 16): [
        (FEW_ROWS, WIDE, LaunchConfig(16, 64, 4, 3)),  # 128 columns take all 255 registers (three-pass tf32)
        (WIDE, WIDE, LaunchConfig(32, 64, 4, 3)),  # rows are twice as large: 32 of them are 35 MB at D = 2048
    ],
    ("reflect", 4, 32): [(WIDE, WIDE, LaunchConfig(32, 64, 8, 2))],  # 233 registers with 4 warps, so 8
    ("reflect", 4, 64): [(WIDE, WIDE, LaunchConfig(32, 32, 8, 2))],  # likewise
    # one sweep, so L2 does not limit the rows: 64 of them, for v's sake
    ("backward_rows", 2, 16): [
        (FEW_ROWS, WIDE, LaunchConfig(16, 128, 4, 2)),  # 64 columns (or 256 on 8 warps) spill on sm_120
        (WIDE, WIDE, LaunchConfig(64, 128, 4, 2)),  # 16 KB tiles; 128 programs at M = 8192
    ],
    ("backward_rows", 2, 32): [
        (FEW_ROWS, WIDE, LaunchConfig(16, 64, 4, 3)),  # 243 registers
        (WIDE, WIDE, LaunchConfig(32, 32, 8, 2)),  # wider spills: q, p, m and dt are all float32 matrix operands
    ],
    ("backward_rows", 4, 16): [
        (FEW_ROWS, WIDE, LaunchConfig(16, 64, 4, 3)),  # 230 registers
        (WIDE, WIDE, LaunchConfig(32, 64, 4, 3)),  # 246 registers
    ],
    ("backward_rows", 4, 32): [(WIDE, WIDE, LaunchConfig(32, 32, 8, 2))],  # 239 registers
    # a strip keeps v and dv on the chip; 128 columns are 256 contiguous bytes of each row
    ("backward_columns", 2, 16): [(WIDE, WIDE, LaunchConfig(32, 128, 4, 2))],  # three 8 KB tiles; 188 registers
    ("backward_columns", 2, 32): [(WIDE, WIDE, LaunchConfig(32, 128, 8, 2))],  # spills with 4 warps in float16
    ("backward_columns", 2, 64): [(WIDE, WIDE, LaunchConfig(32, 32, 8, 2))],  # 64 columns spill on sm_80 or sm_100
    ("backward_columns", 4, 16): [(WIDE, WIDE, LaunchConfig(32, 64, 8, 2))],  # 256 bytes of a row again
    ("backward_columns", 4, 32): [(WIDE, WIDE, LaunchConfig(32, 64, 8, 2))],  # spills with 4 warps
    ("backward_columns", 4, 64): [(WIDE, WIDE, LaunchConfig(16, 32, 8, 2))],  # 32 rows spill on sm_80
    # more than 64 columns: arithmetic binds (10 R multiplications an element in 16 bits), so square tiles
    ("backward_dv", 2, 64): [(WIDE, WIDE, LaunchConfig(32, 64, 8, 2))],
    ("backward_dv", 4, 64): [(WIDE, WIDE, LaunchConfig(32, 32, 8, 2))],
    ("project", 2, 64): [(WIDE, WIDE, LaunchConfig(64, 32, 8, 3))],  # 2 stages spill on sm_80, 64 columns on sm_100
    ("project", 4, 64): [(WIDE, WIDE, LaunchConfig(64, 32, 4, 2))],
    ("combine", 2, 64): [(WIDE, WIDE, LaunchConfig(64, 32, 4, 2))],  # 64 columns spill on sm_80 and sm_120
    ("combine", 4, 64): [(WIDE, WIDE, LaunchConfig(64, 32, 8, 2))],
}

PRODUCT_CONFIG = LaunchConfig(64, 32, 8, 2)
"""`product_kernel`: tiles of 64 x 64, 32 of the inner axis a step; spills with 4 warps on sm_80."""

COLUMN_PROGRAMS = 1024
"""Programs `backward_columns_kernel` is divided into: 4 waves of 2 a multiprocessor. Their dv partials are 4 MB at
R = 8, D = 4096, where M = 8192 rows of x, dy and dx are 201 MB. Constant, so that sums have one order on every GPU."""

ROW_PROGRAMS = 512
"""Most programs of `backward_rows_kernel`, each of which leaves R x R partial sums."""

GRAM_BLOCK_D = 16
"""`gram_kernel`: 16 x 16 x 16 float64 products a step, 16 a thread of 8 warps; 32 a thread spill on sm_120."""

GRAM_SPLITS = 16
"""Most splits of D in `gram_kernel`, of at least 512 columns each."""

SCALE_BLOCK_D = 128
"""`scale_rows_kernel`: 8 pairs x 128 columns a step, 8 float64 a thread."""

SUM_BLOCK = 512
"""`sum_kernel`: 16 bytes a thread and load."""

SHAPES_OF_EVERY_LINE = ((64, 4096), (8192, 2048), (8192, 4096), (8192, 16384))
"""(M, D) that between them reach every line of `CONFIGS`."""


# {(pass of the CUDA kernels, rank padded to 8 or 16): [(largest D, columns of x a block), ...]}; the first that fits
# serves. bench/gpu/notes.md has the predictions.
SLICES = {
    ("forward", 8): [
        (4096, 512),  # two blocks a multiprocessor: one computes while the other waits for the exchange
        (8192, 1024),  # two blocks here too, and clusters of the portable 8
        (32768, 2048),  # one block with 64 KiB of loads in flight; clusters of 8 at D = 16384, where 1024 needs 16
    ],
    ("forward", 16): [
        (1024, 512),  # narrow rows: two blocks
        (8192, 1024),  # the exchange is twice as much for each tile: half as many tiles
        (32768, 2048),  # as above
    ],
    ("backward", 8): [
        (4096, 512),  # two blocks, likewise
        (16384, 1024),  # one block: 172 registers
    ],
    ("backward", 16): [
        (1024, 512),  # two blocks, with all of their 128 registers
        (16384, 1024),  # as in the forward; one block: 216 registers
    ],
}


def factor_warps(block_r: int) -> int:
    """Warps of `chain_factor_kernel`: 4 spill on sm_100 at R = 256 (16 columns of t are 32 float32 a thread)."""
    return 8 if block_r > 128 else 4


def select_config(kernel: str, element_size: int, block_r: int, M: int, D: int) -> LaunchConfig:
    """The first line of the table that fits."""
    lines = CONFIGS[kernel, element_size, block_r]
    return next(config for most_m, most_d, config in lines if most_m >= M and most_d >= D)


def select_slice(direction: str, rank: int, D: int) -> int:
    """Columns of x that one block of a cluster holds on chip, for `direction` "forward" or "backward"; 0: two sweeps.

    A wish: csrc/cuda/cluster.h falls back to the sweeps where it cannot be (float32, before sm_90).
    """
    lines = SLICES[direction, 8 if rank <= 8 else 16] if rank <= 16 else []
    return next((size for most_d, size in lines if most_d >= D), 0)
