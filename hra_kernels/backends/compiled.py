"""Loads the package's compiled modules, or says why one is missing: CMake leaves a note where it left a module out."""

from importlib import import_module
from types import ModuleType


def load(name: str) -> tuple[ModuleType | None, str | None]:
    """The module `hra_kernels.<name>` and None, or None and why it is not here."""
    try:
        return import_module(f"hra_kernels.{name}"), None
    except ModuleNotFoundError:
        return None, f"the compiled module {name} is missing: {_why_left_out(name)}"
    except ImportError as error:
        return None, f"the compiled module {name} does not load: {' '.join(str(error).split())}"


def _why_left_out(name: str) -> str:
    try:
        return f"when hra-kernels was installed, {import_module(f'hra_kernels.{name}_left_out').REASON}"
    except ModuleNotFoundError:
        return "its build failed when hra-kernels was installed (pip install -v shows how), or was for another Python"
