"""Everything that needs a GPU: `python -m bench.gpu.run --help`."""
