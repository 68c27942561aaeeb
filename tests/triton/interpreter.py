"""Triton's interpreter with bfloat16, tf32 and scalars made right; importing this module repairs it.

It is also a pytest plugin, for its larger tiles: `tests/triton/conftest.py` loads it for the tests beside it,
`tests/conftest.py` for `pytest --backends triton`.

Unrepaired, the interpreter keeps bfloat16 as 16-bit integers and multiplies the integers in `tl.dot`, truncates where
the hardware rounds to nearest even, and computes every float32 product exactly, also where tf32 was asked for. Up to
Triton 3.6 it takes scalars from arrays of one element, which NumPy 2.4 no longer gives.
"""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from hra_kernels.backends import triton_launch, tuning

Handle = interpreter.TensorHandle


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _tf32(values: np.ndarray, rounding: int) -> np.ndarray:
    """float32 with the 10 mantissa bits of tf32: truncated (0), or rounded to nearest (0x1000, PTX's cvt.rna)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(rounding)) & np.uint32(0xFFFFE000)).view(np.float32)


def _float32_product(a: np.ndarray, b: np.ndarray, precision) -> np.ndarray:
    """As compiled: three passes round with cvt.rna, a single pass hands float32 to units that read the top bits."""
    name = str(precision).upper()
    if "TF32X3" in name:
        a_hi, b_hi = _tf32(a, 0x1000), _tf32(b, 0x1000)
        with np.errstate(invalid="ignore"):  # infinity - infinity
            a_lo, b_lo = _tf32(a - a_hi, 0x1000), _tf32(b - b_hi, 0x1000)
        return a_lo @ b_hi + a_hi @ b_lo + a_hi @ b_hi
    if "TF32" in name:
        return _tf32(a, 0) @ _tf32(b, 0)
    return a @ b


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    operands = [_widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b)]
    if d.data.dtype != np.float32:
        raise TypeError(f"tl.dot accumulates in float32 in this project, got {d.data.dtype}")
    if a.dtype.scalar == tl.float32:
        product = _float32_product(*operands, input_precision)
    else:
        product = np.matmul(*(x.astype(np.float32) for x in operands))
    return Handle(product + d.data, d.dtype.scalar)


def _cast(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == target:
        return Handle(src.data, target)
    data = _widen(src.data) if source == tl.bfloat16 else src.data
    if target == tl.bfloat16:
        return Handle(_round_to_bfloat16(data.astype(np.float32)), target)
    with np.errstate(over="ignore", invalid="ignore"):
        return Handle(data.astype(interpreter._get_np_dtype(target)), target)


_binary_op = interpreter.InterpreterBuilder.binary_op


def _checked_binary_op(self, lhs, rhs, op):
    if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
        raise TypeError("bfloat16 arithmetic in a kernel: convert to float32 first, the interpreter cannot do it")
    return _binary_op(self, lhs, rhs, op)


def _with_bool_mask(create, position: int):
    def checked(self, *operands):
        mask = operands[position]
        if mask.data.dtype != bool:
            raise TypeError(
                f"a mask of {mask.data.dtype}, from a scalar comparison: Triton 3.9 interprets none but bool"
            )
        return create(self, *operands)

    return checked


interpreter.InterpreterBuilder.create_masked_load = _with_bool_mask(
    interpreter.InterpreterBuilder.create_masked_load, 1
)
interpreter.InterpreterBuilder.create_masked_store = _with_bool_mask(
    interpreter.InterpreterBuilder.create_masked_store, 2
)
interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpreterBuilder.cast_impl = _cast
interpreter.InterpreterBuilder.binary_op = _checked_binary_op


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_tensor_with_scalars(tensor, *scope):  # 3.4 has none
    _patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = _patch_tensor_with_scalars


_patched_modules: set[str] = set()


def _call_device_function(self, *args, **kwargs):
    # unrepaired, every call patches its module's triton.language anew and for good, 2 ms each time; once is enough
    if self.fn.__module__ not in _patched_modules:
        interpreter._patch_lang(self.fn)
        _patched_modules.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call_device_function


# --- tiles ------------------------------------------------------------------------------------------------------------


_SHIPPED = tuning.CONFIGS[tuning.DEFAULT]
_COARSE = [(tuning.WIDE, tuning.WIDE, tuning.LaunchConfig(64, 256, 4, 1))]


@pytest.fixture(autouse=True)
def coarse_tiles(request, monkeypatch):
    """The interpreter's time goes with the number of tiles, so most tests run larger ones than those that ship."""
    if "shipped_tiles" not in request.fixturenames:
        monkeypatch.setattr(tuning, "CONFIGS", {tuning.DEFAULT: dict.fromkeys(_SHIPPED, _COARSE)})
        monkeypatch.setattr(tuning, "GRAM_BLOCK_D", 128)
        monkeypatch.setattr(tuning, "SCALE_BLOCK_D", 512)
        monkeypatch.setattr(tuning, "SCALE_PAIRS", 2)
    triton_launch.forget_plans()
    yield
    triton_launch.forget_plans()
