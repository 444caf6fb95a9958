"""Starts from gradients."""
