"""Labeled sentences for `hra-kernels train nlu`: the default data set, a person's own files, and the three splits."""

import csv
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hra_kernels.recipes import RecipeError, packages, reason

SUFFIXES = (".csv", ".tsv", ".jsonl")
MOST_CLASSES = 200
"""More distinct labels than this are taken for a mistake in --label."""
FEWEST_SENTENCES = 30
"""A single file needs this many to be split into three."""
_SPLIT_FILES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Example:
    """A sentence, maybe a second one, and its class."""

    text: str
    pair: str | None
    label: str

    @property
    def key(self) -> tuple[str, str | None]:
        """Equal for sentences that count as the same one: blanks and capitals do not matter."""
        return _plain(self.text), _plain(self.pair)


def _plain(text: str | None) -> str | None:
    return None if text is None else " ".join(text.split()).casefold()


@dataclass(frozen=True)
class Splits:
    """Train, validation and test examples without a sentence in common; `classes` in the order of the logits."""

    source: str
    classes: list[str]
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    def majority(self, part: str = "test") -> float:
        """Accuracy, on one split, of always answering the class that is most frequent in train."""
        answer = Counter(example.label for example in self.train).most_common(1)[0][0]
        examples = getattr(self, part)
        return sum(example.label == answer for example in examples) / len(examples)

    def shortened(self, evaluated: int) -> "Splits":
        """The same with at most this many validation and test examples."""
        return Splits(self.source, self.classes, self.train, self.validation[:evaluated], self.test[:evaluated])


def movie_sentences(seed: int) -> Splits:
    """Sentences of movie reviews, positive or negative by the mean of at least 20 people's scores from -4 to 4.

    Sentences with a mean nearer to zero than half a point, which people do not agree on, are left out.
    """
    path = packages.fetch(packages.MOVIE_SENTENCES)
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        _, score, text = line.split("\t")
        if abs(float(score)) >= 0.5:
            examples.append(Example(text.strip(), None, "positive" if float(score) > 0 else "negative"))
    return _split("movie-review sentences", examples, seed)


def load(path: Path, seed: int, text: str = "text", label: str = "label", pair: str | None = None) -> Splits:
    """A person's data: one .csv, .tsv or .jsonl file, split here, or a folder with a file for each split.

    Raises:
        RecipeError: no such file, another kind of file, a missing column, an empty field, too little to split.
    """
    if path.is_dir():
        return _folder(path, text, label, pair)
    return _split(str(path), list(_read(path, text, label, pair)), seed)


def _folder(folder: Path, text: str, label: str, pair: str | None) -> Splits:
    parts: dict[str, list[Example]] = {}
    for part, stems in _SPLIT_FILES.items():
        found = [
            folder / (stem + suffix) for stem in stems for suffix in SUFFIXES if (folder / (stem + suffix)).exists()
        ]
        if len(found) != 1:
            wanted = " or ".join(stem + "{" + ",".join(SUFFIXES) + "}" for stem in stems)
            got = (
                ", ".join(p.name for p in found)
                or ", ".join(sorted(p.name for p in folder.iterdir()))
                or "an empty one"
            )
            raise RecipeError(f"--data {folder}: expected one {part} file, {wanted}, got {got}")
        parts[part] = list(_read(found[0], text, label, pair))
    test = _distinct(parts["test"], ())
    validation = _distinct(parts["validation"], test)
    train = _distinct(parts["train"], [*validation, *test])
    return _checked(str(folder), train, validation, test)


def _distinct(examples: Sequence[Example], taken: Sequence[Example]) -> list[Example]:
    """The examples without repeated sentences and without those already taken."""
    seen = {example.key for example in taken}
    kept = []
    for example in examples:
        if example.key not in seen:
            seen.add(example.key)
            kept.append(example)
    return kept


def _split(source: str, examples: list[Example], seed: int) -> Splits:
    examples = _distinct(examples, ())
    if len(examples) < FEWEST_SENTENCES:
        raise RecipeError(
            f"{source}: expected at least {FEWEST_SENTENCES} different sentences to split into train, validation and "
            f"test, got {len(examples)}"
        )
    random.Random(seed).shuffle(examples)
    held_out = min(1000, len(examples) // 10)
    return _checked(source, examples[2 * held_out :], examples[held_out : 2 * held_out], examples[:held_out])


def _checked(source: str, train: list[Example], validation: list[Example], test: list[Example]) -> Splits:
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if not part:
            raise RecipeError(f"{source}: expected sentences in {name}, got none (repeated ones count once)")
    labels = {example.label for example in train}
    if not 2 <= len(labels) <= MOST_CLASSES:
        raise RecipeError(
            f"{source}: expected 2 to {MOST_CLASSES} classes in train, got {len(labels)} distinct labels; "
            "name the column of the class with --label"
        )
    unknown = {example.label for example in [*validation, *test]} - labels
    if unknown:
        raise RecipeError(f"{source}: expected the classes of train in validation and test, got also {sorted(unknown)}")
    return Splits(source, sorted(labels, key=_number_first), train, validation, test)


def _number_first(label: str) -> tuple[int, float, str]:
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def rows_of(path: Path) -> list[tuple[int, dict]]:
    """(line number, fields) of every row of a table.

    Raises:
        RecipeError: no such file, another kind of file, or it does not read.
    """
    if path.suffix not in SUFFIXES:
        raise RecipeError(
            f"--data {path}: expected a {', '.join(SUFFIXES)} file or a folder, got {path.suffix or 'none'}"
        )
    try:
        return list(_jsonl_rows(path) if path.suffix == ".jsonl" else _table_rows(path))
    except FileNotFoundError:
        raise RecipeError(f"--data {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"--data {path}: expected UTF-8 text, got a byte that is not ({error.reason})") from error
    except (OSError, csv.Error) as error:
        raise RecipeError(f"--data {path}: cannot be read ({reason(error)})") from error


def _read(path: Path, text: str, label: str, pair: str | None) -> Iterator[Example]:
    columns = [(option, name) for option, name in (("--text", text), ("--text-pair", pair), ("--label", label)) if name]
    for line, row in rows_of(path):
        values = {}
        for option, name in columns:
            if name not in row:
                there = ", ".join(map(str, row)) or "none"
                raise RecipeError(f"{path} line {line}: no column {name!r} ({option}); the columns are {there}")
            value = row[name]
            if value is None or not str(value).strip():
                raise RecipeError(
                    f"{path} line {line}: expected a value in column {name!r} ({option}), got an empty one"
                )
            values[name] = str(value).strip()
        yield Example(values[text], values[pair] if pair else None, values[label])


def _table_rows(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        if path.suffix == ".tsv":
            reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(stream)
        for row in reader:
            row.pop(None, None)  # what stands right of the last named column
            yield reader.line_num, row


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecipeError(f"{path} line {number}: expected a JSON object, got {error}") from error
            if not isinstance(row, dict):
                raise RecipeError(f"{path} line {number}: expected a JSON object, got {type(row).__name__}")
            yield number, row
