"""Launches of `triton_factor_kernels`: the factor of a chain, and its gradient."""

import torch
from torch import Tensor

from hra_kernels.backends import triton_launch, tuning
from hra_kernels.backends.triton_launch import Launch, cdiv, power_of_two_above


def _scale_rows(u: Tensor, pairs: bool, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale, φ), both (L, R) float64, of u (L, D, R); fills v (L, R, D) if given."""
    L, D, R = u.shape
    scale = triton_launch.empty((L, R), torch.float64, u.device)
    phi = triton_launch.empty((L, R), torch.float64, u.device)
    triton_launch.factor_kernels().scale_rows_kernel[(cdiv(R, 2 * tuning.SCALE_PAIRS), L)](
        v_ptr=scale if v is None else v, scale_ptr=scale, phi_ptr=phi, u_ptr=u, D=D, R=R,
        stride_ul=u.stride(0), stride_ud=u.stride(1), stride_ur=u.stride(2),
        BLOCK_P=tuning.SCALE_PAIRS, BLOCK_D=tuning.SCALE_BLOCK_D, PAIRS=pairs, NEED_V=v is not None,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return scale, phi


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ (L, splits, R, R) float64, each split's share, of a and b (L, R, D)."""
    L, R, D = a.shape
    per_split = max(
        tuning.GRAM_COLUMNS, cdiv(cdiv(D, tuning.gram_splits(R)), tuning.GRAM_BLOCK_D) * tuning.GRAM_BLOCK_D
    )
    splits = cdiv(D, per_split)
    g = triton_launch.empty((L, splits, R, R), torch.float64, a.device)
    triton_launch.factor_kernels().gram_kernel[(cdiv(R, 16) ** 2, splits, L)](
        g_ptr=g, a_ptr=a, b_ptr=b, D=D, R=R, d_per_split=per_split,
        BLOCK_R=16, BLOCK_D=tuning.GRAM_BLOCK_D, num_warps=8, num_stages=1,
    )  # fmt: skip
    return g


def _gram_schmidt(g: Tensor, t: Tensor) -> Tensor:
    """l⁻¹ (L, R, R) float64; fills t."""
    L, splits, R, _ = g.shape
    block_r = power_of_two_above(R, 16)
    inverse = triton_launch.empty((L, R, R), torch.float64, g.device)
    triton_launch.factor_kernels().gram_schmidt_kernel[(L,)](
        inverse_ptr=inverse, t_ptr=t, g_ptr=g, R=R, num_splits=splits,
        BLOCK_R=block_r, BLOCK_C=16, BLOCK_S=tuning.gram_splits(R),
        num_warps=tuning.factor_warps(block_r), num_stages=1,
    )  # fmt: skip
    return inverse


def factor(u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
    """v (L, R, D) and t (L, R, R) of u (L, D, R)."""
    L, D, R = u.shape
    v = triton_launch.empty((L, R, D), torch.float32, u.device)
    t = triton_launch.empty((L, R, R), torch.float32, u.device)
    if u.numel() == 0:
        return v, t.zero_()
    kernels = triton_launch.factor_kernels()
    block_r = power_of_two_above(R, 16)
    with torch.cuda.device_of(u):
        if not apply_gs:
            scale, phi = _scale_rows(u, True, v)
            g = _gram(v, v)
            kernels.chain_factor_kernel[(cdiv(R, 16), L)](
                t_ptr=t, g_ptr=g, scale_ptr=scale, phi_ptr=phi, R=R, num_splits=g.shape[1],
                BLOCK_R=block_r, BLOCK_C=16, BLOCK_S=tuning.gram_splits(R),
                num_warps=tuning.factor_warps(block_r), num_stages=1,
            )  # fmt: skip
        else:
            hat = triton_launch.empty((L, R, D), torch.float32, u.device)
            _scale_rows(u, False, hat)
            inverse = _gram_schmidt(_gram(hat, hat), t)
            kernels.combine_rows_kernel[(cdiv(D, 128), cdiv(R, 16), L)](
                v_ptr=v, w_ptr=inverse, hat_ptr=hat, D=D, R=R, BLOCK_R=16, BLOCK_D=128, num_warps=4, num_stages=1
            )
    return v, t


def du_launch(D: int, R: int, dv_parts_count: int, apply_gs: bool) -> Launch:
    """The last of the factor's backward, which adds up dv first where it comes in parts."""
    names = ("du", "dv", "v", "w", "inverse", "scale", "phi")
    arguments = {
        "D": D, "R": R, "dv_parts_count": dv_parts_count, "BLOCK_P": 8, "BLOCK_D": 128, "APPLY_GS": apply_gs,
        "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
    kernel = triton_launch.factor_kernels().factor_bwd_kernel
    return Launch(kernel, (cdiv(D, 128), cdiv(R, 16), 1), {f"{name}_ptr": name for name in names}, arguments)


def factor_bwd(dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
    """du (D, R)."""
    D, R = u.shape
    du = triton_launch.empty((D, R), u.dtype, u.device)
    if u.numel() == 0:
        return du
    dv, dt, v, t = (tensor.contiguous()[None] for tensor in (dv, dt, v, t))
    kernels = triton_launch.factor_kernels()
    block_r = power_of_two_above(R, 16)
    w = triton_launch.empty((1, R, R), torch.float64, u.device)
    inverse = w
    with torch.cuda.device_of(u):
        if not apply_gs:
            scale, phi = _scale_rows(u[None], True, None)
            kernels.chain_bwd_kernel[(cdiv(R, 16), 1)](
                ds_ptr=w, t_ptr=t, dt_ptr=dt, R=R, BLOCK_R=block_r, BLOCK_C=16, num_warps=4, num_stages=1
            )
        else:
            hat = triton_launch.empty((1, R, D), torch.float32, u.device)
            scale, phi = _scale_rows(u[None], False, hat)
            inverse = _gram_schmidt(_gram(hat, hat), triton_launch.empty((1, R, R), torch.float32, u.device))
            k = _gram(dv, v)
            kernels.gram_schmidt_bwd_kernel[(cdiv(R, 16), 1)](
                n_ptr=w, inverse_ptr=inverse, k_ptr=k, R=R, num_splits=k.shape[1],
                BLOCK_R=block_r, BLOCK_C=16, BLOCK_S=tuning.gram_splits(R), num_warps=4, num_stages=1,
            )  # fmt: skip
        kernel, grid, _, arguments = du_launch(D, R, 1, apply_gs)
        kernel[grid](
            du_ptr=du, dv_ptr=dv, v_ptr=v, w_ptr=w, inverse_ptr=inverse, scale_ptr=scale, phi_ptr=phi, **arguments
        )
    return du
