"""Texts that every machine has, and small pretrained models."""
