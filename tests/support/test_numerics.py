import pytest
import torch
from numerics import (
    LAYOUTS,
    assert_close_to_fp64,
    assert_surroundings_untouched,
    poisoned_empty,
    units_in_last_place,
    with_layout,
)


def product():
    torch.manual_seed(0)
    a, b = torch.randn(20, 30).bfloat16(), torch.randn(30, 10).bfloat16()
    return a.double() @ b.double(), a @ b


def test_eager_itself_passes():
    exact, eager = product()
    assert_close_to_fp64(eager, exact, eager)
    assert_close_to_fp64(exact.bfloat16(), exact, eager)


@pytest.mark.parametrize("spoil", ["one element", "all by a percent", "nan", "zero", "shape", "dtype"])
def test_what_is_wrong_fails(spoil):
    exact, eager = product()
    actual = eager.clone()
    if spoil == "one element":
        actual[3, 4] += 0.25
    elif spoil == "all by a percent":
        actual = (exact * 1.01).bfloat16()
    elif spoil == "nan":
        actual[0, 0] = float("nan")
    elif spoil == "zero":
        actual.zero_()
    elif spoil == "shape":
        actual = actual[:1]
    else:
        actual = actual.float()
    with pytest.raises(AssertionError):
        assert_close_to_fp64(actual, exact, eager)


def test_units_in_last_place_are_the_distance_to_the_next_number():
    values = torch.tensor([1.0, 1.5, -3.0, 1000.0, 1e-3])
    for dtype in (torch.float32, torch.float64):
        given = values.to(dtype)
        following = torch.nextafter(given.abs(), torch.tensor(float("inf"), dtype=dtype))
        expected = following.double() - given.abs().double()
        assert torch.equal(units_in_last_place(given.double(), dtype), expected)
    assert units_in_last_place(torch.tensor([1.0, 2.0]).double(), torch.bfloat16).tolist() == [2**-7, 2**-6]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_values(layout):
    matrix = torch.randn(6, 7)
    view = with_layout(matrix, layout)
    assert torch.equal(view, matrix[:1].expand(6, 7) if layout == "expanded" else matrix)
    assert layout == "contiguous" or not view.is_contiguous()


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_a_write_beside_the_view_is_seen(layout):
    view = poisoned_empty(4, 5, dtype=torch.float32, layout=layout)
    assert view.isnan().all()
    view.zero_()
    assert_surroundings_untouched(view)
    torch.empty(0).set_(view.untyped_storage())[view.storage_offset() - 1] = 1.0
    with pytest.raises(AssertionError, match="outside"):
        assert_surroundings_untouched(view)
