"""What a GPU run consists of: a list of commands, the most wanted first.

`seconds` are limits, not estimates; what has no time left goes on in the next call or, with --resume, on the next
machine. Expected (predictions, on 16 cores): machine 25 s, build 50, smoke 25, correctness 110, op 180, first 60,
counters 60: one call of 10 minutes with part of the tuning. The rest of a quarter of an hour tunes what the targets
rest on; layer, model and numerics fill another.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TO_BE_CONTINUED = 3
"""Exit status of a command that has done a part and goes on when it is called again."""
LIMIT = "{seconds}"


@dataclass(frozen=True)
class Step:
    """A command with its time limit.

    In the command, `LIMIT` becomes the seconds that it has. `unless` is Python that succeeds where there is nothing to
    do: it decides, not the state. `says` is a pattern that the output of a success has, `needs` are tools on the PATH,
    `advisory` a step whose failure fails nothing.
    """

    name: str
    command: list[str]
    seconds: float
    least: float = 20.0
    says: str = ""
    unless: str = ""
    needs: tuple[str, ...] = ()
    advisory: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Steps one after another, or side by side where none of them measures."""

    name: str
    steps: list[Step]
    together: bool = False


FAMILY = ["frozen", "ours", "wy-eager", "lora", "oft", "peft-hra"]
SHORT = ["frozen", "ours", "lora", "wy-eager"]
REST = ["ours-nn", "loha", "lokr", "adalora"]  # BOFT compiles an extension of its own, and waits for the GPU
BFLOAT16 = ["--dtype", "bfloat16"]
BIG = ["8192x2048x2048", "llama3-8b-q", "llama3-70b-q", "8192x16384x16384"]
"""D of 2048 to 16384 at 8192 rows: what the targets are set for."""
BACKENDS = ["--backends", "triton", "cuda", "reference"]
KERNELS = [("triton", 8), ("triton", 16), ("triton", 32), ("triton", 64), ("triton", 128), ("cuda", 8), ("cuda", 16)]
"""One case for each family of kernels: (backend, columns)."""
ACCURACY = "tests/operators/test_accuracy.py"
SANITIZED = "128x1000r8 or 127x1001r7 or 131x264r32 or 129x257r3"

BENCHMARKS = {
    "op": [
        ["--shapes", *BIG, "--ranks", "8", "16", "--dtypes", "bfloat16", *BACKENDS],
        ["--shapes", "llama3-8b-q", "--ranks", "2", "32", "64", "--dtypes", "bfloat16", *BACKENDS],
        ["--shapes", "llama3-8b-q", "--ranks", "8", "32", "--dtypes", "float32", *BACKENDS],
        ["--shapes", "2048x4096x4096", "--ranks", "8", "--dtypes", "bfloat16"],  # with the compiled reference
        ["--shapes", "decode", "--ranks", "8", "--dtypes", "bfloat16", *BACKENDS],
        # in float64 the check of so many columns fits a GPU for few rows only
        ["--shapes", "2048x4096x4096", "--ranks", "128", "--dtypes", "bfloat16", *BACKENDS],
    ],
    "layer": [
        ["--shapes", "llama3-8b-q", *BFLOAT16, "--providers", *FAMILY, "wy-compile", *REST],
        ["--shapes", "llama3-8b-q", *BFLOAT16, "--rank", "16", "--providers", *FAMILY, "wy-compile"],
        ["--shapes", "llama3-8b-up", "llama3-8b-down", "llama3-70b-q", *BFLOAT16, "--providers", *FAMILY],
        ["--shapes", "llama3-8b-kv", "qwen2.5-7b-q", "deberta-v3-base-q", *BFLOAT16, "--providers", *FAMILY],
        ["--shapes", "sd1.5-attn-64", "sd1.5-attn-16", "sd1.5-conv-32", *BFLOAT16, "--providers", *FAMILY],
        ["--shapes", "decode", *BFLOAT16, "--providers", *FAMILY],
        ["--shapes", "standard", "--dtype", "float32", "--providers", *FAMILY],
    ],
    "model": [
        ["--models", "llama3-8b-4layers", "--providers", *FAMILY],
        ["--models", "sd1.5-unet", "--providers", *FAMILY],
        ["--models", "llama3-8b-4layers", "sd1.5-unet", "--modes", "checkpoint", "--providers", *SHORT],
        ["--models", "bert-base", "--providers", *FAMILY],
        ["--models", "llama3-8b-4layers", "--modes", "compile", "--providers", *SHORT[:3]],
        ["--models", "qwen2.5-7b-4layers", "--providers", *SHORT],
    ],
    "numerics": [["--size", "1024"]],
    "host": [["--layers", "8"]],
    "scaling": [["--over", over, *BFLOAT16, "--providers", *SHORT] for over in ("M", "layers", "R", "D")],
}
LITTLE = {
    "op": [["--shapes", "64x128x128", "--ranks", "8", "--dtypes", "float32", "--backends", "reference", "cpu"]],
    "layer": [["--shapes", "64x128x128", "--providers", *FAMILY[:3]]],
    "model": [["--models", "llama-tiny", "unet-tiny", "--modes", "eager", "checkpoint"]],
    "numerics": [["--size", "128", "--measures", "orthogonality"]],
    "host": [["--layers", "2", "--paths", "cpu"]],
    "scaling": [["--over", "M", "--values", "1", "16", "--providers", "frozen", "ours"]],
}
"""A rehearsal's benchmarks."""
SECONDS = {"op": "2", "layer": "3", "model": "8", "numerics": "1", "host": "2", "scaling": "2"}
"""Of measuring per case."""


def benchmark(level: str, work: Path, rehearse: bool) -> Stage:
    """The commands of one level; each goes on with what the results do not have."""
    common = ["--device", "cpu" if rehearse else "cuda", "--missing", "--out", str(work / "results")]
    common += ["--threads", "1" if rehearse else str(min(16, os.cpu_count() or 1))]
    common += ["--seconds", "0.3" if rehearse else SECONDS[level]]
    commands = (LITTLE if rehearse else BENCHMARKS)[level]
    return Stage(
        level,
        [
            Step(str(number), [sys.executable, "-m", "bench", level, *arguments, *common], 240, 30)
            for number, arguments in enumerate(commands, 1)
        ],
    )


def pytest(name: str, seconds: float, *arguments: str, workers: int = 8, each: int = 60, **options: object) -> Step:
    """A run of tests that must have passed some. One that takes over `each` seconds ends its process; 0: none does."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=30"]
    if each:  # from a thread of its own: a test that waits for the GPU gets no signal
        command += ["-o", f"faulthandler_timeout={each}", "-o", "faulthandler_exit_on_timeout=true"]  # pytest 9
        if importlib.util.find_spec("pytest_timeout"):
            command += [f"--timeout={each}", "--timeout-method=thread"]
    if importlib.util.find_spec("xdist") and workers > 1:
        command += ["-n", str(min(workers, os.cpu_count() or 1))]
    says = r"^.*\d+ passed.*$|Timeout \(\d.*$|^.* in test_\w+$"
    return Step(name, [*command, *arguments], seconds, says=says, **options)


def build(work: Path, rehearse: bool) -> Step:
    """The native modules as a user's pip builds them, put into the tree; whatever the state says, if they are amiss."""
    command = [sys.executable, "-m", "bench.gpu.build", "--work", str(work)] + ([] if rehearse else ["--cuda"])
    there = f"from bench.gpu.build import Path, check; check(Path({str(work / 'built-from')!r}), {not rehearse})"
    return Step("modules", command, 400, 60, unless=there)


def correctness(rehearse: bool) -> list[Step]:
    """The shared accuracy tests backend by backend, and every tile of the launch tables, against float64.

    All at once, so that one that hangs costs the others nothing: compiling fills 16 cores, two threads each.
    """
    few = {"workers": 4, "environment": {"OMP_NUM_THREADS": "2"}}
    if rehearse:
        return [pytest("cpu", 120, "--backends", "cpu", ACCURACY, "-k", "130x1000r8-zero", **few)]
    tiles = pytest("tiles", 180, "--backends", "triton", "tests/triton/test_kernels.py", **few)
    backends = ("triton", "cuda", "reference")
    return [tiles, *(pytest(name, 180, "--backends", name, ACCURACY, **few) for name in backends)]


def sanitize(rehearse: bool) -> list[Step]:
    """compute-sanitizer over a handful of the shared tests: memcheck and synccheck gate.

    racecheck is advisory: it knows neither st.async nor messages through mbarriers in distributed shared memory.
    """
    if rehearse:
        return [pytest("cpu", 120, "--backends", "cpu", ACCURACY, "-k", SANITIZED, workers=1)]
    steps = []
    for tool in ("memcheck", "synccheck", "racecheck"):
        for name in ("triton", "cuda"):
            command = pytest("", 0, "-x", "--backends", name, ACCURACY, "-k", SANITIZED, workers=1, each=0).command
            steps.append(
                Step(
                    f"{tool} {name}",
                    ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *command],
                    240,
                    says=r"ERROR SUMMARY.*|^.*\d+ passed.*$",
                    needs=("compute-sanitizer",),
                    advisory=tool == "racecheck",
                    # PyTorch's caching allocator would hide reads past the end of a tensor
                    environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                )
            )
    return steps


def stages(work: Path, rehearse: bool) -> list[Stage]:
    """All stages in their order."""
    python = [sys.executable, "-m"]
    device = "cpu" if rehearse else "cuda"
    little = ["--rehearse"] if rehearse else []
    interpreted = {"TRITON_INTERPRET": "1"} if rehearse else {}
    families = [("cpu", 8)] if rehearse else KERNELS
    smoke = [
        Step(f"{name} {rank}", [*python, "bench.gpu.smoke", name, str(rank), "--device", device], 60)
        for name, rank in families
    ]
    counters = Step("ncu", [*python, "bench.gpu.counters", "--work", str(work), *little], 150, 60,
                    needs=() if rehearse else ("ncu",))  # fmt: skip
    tune = Step("tables", [*python, "bench.gpu.tune", "--out", str(work / "tune"), "--seconds", LIMIT, *little],
                400, 140, environment=interpreted)  # fmt: skip
    layer = benchmark("layer", work, rehearse)
    suite = ["tests/operators/test_reference.py"] if rehearse else ["tests", "-k", "not recipe and not bench"]
    on_cpu = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    few = ["-k", "2x1000r16"] if rehearse else []
    interpreter = pytest(
        "interpreter", 240, "--backends", "triton", ACCURACY, *few, workers=4,
        environment=on_cpu,
    )  # fmt: skip
    emulation = pytest("emulation", 300, "tests/cuda/test_emulated.py", workers=4)
    # built before the tests, whose processes would build it at once
    code = "from tests.cuda import emulation; print(emulation.build())"
    emulator = Step("emulator", [sys.executable, "-c", code], 180, 40)
    return [
        Stage("machine", [Step("facts", [*python, "bench.gpu.machine", "--work", str(work), "--device", device], 90)]),
        Stage("build", [build(work, rehearse)]),
        Stage("smoke", smoke, together=True),
        Stage("correctness", correctness(rehearse), together=True),
        benchmark("op", work, rehearse),
        Stage("first", layer.steps[:1]),  # the layer that all else is about; the stage `layer` finds it measured
        Stage("counters", [counters]),
        Stage("tune", [tune]),
        layer,
        benchmark("model", work, rehearse),
        benchmark("numerics", work, rehearse),
        benchmark("host", work, rehearse),
        Stage("sanitize", sanitize(rehearse), together=not rehearse),
        Stage("confirm", [interpreter] + ([] if rehearse else [emulator, emulation])),
        benchmark("scaling", work, rehearse),
        Stage("suite", [pytest("all", 300, *suite)]),
    ]
