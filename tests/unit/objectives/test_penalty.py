"""The hand-written gradient is autograd's, and shards add up."""

import pytest
import torch

from trainer.objectives import penalty_gradient, penalty_value


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_gradient_is_the_derivative_of_the_value(l1, l2):
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    weight[0, 0] = 0.0
    reference = weight.double().requires_grad_()
    value = l1 * reference.abs().sum() + l2 / 2 * reference.square().sum()
    value.backward()
    torch.testing.assert_close(penalty_value(weight, l1, l2).double(), value.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(penalty_gradient(weight, l1, l2).double(), reference.grad, rtol=1e-6, atol=0)


def test_shards_add_up_and_the_weight_is_left_alone():
    weight = torch.randn(60, generator=torch.Generator().manual_seed(2))
    before = weight.clone()
    shards = weight.split(17)
    torch.testing.assert_close(sum(penalty_value(s, 0.3, 0.2) for s in shards), penalty_value(weight, 0.3, 0.2))
    assert torch.equal(torch.cat([penalty_gradient(s, 0.3, 0.2) for s in shards]), penalty_gradient(weight, 0.3, 0.2))
    assert torch.equal(weight, before)


def test_the_pull_to_the_start_is_the_gradient_of_its_value():
    generator = torch.Generator().manual_seed(0)
    weight, start = torch.randn(2, 7, 5, generator=generator)
    reference = weight.double().requires_grad_()
    value = 0.35 * (reference - start.double()).square().sum() + 0.2 * reference.abs().sum()
    value.backward()
    found = penalty_value(weight, 0.2, 0.0, 0.7, start)
    torch.testing.assert_close(found.double(), value.detach(), rtol=1e-6, atol=0)
    slope = penalty_gradient(weight, 0.2, 0.0, 0.7, start)
    torch.testing.assert_close(slope.double(), reference.grad, rtol=1e-6, atol=0)
    assert not penalty_gradient(start, 0.0, 0.0, 0.7, start).any()
