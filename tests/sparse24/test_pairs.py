"""The choice of two of four against brute force and optimal brain surgeon's closed form, in fp64."""

from itertools import combinations

import pytest
import torch

from nvit.sparse24.pairs import best_pairs, best_values
from nvit_kernels.sparse24 import mask_2to4


def layer(rows: int, columns: int, seed: int = 0):
    """A weight `(rows, columns)` and the damped second moment of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    x = draw(3 * columns, columns) @ draw(columns, columns)
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    return draw(rows, columns), hessian


def without(w, hessian, gone, frozen=()):
    """The row nearest to `w` by the Hessian with zeros at `gone` and `w` itself at `frozen`, and its loss: the normal
    equations of the other places, solved as they stand."""
    free = [i for i in range(len(w)) if i not in gone and i not in frozen]
    change = torch.zeros_like(w)
    change[list(gone)] = -w[list(gone)]
    if free:
        change[free] = -torch.linalg.solve(hessian[free][:, free], hessian[free][:, list(gone)] @ change[list(gone)])
    return w + change, float(change @ hessian @ change)


def by_hand(weight, hessian):
    """`best_pairs`, row by row and group by group, every pair tried."""
    found = weight.clone()
    for row in found:
        for j in range(0, len(row), 4):
            tried = [without(row, hessian, gone, range(j)) for gone in combinations(range(j, j + 4), 2)]
            row.copy_(min(tried, key=lambda each: each[1])[0])
    return found


@pytest.mark.parametrize("columns", [4, 8, 40, 72])
def test_pairs_and_changes_are_those_of_brute_force(columns):
    weight, hessian = layer(6, columns)
    found, mask = best_pairs(weight, hessian)
    exact = by_hand(weight, hessian)
    torch.testing.assert_close(found, exact * mask, rtol=0, atol=1e-9)
    assert float((exact * ~mask).abs().max()) < 1e-9


def test_the_first_pair_is_the_cheapest_of_six():
    weight, hessian = layer(50, 12)
    _, mask = best_pairs(weight, hessian)
    inverse = torch.linalg.inv(hessian)
    for row, kept in zip(weight, mask, strict=True):
        costs = {}
        for pair in combinations(range(4), 2):
            p = list(pair)
            costs[pair] = float(row[p] @ torch.linalg.inv(inverse[p][:, p]) @ row[p])
            assert costs[pair] == pytest.approx(without(row, hessian, p)[1]), "their cost is the least loss"
        gone = tuple((~kept[:4]).nonzero()[:, 0].tolist())
        assert costs[gone] == min(costs.values())


def test_with_independent_inputs_the_choice_is_by_scaled_magnitude():
    """Nothing can be made good then: the least `w² h` leaves, and what stays keeps its value."""
    weight, _ = layer(20, 16)
    scales = torch.rand(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    found, mask = best_pairs(weight, scales.square().diag())
    assert torch.equal(mask, mask_2to4((weight * scales).float()))
    torch.testing.assert_close(found, weight * mask)


def test_every_group_keeps_two():
    weight, hessian = layer(33, 64)
    found, mask = best_pairs(weight, hessian)
    assert bool((mask.unflatten(1, (-1, 4)).sum(2) == 2).all())
    assert bool((found[~mask] == 0).all())


def test_values_are_the_least_squares_of_what_stays():
    weight, hessian = layer(7, 24)
    cross = weight @ hessian
    _, mask = best_pairs(weight, hessian)
    found = best_values(hessian, cross, mask)
    rows = zip(weight, mask, strict=True)
    exact = torch.stack([without(w, hessian, (~m).nonzero()[:, 0].tolist())[0] for w, m in rows])
    torch.testing.assert_close(found, exact * mask, rtol=0, atol=1e-9)


def test_loss_falls_from_magnitude_to_curvature_to_best_values():
    weight, hessian = layer(64, 96)

    def loss(w):
        return float(((w - weight) @ hessian * (w - weight)).sum())

    largest = mask_2to4(weight.float())
    found, mask = best_pairs(weight, hessian)
    cross = weight @ hessian
    best = [best_values(hessian, cross, m) for m in (largest, mask)]
    losses = [loss(w) for w in (weight * largest, *best)]
    assert losses[0] > 2 * losses[1] and losses[1] > 1.2 * losses[2]
    assert loss(found) > losses[2]


def test_an_indefinite_hessian_is_an_error():
    with pytest.raises(torch.linalg.LinAlgError):
        best_pairs(torch.ones(1, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64))
