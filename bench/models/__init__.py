"""Whole blocks and models."""
