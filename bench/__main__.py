"""`python -m bench LEVEL`: measure, print the table, write JSON and plots. `python -m bench LEVEL --help` for more."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import layer, model, numerics, op, providers, record, report, scaling

LEVELS = {"op": op, "layer": layer, "model": model, "numerics": numerics, "scaling": scaling}


def _provider(name: str) -> providers.Provider:
    if name not in providers.BY_NAME:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(providers.BY_NAME)}, got {name!r}")
    return providers.BY_NAME[name]


def build_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--threads", type=int, default=2, help="PyTorch's CPU threads (default 2)")
    common.add_argument("--seconds", type=float, default=20.0, help="measuring time a case, without checks and warm-up")
    common.add_argument(
        "--providers", type=_provider, nargs="+", metavar="NAME", help="default: all that suit the level"
    )
    common.add_argument("--out", type=Path, help="folder for JSON and plots (default: none are written)")
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    levels = parser.add_subparsers(dest="level", required=True, metavar="LEVEL")
    for name, module in LEVELS.items():
        level = levels.add_parser(name, parents=[common], help=module.__doc__.split(":", 1)[1].split(".")[0].strip())
        module.add_arguments(level)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = getattr(LEVELS[options.level], "DEFAULT_PROVIDERS", list(providers.BY_NAME))
    options.providers = options.providers or [providers.BY_NAME[name] for name in names]
    console = Console(width=None if sys.stdout.isatty() else 160)
    columns = TextColumn("{task.description:<60}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        runs = LEVELS[options.level].run(
            options, lambda text, fraction: bar.update(task, description=text, completed=fraction)
        )
    report.show(runs, console)
    if options.out:
        record.save(options.out / f"{options.level}.json", options.level, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
