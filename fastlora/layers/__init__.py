"""One patched layer, and layers that run together."""
