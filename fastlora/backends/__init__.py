"""One interface (docs/architecture.md), three implementations: `torch`, `cublas`, `triton`."""
