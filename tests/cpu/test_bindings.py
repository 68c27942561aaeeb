"""The compiled CPU module: argument errors, every instruction set, threads, and what it may and may not write."""

import pytest
import torch

from hra_kernels import ops, reference
from hra_kernels.backends import cpu as cpu_backend
from hra_kernels.testing.cases import DTYPES, Case, explicit, explicit_weight_side, make_inputs
from hra_kernels.testing.cases import naive as naive_chain
from hra_kernels.testing.tolerance import assert_accurate

native = pytest.importorskip("hra_kernels._native", reason=cpu_backend.BACKEND.why_unavailable() or "")

CPU = cpu_backend.BACKEND
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ISA_CASES = [
    Case(*shape) for shape in [(1, 3, 1), (2, 1000, 16), (127, 1001, 7), (37, 264, 33), (131, 65, 2), (50, 97, 4)]
]
ISA_CASES += [Case(130, 264, 8, transpose=False), Case(64, 300, 7, "near_parallel"), Case(64, 300, 8, apply_gs=True)]


@pytest.fixture(params=native.isas())
def isa(request):
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def reflect_arguments(**changes):
    """Valid keyword arguments of `reflect_fwd`, (M, D, R) = (4, 6, 2) in float32, and the tensors behind them."""
    tensors = {"y": torch.empty(4, 6), "p": torch.empty(4, 2), "x": torch.ones(4, 6), "v": torch.ones(2, 6)}
    tensors["t"] = torch.eye(2)
    arguments = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    arguments |= {"M": 4, "D": 6, "R": 2, "stride_ym": 6, "stride_xm": 6, "dtype": 0}
    return arguments | {"transpose": False, "num_threads": 1} | changes, tensors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": 0}, "reflect_fwd: x must be a pointer to 24 elements, got null"),
        ({"y": 0}, "reflect_fwd: y must be a pointer to 24 elements, got null"),
        ({"v": 0}, "reflect_fwd: v must be a pointer to 12 elements, got null"),
        ({"t": 0}, "reflect_fwd: t must be a pointer to 4 elements, got null"),
        ({"v": 4098}, "reflect_fwd: v must be aligned to its 4-byte elements, got an address 2 bytes past one"),
        ({"x": 4097, "dtype": 2}, "reflect_fwd: x must be aligned to its 2-byte elements"),
        ({"x": 4100, "dtype": 1}, "reflect_fwd: x must be aligned to its 8-byte elements"),
        ({"M": -1}, "reflect_fwd: M must be at least 0, got -1"),
        ({"D": -6}, "reflect_fwd: D must be at least 0, got -6"),
        ({"R": 0}, "reflect_fwd: R must be between 1 and 256, got 0"),
        ({"R": 257}, "reflect_fwd: R must be between 1 and 256, got 257"),
        ({"stride_ym": 5}, "reflect_fwd: stride_ym must be at least the row's 6 elements, got 5"),
        ({"stride_xm": -6}, "reflect_fwd: stride_xm must be at least 0, got -6"),
        ({"dtype": 4}, r"reflect_fwd: dtype must be 0 \(float32\), 1 .* or 3 \(float16\), got 4"),
        ({"num_threads": 0}, "reflect_fwd: num_threads must be at least 1, got 0"),
    ],
)
def test_reflect_fwd_rejects(changes, message):
    arguments, _tensors = reflect_arguments(**changes)
    with pytest.raises(ValueError, match=message):
        native.reflect_fwd(**arguments)


def test_reflect_fwd_accepts_what_it_should():
    arguments, tensors = reflect_arguments(p=0, stride_xm=0)  # no p wanted; every row of x the same
    native.reflect_fwd(**arguments)
    assert torch.equal(tensors["y"], torch.full((4, 6), 1.0 - 12.0))
    arguments, _tensors = reflect_arguments(M=1, stride_ym=0)  # one row needs no stride
    native.reflect_fwd(**arguments)


@pytest.mark.parametrize(
    "changes, message", [({"x": 0}, "reflect_bwd: x"), ({"p": 0}, "reflect_bwd: p"), ({"dy": 0}, "dy")]
)
def test_reflect_bwd_rejects(changes, message):
    x = torch.ones(4, 6)
    arguments = {name: x.data_ptr() for name in ("dx", "dv", "dt", "dy", "x", "v", "t", "p")}
    arguments |= {"M": 4, "D": 6, "R": 2, "stride_dxm": 6, "stride_dym": 6, "stride_xm": 6, "dtype": 0}
    arguments |= {"transpose": False, "num_threads": 1} | changes
    with pytest.raises(ValueError, match=message + r" must be a pointer to \d+ elements, got null"):
        native.reflect_bwd(**arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": 0}, "x must be a pointer to 24 elements, got null"),
        ({"dx": 0}, "dx must be a pointer to 24 elements, got null"),
        ({"dv": 0}, "dv must be a pointer to 12 elements, got null"),
        ({"dt": 0}, "dt must be a pointer to 4 elements, got null"),
        ({"v": 4098}, "v must be aligned to its 4-byte elements"),
        ({"M": -1}, "M must be at least 0, got -1"),
        ({"R": 0}, "R must be between 1 and 256, got 0"),
        ({"stride_dxm": -6}, "stride_dxm must be at least 0, got -6"),
        ({"stride_xm": -6}, "stride_xm must be at least 0, got -6"),
        ({"dtype": 4}, "dtype must be 0"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
    ],
)
def test_weight_side_bwd_rejects(changes, message):
    x = torch.ones(4, 6)
    arguments = {name: x.data_ptr() for name in ("dv", "dt", "dx", "x", "v", "t")}
    arguments |= {"M": 4, "D": 6, "R": 2, "stride_dxm": 6, "stride_xm": 6, "dtype": 0, "num_threads": 1} | changes
    with pytest.raises(ValueError, match="weight_side_bwd: " + message):
        native.weight_side_bwd(**arguments)


@pytest.mark.parametrize(
    "changes, message", [({"u": 0}, "u must be a pointer"), ({"R": 300}, "R must be between 1 and")]
)
def test_wy_factor_rejects(changes, message):
    x = torch.ones(4, 6)
    arguments = {"D": 6, "R": 2, "dtype": 0, "apply_gs": False, "num_threads": 1}
    forward = {name: x.data_ptr() for name in ("v", "t", "copy", "u")} | arguments | changes
    with pytest.raises(ValueError, match="wy_factor_fwd: " + message):
        native.wy_factor_fwd(**forward)
    backward = {name: x.data_ptr() for name in ("du", "dv", "dt", "u", "v", "t")} | arguments | changes
    with pytest.raises(ValueError, match="wy_factor_bwd: " + message):
        native.wy_factor_bwd(**backward)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"du": 0}, "wy_factor_bwd: du must be a pointer"),
        ({"dy": 0}, "reflect_bwd: dy must be a pointer"),
        ({"D": -6}, "chain_bwd: D must be at least 0"),
        ({"R": 300}, "chain_bwd: R must be between 1 and"),
        ({"dtype_u": 1}, "chain_bwd: dtype_u must be float64 where dtype is, and only there, got 1"),
    ],
)
def test_chain_bwd_rejects(changes, message):
    x = torch.ones(4, 6)
    arguments = {name: x.data_ptr() for name in ("dx", "du", "dy", "x", "u", "v", "t", "p")}
    arguments |= {"M": 4, "D": 6, "R": 2, "stride_dym": 6, "stride_xm": 6}
    arguments |= {"dtype": 0, "dtype_u": 0, "transpose": False, "apply_gs": False, "num_threads": 1} | changes
    with pytest.raises(ValueError, match=message):
        native.chain_bwd(**arguments)


def test_set_isa_rejects():
    with pytest.raises(ValueError, match=r"set_isa: name must be one of .*baseline, got 'mmx'"):
        native.set_isa("mmx")
    assert native.isa() in native.isas()


def test_why_unsupported():
    cpu = torch.device("cpu")
    assert CPU.why_unsupported(cpu, torch.float32, 256) is None
    assert "up to 256 columns, got 257" in CPU.why_unsupported(cpu, torch.float32, 257)
    assert "int32" in CPU.why_unsupported(cpu, torch.int32, 8)
    assert "meta" in CPU.why_unsupported(torch.device("meta"), torch.float32, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", ISA_CASES, ids=str)
def test_every_isa(isa, case, dtype):
    x, u, dy = make_inputs(case, dtype)
    exact, naive = explicit(x, u, dy, case), naive_chain(x, u, dy, case, dtype)
    x.requires_grad_()
    u.requires_grad_()
    with ops.use_backend("cpu"):
        y = ops.reflect_chain(x, [u], [case.apply_gs], transpose=case.transpose)
        y.backward(dy)
    assert_accurate({"y": y.detach(), "dx": x.grad, "du": u.grad}, naive, exact, dtype, case.R)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", [case for case in ISA_CASES if case.transpose], ids=str)
def test_every_isa_on_the_weight_side(isa, case, dtype):
    x, u, dx = make_inputs(case, dtype)
    exact = explicit_weight_side(x, u, dx, case)
    naive = naive_chain(x, u, dx, case, dtype, explicit_weight_side)
    v, t = CPU.wy_factor(u, case.apply_gs)
    du = CPU.wy_factor_bwd(*CPU.weight_side_bwd(dx, x, v, t), u, v, t, case.apply_gs)
    assert_accurate({"du": du}, naive, exact, dtype, case.R)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_every_isa_converts_every_16_bit_value(isa, half):
    """All 65536 bit patterns go through the kernel with v = 0 and come back; NaN stays NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half).reshape(256, 256)
    y, _ = CPU.reflect_fwd(x, torch.zeros(2, 256), torch.zeros(2, 2), False)
    nan = x.isnan()
    finite = ~(nan | x.isinf()).any(1)  # infinity times v = 0 is NaN, which then fills the row
    assert torch.equal(y[finite], x[finite])
    assert y[nan.any(1)].isnan().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_every_isa_rounds_to_nearest_even(isa, half):
    """y = x - s v with x = 0 is a rounding of float32 values, ties and overflow included: torch rounds alike."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (64 * 256,), generator=generator, dtype=torch.int64).to(torch.int32)
    bits[::3] = bits[::3] & ~0x1FFF | 0x1000  # ties of float16
    bits[1::3] = bits[1::3] & ~0xFFFF | 0x8000  # ties of bfloat16
    values = torch.nan_to_num(bits.view(torch.float32), nan=1.0, posinf=1.0, neginf=-1.0).reshape(64, 256)
    x = torch.zeros(1, 256, dtype=half)
    x[0, 0] = 1  # p = v[0] = 1 for a v whose first entry is 1, so that y[1:] is -v[1:]
    for row in values:
        v = row[None].clone()
        v[0, 0] = 1
        y, _ = CPU.reflect_fwd(x, v, torch.ones(1, 1), False)
        assert torch.equal(y[0, 1:], (-v[0, 1:]).to(half))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_thread_counts_agree(threads, dtype):
    """Rows do not depend on how they are shared out; sums over the rows do, within their rounding."""
    case = Case(700, 264, 8)
    x, u, dy = make_inputs(case, dtype)
    exact = explicit(x, u, dy, case)
    naive = naive_chain(x, u, dy, case, dtype)
    exact_weight = explicit_weight_side(x, u, dy, case)
    naive_weight = naive_chain(x, u, dy, case, dtype, explicit_weight_side)
    first = None
    for count in (1, 2, 3):
        threads(count)
        for _ in range(3):
            v, t = CPU.wy_factor(u, False)
            y, p = CPU.reflect_fwd(x, v, t, True)
            dx, dv, dt = CPU.reflect_bwd(dy, x, v, t, p, True)
            du = CPU.wy_factor_bwd(dv, dt, u, v, t, False)
            first = first or {"y": y, "p": p, "dx": dx, "v": v, "t": t}
            assert all(torch.equal(first[k], now) for k, now in {"y": y, "p": p, "dx": dx, "v": v, "t": t}.items())
            assert_accurate({"y": y, "dx": dx, "du": du}, naive, exact, dtype, case.R)
            du = CPU.wy_factor_bwd(*CPU.weight_side_bwd(dy, x, v, t), u, v, t, False)
            assert_accurate({"du": du}, naive_weight, exact_weight, dtype, case.R)


def test_runs_are_bitwise_repeatable_for_a_thread_count(threads):
    threads(3)
    x, dy = torch.randn(2, 700, 264).unbind()
    v, t = reference.wy_factor(torch.randn(264, 8))
    p = CPU.reflect_fwd(x, v, t, True)[1]
    first = *CPU.reflect_bwd(dy, x, v, t, p, True), *CPU.weight_side_bwd(dy, x, v, t)
    for _ in range(20):
        again = *CPU.reflect_bwd(dy, x, v, t, p, True), *CPU.weight_side_bwd(dy, x, v, t)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_threads_are_torchs_own():
    """One OpenMP runtime in the process, and it is the one torch runs on."""
    if native.thread_pool() != "openmp":
        pytest.skip("no OpenMP runtime in this process: std::thread serves")
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if any(name in line for name in ("libgomp", "libomp", "libiomp"))}
    # a copy in NAME.libs serves the package NAME alone
    assert len([path for path in runtimes if ".libs/" not in path]) == 1, runtimes
    with open(native.__file__, "rb") as module:
        assert b"libgomp" not in module.read()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (13, 33, 3), (50, 97, 8), (7, 64, 17), (2, 801, 31), (0, 5, 2), (4, 0, 3)], ids=str
)
def test_writes_all_of_its_rows_and_nothing_else(isa, shape, dtype):
    """Outputs are rows of wider arrays filled with a mark: every element of a row is written, none between them."""
    M, D, R = shape
    x, u, dy = make_inputs(Case(M, D, R), dtype)
    v, t = reference.wy_factor(u)
    mark = -1234.0
    y, dx = torch.full((2, M + 2, D + 5), mark, dtype=dtype).unbind()
    p, dv, dt = (torch.full((rows + 2, columns), mark, dtype=v.dtype) for rows, columns in ((M, R), (R, D), (R, R)))
    stride, code = D + 5, CODES[dtype]
    pointers = {"x": x.data_ptr(), "v": v.data_ptr(), "t": t.data_ptr(), "p": p[1].data_ptr()}
    sizes = {"M": M, "D": D, "R": R, "dtype": code, "transpose": True, "num_threads": 2}
    native.reflect_fwd(y=y[1, 2:].data_ptr(), stride_ym=stride, stride_xm=D, **pointers, **sizes)
    gradients = {"dx": dx[1, 2:].data_ptr(), "dv": dv[1].data_ptr(), "dt": dt[1].data_ptr(), "dy": dy.data_ptr()}
    native.reflect_bwd(stride_dxm=stride, stride_dym=D, stride_xm=D, **gradients, **pointers, **sizes)
    for alone, tensor in (("dx", dx), ("dv", dv), ("dt", dt)):  # and each without the others
        again, only = tensor.clone(), dict.fromkeys(("dx", "dv", "dt"), 0) | {alone: gradients[alone]}
        native.reflect_bwd(stride_dxm=stride, stride_dym=D, stride_xm=D, **(gradients | only), **pointers, **sizes)
        assert torch.equal(tensor, again)
    for wide in (y, dx):
        inside = wide[1:-1, 2 : 2 + D].clone()
        assert not (inside == mark).any()
        wide[1:-1, 2 : 2 + D] = mark
        assert (wide == mark).all()
    weight_dv, weight_dt = (torch.full_like(tensor, mark) for tensor in (dv, dt))
    gradients = {"dv": weight_dv[1].data_ptr(), "dt": weight_dt[1].data_ptr(), "dx": dy.data_ptr()}
    del pointers["p"], sizes["transpose"]
    native.weight_side_bwd(stride_dxm=D, stride_xm=D, **gradients, **pointers, **sizes)
    for padded in (p, dv, dt, weight_dv, weight_dt):
        assert (padded[[0, -1]] == mark).all() and not (padded[1:-1] == mark).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, 1e-310, 1e-42, 1e-20, 1e30, 1e300])
def test_values_that_no_sum_holds(isa, value, dtype):
    """Nothing crashes or runs on, and what spoils a row of x stays in its row."""
    value = torch.tensor(value, dtype=torch.float64).to(dtype)
    for apply_gs in (False, True):
        u = torch.randn(37, 5).to(dtype)
        u[:, 1] = u[3, 4] = value
        v, t = CPU.wy_factor(u, apply_gs)
        CPU.wy_factor_bwd(torch.zeros_like(v) + value, torch.zeros_like(t) + value, u, v, t, apply_gs)
    x, spoiled = torch.randn(13, 37).to(dtype), torch.arange(13) == 4
    x[4, 2] = value
    y, _ = CPU.reflect_fwd(x, torch.randn_like(v) / 10, torch.randn_like(t) / 10, False)
    assert y[~spoiled].isfinite().all() and (not value.isnan() or y[spoiled].isnan().all())


def test_strided_u_and_factor_inputs_that_are_not_contiguous():
    u = torch.randn(40, 6)
    v, t = CPU.wy_factor(u, False)
    for view in (u.mT.contiguous().mT, torch.randn(40, 12)[:, ::2].copy_(u), torch.randn(80, 6)[::2].copy_(u)):
        assert all(torch.equal(a, b) for a, b in zip((v, t), CPU.wy_factor(view, False), strict=True))
    x, dy = torch.randn(2, 9, 40).unbind()
    y, p = CPU.reflect_fwd(x, v, t, True)
    turned = [tensor.mT.contiguous().mT for tensor in (v, t, p)]
    assert torch.equal(CPU.reflect_fwd(x, *turned[:2], True)[0], y)
    straight, again = (CPU.reflect_bwd(dy, x, *some, True) for some in ((v, t, p), turned))
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))
    straight_weight, again = (CPU.weight_side_bwd(dy, x, *some) for some in ((v, t), turned[:2]))
    assert all(torch.equal(a, b) for a, b in zip(straight_weight, again, strict=True))
    dv, dt = straight[1:]
    du = CPU.wy_factor_bwd(dv, dt, u, v, t, False)
    turned = [tensor.mT.contiguous().mT for tensor in (dv, dt, u, v, t)]
    assert torch.equal(CPU.wy_factor_bwd(*turned, False), du)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_values(dtype):
    """As torch.equal, but by bits where both are contiguous, so that NaN equals itself."""
    a = torch.randn(33, 5).to(dtype)
    for place in (0, 80, 164):
        b = a.clone()
        assert cpu_backend.same_values(a, b)
        b.view(-1)[place] += 1
        assert not cpu_backend.same_values(a, b) and not cpu_backend.same_values(a.mT, b.mT)
    assert cpu_backend.same_values(a.mT, a.clone().mT) and cpu_backend.same_values(a, a.mT.contiguous().mT)
    assert not cpu_backend.same_values(a, a[:-1]) and not cpu_backend.same_values(a, a.view(5, 33))
    assert cpu_backend.same_values(a[:0], a[:0])
    a[0, 0] = torch.nan
    assert cpu_backend.same_values(a, a.clone())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4096, 8), "a must be a pointer to 8 bytes, got null"),
        ((4096, 0, 8), "b must be a pointer to 8 bytes, got null"),
        ((4096, 4096, -1), "bytes must be at least 0, got -1"),
    ],
)
def test_same_bytes_rejects(arguments, message):
    with pytest.raises(ValueError, match="same_bytes: " + message):
        native.same_bytes(*arguments)
