"""Without a GPU these tests run the kernels in Triton's interpreter, which `tests/conftest.py` turned on."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton.interpreter import coarse_tiles  # noqa: F401  a fixture; importing it repairs the interpreter
