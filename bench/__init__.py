"""Benchmarks: what LoRA costs next to the frozen layer, eager PyTorch and the peers (docs/benchmarks.md)."""
