"""Benchmarks: us and PyTorch on the same weights and batches, side by side in one run. See `bench.run`."""
