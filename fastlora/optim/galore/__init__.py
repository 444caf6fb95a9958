"""GaLore: AdamW whose gradients live in a subspace (Zhao et al. 2024, arXiv 2403.03507)."""
