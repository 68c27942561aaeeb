"""The reading of Triton's intermediate code in `products.py` sees what it is there for."""

import pytest

from tests.triton.products import of_transposed_products

LOADED = """
tt.func public @kernel(%x_ptr: !tt.ptr<f32>) {
  %x = tt.load %x_ptr : tensor<16x16x!tt.ptr<f32>>
  %p = tt.dot %x, %x, %zero : tensor<16x16xf32>
  %x_t = tt.trans %x {order = array<i32: 1, 0>} : tensor<16x16xf32>
  %y = tt.dot %x_t, %p, %zero : tensor<16x16xf32>
}
"""
TRANSPOSED = """
tt.func public @kernel(%x: tensor<16x16xf32>) {
  %p = tt.dot %x, %x, %zero : tensor<16x16xf32>
  %s = arith.mulf %p, %x : tensor<16x16xf32>
  %s_t = tt.trans %s {order = array<i32: 1, 0>} : tensor<16x16xf32>
  %y = tt.dot %s_t, %x, %zero : tensor<16x16xf32>
}
"""
CARRIED = """
tt.func public @kernel(%x: tensor<16x16xf32>) {
  %p:2 = scf.for %i = %c0 to %c9 step %c1 iter_args(%q = %x, %acc = %zero) -> (tensor<16x16xf32>) : i32 {
    %acc_1 = tt.dot %x, %x, %acc : tensor<16x16xf32>
    scf.yield %x, %acc_1 : tensor<16x16xf32>, tensor<16x16xf32>
  }
  %p_t = tt.trans %p#RESULT {order = array<i32: 1, 0>} : tensor<16x16xf32>
  %y = tt.dot %p_t, %x, %zero : tensor<16x16xf32>
}
"""
WITHIN = """
tt.func public @kernel(%x: tensor<16x16xf32>) {
  %y = scf.for %i = %c0 to %c9 step %c1 iter_args(%acc = %x) -> (tensor<16x16xf32>) : i32 {
    %acc_t = tt.trans %acc {order = array<i32: 1, 0>} : tensor<16x16xf32>
    %acc_1 = tt.dot %acc_t, %x, %zero : tensor<16x16xf32>
    scf.yield %acc_1 : tensor<16x16xf32>
  }
}
"""
SAME_NAME = """
tt.func public @kernel(%x: tensor<16x16xf32>) {
  scf.if %c {
    %v = tt.dot %x, %x, %zero : tensor<16x16xf32>
    tt.store %x_ptr, %v : tensor<16x16x!tt.ptr<f32>>
  } else {
    %v = tt.load %x_ptr : tensor<16x16x!tt.ptr<f32>>
    %v_t = tt.trans %v {order = array<i32: 1, 0>} : tensor<16x16xf32>
    %y = tt.dot %v_t, %x, %zero : tensor<16x16xf32>
  }
}
"""


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (LOADED, 0),
        (TRANSPOSED, 1),
        (CARRIED.replace("RESULT", "0"), 0),
        (CARRIED.replace("RESULT", "1"), 1),
        (WITHIN, 1),
        (SAME_NAME, 0),
    ],
    ids=["loaded", "transposed", "carried-x", "carried-product", "within-a-loop", "same-name"],
)
def test_transposed_products(code, found):
    assert len(of_transposed_products(code)) == found
