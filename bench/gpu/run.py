"""One command for everything that needs a GPU: build, test, sanitize, tune, benchmark, verdict.

    python bench/gpu/run.py --out FOLDER                        every stage that has not passed yet
    python bench/gpu/run.py --out FOLDER --stages build test    these
    python bench/gpu/run.py --out FOLDER --rehearse             the same on a CPU, in little

Made for a bare machine (CUDA image with torch, triton, nvcc, cmake, ninja, pybind11, scikit-build-core, peft, pytest,
hypothesis, transformers; no network) that is lent for minutes: a call ends within --seconds, what it did is kept under
build/gpu, and the next call goes on from there. Only the standard library is needed to start. The machine's settings
are read, never changed.

FOLDER gets verdict.md, state.json, results.tar.gz (JSON, plots, logs), tuning.py and up to four plots.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu"
RESULTS = WORK / "results"
LOGS = WORK / "logs"
MARGIN_S = 15.0
"""Kept back at the end of a call for packing."""
PLOTS = ("layer-cost.png", "layer-memory.png", "op-roofline.png", "model-cost.png")


class OutOfTime(Exception):
    """The call's time is up; the stage goes on in the next one."""


class StageFailed(Exception):
    """A stage's own verdict; the message is the summary."""


@dataclass
class Session:
    """One call: what it was asked for, and what all calls so far have found."""

    rehearse: bool
    deadline: float
    state: dict = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def left(self) -> float:
        return self.deadline - MARGIN_S - time.monotonic()

    def command(
        self, stage: str, command: list[str], least: float = 5.0, accept: tuple[int, ...] = (0,), **environment: str
    ) -> tuple[int, str]:
        """Run `command` in the repository, its output appended to the stage's log; (exit status, output).

        Raises:
            OutOfTime: less than `least` seconds are left, or it did not end in time.
            StageFailed: it ended with a status outside `accept`.
        """
        if self.left() < least:
            raise OutOfTime(f"{self.left():.0f} s left, {least:.0f} s wanted for {' '.join(command[:6])}")
        LOGS.mkdir(parents=True, exist_ok=True)
        settings = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
        with (LOGS / f"{stage}.log").open("a") as log:
            print("$", *command, file=log, flush=True)
            start = log.tell()
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, timeout=self.left()
                )
            except subprocess.TimeoutExpired as error:
                raise OutOfTime(f"{' '.join(command[:6])} did not end in time") from error
        output = (LOGS / f"{stage}.log").read_text(errors="replace")[start:]
        if done.returncode not in accept:
            raise StageFailed(f"{' '.join(command[:8])}: status {done.returncode}: {last_lines(output, 3)}")
        return done.returncode, output

    def python(self, stage: str, *arguments: str, **options: object) -> str:
        return self.command(stage, [sys.executable, *arguments], **options)[1]


def last_lines(text: str, count: int = 1) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines()[-count:])


# --- stages: each returns its summary, or raises --------------------------------------------------------------------


def machine(session: Session) -> str:
    """What is here, and the two ceilings: a large copy and a large matrix product."""
    code = f"""
import json, platform, sys, torch
from importlib import metadata
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
found = {{"python": platform.python_version(), "torch": torch.__version__}}
names = "triton peft transformers diffusers pytest hypothesis pybind11 scikit-build-core cmake ninja rich matplotlib"
found |= {{name: version(name) for name in names.split()}}
cuda = {session.device == "cuda"}
if cuda:
    found["gpu"] = torch.cuda.get_device_name()
    found["capability"] = torch.cuda.get_device_capability()
    found["memory GiB"] = torch.cuda.mem_get_info()[1] / 2**30
import time
def seconds(run, repeats):
    for _ in range(3): run()
    torch.cuda.synchronize() if cuda else None
    start = time.perf_counter()
    for _ in range(repeats): run()
    torch.cuda.synchronize() if cuda else None
    return (time.perf_counter() - start) / repeats
device, size = ("cuda", 2**30) if cuda else ("cpu", 2**20)
a = torch.randn(size, device=device); b = torch.empty_like(a)
found["copy GB/s"] = round(2 * a.nbytes / seconds(lambda: b.copy_(a), 10) / 1e9, 1)
n = 8192 if cuda else 256
x = torch.randn(n, n, device=device, dtype=torch.bfloat16); y = torch.randn_like(x)
found["bf16 matmul TFLOP/s"] = round(2 * n**3 / seconds(lambda: x @ y, 10) / 1e12, 2)
print(json.dumps(found))
"""
    facts = session.python("machine", "-c", code)
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    tools = {name: shutil.which(name) is not None for name in ("nvcc", "compute-sanitizer", "ncu", "cuobjdump")}
    if shutil.which("nvidia-smi"):
        session.command("machine", ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], accept=(0, 1, 6, 9))
    return f"{last_lines(facts)} tools {json.dumps(tools)}"


def build(session: Session) -> str:
    """Build the native modules as a user's pip would, and put them into the tree for tests and benchmarks."""
    target = WORK / "site"
    shutil.rmtree(target, ignore_errors=True)
    command = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(target)]
    if not session.rehearse:
        command += ["-C", "cmake.define.HRA_CUDA=ON", "-C", "cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real"]
    session.python("build", *command, "-C", f"build-dir={WORK / 'cmake'}", "--verbose", ".", least=60)
    modules = sorted((target / "hra_kernels").glob("*.so"))
    for module in modules:
        shutil.copy2(module, ROOT / "hra_kernels" / module.name)
    report = session.python("build", "-c", "from hra_kernels import ops; print(ops.backend_report())")
    names = [module.name.split(".")[0] for module in modules]
    if not session.rehearse and not any("cuda" in name for name in names):
        raise StageFailed(f"no CUDA module was built: {names}")
    return f"{', '.join(names)}; {last_lines(report)}"


def backends(session: Session) -> list[str]:
    """Backends that serve this device here."""
    code = "import json; from hra_kernels import ops; print(json.dumps(ops.backend_report()))"
    report = json.loads(last_lines(session.python("test", "-c", code)))
    wanted = ("reference", "cpu") if session.rehearse else ("reference", "triton", "cuda")
    return [name for name in wanted if name in report and report[name] is None]


def pytest(session: Session, stage: str, *arguments: str, **environment: str) -> str:
    output = session.python(stage, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, least=20, **environment)
    summary = last_lines(output)
    if " passed" not in summary:
        raise StageFailed(f"nothing was tested: {summary}")
    return summary


def test_backend(session: Session) -> str:
    """The shared accuracy tests on the device, a backend at a time, those already through left out."""
    done = session.state["test"].setdefault("done", {})
    for name in backends(session):
        if name not in done:
            few = ["-k", "130x1000r8-zero"] if session.rehearse else []
            done[name] = pytest(session, "test", "--backends", name, "tests/test_accuracy.py", *few)
    missing = [name for name in ("triton", "cuda") if name not in done and not session.rehearse]
    if missing:
        raise StageFailed(f"not available on this GPU: {missing}; see build.log")
    return "; ".join(f"{name}: {summary}" for name, summary in done.items())


def suite(session: Session) -> str:
    """The rest of the suite; tensors are on the GPU where a test takes the `device` fixture."""
    selected = ["tests/test_reference.py"] if session.rehearse else ["tests", "--ignore=tests/test_accuracy.py"]
    return pytest(session, "suite", *selected, "-k", "not recipe and not bench", "--maxfail=30")


def emulation(session: Session) -> str:
    """The CUDA emulation against the same tests, here: with `test` on the device, one file has judged both."""
    few = ["-k", "repeated_runs or empty"] if session.rehearse else []
    return pytest(session, "emulation", "tests/test_cuda_emulated.py", *few)


def interpreter(session: Session) -> str:
    """Triton's interpreter with its repair against the same tests, here."""
    few = ["-k", "2x1000r16"] if session.rehearse else []
    plugin = ["-p", "tests.triton_interpreter", "--backends", "triton", "tests/test_accuracy.py"]
    return pytest(session, "interpreter", *plugin, *few, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def sanitize(session: Session) -> str:
    """compute-sanitizer over a handful of the shared tests, a backend and a tool at a time."""
    tool_path = shutil.which("compute-sanitizer")
    if tool_path is None and not session.rehearse:
        raise StageFailed("compute-sanitizer is not on the PATH")
    done = session.state["sanitize"].setdefault("done", {})
    cases = "128x1000r8 or 127x1001r7 or 131x264r32 or 129x257r3"
    tools = ("memcheck", "racecheck", "synccheck")
    names = ["cpu"] if session.rehearse else [name for name in backends(session) if name in ("cuda", "triton")]
    for name in names:
        for tool in tools[:1] if session.rehearse else tools:
            if f"{name} {tool}" in done:
                continue
            tests = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--backends", name, "-k", cases]
            tests += ["tests/test_accuracy.py"]
            wrapper = [] if session.rehearse else [tool_path, "--tool", tool, "--error-exitcode", "99"]
            # PyTorch's caching allocator would hide reads past the end of a tensor
            status, output = session.command(
                "sanitize",
                [*wrapper, sys.executable, *tests],
                least=30,
                accept=(0, 99),
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
            summary = [line for line in output.splitlines() if "ERROR SUMMARY" in line or " passed" in line]
            done[f"{name} {tool}"] = ("FOUND ERRORS: " if status == 99 else "") + " / ".join(summary)
    bad = [name for name, summary in done.items() if summary.startswith("FOUND")]
    if bad:
        raise StageFailed(f"errors under {bad}; see sanitize.log")
    return "; ".join(f"{name}: {summary}" for name, summary in done.items())


def tune(session: Session) -> str:
    """Search the Triton launch table; put the new one in place and test it before anything is timed with it."""
    out = WORK / "tune"
    arguments = ["-m", "bench.gpu.tune", "--out", str(out), "--seconds", str(max(session.left() - 90, 1))]
    environment = {}
    if session.rehearse:
        arguments += ["--rehearse", "--most", "4"]
        environment["TRITON_INTERPRET"] = "1"
    status, output = session.command("tune", [sys.executable, *arguments], least=60, accept=(0, 3), **environment)
    if status == 3:
        raise OutOfTime(last_lines(output))
    shutil.copy2(out / "tuning.py", RESULTS.parent / "tuning.py")
    if session.rehearse:
        return f"{last_lines(output)}; the table is not put in place in a rehearsal"
    table, before = ROOT / "hra_kernels" / "tuning.py", (ROOT / "hra_kernels" / "tuning.py").read_text()
    shutil.copy2(out / "tuning.py", table)
    try:
        tested = pytest(session, "tune", "--backends", "triton", "tests/test_accuracy.py")
    except (StageFailed, OutOfTime):
        table.write_text(before)
        raise
    return f"{last_lines(output)}; with the new table {tested}"


def bench_commands(session: Session, level: str) -> list[list[str]]:
    """The level's command lines, the most wanted first."""
    hra = ["frozen", "ours", "ours-nn", "wy-eager", "wy-compile", "lora", "oft", "peft-hra"]
    rest = ["boft", "loha", "lokr", "adalora", "torch-householder", "householder-product"]
    if session.rehearse:
        little = {
            "op": [["--shapes", "64x128x128", "--ranks", "8"]],
            "layer": [["--shapes", "64x128x128", "--providers", *hra[:4]]],
            "model": [["--models", "llama-tiny"], ["--models", "unet-tiny"]],
            "numerics": [["--size", "128"]],
            "scaling": [["--over", "M", "--values", "1", "16"]],
        }
        return little[level]
    big = ["llama3-8b-q", "llama3-8b-up", "llama3-8b-down", "qwen2.5-7b-q", "llama3-70b-q", "deberta-v3-base-q"]
    wide = ["llama3-8b-kv", "llama3-70b-up", "llama3-70b-down", "qwen2.5-7b-up", "qwen2.5-7b-down"]
    images = ["sd1.5-attn-64", "sd1.5-attn-32", "sd1.5-attn-16"]
    convolutions = ["sd1.5-conv-64", "sd1.5-conv-32", "sd1.5-conv-16", "sd1.5-shortcut-32"]
    bfloat16 = ["--dtype", "bfloat16"]
    layers = [["--shapes", shape, *bfloat16, "--providers", *hra, *rest] for shape in big[:1]]
    layers += [["--shapes", shape, *bfloat16, "--providers", *hra] for shape in [*big[1:], *images, *wide]]
    layers += [["--shapes", "decode", *bfloat16, "--providers", *hra]]
    layers += [["--shapes", "standard", "--dtype", "float32", "--providers", *hra]]
    layers += [["--shapes", shape, *bfloat16, "--providers", *hra] for shape in convolutions]
    return {
        "op": [
            ["--shapes", shape, "--ranks", "8", "32"] for shape in ("llama3-8b-q", "llama3-70b-q", "deberta-v3-base-q")
        ]
        + [["--shapes", "llama3-8b-q", "--ranks", "2", "16", "64", "128"], ["--shapes", "decode", "--ranks", "8"]],
        "layer": layers,
        "model": [
            ["--models", name] for name in ("llama3-8b-4layers", "bert-base", "sd1.5-unet", "qwen2.5-7b-4layers")
        ],
        "numerics": [["--size", "1024"], ["--size", "4096", "--rank", "32"]],
        "scaling": [["--over", sweep, "--dtype", "bfloat16"] for sweep in ("M", "R", "D", "layers")],
    }[level]


def bench(level: str) -> Callable[[Session], str]:
    def run(session: Session) -> str:
        state = session.state[f"bench-{level}"]
        done = state.setdefault("done", [])
        failed = state.setdefault("failed", {})
        for arguments in bench_commands(session, level):
            name = " ".join(arguments)
            if name in done or name in failed:
                continue
            seconds = "0.5" if session.rehearse else {"model": "12"}.get(level, "4")
            common = ["--device", session.device, "--seconds", seconds, "--out", str(RESULTS)]
            common += ["--threads", "1"] if session.rehearse else []
            try:
                session.python(f"bench-{level}", "-m", "bench", level, *arguments, *common, least=40)
                done.append(name)
            except StageFailed as error:
                failed[name] = str(error)
        if failed:
            raise StageFailed(f"{len(done)} measured, {len(failed)} failed: {next(iter(failed.values()))}")
        return f"{len(done)} measured"

    run.__doc__ = f"Level {level} of the benchmark."
    return run


STAGES: dict[str, Callable[[Session], str]] = {
    "machine": machine,
    "build": build,
    "test": test_backend,
    "bench-op": bench("op"),
    "bench-layer": bench("layer"),
    "sanitize": sanitize,
    "tune": tune,
    "bench-model": bench("model"),
    "bench-numerics": bench("numerics"),
    "suite": suite,
    "emulation": emulation,
    "interpreter": interpreter,
    "bench-scaling": bench("scaling"),
}
"""In the order of a first call; what was timed before `tune` is timed again with `--again`."""


# --- what comes back ------------------------------------------------------------------------------------------------


def best_of(level: str) -> list[str]:
    """Lines for the verdict: ours beside the others, a case a line."""
    path = RESULTS / f"{level}.json"
    if not path.exists():
        return []
    lines = []
    for run in json.loads(path.read_text())["runs"]:
        found = [f"{row['label']} {row['ratio']['median']:.3f}" for row in run["rows"] if "ratio" in row]
        wrong = [f"{row['label']}: {row['why'][:70]}" for row in run["rows"] if row.get("why")]
        bounds = [f"{row['label']} {100 * row['of_bound']:.0f} %" for row in run["rows"] if "of_bound" in row]
        values = [f"{row['label']} {row['values']}" for row in run["rows"] if "values" in row]
        settings = " ".join(f"{key} {run['case'][key]}" for key in ("dtype", "rank") if run["case"].get(key))
        lines.append(f"- {run['case']['name']} {settings}: " + "; ".join((bounds or found or values) + wrong))
    return lines


def verdict(session: Session) -> str:
    parts = [
        "# Rehearsal on a CPU: no number here says anything" if session.rehearse else "# Verdict of the GPU run",
        "",
    ]
    for name in STAGES:
        entry = session.state.get(name, {})
        seconds = f" ({entry['seconds']:.0f} s)" if "seconds" in entry else ""
        parts.append(f"- **{name}**: {entry.get('status', 'not run')}{seconds}. {entry.get('summary', '')}")
    for level in ("op", "layer", "model", "numerics", "scaling"):
        lines = best_of(level)
        if lines:
            meaning = {"op": "share of the copy bound", "numerics": "values"}.get(level, "time over the frozen layer's")
            parts += ["", f"## {level}: {meaning}", "", *lines]
    return "\n".join(parts) + "\n"


def pack(session: Session, out: Path) -> None:
    """At most eight files, as few machines return more."""
    out.mkdir(parents=True, exist_ok=True)
    text = verdict(session)
    (out / "verdict.md").write_text(text)
    (out / "state.json").write_text(json.dumps(session.state, indent=1) + "\n")
    with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
        for folder in (RESULTS, LOGS, WORK / "tune"):
            if folder.exists():
                archive.add(folder, arcname=folder.name)
    if (WORK / "tuning.py").exists():
        shutil.copy2(WORK / "tuning.py", out / "tuning.py")
    for name in PLOTS:
        if (RESULTS / name).exists():
            shutil.copy2(RESULTS / name, out / name)
    print(text[-8000:])


def run_stage(session: Session, name: str, again: bool) -> None:
    """Run one stage and note how it went."""
    entry = session.state.setdefault(name, {})
    if again:
        entry.clear()
    entry.pop("failed", None)
    before = entry.get("seconds", 0.0)
    start = time.monotonic()
    print(f"=== {name} ({session.left():.0f} s left)", flush=True)
    try:
        entry["summary"] = STAGES[name](session)
        entry["status"] = "passed"
    except OutOfTime as error:
        entry["status"], entry["summary"] = "unfinished", str(error)
    except StageFailed as error:
        entry["status"], entry["summary"] = "failed", str(error)
    entry["seconds"] = before + time.monotonic() - start
    print(f"    {entry['status']}: {entry['summary'][:400]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what comes back")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="default: all that have not passed")
    parser.add_argument("--seconds", type=float, default=570, help="end within this time (default 570)")
    parser.add_argument("--again", action="store_true", help="forget what these stages found before")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    options = parser.parse_args()
    state_path = WORK / "state.json"
    state = json.loads(state_path.read_text()) if state_path.exists() else {}
    session = Session(options.rehearse, time.monotonic() + options.seconds, state)
    if state.setdefault("rehearse", options.rehearse) != options.rehearse:
        parser.error(f"{WORK} holds {'a rehearsal' if state['rehearse'] else 'a real run'}; remove it first")
    for name in options.stages or STAGES:
        if options.stages is None and state.get(name, {}).get("status") == "passed" and not options.again:
            continue
        run_stage(session, name, options.again)
        WORK.mkdir(parents=True, exist_ok=True)
        state_path.write_text(json.dumps(session.state) + "\n")
        if name == "build" and session.state[name]["status"] != "passed":
            break  # nothing after it would mean anything
    pack(session, options.out)
    bad = [name for name in options.stages or STAGES if session.state.get(name, {}).get("status") != "passed"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
