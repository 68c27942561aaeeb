"""The drop-in for Hugging Face PEFT: after `enable()`, PEFT builds these layers where it would build its own for HRA.

    import hra_kernels.peft
    hra_kernels.peft.enable()
    model = get_peft_model(model, HRAConfig(r=8, target_modules=[...]))     # nothing else changes

PEFT keeps doing what PEFT does: configs, matching of target modules, adapters by name, files. Adapter files are
interchangeable both ways, bit for bit. `export_lora` and PEFT's `convert_to_lora` write an adapter as a LoRA, exactly.
What is not supported (transposed convolutions, groups) is refused with an error that says so.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import peft
except ImportError as error:
    raise ImportError("hra_kernels.peft needs PEFT: pip install 'hra-kernels[peft]'") from error

SUPPORTED = ("0.19", "0.20", "0.21")
"""The PEFT releases whose HRA layers these replace; each is run through the tests. A newer one gets a warning."""

_KNOWN_BROKEN: tuple[str, ...] = ()
"""Newer releases (`major.minor`) that these layers are known not to work with."""


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _require_supported() -> None:
    tested = f"{SUPPORTED[0]} to {SUPPORTED[-1]}"
    release = ".".join(peft.__version__.split(".")[:2])
    if release in _KNOWN_BROKEN or _release(release) < _release(SUPPORTED[0]):
        raise RuntimeError(
            f"hra_kernels.peft: PEFT must be {tested}, got {peft.__version__}, which does not work. PEFT's own "
            "HRA still works; for the kernels install another release, or a newer hra-kernels."
        )
    if _release(release) > _release(SUPPORTED[-1]):
        warnings.warn(
            f"hra_kernels.peft is tested with PEFT {tested}, got {peft.__version__}, which is newer.", stacklevel=3
        )


_require_supported()

import peft.mapping  # noqa: E402
import peft.tuners.hra.model  # noqa: E402
import peft.utils.hotswap  # noqa: E402

from hra_kernels.peft.config import HRAConfig  # noqa: E402
from hra_kernels.peft.conv import HRAConv1d, HRAConv2d, HRAConv3d  # noqa: E402
from hra_kernels.peft.embedding import HRAEmbedding  # noqa: E402
from hra_kernels.peft.export import exact_conversion, export_lora  # noqa: E402
from hra_kernels.peft.hotswap import CONFIG_KEYS, hotswap_with_hra, preparation_with_hra  # noqa: E402
from hra_kernels.peft.linear import HRALinear  # noqa: E402
from hra_kernels.peft.model import HRAModel  # noqa: E402

try:
    from peft.tuners.lora import conversion
except ImportError:  # releases before it
    conversion = None

__all__ = [
    "SUPPORTED",
    "HRAConfig",
    "HRAConv1d",
    "HRAConv2d",
    "HRAConv3d",
    "HRAEmbedding",
    "HRALinear",
    "HRAModel",
    "disable",
    "disabled",
    "enable",
    "enabled",
    "export_lora",
    "is_enabled",
]

_HRA = peft.PeftType.HRA
_hotswap = peft.utils.hotswap
_ABSENT = object()
_replaced: dict[tuple[int, object], tuple[dict, object, object]] = {}

# Everything that decides which classes PEFT builds. The mapping serves get_peft_model, PeftModel and, through
# inject_adapter_in_model, transformers and diffusers; the configuration is what files are loaded into; the two layer
# names serve a stock HRAModel that exists already; the next three are where `HRAModel` is exported from. And what
# `convert_to_lora` does with one layer, and hot swapping with adapters that are not LoRA's.
_REPLACEMENTS = (
    (peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, _HRA, HRAModel),
    (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, _HRA, HRAConfig),
    (vars(peft.tuners.hra.model), "HRALinear", HRALinear),
    (vars(peft.tuners.hra.model), "HRAConv2d", HRAConv2d),
    (vars(peft.tuners.hra), "HRAModel", HRAModel),
    (vars(peft.tuners), "HRAModel", HRAModel),
    (vars(peft), "HRAModel", HRAModel),
    (_hotswap.CONFIG_KEYS_TO_CHECK, _HRA, CONFIG_KEYS),
    (
        vars(_hotswap),
        "hotswap_adapter_from_state_dict",
        hotswap_with_hra(_hotswap.hotswap_adapter_from_state_dict),
    ),
    (
        vars(_hotswap),
        "prepare_model_for_compiled_hotswap",
        preparation_with_hra(_hotswap.prepare_model_for_compiled_hotswap),
    ),
)
if conversion is not None:
    _REPLACEMENTS += (
        (vars(conversion), "_convert_module_to_lora", exact_conversion(conversion._convert_module_to_lora)),
    )


def enable() -> None:
    """Make PEFT build this package's HRA layers from now on. Calling it twice is harmless.

    Layers that exist already stay what they are. `hra_kernels.peft.disable()` undoes it.

    Raises:
        RuntimeError: the installed PEFT is older than `SUPPORTED`, or known not to work (raised at import).
    """
    if not _replaced:
        for namespace, name, replacement in _REPLACEMENTS:
            _replaced[id(namespace), name] = (namespace, name, namespace.get(name, _ABSENT))
            namespace[name] = replacement


def disable() -> None:
    """Make PEFT build its own HRA layers again, exactly as before `enable()`. Models built meanwhile keep working."""
    for namespace, name, original in _replaced.values():
        if original is _ABSENT:
            del namespace[name]
        else:
            namespace[name] = original
    _replaced.clear()


def is_enabled() -> bool:
    """Whether PEFT builds this package's HRA layers at present."""
    return bool(_replaced)


@contextmanager
def enabled() -> Iterator[None]:
    """`enable()` inside the `with` block, and whatever was before after it."""
    before = is_enabled()
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


@contextmanager
def disabled() -> Iterator[None]:
    """PEFT's own HRA layers inside the `with` block, and whatever was before after it."""
    before = is_enabled()
    disable()
    try:
        yield
    finally:
        if before:
            enable()
