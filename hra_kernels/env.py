"""`hra-kernels env`: what is on this machine and which backends run here, as text for people or as JSON."""

import importlib
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hra_kernels
from hra_kernels import ops
from hra_kernels.backends import cpu as cpu_backend


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_match(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1).strip() if match else None


def cpu_name() -> str:
    try:
        name = _first_match(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return name or platform.processor() or platform.machine()


def _cpu_isa() -> str | None:
    if cpu_backend.BACKEND.why_unavailable():
        return None
    return importlib.import_module("hra_kernels._native").isa()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nvcc() -> str | None:
    nvcc = shutil.which("nvcc")
    if not nvcc:
        return None
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{nvcc} does not run: {error}"
    return _first_match(r"release ([\d.]+)", said) or f"{nvcc}, version unknown"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


RIGHT_ON_HOPPER = (13, 1)
"""The first ptxas not known to compile kernels wrongly for compute capability 9.0: releases 12.8 and 13.0 do."""


def _ptxas(capability: tuple[int, int]):
    """Path and version of the assembler that Triton takes for a GPU."""
    compiler = importlib.import_module("triton.backends.nvidia.compiler")
    chosen_by_gpu = bool(inspect.signature(compiler.get_ptxas).parameters)  # not in Triton 3.4
    return compiler.get_ptxas(10 * capability[0] + capability[1]) if chosen_by_gpu else compiler.get_ptxas()


def _is_right_on_hopper(ptxas) -> bool:
    return tuple(map(int, ptxas.version.split("."))) >= RIGHT_ON_HOPPER


def _ptxas_note() -> str | None:
    """The assembler that Triton uses on the first GPU, and a doubt about it if there is one; None where none is."""
    if not torch.cuda.is_available() or torch.version.hip or version("triton") is None:
        return None
    capability = torch.cuda.get_device_capability(0)
    try:
        ptxas = _ptxas(capability)
        if capability != (9, 0) or _is_right_on_hopper(ptxas):
            return f"ptxas {ptxas.version}"
        other = Path(ptxas.path).with_name("ptxas-blackwell")
        newer = type(ptxas).from_path(str(other)) if other.exists() else None
    except Exception as error:  # Triton's own parts, which change: this report goes on
        return f"ptxas unknown: {error}"
    remedy = f"TRITON_PTXAS_PATH={newer.path}" if newer and _is_right_on_hopper(newer) else "Triton 3.9"
    return (
        f"ptxas {ptxas.version}, which has made wrong code of other projects' kernels on this GPU: "
        f"`hra-kernels verify` checks these; {remedy} has a newer one"
    )


def _peft_support() -> str:
    if version("peft") is None:
        return "not installed: pip install 'hra-kernels[peft]'"
    try:
        importlib.import_module("hra_kernels.peft")
    except Exception as error:  # whatever a foreign installation does, this report has to say it and go on
        return f"not usable: {error}"
    return "supported"


def _commit() -> str | None:
    """The git commit of the checkout this package runs from, `-dirty` with uncommitted changes; None elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    result = subprocess.run(describe, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def report() -> dict[str, Any]:
    """Versions, processor, GPUs, and each backend with the reason why it does not run here (None where it does)."""
    return {
        "hra_kernels": hra_kernels.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": _usable_cores(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cuda_of_torch": torch.version.cuda,
        "gpus": _gpus(),
        "nvcc": _nvcc(),
        "triton": version("triton"),
        "ptxas": _ptxas_note(),
        "peft": version("peft"),
        "peft_support": _peft_support(),
        "transformers": version("transformers"),
        "backends": ops.backend_report(),
        "cpu_isa": _cpu_isa(),
        "forced_backend": os.environ.get(ops.BACKEND_VARIABLE) or None,
    }


def as_text(found: dict[str, Any]) -> str:
    """The report as aligned lines."""

    def installed(package: str, note: str = "") -> str:
        return f"{found[package]}{note}" if found[package] else "not installed"

    peft = installed("peft", f" ({found['peft_support']})") if found["peft"] else found["peft_support"]
    rows = [
        ("hra_kernels", f"{found['hra_kernels']}{', commit ' + found['commit'] if found['commit'] else ''}"),
        ("python", f"{found['python']} ({sys.executable})"),
        ("system", found["system"]),
        ("processor", f"{found['cpu']}, {found['cores']} cores usable"),
        ("torch", f"{found['torch']}, {found['torch_threads']} threads"),
        ("GPU", "; ".join(found["gpus"]) or "none that this PyTorch can use"),
        ("nvcc", found["nvcc"] or "not found: no CUDA kernels in a build here"),
        ("triton", installed("triton", f", {found['ptxas']}" if found["ptxas"] else "")),
        ("peft", peft),
        ("transformers", installed("transformers")),
    ]
    for name, reason in found["backends"].items():
        isa = f" ({found['cpu_isa']})" if name == "cpu" and not reason and found["cpu_isa"] else ""
        rows.append((f"backend {name}", f"no: {reason}" if reason else f"yes{isa}"))
    if found["forced_backend"]:
        rows.append((ops.BACKEND_VARIABLE, found["forced_backend"]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
