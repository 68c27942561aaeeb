"""How the best learning rate depends on the rank, on the width, and on the norm of u: `python -m bench.learning_rate`.

Two stand-ins, each trained by AdamW with the schedule of `hra-kernels train nlu`:

    rotation    one layer of D inputs learns W Q* from random x; Q* turns 16 planes by 0.3 radians; a second per run
    nlu         the model and data of `hra-kernels train nlu`, for 100 steps of 16 sentences; the head has its own rate

Results go to `bench/results/learning-rate.json`, where runs that are there already are kept; from them the plot beside
it and the table in `hra_kernels/peft/LEARNING_RATE.md` are made. About 10 minutes on one idle core.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hra_kernels.peft
from hra_kernels import cli, hra_linear
from hra_kernels.measuring import style
from hra_kernels.measuring.text import markdown_table, significant
from hra_kernels.recipes.jobs.nlu import Classifier, open_application
from hra_kernels.recipes.trainer import SimilarLengths

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "learning-rate.json"
PAGE = ROOT / "hra_kernels" / "peft" / "LEARNING_RATE.md"

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ROTATION = {"steps": 200, "rows": 64, "outputs": 64, "planes": 16, "angle": 0.3, "seeds": 2}
NLU = {"steps": 100, "sentences": 16, "max_length": 32, "validated": 400, "head_rate": 3e-3}


class Run(NamedTuple):
    """One training run: the task, D, R, what u is multiplied by before it, and the peak learning rate of u."""

    task: str
    width: int
    rank: int
    scale: float
    rate: float


def plan() -> list[Run]:
    """Powers of two scale u, so that no rounding differs, at rates in the same proportion."""
    sizes = itertools.product((64, 256, 1024), (2, 8, 32), RATES)
    runs = [Run("rotation", width, rank, 1.0, rate) for width, rank, rate in sizes]
    runs += [Run("rotation", 256, 8, s, s * rate) for s, rate in itertools.product((0.25, 4.0), RATES)]
    return runs + [Run("nlu", 384, rank, 1.0, rate) for rank, rate in itertools.product((8, 32), RATES[1:])]


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    rise = max(1, round(0.1 * steps))  # then a linear fall to zero

    def factor(step: int) -> float:
        return (step + 1) / rise if step < rise else (steps - step) / (steps - rise + 1)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _first_vectors(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """u (D, R) as PEFT draws it: pairs of equal columns, entries within ±√(2 / R)."""
    half = torch.empty(width, rank // 2).uniform_(-1, 1, generator=generator) * math.sqrt(2 / rank)
    return half.repeat_interleave(2, dim=1)


def rotation(run: Run, seed: int) -> dict[str, float]:
    """The squared error that is left, over what it was at the start, on rows that were not trained on."""
    generator = torch.Generator().manual_seed(seed)
    planes = ROTATION["planes"]
    w = torch.randn(ROTATION["outputs"], run.width, generator=generator) / math.sqrt(run.width)
    basis = torch.linalg.qr(torch.randn(run.width, 2 * planes, generator=generator))[0]
    plane = basis[:, :planes] @ basis[:, planes:].mT
    target = w @ torch.linalg.matrix_exp(ROTATION["angle"] * (plane - plane.mT))
    u = (run.scale * _first_vectors(run.width, run.rank, generator)).requires_grad_()
    norm = u.detach().norm(dim=0).mean().item()
    optimizer = torch.optim.AdamW([u], lr=run.rate, weight_decay=0.0)
    schedule = _schedule(optimizer, ROTATION["steps"])
    for _ in range(ROTATION["steps"]):
        x = torch.randn(ROTATION["rows"], run.width, generator=generator)
        (hra_linear(x, w, u) - x @ target.mT).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        x = torch.randn(1024, run.width, generator=generator)
        left, start = ((x @ (a - target).mT).square().mean() for a in (hra_linear(torch.eye(run.width), w, u).mT, w))
    return {"norm": norm, "loss": (left / start).item()}


def nlu(run: Run, app: Classifier) -> dict[str, float]:
    """The validation loss and accuracy after training."""
    base, size = app.base, NLU["sentences"]
    with hra_kernels.peft.enabled():
        model = base.adapted(base.hra_config(run.rank, ("query", "value"), apply_gs=False))
    vectors = [p for name, p in model.named_parameters() if "hra_u" in name]
    head = [p for name, p in model.named_parameters() if p.requires_grad and "hra_u" not in name]
    norm = torch.cat([u.detach().norm(dim=0) for u in vectors]).mean().item()
    groups = [{"params": vectors, "lr": run.rate}, {"params": head, "lr": NLU["head_rate"]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = _schedule(optimizer, NLU["steps"])
    model.train()
    sampler = SimilarLengths(app.train, size, 0)
    for step in range(NLU["steps"]):
        epoch, place = divmod(step * size, len(sampler))
        sampler.set_epoch(epoch)
        chosen = list(itertools.islice(sampler, place, place + size))
        model(**app.collate([app.train[i] for i in chosen])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    logits = app.outputs(model, "validation")
    loss = cross_entropy(logits, app.labels("validation")).item()
    return {"norm": norm, "loss": loss, **app.metrics(logits, "validation")}


def measure(missing: list[Run]) -> Iterator[dict]:
    """Each run with its results."""
    if any(run.task == "nlu" for run in missing):
        arguments = cli.build_parser().parse_args(["train", "nlu", "--max-length", str(NLU["max_length"])])
        app = open_application(arguments)
        app.parts["validation"] = app.parts["validation"][: NLU["validated"]]
    for run in missing:
        if run.task == "nlu":
            found = nlu(run, app)
        else:
            each = [rotation(run, seed) for seed in range(ROTATION["seeds"])]
            found = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
        yield run._asdict() | found


def angle(run: dict) -> float:
    """What one step of Adam at the peak rate can turn a vector by, in radians: each entry moves by about the rate."""
    return run["rate"] * math.sqrt(run["width"]) / run["norm"]


def curves(runs: list[dict]) -> list[tuple[tuple, list[dict]]]:
    """((task, D, R, scale), its runs by rate), in the order of the plan."""
    found: dict[tuple, list[dict]] = {tuple(run[:4]): [] for run in plan()}
    for run in runs:
        found[tuple(run[name] for name in Run._fields[:4])].append(run)
    return [(key, sorted(curve, key=lambda run: run["rate"])) for key, curve in found.items() if curve]


def draw(runs: list[dict], path: Path) -> None:
    """Loss by learning rate: three widths of the rotation, and the classifier."""
    colors = {2: style.OTHER, 8: style.OURS, 32: style.INK}
    panels = [("rotation", 64), ("rotation", 256), ("rotation", 1024), ("nlu", 384)]
    with style.figure(path, (11.5, 3.4), columns=len(panels)) as axes:
        for (task, width), panel in zip(panels, axes, strict=True):
            for key, curve in curves(runs):
                if key[:2] == (task, width) and key[3] == 1.0:
                    xs, ys = [run["rate"] for run in curve], [run["loss"] for run in curve]
                    panel.plot(xs, ys, marker="o", markersize=4, color=colors[key[2]], label=f"r = {key[2]}")
            panel.set_xscale("log")
            panel.set_title(f"{task}, D = {width}", fontsize=10)
            panel.set_xlabel("peak learning rate of u")
        axes[0].set_ylabel("error left, share of the start's")
        axes[-1].set_ylabel("validation loss")
        axes[0].legend(fontsize=9)


def table(runs: list[dict]) -> str:
    """One row per curve: its loss at each rate, the best in bold."""
    rows = []
    for (task, width, rank, scale), curve in curves(runs):
        best = min(curve, key=lambda run: run["loss"])
        losses = {run["rate"] / scale: f"{run['loss']:.3f}" for run in curve}
        losses[best["rate"] / scale] = f"**{best['loss']:.3f}**"
        cells = [next((text for rate, text in losses.items() if math.isclose(rate, wanted)), "") for wanted in RATES]
        name = f"{task}, D = {width}, r = {rank}" + (f", u and rate × {scale:g}" if scale != 1 else "")
        rows.append((name, significant(best["norm"]), *cells, significant(angle(best), 2)))
    rates = [f"{rate:g}" for rate in RATES]
    return markdown_table(("task", "norm of u", *rates, "angle of a step at the best rate"), rows)


def main() -> None:
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    done = {tuple(run[name] for name in Run._fields) for run in runs}
    for run in measure([run for run in plan() if tuple(run) not in done]):
        runs.append(run)
        print(json.dumps(run), flush=True)
        RESULTS.write_text(json.dumps({"rotation": ROTATION, "nlu": NLU, "runs": runs}, indent=1) + "\n")
    draw(runs, RESULTS.with_suffix(".svg"))
    if PAGE.exists():
        marked = r"(?<=<!-- sweep -->\n).*?(?=<!-- /sweep -->)"
        PAGE.write_text(re.sub(marked, lambda _: table(runs) + "\n", PAGE.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
