"""What "right" means: at most twice eager PyTorch's error in the same dtype, plus one rounding, measured in fp64."""

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")


def poisoned_empty(*shape: int, dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous") -> Tensor:
    """An uninitialised tensor for a kernel to write, made of NaN: what is left unwritten, or read before, shows."""
    return with_layout(torch.full(shape, float("nan"), dtype=dtype, device=device), layout)


def with_layout(matrix: Tensor, layout: str) -> Tensor:
    """The same values laid out otherwise: a view into a larger tensor of NaN, so that a stray read or write shows too.

    "expanded" repeats the first row with stride 0 (so its values are not the same); it cannot be written.
    """
    rows, columns = matrix.shape
    if layout == "contiguous":
        return matrix.contiguous()
    if layout == "expanded":
        return matrix[:1].expand(rows, columns)
    if layout == "transposed":
        view = matrix.new_full((columns, rows + 3), float("nan")).t()[1 : rows + 1]
    elif layout == "strided":
        view = matrix.new_full((rows, 2 * columns + 1), float("nan"))[:, 1::2]
    elif layout == "offset":
        view = matrix.new_full((rows + 2, columns + 5), float("nan"))[1:-1, 3 : columns + 3]
    else:
        raise ValueError(f"layout: got {layout!r}, want one of {LAYOUTS}")
    view.copy_(matrix)
    return view


def assert_surroundings_untouched(view: Tensor) -> None:
    """Nothing was written beside a view that `poisoned_empty` or `with_layout` made: the rest is still NaN."""
    storage = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert storage[outside].isnan().all(), "written outside of the output"


def assert_close_to_fp64(actual: Tensor, reference64: Tensor, eager: Tensor, what: str = "result") -> None:
    """`actual` is at most twice as far from the fp64 reference as `eager`, which does the same in actual's dtype.

    Two rules, so that neither one bad element nor a small error everywhere passes: the largest error beyond one unit in
    the last place of its element is at most twice eager's largest, and the Frobenius norm of the error is at most twice
    eager's plus half a unit in the last place of everything.
    """
    assert actual.shape == reference64.shape, f"{what}: shape {tuple(actual.shape)}, want {tuple(reference64.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, want {eager.dtype}"
    assert reference64.dtype == torch.float64
    assert actual.isfinite().all(), f"{what}: not finite where the reference is"
    if actual.numel() == 0:
        return
    error = (actual.double() - reference64).abs()
    eager_error = (eager.double() - reference64).abs()
    ulp = units_in_last_place(reference64, actual.dtype)
    worst = (error - ulp).max().item()
    allowed = 2 * eager_error.max().item()
    assert worst <= allowed, f"{what}: largest error beyond one ulp {worst:.3e}, allowed {allowed:.3e} (twice eager's)"
    norm = error.norm().item()
    allowed = 2 * eager_error.norm().item() + 0.5 * ulp.norm().item()
    assert norm <= allowed, f"{what}: error norm {norm:.3e}, allowed {allowed:.3e} (twice eager's and half an ulp)"


def units_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` around each value, in fp64."""
    info = torch.finfo(dtype)
    magnitude = values.abs().clamp_min(info.tiny)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps
