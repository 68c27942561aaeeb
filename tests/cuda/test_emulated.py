"""The CUDA kernels on the CPU emulation: the tests every backend passes, and what only GPU kernels can get wrong.

Each shared test runs under one of the emulation's schedules, picked by its name; the tests with `every_schedule` in
their names run under all.
"""

import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hra_kernels import ops, reference
from hra_kernels.backends import tuning
from hra_kernels.backends.cuda import CudaBackend
from hra_kernels.testing.tolerance import assert_accurate
from tests.cuda import emulation
from tests.operators.test_accuracy import (  # noqa: F401
    test_chain,
    test_empty,
    test_expanded_gradient,
    test_identity_at_initialization_is_exact,
    test_inputs_are_untouched_and_views_serve,
    test_non_finite_shows,
    test_reflect_alone,
    test_repeated_runs_are_bitwise_equal,
    test_what_one_step_learns_is_applied,
)

BACKEND = "cuda-emulated"


@pytest.fixture(scope="module")
def native(request):
    built = request.config.getoption("emulated_module")
    return emulation.load(Path(built)) if built else emulation.emulated()


@pytest.fixture(scope="module")
def backend_module(native):
    return emulation.backend(native)


@pytest.fixture
def on_backend(native, backend_module, request, monkeypatch):
    native.emulate(zlib.crc32(request.node.name.encode()) % len(emulation.SEEDS))
    monkeypatch.setitem(ops.BACKENDS, BACKEND, backend_module)
    with ops.use_backend(BACKEND):
        yield BACKEND


@pytest.fixture
def device():
    return torch.device("cpu")


def set_slice(monkeypatch, size):
    """One slice for all that the CUDA backend does."""
    for key in tuning.SLICES:
        monkeypatch.setitem(tuning.SLICES, key, [(tuning.WIDE, size)])


def all_results(kernels, x, dy, v, t, transpose):
    y, p = kernels.reflect_fwd(x, v, t, transpose)
    dx, dv, dt = kernels.reflect_bwd(dy, x, v, t, p, transpose)
    return {"y": y, "p": p, "dx": dx, "dv": dv, "dt": dt}


def make(M, D, R, dtype, pitch=None):
    """x, dy (M, D) with rows `pitch` apart, v, t."""
    generator = torch.Generator().manual_seed(M * D + R)
    x, dy = (torch.randn(M, pitch or D, generator=generator).to(dtype)[:, :D] for _ in range(2))
    v = torch.randn(R, D, generator=generator) / D**0.5
    return x, dy, v, torch.randn(R, R, generator=generator)


def check_every_schedule(native, kernels, shape, dtype, transpose=True, seeds=emulation.SEEDS):
    """Right under one schedule, and the same bits under all of them."""
    M, D, R, pitch = shape
    x, dy, v, t = make(M, D, R, dtype, pitch)
    exact = all_results(reference, x.double(), dy.double(), v.double(), t.double(), transpose)
    naive = all_results(reference, x, dy, v.to(dtype).float(), t.to(dtype).float(), transpose)
    results = []
    for seed in seeds:
        native.emulate(seed)
        results.append(all_results(kernels, x, dy, v, t, transpose))
    assert_accurate(results[0], naive, exact, dtype, R)
    for later in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, later[name]), name


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape",
    [(104, 1000, 8, None), (33, 301, 3, None), (20, 1100, 13, 1112)],
    ids=["2-blocks", "1-block-odd-columns", "3-blocks-ragged-last-vector"],
)
def test_clusters_under_every_schedule(native, backend_module, shape, dtype, transpose, monkeypatch):
    """The first has more tiles than a cluster has places for, so that every place is used again."""
    set_slice(monkeypatch, 512)
    check_every_schedule(native, backend_module, shape, dtype, transpose)


@pytest.mark.parametrize(
    ("size", "shape", "cluster"),
    [
        (512, (17, 4400, 8, None), 9),
        (1024, (65, 1100, 5, None), 2),
        (1024, (33, 2060, 16, 2064), 3),
        (2048, (65, 1100, 8, None), 1),
        (2048, (33, 2100, 16, None), 2),
    ],
)
def test_every_slice(native, backend_module, size, shape, cluster, monkeypatch):
    """Clusters of 1 block, of a few, and beyond the portable 8; the backward has no slices of 2048."""
    for direction, rank in tuning.SLICES:
        chosen = min(size, 1024) if direction == "backward" else size
        monkeypatch.setitem(tuning.SLICES, (direction, rank), [(tuning.WIDE, chosen)])
    native.launches()
    check_every_schedule(native, backend_module, shape, torch.bfloat16, seeds=(1, 4))
    forward, backward = [launched[1] for launched in native.launches()][:2]
    assert forward == cluster and backward == (cluster if size < 2048 else -(-shape[1] // 1024))


def test_the_table_of_slices():
    """There is a slice for all that is served, and a cluster of it that covers D."""
    for direction, widest in (("forward", 2048), ("backward", 1024)):
        for rank in (1, 8, 9, CudaBackend.max_rank):
            widths = (1, 64, 2048, 4096, 8192, 8193, CudaBackend.max_width)
            sizes = [tuning.select_slice(direction, rank, D) for D in widths]
            assert all(size in (512, 1024, 2048) and size <= widest for size in sizes) and sizes == sorted(sizes)
            assert all(16 * size >= D for size, D in zip(sizes, widths, strict=True))


def test_backward_in_x_alone_is_the_same(native, backend_module, monkeypatch):
    set_slice(monkeypatch, 512)
    x, dy, v, t = make(40, 136, 8, torch.bfloat16)
    native.emulate(1)
    for transpose in (False, True):
        _, p = backend_module.reflect_fwd(x, v, t, transpose)
        dx, _, _ = backend_module.reflect_bwd(dy, x, v, t, p, transpose)
        assert torch.equal(backend_module.reflect_dx(dy, v, t, transpose), dx)


def test_nothing_outside_is_written(native):
    """Results land in a view; the rows around them stay as they were."""
    M, D, R = 21, 100, 8
    x, _, v, t = make(M, D, R, torch.bfloat16)
    framed = torch.full((M + 2, D + 24), 7.0, dtype=torch.bfloat16)
    inner = framed[1 : M + 1, 8 : D + 8]
    p = torch.empty(M, R)
    pointers = [tensor.data_ptr() for tensor in (inner, p, x, v, t)]
    native.emulate(0)
    native.reflect_fwd(*pointers, M, D, R, framed.stride(0), D, 2, True, 512, 2, 0)
    torch.testing.assert_close(inner, reference.reflect_fwd(x, v, t, True)[0])
    inner.fill_(7.0)
    assert (framed == 7.0).all()


@pytest.mark.parametrize("clusters", [1, 3, 100])
def test_any_number_of_clusters_is_right(native, clusters):
    """The grid is a choice: fewer than run at once, more than there are tiles."""
    kernels = emulation.backend(native)
    kernels._native = SimpleNamespace(
        reflect_fwd=native.reflect_fwd,
        reflect_bwd=native.reflect_bwd,
        reflect_bwd_workspace_bytes=native.reflect_bwd_workspace_bytes,
        resident_clusters=lambda *_: clusters,
    )
    native.launches()
    check_every_schedule(native, kernels, (70, 264, 8, None), torch.bfloat16, seeds=(1, 4))
    assert native.launches()[0][0] == min(clusters, 5)


def test_what_the_kernels_do_not_take(backend_module):
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    assert backend_module.why_unsupported(cpu, dtype, 16, 16384) is None
    assert "up to 16 columns, got 17" in backend_module.why_unsupported(cpu, dtype, 17, 64)
    assert "D up to 16384, got 16385" in backend_module.why_unsupported(cpu, dtype, 8, 16385)
    assert "float32" in backend_module.why_unsupported(cpu, torch.float32, 8, 64)
    assert "got meta" in backend_module.why_unsupported(torch.device("meta"), dtype, 8, 64)
    assert backend_module.why_factor_unsupported(cpu, torch.float64, 300) is None, "the reference's factors"


def test_a_wide_reflection_is_refused_by_name_and_else_left_to_others(on_backend):
    x, u = torch.randn(2, 16392, dtype=torch.bfloat16), torch.randn(16392, 4)
    with pytest.raises(RuntimeError, match="cannot serve this call: it serves D up to 16384, got 16392"):
        ops.reflect_chain(x, [u], [False])
    assert ops.choose(x.device, x.dtype, 4, 16384) is ops.BACKENDS[on_backend]
    with ops.use_backend(None):
        assert ops.reflect_chain(x, [u], [False]).shape == x.shape


def test_clusters_are_asked_for_once(monkeypatch):
    """What a device forms, by pass, dtype, rank and width; where it forms none that is the reason."""
    asked = []

    def resident_clusters(backward, D, R, dtype, size):
        asked.append((backward, D, R, dtype, size))
        return 0 if 8 * size < D else 2

    kernels = emulation.backend(SimpleNamespace(resident_clusters=resident_clusters))
    for _ in range(3):
        assert kernels.why_unsupported(torch.device("cpu"), torch.bfloat16, 8, 8192) is None
    assert asked == [(False, 8192, 8, 2, 1024), (True, 8192, 8, 2, 1024)]
    reason = kernels.why_unsupported(torch.device("cpu"), torch.bfloat16, 8, 16384)
    assert reason == "cpu forms no clusters of 16 blocks, which D = 16384 needs"


def test_bad_arguments_are_named(native):
    fwd, bwd = native.reflect_fwd, native.reflect_bwd
    with pytest.raises(ValueError, match="reflect_fwd: R must be between 0 and 16, got 17"):
        fwd(0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 2, False, 512, 1, 0)
    with pytest.raises(ValueError, match="reflect_fwd: D must be between 0 and 8192, got 8193"):
        fwd(0, 0, 0, 0, 0, 0, 8193, 1, 0, 0, 2, False, 512, 1, 0)
    with pytest.raises(ValueError, match="reflect_fwd: y must be a pointer to 6 elements, got null"):
        fwd(0, 0, 16, 16, 16, 2, 3, 1, 3, 3, 2, False, 512, 1, 0)
    with pytest.raises(ValueError, match="reflect_fwd: stride_ym must be at least 3, got 2"):
        fwd(16, 0, 16, 16, 16, 2, 3, 1, 2, 3, 2, False, 512, 1, 0)
    with pytest.raises(ValueError, match="reflect_fwd: clusters must be at least 1, got 0"):
        fwd(16, 0, 16, 16, 16, 2, 3, 1, 3, 3, 2, False, 512, 0, 0)
    with pytest.raises(ValueError, match=r"resident_clusters: dtype must be 2 \(bfloat16\) or 3 \(float16\), got 0"):
        native.resident_clusters(False, 1, 1, 0, 512)
    with pytest.raises(ValueError, match="reflect_bwd: slice must be 512 or 1024, got 2048"):
        native.reflect_bwd_workspace_bytes(1, 1, 1, 2048, 1)
    with pytest.raises(ValueError, match="reflect_bwd: workspace_bytes must be at least 8, got 4"):
        bwd(*[16] * 8, 1, 1, 1, 1, 1, 1, 2, False, 512, 1, 0, 4, 0)
    with pytest.raises(ValueError, match="reflect_bwd: workspace must be 16-byte aligned"):
        bwd(*[16] * 8, 1, 1, 1, 1, 1, 1, 2, False, 512, 1, 8, 8, 0)
