"""The results of a training job as a page of Markdown: `summary.md`, and a section of bench/results/README.md."""

from typing import Any

from hra_kernels.measuring.text import markdown_table, percent_text, seconds_text


def markdown(results: dict[str, Any], ours: str, floor: str) -> str:
    """What was trained and measured, from the contents of results.json.

    Args:
        ours, floor: the names in `step_cost` of our method and of the one that the others are compared with.
    """
    data, found, where = results["data"], results["test_accuracy"], results["environment"]
    options = results["arguments"]
    machine = where["gpus"][0] if where["gpus"] else f"{where['cpu']}, {where['torch_threads']} threads"
    intro = (
        f"{results['model']}, {data['source']} ({data['train']} to train, {data['validation']} to validate, "
        f"{data['test']} to test); HRA r = {options['rank']} on {', '.join(options['target_modules'])}, "
        f"{results['parameters']['trained']:,} trained parameters, {results['steps']} steps of "
        f"{options['batch_size']}, seed {options['seed']}. Measured on {machine}, torch {where['torch']}, "
        f"PEFT {where['peft']}, backend {results['backend']}"
        + (f", commit {where['commit']}" if where["commit"] else "")
    )
    rows = [
        ["always the most frequent class", percent_text(found["majority"]), ""],
        ["before: pretrained, new head", percent_text(found["before"]), ""],
        ["**after**", f"**{percent_text(found['after'])}**", ""],
    ]
    for name, saved in results["saved"].items():
        rows.append([name, percent_text(saved["accuracy"]), f"{saved['max_logit_difference']:.1e}"])
    parts = [intro + ".", markdown_table(["test split", "accuracy", "largest logit difference"], rows)]
    if "step_cost" in results:
        base = results["step_cost"][floor]["median_s"]
        rows = []
        for name, cost in results["step_cost"].items():
            row = [name, seconds_text(cost["median_s"]), f"{cost['median_s'] / base:.2f}"]
            rows.append([f"**{cell}**" for cell in row] if name == ours else row)
        parts.append(markdown_table(["one training step", "median", f"over “{floor}”"], rows))
        parts.append(
            f"{results['times_faster_than_peft_hra']:.1f} times faster than PEFT's HRA on the same batches, with the "
            f"same losses (largest relative difference {results['largest_loss_difference_from_peft_hra']:.0e})."
        )
    return "\n\n".join(parts) + "\n"
