"""CMSALoss and InfoNCELoss: the temperature they own."""

import math

import pytest
import torch

from sda_fast import CMSALoss, InfoNCELoss, cmsa_loss, infonce_loss


@pytest.mark.parametrize(("module", "function"), [(CMSALoss, cmsa_loss), (InfoNCELoss, infonce_loss)])
def test_a_module_is_its_function_at_its_temperature(module, function):
    x, y = torch.randn(9, 5), torch.randn(9, 5)
    torch.testing.assert_close(module(0.7)(x, y), function(x, y, 0.7))
    assert float(module().temperature) == pytest.approx(3.0)


def test_options_reach_the_function():
    x, y = torch.randn(9, 5), torch.randn(9, 5)
    options = {"normalize": True, "row_normalized_targets": True, "detach_teacher": True, "block_size": 3}
    torch.testing.assert_close(CMSALoss(0.7, **options)(x, y), cmsa_loss(x, y, 0.7, **options))


@pytest.mark.parametrize("module", [CMSALoss, InfoNCELoss])
def test_no_optimiser_step_makes_the_temperature_negative(module):
    loss = module(0.5)
    optimiser = torch.optim.SGD(loss.parameters(), lr=1e3)
    for _ in range(3):
        optimiser.zero_grad()
        loss.log_temperature.grad = torch.ones(())
        optimiser.step()
        assert float(loss.temperature.detach()) >= 0
    assert math.isfinite(float(loss.log_temperature.detach()))


def test_the_temperature_learns_only_if_it_may_and_is_saved_either_way():
    assert [name for name, _ in CMSALoss().named_parameters()] == ["log_temperature"]
    fixed = CMSALoss(2.0, learnable=False)
    assert list(fixed.parameters()) == [] and "log_temperature" in fixed.state_dict()
    copy = CMSALoss()
    copy.load_state_dict(fixed.state_dict())
    assert float(copy.temperature.detach()) == pytest.approx(2.0)
    CMSALoss()(torch.randn(4, 3), torch.randn(4, 3)).backward()


@pytest.mark.parametrize("module", [CMSALoss, InfoNCELoss])
@pytest.mark.parametrize("options", [{"backend": "cuda"}, {"block_size": -3}, {"workspace_bytes": 0}], ids=str)
def test_a_wrong_option_is_named_when_the_loss_is_made(module, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .*got"):
        module(**options)


def test_the_representation_says_which_loss_it_is():
    shown = repr(CMSALoss(2.0, learnable=False, detach_teacher=True, across_ranks=True))
    assert shown == (
        "CMSALoss(temperature=2, learnable=False, normalize=False, detach_teacher=True, row_normalized_targets=False, "
        "across_ranks=True)"
    )
    assert "targets=hard" in repr(InfoNCELoss())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_is_named(temperature):
    with pytest.raises(ValueError, match=f"got {temperature}"):
        CMSALoss(temperature)
