"""What a GPU run consists of. A stage returns its summary, or raises `StageFailed` or `OutOfTime`."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from bench.gpu import counters
from bench.gpu.commands import benchmarks
from bench.gpu.session import ROOT, OutOfTime, Session, StageFailed, last_lines

FEWEST_TESTS = 100
"""A backend's tests that must have run: fewer were skipped or lost."""


def machine(session: Session) -> str:
    """What is here, and the two ceilings: a large copy and a large matrix product."""
    code = f"""
import json, platform, sys, torch
from importlib import metadata
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
found = {{"python": platform.python_version(), "torch": torch.__version__}}
names = "triton numpy peft transformers diffusers pytest pytest-xdist hypothesis pybind11 scikit-build-core cmake ninja"
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
    target = session.work / "site"
    shutil.rmtree(target, ignore_errors=True)
    command = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(target)]
    if not session.rehearse:
        command += ["-C", "cmake.define.HRA_CUDA=ON", "-C", "cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real"]
    session.python("build", *command, "-C", f"build-dir={session.work / 'cmake'}", "--verbose", ".", least=60)
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


def test_backend(session: Session) -> str:
    """The shared accuracy tests on the device, a backend at a time, those already through left out."""
    done = session.state["test"].setdefault("done", {})
    for name in backends(session):
        if name not in done:
            own = {"triton": ["tests/triton/test_kernels.py"]}.get(name, [])
            few = ["-k", "130x1000r8-zero"] if session.rehearse else []
            summary = session.pytest("test", "--backends", name, "tests/operators/test_accuracy.py", *own, *few)
            passed = int(re.search(r"(\d+) passed", summary).group(1))
            if passed < FEWEST_TESTS and not session.rehearse:
                raise StageFailed(f"{name}: only {summary}")
            done[name] = summary
    missing = [name for name in ("triton", "cuda") if name not in done and not session.rehearse]
    if missing:
        raise StageFailed(f"not available on this GPU: {missing}; see build.log")
    return "; ".join(f"{name}: {summary}" for name, summary in done.items())


def suite(session: Session) -> str:
    """The rest of the suite; tensors are on the GPU where a test takes the `device` fixture."""
    others = [
        f"--ignore=tests/{name}.py"
        for name in ("operators/test_accuracy", "cuda/test_emulated", "cuda/test_planted", "recipes/test_cli")
    ]
    selected = ["tests/operators/test_reference.py"] if session.rehearse else ["tests", *others]
    return session.pytest("suite", *selected, "-k", "not recipe and not bench", "--maxfail=30")


def emulation(session: Session) -> str:
    """The CUDA emulation against the same tests, here: with `test` on the device, one file has judged both."""
    code = "from tests.cuda import emulation; print(emulation.build())"
    module = last_lines(session.python("emulation", "-c", code, least=40))
    few = ["-k", "repeated_runs or empty"] if session.rehearse else []
    return session.pytest("emulation", "tests/cuda/test_emulated.py", *few, workers=4, HRA_EMULATED_MODULE=module)


def interpreter(session: Session) -> str:
    """Triton's interpreter with its repair against the same tests, here."""
    few = ["-k", "2x1000r16"] if session.rehearse else []
    plugin = ["-p", "tests.triton.interpreter", "--backends", "triton", "tests/operators/test_accuracy.py"]
    return session.pytest("interpreter", *plugin, *few, workers=4, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def sanitize(session: Session) -> str:
    """compute-sanitizer over a handful of the shared tests, every backend and tool side by side."""
    tool_path = shutil.which("compute-sanitizer")
    if tool_path is None and not session.rehearse:
        raise StageFailed("compute-sanitizer is not on the PATH")
    done = session.state["sanitize"].setdefault("done", {})
    cases = "128x1000r8 or 127x1001r7 or 131x264r32 or 129x257r3"
    tests = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", cases, "tests/operators/test_accuracy.py"]

    def check(name: str, tool: str) -> str:
        wrapper = [] if session.rehearse else [tool_path, "--tool", tool, "--error-exitcode", "99"]
        # PyTorch's caching allocator would hide reads past the end of a tensor
        status, output = session.command(
            f"sanitize-{name}-{tool}",
            [*wrapper, sys.executable, *tests, "--backends", name],
            least=30,
            accept=(0, 99),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        summary = [line for line in output.splitlines() if "ERROR SUMMARY" in line or " passed" in line]
        return ("FOUND ERRORS: " if status == 99 else "") + " / ".join(summary)

    names = ["cpu"] if session.rehearse else [name for name in backends(session) if name in ("cuda", "triton")]
    tools = ("memcheck",) if session.rehearse else ("memcheck", "racecheck", "synccheck")
    with ThreadPoolExecutor() as pool:
        running = {
            f"{name} {tool}": pool.submit(check, name, tool)
            for name in names
            for tool in tools
            if f"{name} {tool}" not in done
        }
    problems = {key: future.exception() for key, future in running.items()}
    done.update({key: future.result() for key, future in running.items() if problems[key] is None})
    for error in filter(None, problems.values()):
        raise error
    bad = [name for name, summary in done.items() if summary.startswith("FOUND")]
    if bad:
        raise StageFailed(f"errors under {bad}; see the logs named sanitize")
    return "; ".join(f"{name}: {summary}" for name, summary in done.items())


def tune(session: Session) -> str:
    """Search the launch tables; put the new ones in place and test them before anything is timed with them."""
    out = session.work / "tune"
    arguments = ["-m", "bench.gpu.tune", "--out", str(out), "--seconds", str(max(session.left() - 90, 1))]
    environment = {}
    if session.rehearse:
        arguments += ["--rehearse", "--most", "4"]
        environment["TRITON_INTERPRET"] = "1"
    status, output = session.command("tune", [sys.executable, *arguments], least=60, accept=(0, 3), **environment)
    if status == 3:
        raise OutOfTime(last_lines(output))
    if session.rehearse:
        return f"{last_lines(output)}; the table is not put in place in a rehearsal"
    table, before = ROOT / "hra_kernels" / "tuning.py", (ROOT / "hra_kernels" / "tuning.py").read_text()
    shutil.copy2(out / "tuning.py", table)
    try:
        tested = [
            session.pytest("tune", "--backends", name, "tests/operators/test_accuracy.py")
            for name in ("triton", "cuda")
        ]
    except (StageFailed, OutOfTime):
        table.write_text(before)
        raise
    shutil.copy2(out / "tuning.py", session.work / "tuning.py")
    return f"{last_lines(output)}; with the new tables {'; '.join(tested)}"


def restore_tables(session: Session) -> None:
    """Put the tuned tables back: a lease's next call brings the tree as it is at home."""
    tuned = session.work / "tuning.py"
    if tuned.exists():
        shutil.copy2(tuned, ROOT / "hra_kernels" / "tuning.py")


def bench(level: str) -> Callable[[Session], str]:
    """The stage that runs a level of the benchmark."""

    def run(session: Session) -> str:
        failed = session.state[f"bench-{level}"]["failed"] = {}
        commands = benchmarks(level, session.rehearse)
        common = ["--device", session.device, "--missing", "--out", str(session.results)]
        common += ["--threads", "1"] if session.rehearse else ["--threads", str(min(16, os.cpu_count() or 1))]
        for arguments in commands:
            try:
                session.python(f"bench-{level}", "-m", "bench", level, *arguments, *common, least=30)
            except StageFailed as error:
                failed[" ".join(arguments)] = str(error)
        if failed:
            raise StageFailed(f"{len(failed)} of {len(commands)} commands failed: {next(iter(failed.values()))}")
        return f"{len(commands)} commands"

    run.__doc__ = f"Level {level} of the benchmark."
    return run


STAGES: dict[str, Callable[[Session], str]] = {
    "machine": machine,
    "build": build,
    "test": test_backend,
    "tune": tune,
    "emulation": emulation,
    "interpreter": interpreter,
    "bench-op": bench("op"),
    "bench-layer": bench("layer"),
    "sanitize": sanitize,
    "suite": suite,
    "profile": counters.run,
    "bench-model": bench("model"),
    "bench-scaling": bench("scaling"),
    "bench-numerics": bench("numerics"),
}

WAVES = [
    ["machine"],
    ["build"],
    ["test"],
    ["tune", "emulation", "interpreter"],  # the last two use no GPU
    ["bench-op"],
    ["bench-layer"],
    ["sanitize", "suite"],  # neither measures
    ["profile"],
    ["bench-model"],
    ["bench-scaling"],
    ["bench-numerics"],
]
"""The order, and what runs side by side."""
