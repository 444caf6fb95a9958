"""PEFT's layers, tuner and files: the one place that imports peft."""
