"""Launches of `triton_kernels`: reflections and their gradients.

Forward and dx are one launch up to 64 columns, three above. A backward is two launches up to 32 columns, five up to 64,
six above, one more where partial sums have to be added up. In 16 bits and with more than 16 columns, each of these
takes one more launch, for the halves of v. Nothing is specialized on M: a new batch size compiles nothing.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hra_kernels.backends import triton_factor, triton_launch, tuning
from hra_kernels.backends.triton_launch import (
    Launch,
    Launches,
    cdiv,
    float32_precision,
    num_warps,
    on,
    planned,
    power_of_two_above,
)

FUSED_RANK = 64
"""Up to here p and m of a row block fit on the chip. More columns go 64 at a time through kernels of their own."""

FUSED_BACKWARD_RANK = 32
"""Up to here q, p, m and dt do. More columns spill registers: the products of size R are kernels of their own."""


class Rows(NamedTuple):
    """What a launch follows from: rows of a tensor, the columns of its chain, and where."""

    M: int
    D: int
    R: int
    dtype: torch.dtype
    device: torch.device


def _mode(dtype: torch.dtype, R: int) -> dict[str, object]:
    """The constants every kernel of `triton_kernels` takes, explained there."""
    split = 0 if dtype == torch.float32 else 1 if R <= 8 else 2 if R <= 16 else 3
    block_r = power_of_two_above(R, 16) if R <= FUSED_RANK else FUSED_RANK
    return {"BLOCK_R": block_r, "SPLIT": split, "PRECISION": float32_precision()}


def v_scale(dtype: torch.dtype) -> float:
    """What v is multiplied by, and its products divided by, where it meets x: float16 has no small numbers."""
    return 256.0 if dtype == torch.float16 else 1.0


def _require_int_offsets(op: str, D: int, R: int) -> None:
    if D * R >= 2**31:
        raise ValueError(f"{op}: v must have fewer than 2^31 elements, got {R} x {D}")


def _m_strides(t_strides: tuple[int, int], transpose: bool) -> dict[str, int]:
    stride_i, stride_j = reversed(t_strides) if transpose else t_strides
    return {"stride_mi": stride_i, "stride_mj": stride_j}


def _config(name: str, rows: Rows) -> tuning.LaunchConfig:
    with on(rows.device):
        return tuning.select_config(name, rows.dtype.itemsize, rows.R, rows.M, rows.D)


def _launch(
    name: str, config: tuning.LaunchConfig, grid: tuple[int, ...], rows: Rows, tensors: dict[str, str], **arguments
) -> Launch:
    sizes = {"M": rows.M, "D": rows.D, "R": rows.R}
    options = {"num_warps": num_warps(config), "num_stages": config.num_stages}
    tiles = {"BLOCK_M": config.block_m, "BLOCK_D": config.block_d} | options
    kernel = getattr(triton_launch.kernels(), name)
    return Launch(kernel, grid, tensors, sizes | arguments | _mode(rows.dtype, rows.R) | tiles)


def _halves(rows: Rows, v: str = "v") -> tuple[str, list[Launch], dict[str, tuple]]:
    """What kernels are to read a v from, and the launch and the scratch that it takes, if any."""
    if _mode(rows.dtype, rows.R)["SPLIT"] != 3:
        return v, [], {}
    name, kernel = f"{v}_halves", triton_launch.kernels().halves_kernel
    arguments = {"R": rows.R, "D": rows.D, "V_SCALE": v_scale(rows.dtype), "BLOCK": tuning.HALVES_BLOCK, "num_warps": 4}
    grid = (cdiv(rows.R * rows.D, tuning.HALVES_BLOCK),)
    parts = 4 if rows.dtype == torch.float16 else 2
    scratch = {name: ((parts, rows.R, rows.D), rows.dtype)}
    return name, [Launch(kernel, grid, {"halves_ptr": name, "v_ptr": v}, arguments)], scratch


# --- more columns than a tile holds -----------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """A factor of a small product: the tensor's name, its sizes and strides."""

    name: str
    rows: int
    cols: int
    strides: tuple[int, int]

    @property
    def mT(self) -> "Matrix":
        return Matrix(self.name, self.cols, self.rows, (self.strides[1], self.strides[0]))


def _product(
    c: str, a: Matrix, b: Matrix, splits: int = 1, alpha: float = 1.0, strides: tuple[int, int] | None = None
) -> Launch:
    """c (splits, rows, cols) = alpha a b, the inner axis in `splits` parts; `strides` of c's last two axes."""
    config = tuning.PRODUCT_CONFIG
    block, block_k = config.block_m, config.block_d
    stride_ci, stride_cj = strides or (b.cols, 1)
    arguments = {
        "rows": a.rows, "cols": b.cols, "inner": a.cols,
        "inner_per_split": cdiv(cdiv(a.cols, splits), block_k) * block_k,
        "stride_ci": stride_ci, "stride_cj": stride_cj, "stride_ai": a.strides[0], "stride_ak": a.strides[1],
        "stride_bk": b.strides[0], "stride_bj": b.strides[1], "alpha": alpha,
        "BLOCK_I": block, "BLOCK_J": block, "BLOCK_K": block_k, "PRECISION": float32_precision(),
        "num_warps": num_warps(config), "num_stages": config.num_stages,
    }  # fmt: skip
    grid = (cdiv(b.cols, block) * cdiv(a.rows, block), splits)
    tensors = {"c_ptr": c, "a_ptr": a.name, "b_ptr": b.name}
    return Launch(triton_launch.kernels().product_kernel, grid, tensors, arguments)


def _project(p: str, x: str, v: str, rows: Rows, stride_xm: int) -> Launch:
    """p = x vᵀ"""
    config = _config("project", rows)
    grid = (cdiv(rows.R, FUSED_RANK) * cdiv(rows.M, config.block_m),)
    tensors = {"p_ptr": p, "x_ptr": x, "v_ptr": v}
    return _launch("project_kernel", config, grid, rows, tensors, stride_xm=stride_xm, V_SCALE=v_scale(rows.dtype))


def _combine(y: str, x: str, s: str, v: str, rows: Rows, stride_xm: int) -> Launch:
    """y = x - s v"""
    config = _config("combine", rows)
    grid = (cdiv(rows.D, config.block_d) * cdiv(rows.M, config.block_m),)
    tensors = {"y_ptr": y, "x_ptr": x, "s_ptr": s, "v_ptr": v}
    return _launch("combine_kernel", config, grid, rows, tensors, stride_ym=rows.D, stride_xm=stride_xm)


def _m(rows: Rows, t_strides: tuple[int, int], transpose: bool) -> Matrix:
    t = Matrix("t", rows.R, rows.R, t_strides)
    return t.mT if transpose else t


# --- forward and dx ---------------------------------------------------------------------------------------------------


@functools.cache
def _chip(device: torch.device) -> tuple[int, int] | None:
    """(multiprocessors, bytes of L2), None where no GPU is"""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def _most_row_blocks(rows: Rows, block_m: int) -> int:
    """Row blocks of x that may be in flight for their second sweep to find them in L2, and no processor idle."""
    chip = _chip(rows.device)
    if chip is None:
        return rows.M
    processors, cache = chip
    return processors * max(1, int(tuning.L2_SHARE * cache) // (processors * block_m * rows.D * rows.dtype.itemsize))


@planned
def _reflect_plan(rows: tuple, stride_xm: int, t_strides: tuple[int, int], transpose: bool, need_p: bool) -> Launches:
    """Of y, p if needed, x, v and t."""
    rows = Rows(*rows)  # here, once: to make them takes as long as to find a plan
    M, _, R, _, device = rows
    v, launches, scratch = _halves(rows)
    if R > FUSED_RANK:
        p, m = Matrix("p", M, R, (R, 1)), _m(rows, t_strides, transpose)
        launches += [
            _project("p", "x", v, rows, stride_xm),
            _product("s", p, m),
            _combine("y", "x", "s", v, rows, stride_xm),
        ]
        names = ("s",) if need_p else ("s", "p")
        return Launches(device, launches, scratch | {name: ((M, R), torch.float32) for name in names})
    config = _config("reflect", rows)
    programs = cdiv(M, config.block_m)
    if not launches:
        programs = min(programs, _most_row_blocks(rows, config.block_m))
    tensors = {"y_ptr": "y", "p_ptr": "p" if need_p else "y", "x_ptr": "x", "v_ptr": v, "m_ptr": "t"}
    launch = _launch(
        "reflect_kernel", config, (programs,), rows, tensors,
        stride_ym=rows.D, stride_xm=stride_xm, **_m_strides(t_strides, transpose),
        V_SCALE=v_scale(rows.dtype), NEED_P=need_p, STAGES=config.num_stages,
    )  # fmt: skip
    return Launches(device, [*launches, launch], scratch)


def reflect(x: Tensor, v: Tensor, t: Tensor, transpose: bool, need_p: bool) -> tuple[Tensor, Tensor | None]:
    """y (M, D), and p (M, R) if needed, of `Backend.reflect_fwd`."""
    (M, D), R = x.shape, v.shape[0]
    _require_int_offsets("reflect_fwd" if need_p else "reflect_dx", D, R)
    y = triton_launch.empty_like(x, M, D)
    p = triton_launch.empty_like(v, M, R) if need_p else None
    if M == 0 or D == 0 or R == 0:
        return y.copy_(x), p.zero_() if need_p else None
    launches = _reflect_plan((M, D, R, x.dtype, x.device), x.stride(0), t.stride(), transpose, need_p)
    if need_p:
        launches(y=y, p=p, x=x, v=v.contiguous(), t=t)
    else:
        launches(y=y, x=x, v=v.contiguous(), t=t)
    return y, p


# --- backward ---------------------------------------------------------------------------------------------------------


def _rows_bwd(
    rows: Rows, stride_dym: int, t_strides: tuple[int, int], transpose: bool, v: str
) -> tuple[list[Launch], dict[str, tuple]]:
    """q mᵀ and s = p m (M, R) for q = dy vᵀ, and dt (parts, R, R), from dy, v of `_halves`, t, p; and their scratch."""
    M, _, R, dtype, _ = rows
    scratch = {name: ((M, R), torch.float32) for name in ("qm", "s")}
    stride_ti, stride_tj = (1, R) if transpose else (R, 1)
    if R <= FUSED_BACKWARD_RANK:
        config = _config("backward_rows", rows)
        parts = cdiv(M, config.block_m)
        if _mode(dtype, R)["SPLIT"] != 3:
            parts = min(parts, tuning.ROW_PROGRAMS)
        tensors = {
            "qm_ptr": "qm", "s_ptr": "s", "dt_ptr": "dt_parts", "dy_ptr": "dy", "v_ptr": v, "p_ptr": "p",
            "m_ptr": "t",
        }  # fmt: skip
        launches = [_launch(
            "backward_rows_kernel", config, (parts,), rows, tensors,
            stride_dym=stride_dym, **_m_strides(t_strides, transpose), stride_ti=stride_ti, stride_tj=stride_tj,
            V_SCALE=v_scale(dtype),
        )]  # fmt: skip
    else:
        parts = min(cdiv(M, 512), 64)
        scratch["q"] = ((M, R), torch.float32)
        m, p, q = _m(rows, t_strides, transpose), Matrix("p", M, R, (R, 1)), Matrix("q", M, R, (R, 1))
        launches = [
            _project("q", "dy", v, rows, stride_dym),
            _product("qm", q, m.mT),
            _product("s", p, m),
            _product("dt_parts", p.mT, q, parts, -1.0, (stride_ti, stride_tj)),
        ]
    return launches, scratch | {"dt_parts": ((parts, R, R), torch.float32)}


def _column_splits(rows: Rows, block_m: int, block_d: int) -> tuple[int, int]:
    """(rows a split, splits) for `backward_columns_kernel`, of which dv's partial sums are one a split."""
    strips = cdiv(rows.D, block_d)
    blocks = cdiv(rows.M, block_m)
    per_split = cdiv(blocks, max(1, min(blocks, tuning.COLUMN_PROGRAMS // strips))) * block_m
    return per_split, cdiv(rows.M, per_split)


def _columns_bwd(
    rows: Rows, stride_dym: int, stride_xm: int, u_strides: tuple[int, int] | None, dt_parts_count: int,
    need_dx: bool, v: str,
) -> tuple[Launch, tuple[int, int, int]]:  # fmt: skip
    """dx if needed, and dv = -(sᵀ dy + qmᵀ x) (parts, R, D), whose shape comes back too.

    With u_strides: ds, scale and phi for the gradient of u too, of the chain's plan.
    """
    D, R = rows.D, rows.R
    config = _config("backward_columns" if need_dx else "backward_dv", rows)
    rows_per_split, splits = _column_splits(rows, config.block_m, config.block_d)
    chain = u_strides is not None
    tensors = {
        "dx_ptr": "dx" if need_dx else "x", "dv_ptr": "dv_parts", "dy_ptr": "dy", "x_ptr": "x", "v_ptr": v,
        "qm_ptr": "qm", "s_ptr": "s",
    }  # fmt: skip
    of_chain = {"ds_ptr": "ds", "scale_ptr": "scale", "phi_ptr": "phi", "u_ptr": "u"}
    tensors |= of_chain if chain else dict.fromkeys(of_chain, "qm")
    stride_ud, stride_ur = u_strides or (R, 1)
    launch = _launch(
        "backward_columns_kernel", config,
        (splits, cdiv(D, config.block_d) + chain, cdiv(R, _mode(rows.dtype, R)["BLOCK_R"])), rows,
        tensors | {"t_ptr": "t", "dt_parts_ptr": "dt_parts"},
        rows_per_split=rows_per_split, stride_dxm=D, stride_dym=stride_dym, stride_xm=stride_xm,
        stride_ud=stride_ud, stride_ur=stride_ur, dt_parts_count=dt_parts_count,
        NEED_DX=need_dx, STAGES=config.num_stages, CHAIN=chain,
        BLOCK_P=tuning.SCALE_PAIRS, SCALE_BLOCK_D=tuning.SCALE_BLOCK_D,
    )  # fmt: skip
    return launch, (splits, R, D)


def _bwd_parts(
    rows: Rows, stride_dym: int, stride_xm: int, t_strides: tuple[int, int], u_strides: tuple[int, int] | None,
    transpose: bool,
) -> tuple[list[Launch], dict[str, tuple]]:  # fmt: skip
    """dx, and dv and dt in parts, which are in the scratch."""
    v, halves, halves_scratch = _halves(rows)
    launches, scratch = _rows_bwd(rows, stride_dym, t_strides, transpose, v)
    if rows.R > FUSED_RANK:
        launches.append(_combine("dx", "dy", "qm", v, rows, stride_dym))
    parts = scratch["dt_parts"][0][0]
    columns, shape = _columns_bwd(rows, stride_dym, stride_xm, u_strides, parts, rows.R <= FUSED_RANK, v)
    return [*halves, *launches, columns], halves_scratch | scratch | {"dv_parts": (shape, torch.float32)}


def _with_sums(rows: Rows, launches: list[Launch], scratch: dict[str, tuple]) -> Launches:
    """dv and dt beside what the launches give, of their parts in the scratch."""
    counts = {name: scratch[f"{name}_parts"][0][0] for name in ("dv", "dt")}
    sizes = {"dv": rows.R * rows.D, "dt": rows.R**2}
    for name, count in counts.items():
        if count == 1:  # a single part is its own sum
            sizes[name] = 0
            del scratch[f"{name}_parts"]
            launches = [_in_place(launch, f"{name}_parts", name) for launch in launches]
    if any(sizes.values()):
        programs = sum(cdiv(size, tuning.SUM_BLOCK) for size in sizes.values())
        parts = {f"{name}_parts_ptr": name if count == 1 else f"{name}_parts" for name, count in counts.items()}
        arguments = {f"{name}_size": size for name, size in sizes.items()}
        arguments |= {f"{name}_parts_count": count for name, count in counts.items()}
        arguments |= {"BLOCK": tuning.SUM_BLOCK, "num_warps": 4}
        tensors = {"dv_ptr": "dv", "dt_ptr": "dt"} | parts
        launches.append(Launch(triton_launch.kernels().sum_kernel, (programs,), tensors, arguments))
    return Launches(rows.device, launches, scratch)


@planned
def _bwd_plan(rows: Rows, stride_dym: int, stride_xm: int, t_strides: tuple[int, int], transpose: bool) -> Launches:
    """Of dx, dv, dt, dy, x, v, t and p."""
    return _with_sums(rows, *_bwd_parts(rows, stride_dym, stride_xm, t_strides, None, transpose))


def _in_place(launch: Launch, old: str, new: str) -> Launch:
    return launch._replace(tensors={key: new if name == old else name for key, name in launch.tensors.items()})


def reflect_bwd(
    dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, D), dv (R, D) and dt (R, R) of `Backend.reflect_bwd`."""
    (M, D), R = x.shape, v.shape[0]
    _require_int_offsets("reflect_bwd", D, R)
    dx = triton_launch.empty_like(dy, M, D)
    if dy.numel() == 0 or v.numel() == 0:
        return dx.copy_(dy), torch.zeros_like(v), torch.zeros_like(t)
    dv, dt = triton_launch.empty_like(v, R, D), triton_launch.empty_like(t, R, R)
    launches = _bwd_plan(Rows(M, D, R, x.dtype, x.device), dy.stride(0), x.stride(0), t.stride(), transpose)
    launches(dx=dx, dv=dv, dt=dt, dy=dy, x=x, v=v.contiguous(), t=t, p=p.contiguous())
    return dx, dv, dt


@planned
def _chain_plan(
    rows: tuple, u_dtype: torch.dtype, u_strides: tuple[int, int], stride_dym: int, stride_xm: int, transpose: bool
) -> Launches:
    """Of dx, du, dy, x, u, v, t and p."""
    rows = Rows(*rows)
    R = rows.R
    launches, scratch = _bwd_parts(rows, stride_dym, stride_xm, (R, 1), u_strides, transpose)
    scratch |= {"ds": ((R, R), torch.float64), "scale": ((R,), torch.float64), "phi": ((R,), torch.float64)}
    du = triton_factor.du_launch(rows.D, R, scratch["dv_parts"][0][0], apply_gs=False)
    tensors = {
        "du_ptr": "du", "dv_ptr": "dv_parts", "v_ptr": "v", "w_ptr": "ds", "inverse_ptr": "ds", "scale_ptr": "scale",
        "phi_ptr": "phi",
    }  # fmt: skip
    return Launches(rows.device, [*launches, du._replace(tensors=tensors)], scratch)


def chain_bwd(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
) -> tuple[Tensor, Tensor]:
    """dx (M, D) and du (D, R) of `Backend.chain_bwd`, up to `FUSED_BACKWARD_RANK` columns, of tensors with elements."""
    (M, D), R = x.shape, v.shape[0]
    _require_int_offsets("chain_bwd", D, R)
    dx, du = triton_launch.empty_like(dy, M, D), triton_launch.empty_like(u, D, R)
    rows = M, D, R, x.dtype, x.device
    launches = _chain_plan(rows, u.dtype, u.stride(), dy.stride(0), x.stride(0), transpose)
    launches(dx=dx, du=du, dy=dy, x=x, u=u, v=v.contiguous(), t=t.contiguous(), p=p.contiguous())
    return dx, du


# --- the weight side --------------------------------------------------------------------------------------------------


@planned
def _weight_side_plan(rows: Rows, stride_dxm: int, stride_xm: int, t_strides: tuple[int, int]) -> Launches:
    """Of dv, dt, dy, which is dx, x, v, v Q and t."""
    (v, launches, scratch), (vq, of_vq, scratch_of_vq) = _halves(rows), _halves(rows, "vq")
    of_rows, scratch_of_rows = _rows_bwd(rows, stride_dxm, t_strides, True, vq)
    parts = scratch_of_rows["dt_parts"][0][0]
    columns, shape = _columns_bwd(rows, stride_dxm, stride_xm, None, parts, False, v)
    scratch |= scratch_of_vq | scratch_of_rows
    scratch |= {"p": ((rows.M, rows.R), torch.float32), "dv_parts": (shape, torch.float32)}
    launches += [_project("p", "x", v, rows, stride_xm), *of_vq, *of_rows, columns]
    return _with_sums(rows, launches, scratch)


def weight_side_bwd(dx: Tensor, x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """dv (R, D) and dt (R, R) of `reference.weight_side_bwd`: two reads of x and of dx.

    They are those of `reflect_bwd` for dy = dx Qᵀ, which is not formed. Its q = dy vᵀ is dx (v Q)ᵀ, from which dt
    follows and, with s = p tᵀ and c = pᵀ dx vᵀ, the one sum over dy: sᵀ dy = sᵀ dx - t c tᵀ v, t c tᵀ = t dtᵀ t.
    """
    (M, D), R = x.shape, v.shape[0]
    _require_int_offsets("weight_side_bwd", D, R)
    dv, dt = triton_launch.empty_like(v, R, D), triton_launch.empty_like(t, R, R)
    if x.numel() == 0 or R == 0:
        return dv.zero_(), dt.zero_()
    v = v.contiguous()
    vq, _ = reflect(v, v, t, transpose=False, need_p=False)
    launches = _weight_side_plan(Rows(M, D, R, x.dtype, x.device), dx.stride(0), x.stride(0), t.stride())
    launches(dv=dv, dt=dt, dy=dx, x=x, v=v, vq=vq, t=t)
    wide_t = t.double()  # float64 products have no tf32
    dv += wide_t @ dt.mT.double() @ wide_t @ v.double()
    return dv, dt
