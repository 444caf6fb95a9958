"""A model's adapters: patch, switch, merge, combine, save, load, explain."""
