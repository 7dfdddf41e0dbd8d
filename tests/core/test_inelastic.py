"""Inelastic scattering in numbers: published mean free paths, absorption, contrast, thickness."""

import math

import pytest
import torch

from cryosim.core.constants import REST_ENERGY, interaction_constant
from cryosim.core.inelastic import (
    CARBON,
    ICE,
    PROTEIN,
    PROTEIN_INNER_POTENTIAL,
    absorption_potential,
    inelastic_contrast,
    log_ratio_thickness,
    mean_free_path,
)

KNOWN = [  # [Å] at 300, 200 and 100 kV: Vulović et al. 2013, eq. 8
    (ICE, (3750, 3110, 2060)),
    (PROTEIN, (1970, 1630, 1080)),
    (CARBON, (1730, 1430, 950)),
]


@pytest.mark.parametrize(("reference", "lengths"), KNOWN)
def test_published_mean_free_paths(reference, lengths):
    for voltage, wanted in zip((300.0, 200.0, 100.0), lengths):
        assert mean_free_path(reference, voltage) == pytest.approx(wanted, rel=5e-3)


def cross_section(material, voltage):
    """Inelastic cross-section of one molecule, atom or mean protein atom [Å^2]: Vulović et al. 2013, eqs. 8 and 9.

    Measured at 100 kV for hydrogen and protein, 1.5e-6 sqrt(Z) / beta^2 ln(...) nm^2 for others; all for 20 eV.
    """

    def beta2(u):
        return 1 - (REST_ENERGY / (u + REST_ENERGY)) ** 2

    def logarithm(u):
        return math.log(beta2(u) * (u + REST_ENERGY) / 10)

    u = 1e3 * voltage
    from_100 = beta2(1e5) * logarithm(u) / (beta2(u) * logarithm(1e5))
    heavy = {z: 1.5e-4 * math.sqrt(z) / beta2(u) * logarithm(u) for z in (6, 8)}
    return {"ice": 2 * 8.8e-4 * from_100 + heavy[8], "protein": 0.82e-2 * from_100, "carbon": heavy[6]}[material]


@pytest.mark.parametrize("voltage", [80.0, 120.0, 300.0])
@pytest.mark.parametrize(
    ("material", "reference", "density", "mass"),
    [("ice", ICE, 0.93, 18.0), ("protein", PROTEIN, 1.35, 7.2), ("carbon", CARBON, 1.75, 12.0)],
)
def test_mean_free_path_is_one_over_density_and_cross_section(material, reference, density, mass, voltage):
    number_density = density / mass * 0.602214  # [1/Å^3]
    wanted = 1 / (number_density * cross_section(material, voltage))
    assert mean_free_path(reference, voltage) == pytest.approx(wanted, rel=2e-3)


def test_reference_voltage_changes_nothing():
    assert mean_free_path(3150.0, 300.0) == pytest.approx(3150.0, rel=1e-15)


@pytest.mark.parametrize(("length", "wanted"), [(ICE, 0.204), (PROTEIN, 0.389)])
def test_absorption_potentials(length, wanted):
    assert absorption_potential(length, 300.0) == pytest.approx(wanted, abs=5e-4)


@pytest.mark.parametrize("voltage", [100.0, 300.0])
def test_absorption_takes_what_lost_energy(voltage):
    """|exp(-sigma V_im t)|^2 = exp(-t / Lambda)."""
    length, thickness = mean_free_path(ICE, voltage), 1234.0
    passed = math.exp(-2 * interaction_constant(voltage) * absorption_potential(length, voltage) * thickness)
    assert passed == pytest.approx(math.exp(-thickness / length), rel=1e-12)


def test_contrast_of_protein_in_ice():
    """Of the 0.07 to 0.10 in use over half is inelastic loss; it varies little with the voltage."""
    assert inelastic_contrast(300.0) == pytest.approx(0.0531, abs=5e-4)
    assert inelastic_contrast(300.0, inner_potential=7.0) == pytest.approx(0.0746, abs=5e-4)
    for voltage in (100.0, 200.0):
        assert inelastic_contrast(voltage) == pytest.approx(inelastic_contrast(300.0), rel=0.3)
    assert inelastic_contrast(300.0, reference=ICE) == 0  # what absorbs like ice has no contrast of this kind


def test_contrast_is_the_angle_of_the_complex_potential():
    """(V + i V_im) of the body less that of the medium is along sqrt(1 - A^2) + i A."""
    body = PROTEIN_INNER_POTENTIAL + 1j * absorption_potential(PROTEIN, 300.0)
    medium = 4.5301 + 1j * absorption_potential(ICE, 300.0)
    a = inelastic_contrast(300.0)
    assert (body - medium) / abs(body - medium) == pytest.approx(math.sqrt(1 - a**2) + 1j * a, rel=1e-12)


def test_thickness_from_two_intensities():
    thickness = torch.tensor([100.0, 2000.0, 8000.0], dtype=torch.float64)
    passed = torch.exp(-thickness / ICE)
    torch.testing.assert_close(log_ratio_thickness(0.8 * passed, 0.8 * torch.ones(3).double(), ICE), thickness)
    assert log_ratio_thickness(1.0, math.e, 3750.0) == pytest.approx(3750.0)
    assert log_ratio_thickness(1.0, 1.0, 3750.0) == 0


FUNCTIONS = {
    mean_free_path: (3750.0, 300.0),
    absorption_potential: (3750.0, 300.0),
    log_ratio_thickness: (0.4, 1.0, 3750.0),
}


@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_tensors_equal_numbers_and_slopes_are_right(function):
    values = FUNCTIONS[function]
    tensors = [torch.tensor([0.9 * v, v], dtype=torch.float64, requires_grad=True) for v in values]
    got = function(*tensors)
    wanted = [function(*(0.9 * v for v in values)), function(*values)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    for i, gradient in enumerate(torch.autograd.grad(got.sum(), tensors)):
        step = 1e-5 * values[i]
        ends = [function(*(v + s * step * (j == i) for j, v in enumerate(values))) for s in (1, -1)]
        assert float(gradient[1]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_slopes_of_the_contrast():
    names = ("reference", "medium_reference", "inner_potential", "medium_inner_potential")
    values = torch.tensor([PROTEIN, ICE, PROTEIN_INNER_POTENTIAL, 4.5], dtype=torch.float64)

    def contrast(v, voltage):
        return inelastic_contrast(voltage, **dict(zip(names, v)))

    voltage = torch.tensor(200.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(contrast, (values.requires_grad_(), voltage.requires_grad_()), rtol=1e-6)
    assert float(contrast(values.detach(), voltage.detach())) == pytest.approx(
        inelastic_contrast(200.0, medium_inner_potential=4.5), rel=1e-12
    )


@pytest.mark.parametrize("bad", [0, -300.0, math.nan])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda bad: mean_free_path(bad, 300.0), "reference"),
        (lambda bad: mean_free_path(ICE, bad), "voltage"),
        (lambda bad: absorption_potential(bad, 300.0), "mean_free_path"),
        (lambda bad: absorption_potential(ICE, bad), "voltage"),
        (lambda bad: inelastic_contrast(bad), "voltage"),
        (lambda bad: inelastic_contrast(300.0, reference=bad), "reference"),
        (lambda bad: log_ratio_thickness(bad, 1.0, ICE), "zero_loss"),
        (lambda bad: log_ratio_thickness(torch.tensor([1.0, bad]), 1.0, ICE), "zero_loss"),
        (lambda bad: log_ratio_thickness(1.0, bad, ICE), "unfiltered"),
        (lambda bad: log_ratio_thickness(0.5, 1.0, bad), "mean_free_path"),
    ],
)
def test_numbers_must_be_positive(call, name, bad):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(bad)
