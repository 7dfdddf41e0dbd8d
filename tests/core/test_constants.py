"""Wavelength and interaction constant: CODATA numbers, the textbook's identities, gradients."""

import pytest
import torch

from cryosim.core.constants import POTENTIAL_PER_FORM_FACTOR, REST_ENERGY, interaction_constant, wavelength

KNOWN = [  # [kV], [Å], [rad/(V·Å)]
    (100.0, 0.037014366, 9.243958e-4),
    (200.0, 0.025079340, 7.288401e-4),
    (300.0, 0.019687489, 6.526161e-4),
]


@pytest.mark.parametrize(("voltage", "length", "sigma"), KNOWN)
def test_codata_numbers(voltage, length, sigma):
    assert wavelength(voltage) == pytest.approx(length, rel=3e-8)
    assert interaction_constant(voltage) == pytest.approx(sigma, rel=1e-7)


def test_potential_per_form_factor():
    assert POTENTIAL_PER_FORM_FACTOR == pytest.approx(47.87764724, rel=1e-8)
    assert REST_ENERGY == pytest.approx(510998.95, rel=1e-8)


@pytest.mark.parametrize("voltage", [80.0, 120.0, 300.0, 1000.0])
def test_sigma_is_relativistic_factor_times_wavelength_over_k(voltage):
    gamma = 1 + 1e3 * voltage / REST_ENERGY
    assert interaction_constant(voltage) == pytest.approx(
        gamma * wavelength(voltage) / POTENTIAL_PER_FORM_FACTOR, rel=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [wavelength, interaction_constant])
def test_tensors_equal_numbers(function, dtype):
    voltages = torch.tensor([[100.0, 200.0, 300.0], [80.0, 120.0, 1000.0]], dtype=dtype)
    got = function(voltages)
    assert got.dtype == dtype
    wanted = torch.tensor([[function(v) for v in row] for row in voltages.tolist()], dtype=torch.float64)
    torch.testing.assert_close(got.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("function", [wavelength, interaction_constant])
def test_gradient_is_the_slope(function):
    voltage = torch.tensor([60.0, 200.0, 300.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(voltage).sum(), voltage)
    step = 1e-2
    slope = torch.tensor([(function(v + step) - function(v - step)) / (2 * step) for v in voltage.tolist()])
    torch.testing.assert_close(gradient, slope.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("voltage", [0, -300.0, float("nan")])
@pytest.mark.parametrize("function", [wavelength, interaction_constant])
def test_voltage_must_be_positive(function, voltage):
    with pytest.raises(ValueError, match="voltage"):
        function(voltage)
