"""How the GPU kernels are launched: frozen data, chosen by architecture and shape, no autotuning on a user's call.

The tables are data, one file per architecture in `launch_tables/`: `default.json` serves every GPU, and the file named
like an architecture (sm_90, gfx942) replaces those of its entries that it has. `python -m bench.gpu.tune` measures and
writes the file of the GPU it runs on. Each line has a `why`: the time it was chosen by, or the reasoning it rests on.

NOT YET MEASURED ON A GPU. What is checked without one: every line of an architecture's table compiles for it with no
spill, with matrix instructions and 16-byte accesses; `python -m tests.triton.machine_code` prints the registers.

The reasoning behind the tiles, for an H100 (132 multiprocessors, 50 MB of L2, 3.0 TB/s):
  * the second sweep finds x in L2 only while the rows in flight fit, so the grid has no more programs than that, and at
    least one per multiprocessor, which go from row block to row block: 132 * block_m * D * 2 bytes. The reverse order
    saves a part where even those do not fit. One program has to hide its own latency: two tiles on their way beside
    the one in use, 16 KB each where registers let them;
  * a program reads all of v (4 R D bytes) in each sweep, from L2: with R = 8 as many bytes as 16 rows of bfloat16 x, so
    a larger block_m halves that traffic; L2 gives about twice what device memory does. Reading each row once and
    making [hi | lo] of it on chip was tried: 20 % fewer bytes, but 40 % more instructions, in 4-byte stores;
  * above 16 columns 16-bit kernels read halves of v that a launch of its own has made: as many bytes as v, but nothing
    is converted in the sweeps, and no tile of float32 v is in registers. Each program has one block of rows: addresses
    that a loop over blocks holds were 60 to 120 registers. 64 rows of x are then as many bytes as v at R = 32;
  * few rows are few programs: the smallest block_m, and wide tiles for fewer steps, because latency is all there is;
  * a tile of x, its float32 update and v's two halves live in 255 registers per thread;
  * `backward_rows` sweeps once, so L2 does not limit its rows: 64 of them, for v's sake; in `backward_columns` a strip
    keeps v and dv on the chip, and 128 columns are 256 contiguous bytes of each row.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes (rows, columns of x), warps of 32 threads per program, and stages of the software pipeline."""

    block_m: int
    block_d: int
    num_warps: int
    num_stages: int


TABLES = Path(__file__).with_name("launch_tables")
DEFAULT = "default"
WIDE = 2**40
"""No limit."""

TileTable = dict[tuple[str, int, int], list[tuple[int, int, LaunchConfig]]]
"""{(kernel, bytes per element of x, rank): [(largest M, largest D, config), ...]}; the first line that fits serves."""


def _limit(value: int | None) -> int:
    return WIDE if value is None else value


def read_tiles(rows: list[dict]) -> TileTable:
    """The `tiles` of a table's file."""
    found: TileTable = {}
    for row in rows:
        line = (_limit(row["max_m"]), _limit(row["max_d"]), LaunchConfig(*row["tile"]))
        found.setdefault((row["kernel"], row["bytes"], row["rank"]), []).append(line)
    return found


def read_slices(rows: list[dict]) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """The `slices` of a table's file."""
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for row in rows:
        found.setdefault((row["pass"], row["rank"]), []).append((_limit(row["max_d"]), row["slice"]))
    return found


_FILES = {path.stem: json.loads(path.read_text()) for path in sorted(TABLES.glob("*.json"))}

CONFIGS: dict[str, TileTable] = {
    name: read_tiles(_FILES[DEFAULT]["tiles"]) | read_tiles(content["tiles"]) for name, content in _FILES.items()
}
"""Triton's tiles by architecture; one that has no table of its own takes the default. The rank of a key is the largest
that it serves: 16-bit kernels run other code for 8 columns and less than for 16."""

SLICES = read_slices(_FILES["sm_90"]["slices"])
"""{(pass of the CUDA kernels, rank padded to 8 or 16): [(largest D, columns of x per block), ...]}; the first that fits
serves. They need the clusters of sm_90; bench/gpu/notes.md has the predictions."""

PRODUCT_CONFIG = LaunchConfig(64, 32, 8, 3)
"""`product_kernel`: tiles of 64 x 64, 32 of the inner axis per step; 4 warps spill on sm_80, 2 stages on sm_100."""

L2_SHARE = 0.75
"""Of L2, for the rows of x between `reflect_kernel`'s two sweeps; v, p and y, which leaves first, take the rest. Not
kept to by 16-bit kernels for more than 16 columns, which take all row blocks at once."""

COLUMN_PROGRAMS = 1024
"""Programs `backward_columns_kernel` is divided into: 4 waves of 2 per multiprocessor. Their dv partials are 4 MB at
R = 8, D = 4096, where M = 8192 rows of x, dy and dx are 201 MB. Constant, so that sums have one order on every GPU."""

ROW_PROGRAMS = 512
"""Most programs of `backward_rows_kernel`, each of which leaves R x R partial sums; beyond 16 columns, 16-bit kernels
have one for each block of rows (at D = 4096 and R = 32 their sums are 1 % of x)."""

GRAM_BLOCK_D = 16
"""`gram_kernel`: 16 x 16 x 16 float64 products per step, 16 per thread of 8 warps; 32 per thread spill on sm_120."""

GRAM_COLUMNS = 64
"""Least columns of a split in `gram_kernel`: 4 steps one after the other, of which each takes a latency of memory."""

SCALE_BLOCK_D = 1024
"""`scale_rows_kernel`: 8 float64 per thread and column; its three sweeps are 4 steps each at D = 4096."""

SCALE_PAIRS = 1
"""Pairs of columns per program of `scale_rows_kernel`: all of them side by side, whose steps are latency alone."""

HALVES_BLOCK = 1024
"""`halves_kernel`: 8 elements per thread, which it stores as 16 bytes."""

SUM_BLOCK = 512
"""`sum_kernel`: 16 bytes per thread and load."""

SHAPES_OF_EVERY_LINE = ((64, 4096), (8192, 2048), (8192, 4096), (8192, 16384))
"""(M, D) that between them reach every line of `CONFIGS`."""


def gram_splits(rank: int) -> int:
    """Most splits of D in `gram_kernel`: few columns are few programs; of many, the partial sums are R x R each."""
    return 32 if rank <= 32 else 16


def factor_warps(block_r: int) -> int:
    """Warps of `chain_factor_kernel` and `gram_schmidt_kernel`, which hold 16 x R float64: at R = 256, 4 or 8 spill."""
    return 16 if block_r > 128 else 4


@functools.cache
def _architecture(device: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def architecture() -> str:
    """The key of the current device's table: sm_90, gfx942, ..., or `DEFAULT` where no GPU is in use."""
    return _architecture(torch.cuda.current_device()) if torch.cuda.is_initialized() else DEFAULT


def select_config(
    kernel: str, element_size: int, rank: int, M: int, D: int, architecture_key: str | None = None
) -> LaunchConfig:
    """The tile of `kernel` for `rank` columns: the first line that fits.

    Args:
        element_size: bytes per element of x, 2 or 4.
        rank: columns of u; above 64 they go 64 at a time, by the lines of rank 64.
        architecture_key: whose table; None for the current device's.

    Raises:
        KeyError: no table has this kernel and element size.
    """
    tables = CONFIGS.get(architecture_key or architecture(), CONFIGS[DEFAULT])
    for served in (8, 16, 32, 64):
        if served >= min(rank, 64) and (kernel, element_size, served) in tables:
            lines = tables[kernel, element_size, served]
            return next(config for most_m, most_d, config in lines if most_m >= M and most_d >= D)
    raise KeyError(f"select_config: no tile for {kernel} with {element_size} bytes per element and {rank} columns")


def select_slice(direction: str, rank: int, D: int) -> int:
    """Columns of x that one block of a cluster holds on chip, for `direction` "forward" or "backward".

    0: none does; the `cuda` backend serves nothing for which this is so.
    """
    lines = SLICES[direction, 8 if rank <= 8 else 16] if rank <= 16 else []
    return next((size for most_d, size in lines if most_d >= D), 0)
