"""Fine-tuning jobs from beginning to end. See `hra-kernels train --help`."""
