"""What fine-tuning jobs and benchmarks share: the stopwatch, the look of plots, and text of numbers and tables."""
