"""Zero-loss, slit and unfiltered images of ice and protein, from the specimen to the expected counts."""

import math
from pathlib import Path

import pytest
import torch

import cryosim as cs
from cryosim.core.fourier import positions, squared_frequencies
from cryosim.core.inelastic import ICE, ICE_INNER_POTENTIAL, mean_free_path
from cryosim.core.rotation import random_rotations
from cryosim.io import read_atoms
from cryosim.microscope.energy_loss import defocus_change
from cryosim.specimen.atoms import concatenate
from cryosim.specimen.ice import Absorption, Ice, meniscus
from cryosim.specimen.specimen import Poses
from cryosim.specimen.tilted import tilted_slices

ORIGIN = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))


def of(atoms, ice, absorption):
    return cs.Specimen((atoms,), (ORIGIN,), (100.0, 100.0, 100.0), ice, absorption)


def ubiquitin(hydrogens):
    """Ubiquitin, C378 H629 N105 O118 S; its 629 hydrogens, which the file lacks, 1 Å from other atoms at random."""
    heavy = read_atoms(Path(cs.__file__).parent / "data" / "1ubi.pdb").centred()
    if not hydrogens:
        return heavy
    generator = torch.Generator().manual_seed(1)
    on = torch.arange(629) % len(heavy)
    bonds = random_rotations(629, generator)[:, :, 0]
    return concatenate([heavy, cs.Atoms(heavy.positions[on] + bonds, torch.ones(629, dtype=torch.long))])


def counts(specimen, optics, shape, pixel, thickness, angle=0.0, dose=20.0, detector=None):
    """Expected counts per e-/Å^2, of the whole field unless a smaller detector is given."""
    slices = tilted_slices(specimen, angle, shape, pixel, thickness, voltage=optics.voltage, dtype=torch.float64)
    detector = detector or cs.Detector(shape, pixel)
    return cs.expected_counts(slices, optics, detector, dose=dose) / (dose * detector.pixel_size**2)


# electrons are conserved ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::cryosim.SamplingWarning")  # the rare largest losses are out of focus by far
@pytest.mark.parametrize("structure", ["constant", "water"])
@pytest.mark.parametrize("voltage", [100.0, 300.0])
def test_without_filter_and_aperture_no_electron_is_missing(voltage, structure):
    """Every electron falls somewhere on the field, with whatever loss: also under tilt, and out of focus."""
    specimen = of(ubiquitin(False), Ice(300.0, structure=structure), Absorption())
    optics = cs.Optics(voltage, defocus=1500.0, chromatic_aberration=1.0, slit=math.inf)
    seen = counts(specimen, optics, (84, 85), 1.8, 6.0, angle=30.0)
    assert float(seen.std()) > 0.002
    assert float(seen.mean()) == pytest.approx(1.0, abs=1e-4 if structure == "water" else 1e-6)


def test_a_slit_passes_more_than_zero_loss_and_less_than_all():
    """Zero loss is exp(-t / Lambda) of all, and every loss that passes adds to it."""
    specimen = of(ubiquitin(False), Ice(400.0), Absorption())
    passed = [
        float(counts(specimen, cs.Optics(slit=slit), (60, 60), 2.0, 8.0).mean()) for slit in (0.0, 20.0, 60.0, math.inf)
    ]
    assert passed[0] == pytest.approx(math.exp(-400 / ICE), rel=0.005)
    assert passed[0] < passed[1] < passed[2] < passed[3]
    assert passed[3] == pytest.approx(1.0, abs=1e-6)
    assert passed[1] - passed[0] < 0.1 * (1 - passed[0])  # a slit of 20 eV passes 10 eV of loss at most


def test_an_aperture_takes_electrons_from_both():
    """From those with a loss and those without alike: so it does not change the thickness that is found."""
    specimen = of(ubiquitin(False), Ice(400.0, structure="water"), Absorption())
    ratios, passed = [], []
    for aperture in (math.inf, 3.0):
        zero, all_ = (
            float(counts(specimen, cs.Optics(slit=slit, aperture=aperture), (80, 80), 1.2, 8.0).mean())
            for slit in (0.0, math.inf)
        )
        passed.append(all_)
        ratios.append(zero / all_)
    assert passed[1] < 0.996 < 0.9999 < passed[0]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)


@pytest.mark.parametrize("by", ["mean free path", "amplitude contrast"])
def test_molecules_in_vacuum_through_a_slit(by):
    """Nothing is lost beside them, and no electron in all."""
    specimen = of(ubiquitin(False), None, Absorption() if by == "mean free path" else None)
    optics = cs.Optics(amplitude_contrast=0.0 if by == "mean free path" else 0.07, slit=math.inf)
    assert float(counts(specimen, optics, (60, 60), 1.5, 6.0).mean()) == pytest.approx(1.0, abs=1e-3)


# thickness from two images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("angle", "voltage"), [(0.0, 300.0), (0.0, 120.0), (45.0, 300.0)])
def test_thickness_map_of_a_meniscus(angle, voltage):
    """Lambda ln(unfiltered / zero loss) is the ice along the beam (Malis, Cheng & Egerton 1988), within 2 %."""
    ice = Ice(400.0, relief=meniscus(6400.0, 400.0, 1000.0))
    specimen = of(cs.Atoms([[9000.0, 0.0, 0.0]], [1]), ice, Absorption())
    shape, pixel, detector = (120, 121), 20.0, cs.Detector((60, 60), 20.0)
    optics = cs.Optics(voltage, defocus=5000.0, chromatic_aberration=2.7)
    zero, all_ = (
        counts(specimen, optics.replace(slit=slit), shape, pixel, 40.0, angle, detector=detector)
        for slit in (0.0, math.inf)
    )
    found = cs.log_ratio_thickness(zero, all_, mean_free_path(ICE, voltage))  # (y, x) [Å]
    slices = tilted_slices(specimen, angle, shape, pixel, 40.0, voltage=voltage, dtype=torch.float64)
    wanted = (slices.column + slices.surfaces.depths.sum(0))[30:90, 30:90]
    if angle == 0:
        place = positions(60, pixel, dtype=torch.float64)
        torch.testing.assert_close(
            wanted, 400 * (1 + (place**2 + place[:, None] ** 2) / 1000**2), rtol=0.005, atol=0, check_stride=False
        )
    assert float(wanted.max() / wanted.min()) > 1.5
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


# amplitude contrast ---------------------------------------------------------------------------------------------------


def contrast_ratio(atoms, amplitude_contrast, voltage=300.0):
    """Zero-loss contrast of a protein in ice in focus, by absorption over that by amplitude contrast; detail > 33 Å."""
    ice, shape, pixel = Ice(200.0), (72, 72), 2.0
    by_absorption = counts(of(atoms, ice, Absorption()), cs.Optics(voltage), shape, pixel, 5.0)
    optics = cs.Optics(voltage, amplitude_contrast=amplitude_contrast)
    by_amplitude = counts(of(atoms, ice, None), optics, shape, pixel, 5.0)
    q = squared_frequencies(shape, pixel, dtype=torch.float64).sqrt()
    coarse = (q > 0) & (q < 0.03)
    one, other = (torch.fft.fft2(x / x[:4].mean() - 1)[coarse] for x in (by_absorption, by_amplitude))
    return float((one * other.conj()).real.sum() / other.abs().square().sum())


def own_potential(atoms):
    """Potential of a protein over its displaced volume [V], from its slices in vacuum."""
    ice = tilted_slices(of(atoms, None, Absorption()), 0.0, (72, 72), 2.0, 5.0, voltage=300.0, dtype=torch.float64)
    return float(ice.atoms.total().sum() / ice.volumes[0].total().sum())


@pytest.mark.parametrize("voltage", [100.0, 300.0])
@pytest.mark.parametrize("hydrogens", [True, False])
def test_absorption_is_the_amplitude_contrast_of_the_potential_at_hand(hydrogens, voltage):
    """Given the protein's own inner potential, 7.8 V with hydrogens and 9.0 V without, the two agree."""
    atoms = ubiquitin(hydrogens)
    own = own_potential(atoms)
    assert own == pytest.approx(7.8 if hydrogens else 9.04, abs=0.03)
    a = cs.inelastic_contrast(voltage, inner_potential=own, medium_inner_potential=ICE_INNER_POTENTIAL)
    assert contrast_ratio(atoms, a, voltage) == pytest.approx(1.0, abs=0.05)


def test_inner_potential_of_protein():
    """Independent atoms at 1.35 g/cm^3, hydrogens among them: 8.0 V."""
    atoms = ubiquitin(True)
    volume = 8565 / (1.35 * 0.602214)  # [Å^3]
    source = tilted_slices(of(atoms, None, None), 0.0, (72, 72), 2.0, 5.0, dtype=torch.float64)
    assert float(source.total().sum()) * 4.0 / volume == pytest.approx(8.0, abs=0.05)


def test_absorption_is_the_amplitude_contrast_that_is_predicted():
    """`inelastic_contrast` with its defaults, within 15 %, for a protein with its hydrogens."""
    assert contrast_ratio(ubiquitin(True), cs.inelastic_contrast(300.0)) == pytest.approx(1.0, abs=0.15)


# chromatic focus ------------------------------------------------------------------------------------------------------

GOLD = 2.35  # spacing of the 111 planes [Å]
FADING = {9.0: 5200.0, 15.0: 3400.0, 23.0: 2400.0, 30.0: 2000.0}
"""Loss [eV] and full width at half maximum [Å], against defocus, of the power at 2.35 Å in images of gold by electrons
with that loss: the calculation from the contrast transfer in Dickerson et al. 2022, PMC9355893, table 1."""


def through_focus(energy, focus):
    """Complex amplitude of the 2.35 Å contrast over one period of defocus from `focus` on, by electrons of one loss."""
    pixel, shape = GOLD / 8, (8, 64)
    x = positions(shape[1], dtype=torch.float64)
    wave = torch.exp(0.02j * torch.cos(2 * math.pi * x / 8) - 0.0005).expand(shape)  # 0.001 mean free paths
    line = cs.LossSpectrum(energy, 0.02, largest=100.0, bins=64, most_events=2)
    turn = math.pi * cs.wavelength(300.0) / GOLD**2  # [rad/Å]
    total = 0.0
    for defocus in (focus + i * math.pi / (4 * turn) for i in range(8)):
        optics = cs.Optics(defocus=defocus, chromatic_aberration=2.7)
        unfiltered = cs.energy_filtered_image(wave, 0.001, optics.replace(slit=math.inf), pixel, losses=line)
        lost = unfiltered - cs.image(wave, optics, pixel)
        contrast = 2 * float((lost * torch.cos(2 * math.pi * x / 8)).mean() / lost.mean())
        total += contrast * complex(math.cos(turn * defocus), -math.sin(turn * defocus)) / 4
    return total


@pytest.mark.filterwarnings("ignore::cryosim.SamplingWarning")
@pytest.mark.parametrize("energy", FADING)
def test_losses_have_a_focus_of_their_own_and_do_not_fade(energy):
    """Contrast -0.04 sin(pi lambda k^2 (defocus - Cc E / (e V))), as strong far from focus as near it.

    So chromatic defocus, with whatever width of window, does not make the fading of table 1: damping by a spread of
    focus is the same at every defocus. It comes from the angle of the inelastic event, which the model leaves out.
    """
    energy = energy + 0.125  # on the grid of losses
    near, far = through_focus(energy, 0.0), through_focus(energy, 6000.0)
    assert abs(near) == pytest.approx(0.04, rel=0.02)
    assert abs(far) == pytest.approx(abs(near), rel=0.02)
    shift = -defocus_change(energy, cs.Optics(chromatic_aberration=2.7))
    assert shift == pytest.approx(90 * energy)
    turn = math.pi * cs.wavelength(300.0) / GOLD**2
    wanted = 0.04j * complex(math.cos(turn * shift), -math.sin(turn * shift))  # of -0.04 sin(turn (f - shift))
    assert abs(near - wanted) < 0.03 * 0.04


def half_width(convergence):
    """Full width [Å] at half maximum of the power at 2.35 Å against defocus, for a source of some half-angle."""
    defocus = torch.arange(0.0, 8000.0, 10.0, dtype=torch.float64)
    damping = cs.envelope(cs.Optics(defocus=defocus, convergence=convergence), (1, 8), GOLD / 8)[:, 0, 1]
    return 20.0 * float((damping.square() > 0.5).sum())


def test_fading_by_a_spread_of_angles():
    """Of half-angle beta the width is sqrt(2 ln 2) d / (pi beta), d = 2.35 Å: product law.

    An inelastic event spreads the angles in proportion to the loss. So a convergence in that proportion, fitted to the
    first row of table 1 (0.17 mrad for 9 eV), gives the others within 25 %: 3120, 2040 and 1560 Å.
    """
    for beta in (0.1, 0.2, 0.4):
        assert half_width(beta) == pytest.approx(math.sqrt(2 * math.log(2)) * GOLD / (math.pi * 1e-3 * beta), rel=0.01)
    beta = math.sqrt(2 * math.log(2)) * GOLD / (math.pi * FADING[9.0]) * 1e3
    assert beta == pytest.approx(0.17, abs=0.005)
    for energy, wanted in FADING.items():
        assert half_width(beta * energy / 9) == pytest.approx(wanted, rel=0.25)
