"""The CUDA kernels on the CPU emulation: the tests every backend passes, and what only GPU kernels can get wrong.

Each shared test runs under one of the emulation's schedules, picked by its name, as on sm_80 or
sm_90; the tests with `every_schedule` in their names run under all.
"""

import zlib

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
KERNEL_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def native():
    return emulation.emulated()


@pytest.fixture(scope="module")
def backend_module(native):
    return CudaBackend(native, "cpu")


@pytest.fixture
def on_backend(native, backend_module, request, monkeypatch):
    draw = zlib.crc32(request.node.name.encode())
    native.emulate(draw % len(emulation.SEEDS), 90 if draw // len(emulation.SEEDS) % 2 else 80)
    monkeypatch.setitem(ops.BACKENDS, BACKEND, backend_module)
    with ops.use_backend(BACKEND):
        yield BACKEND


@pytest.fixture
def device():
    return torch.device("cpu")


def set_slice(monkeypatch, size):
    """One slice for all that the CUDA backend does; 0 is the sweeps."""
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


def check_every_schedule(native, kernels, shape, dtype, capability, seeds=emulation.SEEDS):
    """Right under one schedule, and the same bits under all of them."""
    M, D, R, pitch = shape
    x, dy, v, t = make(M, D, R, dtype, pitch)
    exact = all_results(reference, x.double(), dy.double(), v.double(), t.double(), True)
    naive = all_results(reference, x, dy, v.to(dtype).float(), t.to(dtype).float(), True)
    results = []
    for seed in seeds:
        native.emulate(seed, capability)
        results.append(all_results(kernels, x, dy, v, t, True))
    assert_accurate(results[0], naive, exact, dtype, R)
    for later in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, later[name]), name


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    "shape",
    [(70, 264, 8, None), (33, 131, 3, None), (33, 131, 17, 136), (5, 96, 40, 97)],
    ids=["aligned", "odd-columns", "ragged-last-vector", "odd-rows"],
)
def test_sweeps_under_every_schedule(native, backend_module, shape, dtype):
    """16-byte and scalar accesses, all padded ranks."""
    check_every_schedule(native, backend_module, shape, dtype, capability=80)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape",
    [(104, 1000, 8, None), (33, 301, 3, None), (20, 1100, 13, 1112)],
    ids=["2-blocks", "1-block-odd-columns", "3-blocks-ragged-last-vector"],
)
def test_clusters_under_every_schedule(native, backend_module, shape, dtype, monkeypatch):
    """The first has more tiles than a cluster has places for, so that every place is used again."""
    set_slice(monkeypatch, 512)
    check_every_schedule(native, backend_module, shape, dtype, capability=90)


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
    """Clusters of 1 block, of a few, and beyond the portable 8; the backward has no slices of 2048, and sweeps."""
    set_slice(monkeypatch, size)
    native.launches()
    check_every_schedule(native, backend_module, shape, torch.bfloat16, capability=90, seeds=(1, 4))
    blocks = [launched[1] for launched in native.launches()]
    forward, backward = blocks[0], blocks[1]
    assert forward == cluster and backward == (cluster if size < 2048 else 1)


def test_where_the_cluster_path_ends(native):
    """The workspace tells the paths apart: sweeps keep s and qm of every row there, clusters one share each."""

    def floats_per_row(D, R, dtype_code, size, capability):
        native.emulate(0, capability)
        few, many = (native.reflect_bwd_workspace_bytes(rows, D, R, dtype_code, size) for rows in (1 << 20, 1 << 21))
        return (many - few) / 4 / (1 << 20)

    for served in [
        (4096, 8, 2, 512),
        (8192, 16, 3, 512),
        (8192, 16, 2, 1024),
        (16384, 8, 2, 1024),
        (16384, 16, 2, 1024),
    ]:
        assert floats_per_row(*served, capability=90) == 0, served
    for not_served in [
        (16385, 8, 2, 1024),
        (8193, 8, 2, 512),
        (4096, 17, 2, 512),
        (4096, 8, 0, 512),
        (4096, 8, 2, 2048),
        (4096, 8, 2, 0),
    ]:
        assert floats_per_row(*not_served, capability=90) > 1, not_served
    assert floats_per_row(4096, 8, 2, 512, capability=80) > 1
    # a consumer GPU has clusters, and less shared memory
    assert floats_per_row(8192, 8, 2, 1024, capability=120) > 1


def test_the_table_of_slices():
    for direction in ("forward", "backward"):
        assert tuning.select_slice(direction, 17, 4096) == tuning.select_slice(direction, 8, 2**20) == 0
        for rank in (1, 8, 9, 16):
            sizes = [tuning.select_slice(direction, rank, D) for D in (64, 2048, 4096, 8192, 16384)]
            assert all(size in (512, 1024, 2048) for size in sizes) and sizes == sorted(sizes)


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("seed", emulation.SEEDS)
def test_many_layers_share_launches(native, backend_module, seed, dtype, apply_gs):
    """More layers than one launch takes; each as if it were alone."""
    native.emulate(seed, 80)
    us = torch.randn(34, 21, 5, generator=torch.Generator().manual_seed(0)).to(dtype).mT.contiguous().mT
    for u, v, t in zip(us, *backend_module.wy_factor_many(us, apply_gs), strict=True):
        exact_v, exact_t = reference.wy_factor(u, apply_gs)
        torch.testing.assert_close(v, exact_v, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(t, exact_t, rtol=1e-6, atol=1e-7)


def test_backward_in_x_alone_is_the_same(native, backend_module, monkeypatch):
    set_slice(monkeypatch, 512)
    x, dy, v, t = make(40, 136, 8, torch.bfloat16)
    for transpose, capability in ((False, 80), (True, 80), (True, 90)):
        native.emulate(1, capability)
        _, p = backend_module.reflect_fwd(x, v, t, transpose)
        dx, _, _ = backend_module.reflect_bwd(dy, x, v, t, p, transpose)
        assert torch.equal(backend_module.reflect_dx(dy, v, t, transpose), dx)


def test_nothing_outside_is_written(native, backend_module):
    """Results land in a view; the rows around them stay as they were."""
    M, D, R = 21, 100, 8
    x, _, v, t = make(M, D, R, torch.bfloat16)
    framed = torch.full((M + 2, D + 24), 7.0, dtype=torch.bfloat16)
    inner = framed[1 : M + 1, 8 : D + 8]
    p = torch.empty(M, R)
    pointers = [tensor.data_ptr() for tensor in (inner, p, x, v, t)]
    for capability, size in ((80, 0), (90, 512)):
        native.emulate(0, capability)
        native.reflect_fwd(*pointers, M, D, R, framed.stride(0), D, 2, True, size, 0)
        torch.testing.assert_close(inner, reference.reflect_fwd(x, v, t, True)[0])
        inner.fill_(7.0)
        assert (framed == 7.0).all()


def test_what_the_kernels_do_not_take(backend_module):
    cpu = torch.device("cpu")
    assert backend_module.why_unsupported(cpu, torch.float32, 64) is None
    assert "64 columns" in backend_module.why_unsupported(cpu, torch.float32, 65)
    assert "float64" in backend_module.why_unsupported(cpu, torch.float64, 8)
    assert "got meta" in backend_module.why_unsupported(torch.device("meta"), torch.float32, 8)


def test_bad_arguments_are_named(native):
    with pytest.raises(ValueError, match="reflect_fwd: R must be between 0 and 64, got 65"):
        native.reflect_fwd(0, 0, 0, 0, 0, 0, 0, 65, 0, 0, 0, False, 0, 0)
    with pytest.raises(ValueError, match="reflect_fwd: y must be a pointer to 6 elements, got null"):
        native.reflect_fwd(0, 0, 16, 16, 16, 2, 3, 1, 3, 3, 0, False, 0, 0)
    with pytest.raises(ValueError, match="reflect_fwd: stride_ym must be at least 3, got 2"):
        native.reflect_fwd(16, 0, 16, 16, 16, 2, 3, 1, 2, 3, 0, False, 0, 0)
    with pytest.raises(ValueError, match="reflect_bwd: dtype must be"):
        native.reflect_bwd_workspace_bytes(1, 1, 1, 1, 0)
    with pytest.raises(ValueError, match="reflect_bwd: slice must be 0, 512, 1024 or 2048, got 256"):
        native.reflect_bwd_workspace_bytes(1, 1, 1, 2, 256)
    with pytest.raises(ValueError, match="reflect_bwd: workspace_bytes must be at least"):
        native.reflect_bwd(*[16] * 8, 1, 1, 1, 1, 1, 1, 0, False, 0, 16, 4, 0)
