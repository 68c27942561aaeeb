"""The command line: `hra-kernels env | verify | fetch | train | generate | eval | export`.

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import hra_kernels
from hra_kernels import verify
from hra_kernels.recipes import RecipeError, options

VERBS = {
    "train": ("train", "", "fine-tune a model with HRA, from loading to merging"),
    "generate": ("generate", "GENERATE_", "what a job's evaluation reads, by several processes"),
    "eval": ("evaluate", "EVAL_", "the metrics of a model that a job has trained and merged"),
}
"""Commands over jobs: the function of a job's file, the prefix of its OPTIONS and DEFAULTS, and help."""


class _JobParser(argparse.ArgumentParser):
    """Takes its options from the job's own file, which is imported only when the job is chosen.

    A job's file has a function for each command that serves it, and the command's tables of options and defaults, as
    VERBS names them.
    """

    job: str
    verb: str

    def parse_known_args(self, args=None, namespace=None):
        module = _import_for(f"hra_kernels.recipes.jobs.{self.job}", options.extra(self.job))
        self.description, self.formatter_class = module.__doc__, argparse.RawDescriptionHelpFormatter
        function, prefix = VERBS[self.verb][:2]
        if self.verb == "train":
            self.epilog = module.EPILOG
        options.add(self, getattr(module, prefix + "OPTIONS"), getattr(module, prefix + "DEFAULTS"))
        self.set_defaults(run=getattr(module, function))
        return super().parse_known_args(args, namespace)


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
    fetch.add_argument("job", choices=sorted(options.jobs()))
    fetch.set_defaults(run=_fetch)

    for verb, (function, _, said) in VERBS.items():
        _add_jobs(commands.add_parser(verb, help=said), verb, options.jobs(function))

    export = commands.add_parser(
        "export",
        help="a saved HRA adapter as a LoRA adapter, exactly",
        description="Write the LoRA adapter that equals a saved HRA adapter, for what serves LoRA alone (vLLM, "
        "Diffusers, llama.cpp). It belongs to the very base model it was exported from.",
    )
    export.add_argument("adapter", metavar="FOLDER", help="the HRA adapter: adapter_config.json and its weights")
    export.add_argument("--model", metavar="NAME_OR_FOLDER", help="base model (default: the one the adapter names)")
    export.add_argument("--num-labels", type=options.positive(int), metavar="N", help="classes of a classifier's head")
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


def _add_jobs(parser: argparse.ArgumentParser, verb: str, jobs: Mapping[str, str]) -> None:
    chosen = parser.add_subparsers(dest="job", required=True, metavar="JOB", parser_class=_JobParser)
    for name, said in jobs.items():
        sub = chosen.add_parser(name, help=said)
        sub.job, sub.verb = name, verb


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
