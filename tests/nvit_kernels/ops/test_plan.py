import pytest
import torch

from nvit_kernels import functional
from nvit_kernels.ops.group_dot.plan import DotSlice, GroupDotPlan

SHAPES = {"w": (12, 8), "b": (12,), "conv.weight": (4, 3, 2, 2)}


@pytest.mark.parametrize(("slices", "error", "match"), [
    ([], ValueError, "at least one slice"),
    ([DotSlice("v", 0, None, (12, 8), 0, 0)], KeyError, "names v"),
    ([DotSlice("w", 8, 14, (6, 8), 0, 0)], ValueError, "rows 8:14"),
    ([DotSlice("w", 0, 6, (12, 8), 0, 0)], ValueError, "cannot be viewed"),
    ([DotSlice("w", 0, None, (12, 8), 2, 0)], ValueError, "no axis 2"),
])  # fmt: skip
def test_a_slice_that_fits_no_parameter_is_refused(slices, error, match):
    with pytest.raises(error, match=match):
        GroupDotPlan(slices, SHAPES)


@pytest.mark.parametrize(("slices", "match"), [
    ([DotSlice("w", 0, None, (12, 8), 0, 0), DotSlice("b", 0, None, (12,), 0, 6)], "overlap in part"),
    ([DotSlice("w", 0, None, (8, 12), 0, 0)], "do not split into rows and columns"),
])  # fmt: skip
def test_a_plan_that_cannot_be_laid_out_says_why(slices, match):
    with pytest.raises(ValueError, match=match):
        GroupDotPlan(slices, SHAPES).tables(torch.device("cpu"))


def test_tables_are_made_once_a_device():
    plan = GroupDotPlan([DotSlice("w", 0, None, (12, 8), 0, 0)], SHAPES)
    assert plan.tables(torch.device("cpu")) is plan.tables(torch.device("cpu"))


def test_every_element_is_in_exactly_one_tile():
    shapes = {"qkv": (300, 40), "b": (300,)}
    plan = GroupDotPlan([DotSlice("qkv", 0, 100, (100, 40), 0, 0), DotSlice("qkv", 100, 170, (70, 40), 1, 100),
                         DotSlice("b", 0, None, (300,), 0, 140)], shapes)  # fmt: skip
    seen = {0: torch.zeros(300, 40), 1: torch.zeros(1, 300)}
    for step, tiles in plan.tables(torch.device("cpu")).tiles.items():
        for number, start, end, j, columns, _, _ in tiles.tolist():
            assert end - start <= 64 and not any(start < cut < end for cut in (100, 170))
            assert columns * step == seen[number].shape[1]
            seen[number][start:end, 256 * j : 256 * (j + 1)] += 1
    assert all((count == 1).all() for count in seen.values())


@pytest.mark.parametrize(("change", "error", "match"), [
    (lambda p, g: p.pop("w"), KeyError, "not among"), (lambda p, g: g.update(w=None), KeyError, "no gradient"),
    (lambda p, g: g.update(w=torch.ones(12, 9)), ValueError, "the plan was made for"),
])  # fmt: skip
def test_wrong_parameters_and_gradients_are_named(change, error, match):
    plan = GroupDotPlan([DotSlice("w", 0, None, (12, 8), 0, 0)], SHAPES)
    params, grads = ({"w": torch.ones(12, 8), "b": torch.ones(12)} for _ in range(2))
    change(params, grads)
    with pytest.raises(error, match=match):
        functional.group_dot(params, grads, plan)
