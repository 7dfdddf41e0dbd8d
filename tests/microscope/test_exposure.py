"""The waist: slices in, expected counts out, with the slope of every parameter on the way."""

import pytest
import torch

from cryosim.microscope.detector import Detector
from cryosim.microscope.exposure import expected_counts
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice, projection
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.potential import Slices, potential_slices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("detector", [Detector((10, 9), 1.1), Detector((8, 9), 1.9)])
@pytest.mark.parametrize("dose", [0.0, 2.5, torch.tensor(2.5)])
def test_vacuum_counts_are_dose_times_pixel_area(detector, dose, dtype):
    vacuum = Slices(torch.zeros(2, 3, 20, 19, dtype=dtype), 1.1, 4.0)
    counts = expected_counts(vacuum, Optics(defocus=8000.0, amplitude_contrast=0.1), detector, dose=dose)
    assert counts.dtype == dtype
    wanted = torch.full((2, *detector.shape), float(dose) * detector.pixel_size**2, dtype=dtype)
    torch.testing.assert_close(counts, wanted, rtol=4e-6 if dtype == torch.float32 else 1e-14, atol=0)


def protein(generator, n=6):
    positions = 3 * torch.randn(n, 3, generator=generator, dtype=torch.float64).clamp(-1.9, 1.9)
    return Atoms(
        positions, torch.tensor([6, 7, 8, 16, 1, 15])[:n], 10 + 30 * torch.rand(n, generator=generator).double()
    )


def slices_of(atoms, thickness=3.0):
    return potential_slices(atoms, (27, 28), 0.9, thickness, 7, width=14)


@pytest.mark.parametrize("scattering", [multislice, projection])
def test_counts_are_linear_in_the_dose(scattering, generator):
    slices = slices_of(protein(generator))
    optics, detector = Optics(defocus=3000.0, amplitude_contrast=0.07), Detector((15, 16), 1.3)
    one = expected_counts(slices, optics, detector, dose=1.0, scattering=scattering)
    torch.testing.assert_close(expected_counts(slices, optics, detector, dose=37.0, scattering=scattering), 37 * one)


def test_doses_and_optics_of_each_tilt(generator):
    slices = slices_of(protein(generator))
    doses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    optics = Optics(defocus=torch.tensor([1000.0, 2000.0, -500.0], dtype=torch.float64), amplitude_contrast=0.07)
    detector = Detector((15, 16), 1.3)
    together = expected_counts(slices, optics, detector, dose=doses)
    for i in range(3):
        torch.testing.assert_close(together[i], expected_counts(slices, optics.index(i), detector, dose=doses[i]))


BASE = {
    "defocus": 900.0,
    "voltage": 300.0,
    "spherical_aberration": 2.7,
    "astigmatism": 200.0,
    "astigmatism_angle": 20.0,
    "phase_shift": 20.0,
    "amplitude_contrast": 0.07,
}
OTHER = {"dose": 3.0, "pixel_size": 1.37, "thickness": 3.0}
STEPS = {  # of the differences; 1e-3 for the rest
    "defocus": 0.1,
    "voltage": 0.01,
    "astigmatism": 0.1,
    "astigmatism_angle": 0.01,
    "amplitude_contrast": 1e-4,
    "pixel_size": 1e-4,
}


@pytest.mark.parametrize("name", [*BASE, *OTHER, "positions", "b_factors", "occupancies"])
def test_slope_of_the_counts_in(name, generator):
    """Autograd against central differences, from the atoms and the microscope to the counts."""
    atoms = protein(generator)
    weights = torch.randn(15, 14, generator=generator, dtype=torch.float64)

    def score(value):
        values = BASE | OTHER
        mine = atoms
        if name in values:
            values = values | {name: value}
        else:
            mine = atoms.replace(**{name: value})
        optics = Optics(**{key: values[key] for key in BASE})
        detector = Detector((15, 14), values["pixel_size"])
        counts = expected_counts(slices_of(mine, values["thickness"]), optics, detector, dose=values["dose"])
        return (counts * weights).sum()

    start = (BASE | OTHER).get(name)
    value = getattr(atoms, name) if start is None else torch.tensor(start, dtype=torch.float64)
    direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(score(value.requires_grad_()), value)
    step = STEPS.get(name, 1e-3)
    with torch.no_grad():
        slope = (score(value + step * direction) - score(value - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4 if name == "thickness" else 1e-5)
