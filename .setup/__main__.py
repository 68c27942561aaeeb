"""Set up everything in a virtual environment, then run a command in it.

    python3 .setup                              set up only
    python3 .setup hra-kernels train nlu        set up if needed, then the main job
    python3 .setup pytest                       set up if needed, then the tests

Needs Python 3.10 or newer and a C++ compiler. What decides the environment, all of it here:

- a PyTorch that this Python already has (2.6 or newer) stays: the new environment sees it and pip may not replace it;
- otherwise, without an NVIDIA driver, constraints-cpu.txt pins the tested versions, and pip takes a CPU build of
  PyTorch where it finds one; with a driver, pip takes the current PyTorch;
- CMake and ninja come from pip where they are missing; CUDA kernels are built where nvcc is found.

A second call with nothing changed goes straight to the command.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / ".setup" / "constraints-cpu.txt"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 6)
OLDEST_CMAKE = (3, 20)  # csrc/CMakeLists.txt
WINDOWS = os.name == "nt"


def stop(message):
    sys.exit("setup: " + message)


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog="python3 .setup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="DIR", help="environment (default: .venv)")
    parser.add_argument("--dev", action="store_true", help="also install the linters that .ci/run uses")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command to run in the environment")
    return parser.parse_args()


def version_tuple(text):
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def present_torch():
    """(version, folders) of a PyTorch that this Python has already; (None, []) without a usable one."""
    from importlib import metadata

    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None, []
    if version_tuple(version) < OLDEST_TORCH:
        print(f"PyTorch {version} is too old here (2.6 or newer is needed): the environment gets another")
        return None, []
    return version, sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def has_nvidia_driver():
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def build_tools(arguments):
    """What pip has to bring so that the native module builds; and hqq, which the tests want and has no wheels."""
    tools = ["scikit-build-core>=0.10", "pybind11>=2.13"] + (["setuptools>=70.1"] if arguments.dev else [])
    cmake = shutil.which("cmake")
    if cmake:
        words = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False).stdout.split()
        cmake = len(words) > 2 and version_tuple(words[2]) >= OLDEST_CMAKE
    if not cmake:
        tools.append("cmake")
    if not (shutil.which("ninja") or shutil.which("ninja-build")):
        tools.append("ninja")
    return tools


def check_machine():
    if sys.version_info[:2] < OLDEST_PYTHON:
        stop(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]} ({sys.executable})")
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"]
    if not any(shutil.which(name) for name in compilers if name):
        stop("no C++ compiler found (looked for $CXX, c++, g++, clang++). On Debian or Ubuntu: apt-get install g++")


def run_logged(title, command, log):
    """Run a step, its output in the log; one line on the screen. A failure shows the log's end."""
    start = time.monotonic()
    print(f"{title} ...", end="", flush=True)
    with open(log, "ab") as stream:
        stream.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        stream.flush()
        failed = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    print(f" {'failed' if failed else 'done'} ({time.monotonic() - start:.0f} s)", flush=True)
    if failed:
        tail = log.read_text(errors="replace").splitlines()[-25:]
        print("\n".join("    " + line for line in tail))
    return not failed


def executable(venv, name):
    return venv / ("Scripts" if WINDOWS else "bin") / (name + (".exe" if WINDOWS else ""))


def site_packages(python):
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip()


def fingerprint(arguments, torch_version):
    """Changes when anything that the environment was made from does."""
    digest = hashlib.sha256(repr((sys.version, sys.prefix, torch_version, arguments.dev)).encode())
    native = sorted(p for folder in ("csrc", "python_bindings") for p in (ROOT / folder).rglob("*") if p.is_file())
    for path in (Path(__file__), CONSTRAINTS, ROOT / "pyproject.toml", *native):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def create(arguments, torch_version, torch_folders, log):
    venv = arguments.venv
    title = f"[1/4] virtual environment in {os.path.relpath(venv)}"
    # pyvenv.cfg absent: not an environment yet, or a half-made one
    if not ((venv / "pyvenv.cfg").exists() and executable(venv, "python").exists()):
        if not run_logged(title, [sys.executable, "-m", "venv", str(venv)], log):
            stop("could not make a virtual environment. On Debian or Ubuntu: apt-get install python3-venv")
    else:
        print(title, "... there")
    pip = [str(executable(venv, "python")), "-m", "pip", "install", "--disable-pip-version-check"]
    extras = ("test,triton" if torch_version is None else "test") + (",dev" if arguments.dev else "")
    link = Path(site_packages(pip[0]), "hra_setup_torch.pth")
    link.unlink(missing_ok=True)
    if torch_version is not None:
        print(f"      keeping PyTorch {torch_version} of {sys.executable}")
        link.write_text("\n".join(torch_folders) + "\n")
        constraints = f"torch=={torch_version}\n"
    elif has_nvidia_driver():
        print("      NVIDIA driver found: the current PyTorch with CUDA")
        constraints = ""
    else:
        constraints = CONSTRAINTS.read_text()
    pins = venv / "constraints.txt"
    pins.write_text(constraints)
    pip += ["-c", str(pins)]
    if not run_logged("[2/4] build tools", [*pip, *build_tools(arguments)], log):
        stop(f"pip could not install the build tools (log: {log})")
    title = "[3/4] PyTorch, PEFT, transformers; hra-kernels compiled (a few minutes)"
    if not run_logged(title, [*pip, "--no-build-isolation", "-e", f".[{extras}]"], log):
        stop(f"pip could not install hra-kernels[{extras}] (log: {log})")
    fetch = [str(executable(venv, "hra-kernels")), "fetch", "nlu"]
    if not run_logged("[4/4] model and data of the main job", fetch, log):
        print("      going on without: the main job will ask for them, and their tests skip")


def main():
    arguments = parse_arguments()
    check_machine()
    arguments.venv = arguments.venv.resolve()
    if Path(sys.prefix).resolve() == arguments.venv and sys._base_executable != sys.executable:
        os.execv(sys._base_executable, [sys._base_executable, *sys.orig_argv[1:]])
    torch_version, torch_folders = present_torch()
    made_from = fingerprint(arguments, torch_version)
    stamp = arguments.venv / "hra-setup.json"
    if not (stamp.exists() and json.loads(stamp.read_text()).get("made_from") == made_from):
        arguments.venv.mkdir(parents=True, exist_ok=True)
        create(arguments, torch_version, torch_folders, arguments.venv / "setup.log")
        stamp.write_text(json.dumps({"made_from": made_from}))
    if not arguments.command:
        print(f"ready: {executable(arguments.venv, 'python')}")
        return
    scripts = str(executable(arguments.venv, "python").parent)
    os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    os.environ["VIRTUAL_ENV"] = str(arguments.venv)
    os.environ.pop("PYTHONHOME", None)
    program = shutil.which(arguments.command[0])
    if program is None:
        stop(f"no command {arguments.command[0]!r} in {scripts} or on PATH")
    sys.stdout.flush()
    if WINDOWS:
        sys.exit(subprocess.run([program, *arguments.command[1:]], check=False).returncode)
    os.execv(program, [program, *arguments.command[1:]])


if __name__ == "__main__":
    main()
