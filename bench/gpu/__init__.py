"""Everything that needs a GPU: `python bench/gpu/run.py --help`."""
