"""Three published tables of one quantity: what they agree on, and where each is known to be right."""

import math

import pytest
import torch

from cryosim.specimen.scattering_factors import displaced_solvent_factor, scattering_factor

TABLES = ["lobato", "kirkland", "peng"]
BOHR = 0.529177210903  # [Å]


def forward(numbers, table):
    return scattering_factor(torch.as_tensor(numbers), torch.zeros((), dtype=torch.float64), table)


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (1, (0.5292, 0.5297, 0.5288)),
        (6, (2.5097, 2.5114, 2.5092)),
        (7, (2.2488, 2.2188, 2.2131)),
        (8, (2.0291, 1.9897, 1.9834)),
        (15, (5.5675, 5.4976, 5.4862)),
        (16, (5.2539, 5.1721, 5.1597)),
    ],
)
def test_published_forward_values(number, wanted):
    """f(0) of Lobato & Van Dyck 2014, Kirkland 2020 and Peng et al. 1996 (table for s up to 6 1/Å)."""
    for table, value in zip(TABLES, wanted, strict=True):
        assert float(forward([number], table)[0]) == pytest.approx(value, abs=6e-5)


def test_tables_agree_at_zero_to_six_percent():
    """All of Peng's elements but two: the fits of Lobato at 77 (Ir) and of Kirkland at 84 (Po) are 10 % low."""
    numbers = [z for z in range(1, 99) if z not in (77, 84)]
    values = torch.stack([forward(numbers, table) for table in TABLES])
    assert (values > 0).all()
    assert ((values.amax(0) - values.amin(0)) / values.amax(0)).max() < 0.06


@pytest.mark.parametrize("table", TABLES)
def test_potassium_is_positive_throughout(table):
    """A widely copied misprint, a2(K) = -1.4031 in Peng's table, makes f(0) 6.18 instead of 8.98 Å."""
    assert float(forward([19], table)[0]) == pytest.approx(8.98, abs=0.05)


@pytest.mark.parametrize("number", [1, 6, 8, 16, 20, 26, 30])
def test_tables_agree_inside_one_angstrom(number):
    g2 = torch.linspace(0, 1, 41, dtype=torch.float64) ** 2
    curves = [scattering_factor(torch.tensor([number]), g2, table)[0] for table in TABLES]
    for other in curves[1:]:
        assert ((other - curves[0]).abs() / curves[0][0]).max() < 0.03
    for curve in curves:
        assert (curve.diff() < 0).all()


@pytest.mark.parametrize("number", [6, 8, 16, 26])
@pytest.mark.parametrize(("table", "tolerance"), [("lobato", 1e-3), ("kirkland", 0.05)])
def test_far_out_the_nucleus_scatters_alone(number, table, tolerance):
    """Mott-Bethe: f -> Z / (2 pi^2 a0 g^2), Rutherford scattering."""
    g2 = torch.tensor([1e4], dtype=torch.float64)
    rutherford = number / (2 * math.pi**2 * BOHR * g2)
    torch.testing.assert_close(
        scattering_factor(torch.tensor([number]), g2, table)[0], rutherford, rtol=tolerance, atol=0
    )


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_row_for_each_element(table, dtype):
    g2 = torch.rand(4, 5, dtype=dtype)
    both = scattering_factor(torch.tensor([8, 6]), g2, table)
    assert both.shape == (2, 4, 5)
    assert both.dtype == dtype
    torch.testing.assert_close(both[1], scattering_factor(torch.tensor([6]), g2, table)[0])


@pytest.mark.parametrize("table", TABLES)
def test_unknown_element(table):
    with pytest.raises(ValueError, match="no element"):
        forward([6, 118], table)
    with pytest.raises(ValueError, match="no element"):
        forward([0], table)


def test_unknown_table():
    with pytest.raises(ValueError, match="lobato"):
        forward([6], "cromer")


def test_displaced_solvent_is_a_gaussian_of_the_atoms_volume():
    """Fraser, MacRae & Suzuki 1978: C 16.44, O 9.13 Å^3; exp(-pi v^(2/3) g^2)."""
    g2 = torch.tensor([0.0, 0.04], dtype=torch.float64)
    got = displaced_solvent_factor(torch.tensor([6, 8]), g2)
    for row, volume in zip(got, (16.44, 9.13), strict=True):
        assert float(row[0]) == pytest.approx(volume, rel=1e-6)
        assert float(row[1]) == pytest.approx(volume * math.exp(-math.pi * volume ** (2 / 3) * 0.04), rel=1e-6)
