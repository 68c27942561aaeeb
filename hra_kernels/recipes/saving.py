"""Results that are there whole or not at all, whatever ends the process that writes them."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hra_kernels.recipes import RecipeError, reason

MADE = "whole"
"""The last file, also by name, of a folder that `made_once` fills."""


@contextlib.contextmanager
def written_whole(folder: Path, forgetting: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to write into; what it holds at the end of the `with` block is moved into `folder`.

    Nothing is moved if the block raises. A process that is killed leaves a folder `.partial` at most, which the next
    call removes.

    Args:
        folder: made where missing; entries of the same names are replaced, others stay.
        forgetting: further entries to remove, because what is written makes them out of date.

    Raises:
        RecipeError: no such folder can be made, or the disk is full.
    """
    partial = folder / ".partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir()
        try:
            yield partial
            entries = sorted(partial.iterdir())
            for name in {*forgetting, *(entry.name for entry in entries)}:
                _remove(folder / name)
            for entry in entries:
                os.replace(entry, folder / entry.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or reason(error)
        raise RecipeError(f"--out {folder}: cannot write this folder ({said})") from error


def save_evaluation(out: Path, results: Mapping[str, Any]) -> None:
    """What an `eval` found, as `eval.json` in `out`. Raises RecipeError as `written_whole`."""
    with written_whole(out) as folder:
        (folder / "eval.json").write_text(json.dumps(results, indent=2) + "\n")


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` where it has not been; under torchrun by the first process, the others wait."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _made(folder, make)
    import accelerate
    import torch

    with accelerate.PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        return _made(folder, make)


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    if not (folder / MADE).is_file():
        with written_whole(folder) as partial:
            make(partial)
            (partial / MADE).write_text("")
    return folder


def cannot_write(error: BaseException) -> bool:
    """Whether this is the file system's refusal; PyTorch's writer gives it as a RuntimeError."""
    return isinstance(error, (OSError, SafetensorError)) or "PytorchStreamWriter failed" in str(error)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
