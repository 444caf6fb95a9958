"""A folder an op: `<op>.py` (checks, autograd, the choice of kernels), `aten.py` and `triton.py`."""
