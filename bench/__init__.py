"""Benchmarks: what LoRA costs beside the frozen layer, eager PyTorch and the peers (docs/benchmarks.md)."""
