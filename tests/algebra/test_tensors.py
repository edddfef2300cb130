import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from deltafl.algebra.tensors import BLOCK, Joined, Lazy, Spec, lazy, round_once
from laws.worlds import ByBlocks

# dtype -> (bits of precision, least exponent of a normal number): IEEE 754 and bfloat16.
FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}
HALVES = (torch.bfloat16, torch.float16)


def nearest(x: float, dtype: torch.dtype) -> float:
    """x rounded once to a format, in fractions: nearest, ties to even, overflow to infinity."""
    if not math.isfinite(x) or x == 0:
        return x
    precision, least = FORMATS[dtype]
    exponent = max(math.frexp(x)[1] - 1, least)
    unit = Fraction(2) ** (exponent - precision + 1)
    value = round(Fraction(x) / unit) * unit
    if abs(value) > Fraction(torch.finfo(dtype).max):
        return math.copysign(math.inf, x)
    return math.copysign(float(value), x)


def assert_rounds_once(values: list[float], dtype: torch.dtype) -> None:
    rounded = round_once(torch.tensor(values, dtype=torch.float64), dtype)
    assert rounded.dtype == dtype
    expected = torch.tensor([nearest(x, dtype) for x in values], dtype=torch.float64)
    torch.testing.assert_close(rounded.double(), expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(rounded.signbit()[numbers], expected.signbit()[numbers])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@given(values=st.lists(st.floats(), min_size=1))
@example(values=[0.0, -0.0, math.nan, math.inf, -math.inf, 1e300, -1e300, 5e-324, -5e-324])
@example(values=[65504.0, 65519.9999, 65520.0, -65520.0, 3.3895e38, 3.3961e38, 3.4028235e38])
@example(values=[2**-24.0, 2**-25.0, 2**-25 * (1 + 2**-40), 2**-134 * (1 + 2**-40), 1e-45])
def test_any_float64_is_rounded_once(dtype, values):
    assert_rounds_once(values, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cut", [-40, -30, -50])
def test_values_beside_a_midpoint_are_rounded_once(dtype, cut):
    """Midpoints of two neighbours, a hair above and below: where a step through float32 goes wrong."""
    bits = torch.arange(0, 0x7F00 if dtype == torch.bfloat16 else 0x7B00, 37, dtype=torch.int16)
    low, high = bits.view(dtype).double(), (bits + 1).view(dtype).double()
    middle = (low + high) / 2
    values = torch.cat([middle, middle * (1 + 2.0**cut), middle * (1 - 2.0**cut)])
    assert (values.to(dtype) != round_once(values, dtype)).any(), (
        "torch rounds twice; if it no longer does, drop this"
    )
    assert_rounds_once([*values.tolist(), *(-values).tolist()], dtype)


def test_a_part_of_a_tensor_is_read_alone():
    tensor = torch.arange(12.0).reshape(3, 4).bfloat16()
    for tensors in ({"w": tensor}, ByBlocks({"w": tensor}), Joined({"w": ({"v": tensor}, "v")})):
        held = lazy(tensors)
        assert held.spec("w") == Spec((3, 4), torch.bfloat16)
        assert held.spec("w").numel == 12
        assert held.block("w", 5, 8).tolist() == [5, 6, 7]
        assert held.block("w", 5, 8, torch.float64).dtype == torch.float64
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            out = torch.empty(3, dtype=dtype)
            held.read("w", 5, 8, out)
            assert out.tolist() == [5, 6, 7]
        assert lazy(held) is held


class Squares(Lazy):
    """0, 1, 4, ... of any length, with nothing defined but what must be."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.shapes, self.names = shapes, shapes

    def spec(self, name: str) -> Spec:
        return Spec(self.shapes[name], torch.float64)

    def read(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(torch.arange(start, stop).square())


def test_the_mapping_follows_from_spec_and_read():
    squares = Squares(a=(2, 3), none=(0, 4), long=(BLOCK + 2,), one=())
    assert (list(squares), len(squares)) == (["a", "none", "long", "one"], 4)
    assert ("a" in squares, "b" in squares) == (True, False)
    assert squares["a"].tolist() == [[0, 1, 4], [9, 16, 25]]
    assert squares["none"].shape == (0, 4)
    assert torch.equal(squares["long"], torch.arange(BLOCK + 2).double().square())
    assert squares["one"].shape == ()
    assert squares.get("b") is None
    with pytest.raises(KeyError, match="b"):
        squares["b"]


def test_tensors_of_several_mappings_are_joined_under_other_names():
    one, two = {"a": torch.ones(2)}, ByBlocks({"b": torch.zeros(3).half()})
    joined = Joined({"x": (two, "b"), "a": (one, "a")})
    assert [(n, t.tolist()) for n, t in joined.items()] == [("x", [0, 0, 0]), ("a", [1, 1])]
