"""What only the Triton kernels can get wrong: on a GPU where there is one, else in Triton's interpreter."""

import ast
import dataclasses
import inspect
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from hra_kernels import ops, reference
from hra_kernels.backends import triton as triton_backend
from hra_kernels.backends import triton_factor_kernels, triton_kernels, triton_launch, triton_reflect, tuning
from hra_kernels.testing.cases import make_u
from hra_kernels.testing.tolerance import assert_accurate, orthogonality, relative, rounding

pytestmark = pytest.mark.skipif(
    triton_backend.BACKEND.why_unavailable() is not None, reason="no GPU, and TRITON_INTERPRET=0"
)

KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRITON = triton_backend.BACKEND
GUARD = 97
"""Elements before and behind every tensor that a kernel may write, with a value none of them computes."""


EDGY_SHAPES = [(33, 70, 1), (1, 9, 8), (70, 131, 13), (37, 50, 33), (35, 67, 70), (9, 40, 130)]


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def name_of(dtype):
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


@pytest.fixture(autouse=True)
def triton_only(device):
    """Triton serves every operator, and tensors that name no device are made where it does."""
    with ops.use_backend("triton"), device:
        yield


@pytest.fixture
def shipped_tiles():
    """Ask for it to run with the tiles of `tuning`, also in the interpreter."""


def here(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors made by a CPU's generator, on the device under test."""
    return [tensor.to(torch.get_default_device()) for tensor in tensors]


def seeded_u(D: int, R: int, columns: str, seed: int = 0) -> torch.Tensor:
    return here(make_u(D, R, columns, torch.Generator().manual_seed(seed)))[0]


@pytest.fixture
def guarded(monkeypatch) -> Callable[[], list[str]]:
    """Guard bands around every tensor the launchers allocate; call it for the list of bands that were written to."""
    buffers = []

    def empty(shape, dtype, device):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD,), 12345.0, dtype=dtype, device=device)
        inner = buffer[GUARD : GUARD + size]
        inner.fill_(float("nan"))
        buffers.append((tuple(shape), buffer))
        return inner.view(shape)

    def damage():
        return [
            f"{shape} {buffer.dtype}"
            for shape, buffer in buffers
            if not ((buffer[:GUARD] == 12345.0).all() and (buffer[-GUARD:] == 12345.0).all())
        ]

    monkeypatch.setattr(triton_launch, "empty", empty)
    like = lambda tensor, *shape: empty(shape, tensor.dtype, tensor.device)  # noqa: E731
    monkeypatch.setattr(triton_launch, "empty_like", like)
    return damage


def in_poison(tensor: torch.Tensor, pad: int = 11) -> torch.Tensor:
    """The same (rows, columns) as a view with NaN on all sides: reading past any edge shows in the result."""
    rows, columns = tensor.shape
    buffer = tensor.new_full((rows + 2, columns + 2 * pad), float("nan"))
    view = buffer[1 : 1 + rows, pad : pad + columns]
    view.copy_(tensor)
    return view


def reflect_inputs(M, D, R, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(M, D, generator=generator).to(dtype) for _ in range(2))
    v, t = (torch.randn(R, columns, generator=generator) for columns in (D, R))
    return here(x, dy, v / D**0.5, scale * t)


def reflect_all(backend, x, dy, v, t, transpose):
    y, p = backend.reflect_fwd(x, v, t, transpose)
    dx, dv, dt = backend.reflect_bwd(dy, x, v, t, p, transpose)
    return {"y": y, "p": p, "dx": dx, "dv": dv, "dt": dt}


def reflect_bounds(x, dy, v, t, transpose):
    """(naive, exact) for `assert_accurate`; the naive version rounds all that it multiplies to x's dtype."""
    rounded = [tensor.to(x.dtype).float() for tensor in (x, dy, v, t)]
    wide = [tensor.double() for tensor in (x, dy, v, t)]
    return reflect_all(reference, *rounded, transpose), reflect_all(reference, *wide, transpose)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", EDGY_SHAPES, ids=str)
def test_nothing_outside_is_read_or_written(shape, dtype, guarded):
    x, dy, v, t = reflect_inputs(*shape, dtype)
    naive_results, exact = reflect_bounds(x, dy, v, t, True)
    got = reflect_all(TRITON, in_poison(x), in_poison(dy, 3), v, in_poison(t), True)
    assert_accurate(got, naive_results, exact, dtype, shape[2])
    assert not guarded()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(33, 70, 1), (200, 131, 8), slow((70, 40, 19)), slow((9, 40, 33))], ids=str)
def test_weight_side(shape, dtype, guarded, monkeypatch):
    """Two programs for all rows, nothing outside read or written; dv and dt of x and dx as they are, in 16 bits too."""
    monkeypatch.setattr(tuning, "ROW_PROGRAMS", 2)
    x, dx, *_ = reflect_inputs(*shape, dtype)
    v, t = reference.wy_factor(seeded_u(*shape[1:], "scales"))
    tensors = (dx, x, v, t)
    exact = reference.weight_side_bwd(*(tensor.double() for tensor in tensors))
    naive = reference.weight_side_bwd(*(tensor.to(dtype).float() for tensor in tensors))
    got = TRITON.weight_side_bwd(in_poison(dx, 3), in_poison(x), v, in_poison(t))
    pairs = (dict(zip(("dv", "dt"), found, strict=True)) for found in (got, naive, exact))
    assert_accurate(*pairs, dtype, shape[2])
    assert not guarded()


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (131, 3), (70, 18)], ids=str)
def test_factor_stays_inside(shape, apply_gs, guarded):
    D, R = shape
    u = seeded_u(D, R, "random")
    v, t = ops.wy_factor(in_poison(u), apply_gs)
    exact_v, exact_t = reference.wy_factor(u, apply_gs)
    torch.testing.assert_close(
        reference.dense(v.double(), t.double()), reference.dense(exact_v.double(), exact_t.double())
    )
    du = TRITON.wy_factor_bwd(torch.ones(R, D), torch.ones(R, R), in_poison(u), v, t, apply_gs)
    assert du.isfinite().all()
    assert not guarded()


@pytest.mark.parametrize("R", [33, slow(65), slow(66)])
@pytest.mark.parametrize("apply_gs", [False, slow(True)])
def test_factor_of_many_columns(R, apply_gs):
    """More columns than a tile of 16 in every kernel of the factor, an odd and an even number of them."""
    generator = torch.Generator().manual_seed(0)
    u = seeded_u(80, R, "zero_columns")
    v, t = TRITON.wy_factor(u, apply_gs)
    exact = reference.wy_factor(u, apply_gs)
    assert torch.equal(v, exact[0]) or apply_gs
    q = reference.dense(v.double(), t.double())
    assert (q - reference.dense(*(tensor.double() for tensor in exact))).abs().max() < rounding(80, R)
    assert (q @ q.mT - torch.eye(80)).abs().max() < orthogonality(u, v, t, apply_gs)
    dv, dt = here(torch.randn(R, 80, generator=generator), torch.randn(R, R, generator=generator))
    du = TRITON.wy_factor_bwd(dv, dt, u, v, t, apply_gs)
    # the same formula from the same factor, in float64 up to one rounding
    assert relative(du, reference.wy_factor_bwd(dv, dt, u, v, t, apply_gs)) < rounding(80, R)


@pytest.mark.parametrize("apply_gs", [False, True])
def test_batch_is_bitwise_each_on_its_own(apply_gs):
    us = torch.stack([seeded_u(70, 5, kind) for kind in ("random", "scales", "spike")])
    v, t = TRITON.wy_factor_many(us, apply_gs)
    for i, u in enumerate(us):
        alone = TRITON.wy_factor(u, apply_gs)
        assert torch.equal(v[i], alone[0]) and torch.equal(t[i], alone[1])


def test_many_layers_share_launches(monkeypatch):
    """Six layers of two shapes: two groups, the launches of two layers; results as from `wy_factor`, in order."""
    us = [seeded_u(D, 4, "random", seed) for seed, D in enumerate((40, 24, 40, 40, 24, 40))]
    batches = []
    original = TRITON.wy_factor_many

    def counted(u, apply_gs):
        batches.append(u.shape[0])
        return original(u, apply_gs)

    monkeypatch.setattr(TRITON, "wy_factor_many", counted)
    factors = ops.wy_factor_many(us)
    assert sorted(batches) == [2, 4]
    for u, (v, t) in zip(us, factors, strict=True):
        expected = reference.wy_factor(u)
        assert torch.equal(v, expected[0])
        torch.testing.assert_close(t, expected[1])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "shape", [(33, 70, 1), (130, 131, 8), slow((70, 40, 19)), slow((9, 40, 33)), (0, 40, 3)], ids=str
)
def test_backward_of_a_chain_is_bitwise_that_of_its_parts(shape, dtype, guarded):
    """At once, du among the launches of dx: the same bits as dv and dt on their own, then du."""
    M, D, R = shape
    x, dy, *_ = reflect_inputs(M, D, R, dtype)
    u = seeded_u(D, R, "scales")
    for transpose, apply_gs in ((False, False), (True, False), (True, True)):
        v, t = TRITON.wy_factor(u, apply_gs)
        _, p = TRITON.reflect_fwd(x, v, t, transpose)
        at_once = TRITON.chain_bwd(in_poison(dy), in_poison(x, 3), in_poison(u), v, t, p, transpose, apply_gs)
        dx, dv, dt = TRITON.reflect_bwd(dy, x, v, t, p, transpose)
        assert torch.equal(at_once[0], dx)
        assert torch.equal(at_once[1], TRITON.wy_factor_bwd(dv, dt, u, v, t, apply_gs))
    assert not guarded()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_few_programs_go_over_all_rows(dtype, monkeypatch):
    """A chip whose L2 holds less than a row block: each of its three processors takes every third block."""
    x, _, v, t = reflect_inputs(7 * 64 - 5, 40, 8, dtype)
    at_once = TRITON.reflect_fwd(x, v, t, True)
    monkeypatch.setattr(triton_reflect, "_chip", lambda device: (3, 1))
    triton_launch.forget_plans()
    assert triton_reflect._most_row_blocks(triton_reflect.Rows(*x.shape, 8, dtype, x.device), 64) == 3
    for expected, got in zip(at_once, TRITON.reflect_fwd(x, v, t, True), strict=True):
        assert torch.equal(expected, got)


def test_rows_in_flight_fit_l2(monkeypatch):
    """132 processors, 50 MB of L2: one program each where rows are wide, more where they are narrow."""
    monkeypatch.setattr(triton_reflect, "_chip", lambda device: (132, 50 * 2**20))
    for D, block_m, each in ((4096, 32, 1), (16384, 16, 1), (2048, 64, 1), (1024, 16, 9)):
        rows = triton_reflect.Rows(8192, D, 8, torch.bfloat16, torch.device("meta"))
        assert triton_reflect._most_row_blocks(rows, block_m) == 132 * each


@pytest.mark.parametrize("module", [triton_kernels, triton_factor_kernels], ids=lambda module: module.__name__)
def test_no_function_calls_itself(module):
    """Triton 3.4 hashes a function with those that it calls, in this case without end."""
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(function, ast.FunctionDef):
            called = {getattr(call.func, "id", "") for call in ast.walk(function) if isinstance(call, ast.Call)}
            assert function.name not in called


SHIPPED = sorted(
    {
        (*key, *dataclasses.astuple(config))
        for tables in tuning.CONFIGS.values()
        for key, lines in tables.items()
        for _, _, config in lines
    }
)
"""(kernel, bytes per element, rank, *tile) of every architecture's every line."""


@pytest.mark.parametrize("line", SHIPPED, ids=lambda line: "-".join(map(str, line)))
def test_shipped_tiles(line, shipped_tiles, monkeypatch):
    """The tile sizes that ship, where the other tests run coarser ones: more than one tile each way, none whole."""
    (kernel, element_size, rank), config = line[:3], tuning.LaunchConfig(*line[3:])
    tables = tuning.CONFIGS.get(tuning.architecture(), tuning.CONFIGS[tuning.DEFAULT])
    monkeypatch.setitem(tables, line[:3], [(tuning.WIDE, tuning.WIDE, config)])
    dtype = torch.float32 if element_size == 4 else torch.bfloat16
    # the columns that make the launchers take this line of the table
    wide = 40 if kernel in ("reflect", "backward_columns") else 70
    R = {8: 8, 16: 9, 32: 19, 64: wide}[rank]
    M, D = config.block_m + 3, config.block_d + 5
    x, dy, v, t = reflect_inputs(M, D, R, dtype)
    naive_results, exact = reflect_bounds(x, dy, v, t, False)
    assert_accurate(reflect_all(TRITON, x, dy, v, t, False), naive_results, exact, dtype, R)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES[1:], ids=name_of)
def test_halves(dtype):
    """hi and lo of v hold 16 bits in bfloat16, 22 in float16: its y has no room to show if those in bfloat16 do not."""
    _, _, v, _ = reflect_inputs(1, 71, 17, dtype)
    name, launches, scratch = triton_reflect._halves(triton_reflect.Rows(1, 71, 17, dtype, v.device))
    halves = torch.empty(scratch[name][0], dtype=dtype)
    triton_launch.Launches(v.device, launches, {})(**{name: halves, "v": v})
    scaled = halves[:2].double().sum(0) / triton_reflect.v_scale(dtype)
    assert relative(scaled, v.double()) < (2.0**-17 if dtype == torch.bfloat16 else 2.0**-22)
    assert relative(halves[-2:].view(torch.bfloat16).double().sum(0), v.double()) < 2.0**-17


@pytest.mark.parametrize("M", [4_194_241, 2**28])
@pytest.mark.parametrize("R", [8, 33, 65, 256])
def test_a_grid_holds_any_number_of_rows(M, R, shipped_tiles, monkeypatch):
    """A GPU's grid ends at 65535 on all axes but the first; the interpreter has no limit. Nothing is launched."""
    grids = {}

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            grids[self.name] = grid
            return lambda **_: None

    for name in list(vars(triton_kernels)):
        if name.endswith("_kernel"):
            monkeypatch.setattr(triton_kernels, name, Recorded(name))
    for dtype in KERNEL_DTYPES:
        x, dy = (torch.empty(M, 4608, dtype=dtype, device="meta") for _ in range(2))
        v, t = (torch.empty(R, columns, device="meta") for columns in (4608, R))
        reflect_all(TRITON, x, dy, v, t, True)
    assert len(grids) >= (4 if R < 65 else 5), grids
    for name, grid in grids.items():
        for size, most in zip(grid, (2**31 - 1, 65535, 65535), strict=False):
            assert 1 <= size <= most, (name, grid)


@pytest.mark.parametrize("scale", [1e-6, 1e5, 1e12])
@pytest.mark.parametrize("R", [7, 19])
def test_float16_holds_any_scale_of_v(R, scale):
    """Rows of v far beyond float16, each at a scale of its own, as `ops.reflect` may be given them."""
    x, dy, v, t = reflect_inputs(65, 100, R, torch.float16)
    scales = scale ** torch.linspace(0, 1, R)
    scaled_v, scaled_t = (tensor.requires_grad_() for tensor in (scales[:, None] * v, t / scales[:, None] / scales))
    leaf = x.clone().requires_grad_()
    y = ops.reflect(leaf, scaled_v, scaled_t, True)
    y.backward(dy)
    got = {"y": y.detach(), "dx": leaf.grad, "dv": scaled_v.grad, "dt": scaled_t.grad}
    with torch.no_grad():
        naive_results, exact = reflect_bounds(x, dy, v, t, True)
        exact = reflect_all(reference, *(tensor.double() for tensor in (x, dy, scaled_v, scaled_t)), True)
    naive_results["dv"] = naive_results["dv"] / scales[:, None]
    naive_results["dt"] = naive_results["dt"] * scales[:, None] * scales
    for results in (naive_results, exact):
        del results["p"]
    assert_accurate(got, naive_results, exact, torch.float16, R)


@pytest.mark.parametrize("scale", [1e-9, 1e5])
@pytest.mark.parametrize("R", [7, 19])
def test_float16_holds_any_scale_of_t(R, scale):
    """s = p m may be far below float16's smallest number, or above its largest, while y and dx are neither."""
    x, dy, v, t = reflect_inputs(65, 100, R, torch.float16, scale=scale)
    x, dy = (x * 1e-4, dy * 1e-4) if scale > 1 else (x, dy)
    exact = reflect_all(reference, *(tensor.double() for tensor in (x, dy, v, t)), True)
    rounded_t = (t / scale).half().float() * scale  # float16 could not hold t itself
    naive_results = reflect_all(reference, x.float(), dy.float(), v.half().float(), rounded_t, True)
    got = reflect_all(TRITON, x, dy, v, t, True)
    assert_accurate(got, naive_results, exact, torch.float16, R)
    for name in ("dv", "dt"):  # float32 results: the naive version's rounding to float16 is no measure for them
        error = relative(got[name], exact[name])
        assert error < rounding(100, R), (name, error)
