"""Which benchmarks a GPU run takes, the most wanted first."""

FAMILY = ["frozen", "ours", "wy-eager", "lora", "oft", "peft-hra"]
COMPILED = ["wy-compile"]
"""Takes longer to compile than a case to measure."""
REST = ["ours-nn", "loha", "lokr", "adalora"]  # BOFT compiles an extension of its own, and waits for the GPU
BFLOAT16 = ["--dtype", "bfloat16"]
BIG = ["8192x2048x2048", "llama3-8b-q", "llama3-70b-q", "8192x16384x16384"]
"""D of 2048 to 16384 at 8192 rows: what the targets are set for."""


def _op() -> list[list[str]]:
    backends = ["triton", "cuda", "reference"]
    return [
        ["--shapes", *BIG, "--ranks", "8", "16", "--dtypes", "bfloat16", "--backends", *backends],
        ["--shapes", "llama3-8b-q", "--ranks", "2", "32", "64", "--dtypes", "bfloat16", "--backends", *backends],
        ["--shapes", "llama3-8b-q", "--ranks", "8", "32", "--dtypes", "float32", "--backends", *backends],
        ["--shapes", "2048x4096x4096", "--ranks", "8", "--dtypes", "bfloat16"],  # with the compiled reference
        ["--shapes", "decode", "--ranks", "8", "--dtypes", "bfloat16", "--backends", *backends],
        # in float64 the check of so many columns fits a GPU for few rows only
        ["--shapes", "2048x4096x4096", "--ranks", "128", "--dtypes", "bfloat16", "--backends", *backends],
    ]


def _layer() -> list[list[str]]:
    return [
        ["--shapes", "llama3-8b-q", *BFLOAT16, "--providers", *FAMILY, *COMPILED, *REST],
        ["--shapes", "llama3-8b-q", *BFLOAT16, "--rank", "16", "--providers", *FAMILY, *COMPILED],
        ["--shapes", "llama3-8b-up", "llama3-8b-down", "llama3-70b-q", *BFLOAT16, "--providers", *FAMILY],
        ["--shapes", "llama3-8b-kv", "qwen2.5-7b-q", "deberta-v3-base-q", *BFLOAT16, "--providers", *FAMILY],
        ["--shapes", "sd1.5-attn-64", "sd1.5-attn-16", "sd1.5-conv-32", *BFLOAT16, "--providers", *FAMILY],
        ["--shapes", "decode", *BFLOAT16, "--providers", *FAMILY],
        ["--shapes", "standard", "--dtype", "float32", "--providers", *FAMILY],
    ]


def _model() -> list[list[str]]:
    whole = ["frozen", "ours", "lora", "wy-eager", "oft", "peft-hra"]
    short = ["frozen", "ours", "lora", "wy-eager"]
    return [
        ["--models", "llama3-8b-4layers", "--providers", *whole],
        ["--models", "sd1.5-unet", "--providers", *whole],
        ["--models", "llama3-8b-4layers", "sd1.5-unet", "--modes", "checkpoint", "--providers", *short],
        ["--models", "bert-base", "--providers", *whole],
        ["--models", "llama3-8b-4layers", "--modes", "compile", "--providers", *short[:3]],
        ["--models", "qwen2.5-7b-4layers", "--providers", *short],
    ]


def _scaling() -> list[list[str]]:
    few = ["--providers", "frozen", "ours", "wy-eager", "lora"]
    return [["--over", sweep, *BFLOAT16, *few] for sweep in ("M", "layers", "R", "D")]


LITTLE = {
    "op": [["--shapes", "64x128x128", "--ranks", "8", "--dtypes", "float32", "--backends", "reference", "cpu"]],
    "layer": [["--shapes", "64x128x128", "--providers", *FAMILY[:3]]],
    "model": [["--models", "llama-tiny", "unet-tiny", "--modes", "eager", "checkpoint"]],
    "numerics": [["--size", "128", "--measures", "orthogonality"]],
    "scaling": [["--over", "M", "--values", "1", "16", "--providers", "frozen", "ours"]],
}
"""A rehearsal's."""

SECONDS = {"op": "2", "layer": "3", "model": "8", "numerics": "1", "scaling": "2"}
"""Of measuring a case."""


def benchmarks(level: str, rehearse: bool) -> list[list[str]]:
    """The command lines of a level, each `python -m bench LEVEL ...` without device and output."""
    if rehearse:
        return [[*arguments, "--seconds", "0.3"] for arguments in LITTLE[level]]
    real = {"op": _op, "layer": _layer, "model": _model, "scaling": _scaling}
    commands = real[level]() if level in real else [["--size", "1024"]]
    return [[*arguments, "--seconds", SECONDS[level]] for arguments in commands]
