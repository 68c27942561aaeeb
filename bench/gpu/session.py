"""One call of `bench.gpu.run`: its deadline, what all calls so far have found, and the commands it starts."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu"
"""Kept between the calls of a lease, as ignored build outputs are."""
MARGIN_S = 15.0
"""Kept back at the end of a call for packing."""


class OutOfTime(Exception):
    """The call's time is up; the stage goes on in the next one."""


class StageFailed(Exception):
    """A stage's own verdict; the message is the summary."""


@dataclass
class Session:
    """What this call was asked for, and what all calls so far have found."""

    rehearse: bool
    deadline: float
    state: dict = field(default_factory=dict)
    work: Path = WORK

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def results(self) -> Path:
        return self.work / "results"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    def left(self) -> float:
        return self.deadline - MARGIN_S - time.monotonic()

    def command(
        self, log: str, command: list[str], least: float = 5.0, accept: tuple[int, ...] = (0,), **environment: str
    ) -> tuple[int, str]:
        """Run `command` in the repository, its output appended to a log; (exit status, output).

        Raises:
            OutOfTime: less than `least` seconds are left, or it did not end in time.
            StageFailed: it ended with a status outside `accept`.
        """
        if self.left() < least:
            raise OutOfTime(f"{self.left():.0f} s left, {least:.0f} s wanted for {' '.join(command[:6])}")
        self.logs.mkdir(parents=True, exist_ok=True)
        path = self.logs / f"{log}.log"
        python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        settings = os.environ | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"} | environment
        with path.open("a") as file:
            print("$", *command, file=file, flush=True)
            start = file.tell()
            # a session of its own, so that test workers end with the process that started them
            process = subprocess.Popen(
                command, cwd=ROOT, env=settings, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(timeout=self.left())
            except subprocess.TimeoutExpired as error:
                raise OutOfTime(f"{' '.join(command[:6])} did not end in time") from error
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with path.open(errors="replace") as file:
            file.seek(start)
            output = file.read()
        if status not in accept:
            raise StageFailed(f"{' '.join(command[:8])}: status {status}: {last_lines(output, 3)}")
        return status, output

    def python(self, log: str, *arguments: str, **options: object) -> str:
        return self.command(log, [sys.executable, *arguments], **options)[1]

    def pytest(self, log: str, *arguments: str, workers: int = 8, **environment: str) -> str:
        """The summary of a test run, by several processes where pytest-xdist is here.

        Raises:
            StageFailed: a test failed, or none was run.
        """
        parallel = not self.rehearse and importlib.util.find_spec("xdist") is not None
        spread = ["-n", str(min(workers, os.cpu_count() or 1))] if parallel else []
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *spread, *arguments]
        output = self.python(log, *command, least=20, **environment)
        summary = last_lines(output)
        if " passed" not in summary:
            raise StageFailed(f"nothing was tested: {summary}")
        return summary


def last_lines(text: str, count: int = 1) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines()[-count:])
