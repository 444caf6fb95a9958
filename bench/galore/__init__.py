"""GaLore's optimizer: its cost, its bases, training with it."""
