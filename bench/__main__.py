"""Measure, print a table, write JSON and plots: `python -m bench LEVEL`; `python -m bench report` draws from JSON."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import compare, host, layer, model, numerics, op, providers, record, report, scaling, screen
from hra_kernels.recipes.options import positive

LEVELS = {
    "op": op,
    "layer": layer,
    "model": model,
    "numerics": numerics,
    "scaling": scaling,
    "host": host,
}


def _provider(name: str) -> providers.Provider:
    if name not in providers.BY_NAME:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(providers.BY_NAME)}, got {name!r}")
    return providers.BY_NAME[name]


def build_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--threads", type=int, default=2, help="PyTorch's CPU threads (default 2)")
    common.add_argument("--seconds", type=positive(float), default=20.0, help="per case, without checks and warm-up")
    common.add_argument(
        "--providers", type=_provider, nargs="+", metavar="NAME", help="default: all that suit the level"
    )
    common.add_argument("--out", type=Path, help="folder for JSON and plots (default: none are written)")
    common.add_argument("--save", action="store_true", help="write into this machine's folder of bench/results/")
    common.add_argument("--missing", action="store_true", help="only the cases that the file in --out does not have")
    common.add_argument("--no-plots", action="store_true", help="JSON only")
    common.add_argument("--base", metavar="REF", help="measure this commit too, in turns, and compare")
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    levels = parser.add_subparsers(dest="level", required=True, metavar="LEVEL")
    for name, module in LEVELS.items():
        summary = module.__doc__.split(":", 1)[1].split(":")[0].split(".")[0].strip()
        level = levels.add_parser(name, parents=[common], help=" ".join(summary.split()), description=module.__doc__)
        level.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(level)
    drawn = levels.add_parser("report", help="tables, plots and results/README.md from the JSON that is there")
    drawn.add_argument("--results", type=Path, default=record.RESULTS, help="folder of machines' folders")
    drawn.add_argument("--readme", type=Path, help="fill this file's results block")
    return parser


def make_report(options: argparse.Namespace, console: Console) -> None:
    """Print every table, draw every plot, write the page of results and, where it is named, fill the README."""
    from bench import plots

    for path in sorted(options.results.glob("*/*.json")):
        if path.stem in LEVELS:
            runs = record.load(path)["runs"]
            screen.show(runs, console)
            plots.draw(path.parent, path.stem, runs)
    (options.results / "README.md").write_text(report.results_page(options.results))
    if options.readme:
        block = report.readme_block(options.results.resolve(), options.readme.resolve().parent)
        options.readme.write_text(report.fill(options.readme.read_text(), block))


def measure(options: argparse.Namespace, console: Console) -> None:
    """Measure the cases of one level. Each is in the file as soon as it is measured; one that fails spares the rest."""
    torch.set_num_threads(options.threads)
    if options.save:
        options.out = record.RESULTS / record.folder_name(options.device)
    if options.missing and not options.out:
        raise ValueError("--missing: expected --out or --save with it, for it needs a file to look into")
    module = LEVELS[options.level]
    if options.providers is None:
        names = getattr(module, "DEFAULT_PROVIDERS", list(providers.BY_NAME))
        options.providers = [providers.BY_NAME[name] for name in names]
    columns = TextColumn("{task.description:<60}"), BarColumn(), TimeElapsedColumn()
    planned, path = module.plan(options), options.out and options.out / f"{options.level}.json"
    if options.missing:
        planned = record.without_measured(planned, path)
    runs, failed = [], []
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(planned))
        for k, one in enumerate(planned):

            def advance(text: str, fraction: float, k: int = k) -> None:
                bar.update(task, description=text, completed=k + fraction)

            try:
                runs.append(one.measure(advance))
            except Exception as error:  # out of memory, a compiler's: whatever it is, the other cases may outlive it
                failed.append(f"{one.case['name']}: {type(error).__name__}: {' '.join(str(error).split())}")
                continue
            if path:
                record.save(path, options.level, runs[-1:])
    screen.show(runs, console)
    if path and runs and not options.no_plots:
        from bench import plots

        plots.draw(options.out, options.level, record.load(path)["runs"])
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(planned)} cases failed: {'; '.join(failed)}")


def _without(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`arguments` without these flags and their one value each."""
    kept, skip = [], False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not skip and name not in flags:
            kept.append(argument)
        skip = not skip and name in flags and not value
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = build_parser()
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    try:
        if options.level == "report":
            make_report(options, console)
        elif options.base:
            level_arguments = _without(arguments, ["--base", "--seconds", "--out"])
            level_arguments.remove(options.level)
            found = compare.compare(options.base, options.level, level_arguments, options.seconds, console)
            if options.out:
                compare.save(options.out / f"compare-{options.level}.json", found)
        else:
            measure(options, console)
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"bench: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
