"""One layer, or layers that run together, next to eager PyTorch and PEFT."""
