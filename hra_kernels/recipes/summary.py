"""The results of a training job as a page of Markdown: `summary.md`, and a section of bench/results/README.md."""

from typing import Any

from hra_kernels.measuring.text import markdown_table, seconds_text
from hra_kernels.recipes.application import Metric


def markdown(results: dict[str, Any], main: Metric, output: str, ours: str, floor: str) -> str:
    """What was trained and measured, from the contents of results.json.

    Args:
        main, output: the metric that comes first, and what outputs are called.
        ours, floor: the names in `step_cost` of our method and of the one that the others are compared with.
    """
    data, where, options = results["data"], results["environment"], results["arguments"]
    threads = "1 thread" if where["torch_threads"] == 1 else f"{where['torch_threads']} threads"
    machine = where["gpus"][0] if where["gpus"] else f"{where['cpu']}, {threads}"
    load = results.get("load_average_before_timing")
    sizes = ", ".join(f"{number} {part}" for part, number in data.items() if isinstance(number, int))
    intro = (
        f"{results['model']}, {data['source']} ({sizes}); HRA r = {options['rank']} on "
        f"{', '.join(options['target_modules'])}, {results['parameters']['trained']:,} trained parameters, "
        f"{results['steps']} steps of {options['batch_size']}, seed {options['seed']}. Measured on {machine}, "
        f"torch {where['torch']}, PEFT {where['peft']}, backend {results['backend']}"
        + (f", commit {where['commit']}" if where["commit"] else "")
        + (f"; load average {load:.1f} before the timing" if load is not None else "")
    )
    parts = [intro + ".", *results["notes"], _metrics(results, main, output)]
    if "step_cost" in results:
        base = results["step_cost"][floor]["median_s"]
        rows = []
        for name, cost in results["step_cost"].items():
            row = [name, seconds_text(cost["median_s"]), f"{cost['median_s'] / base:.2f}"]
            rows.append([f"**{cell}**" for cell in row] if name == ours else row)
        parts.append(markdown_table(["one training step", "median", f"over “{floor}”"], rows))
    if "times_faster_than_peft_hra" in results:
        parts.append(
            f"{results['times_faster_than_peft_hra']:.1f} times faster than PEFT's HRA on the same batches, with the "
            f"same losses (largest relative difference {results['largest_loss_difference_from_peft_hra']:.0e})."
        )
    return "\n\n".join(parts) + "\n"


def _metrics(results: dict[str, Any], main: Metric, output: str) -> str:
    """One row per way to answer the test split, one column per metric."""
    found = {**results["test"], **results["saved"]}
    others = sorted({name for row in found.values() for name in row} - {main.name, "max_difference"})
    rows = []
    for name, row in found.items():
        cells = [name, main.text(row[main.name]), *(f"{row[other]:.4f}" if other in row else "" for other in others)]
        cells = [f"**{cell}**" if name == "after" and cell else cell for cell in cells]
        rows.append([*cells, f"{row['max_difference']:.1e}" if "max_difference" in row else ""])
    return markdown_table(["test split", main.name, *others, f"largest {output} difference"], rows)
