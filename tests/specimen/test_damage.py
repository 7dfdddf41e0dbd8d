"""Damage: detail fades with dose as measured, the mass stays, doses add, and classes of atoms go their own ways."""

import math

import pytest
import torch

import cryosim as cs
from cryosim import io
from cryosim.io.examples import example_path
from cryosim.specimen.atoms import CLASSES
from cryosim.specimen.damage import decay_rate, voltage_factor, water_decay
from cryosim.specimen.specimen import Poses
from cryosim.specimen.tilted import tilted_slices
from cryosim.specimen.water import frame_shares

FREQUENCIES = torch.tensor([1 / 40, 1 / 20, 1 / 10, 1 / 5, 1 / 3, 1 / 2], dtype=torch.float64)  # [1/Å]


def of(atoms, damage=None, **more):
    here = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
    return cs.Specimen((atoms,), (here,), (60.0, 60.0, 60.0), damage=damage, **more)


def some_atoms(generator, n=40, classes=None):
    positions = 20 * torch.rand(n, 3, generator=generator, dtype=torch.float64) - 10
    return cs.Atoms(positions, torch.full((n,), 6), classes=classes)


def projected(specimen, moment, dtype=torch.float64, voltage=300.0, shape=(64, 63)):
    source = tilted_slices(specimen, 0.0, shape, 0.8, 4.0, dtype=dtype, voltage=voltage, moment=moment)
    return source.total()


def test_critical_exposure_of_the_paper():
    """Grant & Grigorieff 2015, at 40, 20, 10, 5, 3 and 2 Å."""
    exposure = cs.critical_exposure(FREQUENCIES)
    wanted = torch.tensor([116.7, 38.7, 14.1, 6.39, 4.34, 3.59], dtype=torch.float64)
    torch.testing.assert_close(exposure, wanted, rtol=3e-3, atol=0)
    assert math.isinf(float(cs.critical_exposure(0.0)))


@pytest.mark.parametrize(("voltage", "factor"), [(300.0, 1.0), (200.0, 0.8), (100.0, 1 / 1.57)])
def test_voltages_that_were_measured(voltage, factor):
    assert float(voltage_factor(voltage)) == pytest.approx(factor)
    ratio = cs.critical_exposure(FREQUENCIES, voltage) / cs.critical_exposure(FREQUENCIES)
    torch.testing.assert_close(ratio, torch.full_like(ratio, factor))


@pytest.mark.parametrize("voltage", [80.0, 400.0])
def test_voltages_that_were_not(voltage):
    with pytest.raises(ValueError, match="between 100 and 300 kV"):
        cs.critical_exposure(0.1, voltage)
    moment = cs.Moment(10.0, 1.0)
    stated = cs.Damage(voltage_factor=0.5)
    assert bool(torch.isfinite(cs.fading(stated, FREQUENCIES**2, moment, voltage)).all())


def test_optimal_exposure_is_the_best():
    """By brute force: of a plain sum up to a dose, the signal over the root of the dose."""
    for k in (0.05, 0.2, 0.4):
        critical = float(cs.critical_exposure(k))
        doses = torch.linspace(0.5, 5, 45001, dtype=torch.float64) * critical
        ratio = 2 * critical * (1 - torch.exp(-doses / (2 * critical))) / doses.sqrt()
        best = doses[ratio.argmax()]
        assert float(best) == pytest.approx(float(cs.optimal_exposure(k)), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_amplitude_at_the_critical_exposure(dtype):
    """After N_e the power is down to 1/e: the amplitude to exp(-1/2). A frame of no dose is a point in time."""
    for k in FREQUENCIES.to(dtype):
        left = cs.fading(cs.Damage(), k**2, cs.Moment(float(cs.critical_exposure(k)), 0.0), 300.0)
        assert left.dtype == dtype
        assert float(left) == pytest.approx(math.exp(-0.5), rel=1e-5)


DAMAGES = {
    "critical": cs.Damage(),
    "b-factor": cs.Damage(None, b_growth=2.0),
    "loss": cs.Damage(None, loss=0.02),
    "all": cs.Damage(cs.CriticalExposure(), 1.0, 0.01),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_doses_add(damage):
    """Twice as long a frame is the mean of two; what is left after N and then M is the product (an exponential)."""
    k2 = FREQUENCIES**2
    long = cs.fading(damage, k2, cs.Moment(7.0, 6.0), 300.0)
    halves = [cs.fading(damage, k2, cs.Moment(7.0, 6.0, frame=f, frames=2), 300.0) for f in (0, 1)]
    torch.testing.assert_close(long, sum(halves) / 2, rtol=1e-12, atol=0)
    now, then, both = (cs.fading(damage, k2, cs.Moment(n), 300.0) for n in (3.0, 5.0, 8.0))
    torch.testing.assert_close(now * then, both, rtol=1e-12, atol=0)


@pytest.mark.parametrize("during", [0.0, 1e-9, 1e-4, 1e-2, 1.0, 30.0])
def test_mean_over_a_frame(during):
    """Against the sum of many short ones."""
    k2 = torch.cat([torch.zeros(1, dtype=torch.float64), FREQUENCIES**2])
    n = 2000
    parts = sum(cs.fading(cs.Damage(), k2, cs.Moment(2.0 + during * (i + 0.5) / n), 300.0) for i in range(n)) / n
    torch.testing.assert_close(cs.fading(cs.Damage(), k2, cs.Moment(2.0, during), 300.0), parts, rtol=1e-6, atol=0)


def test_gradients_at_zero_frequency_are_finite():
    values = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.24499, 1.6649, 2.8141, 5.0)]
    k2 = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    left = cs.fading(cs.Damage(cs.CriticalExposure(*values[:3])), k2, cs.Moment(values[3], values[3]), 300.0)
    assert bool((left == 1).all())
    for gradient in torch.autograd.grad(left.sum(), [*values, k2]):
        assert torch.isfinite(gradient).all()


def test_gradient_of_the_curve():
    values = torch.tensor([0.24499, 1.6649, 2.8141, 12.0, 3.0, 0.7, 0.01], dtype=torch.float64, requires_grad=True)

    def left(v):
        damage = cs.Damage(cs.CriticalExposure(v[0], v[1], v[2]), v[5], v[6])
        return cs.fading(damage, FREQUENCIES**2, cs.Moment(v[3], v[4], frame=1, frames=2), 200.0)

    assert torch.autograd.gradcheck(left, values)


# in the slices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_dose_changes_nothing(damage, dtype, generator):
    atoms = some_atoms(generator)
    for moment in (None, cs.Moment()):
        before, after = (projected(of(atoms, d), moment, dtype) for d in (None, damage))
        assert torch.equal(before, after)


def test_slices_fade_by_the_curve_and_keep_their_mass(generator):
    atoms = some_atoms(generator)
    fresh, old = projected(of(atoms), None), projected(of(atoms, cs.Damage()), cs.Moment(20.0, 4.0))
    spectra = [torch.fft.rfft2(v) for v in (fresh, old)]
    k2 = cs.core.fourier.squared_frequencies(fresh.shape, 0.8, half=True, dtype=torch.float64)
    kept = spectra[0].abs() > 1e-6 * spectra[0].abs().max()
    wanted = cs.fading(cs.Damage(), k2, cs.Moment(20.0, 4.0), 300.0)
    torch.testing.assert_close((spectra[1] / spectra[0]).real[kept], wanted[kept], rtol=1e-6, atol=1e-9)
    assert float(old.sum()) == pytest.approx(float(fresh.sum()), rel=1e-12)


def test_growing_b_factors_are_b_factors(generator):
    """At a moment, growth times dose is what the atoms' own B-factors would be."""
    atoms = some_atoms(generator)
    grown = projected(of(atoms, cs.Damage(None, b_growth=2.5)), cs.Moment(8.0))
    other = projected(of(atoms.replace(b_factors=torch.full((40,), 20.0, dtype=torch.float64))), None)
    torch.testing.assert_close(grown, other, rtol=0, atol=2e-6 * float(other.abs().max()))


def test_lost_atoms_are_occupancies(generator):
    classes = torch.arange(40) % 3
    atoms = some_atoms(generator, classes=classes)
    rates = torch.tensor([0.0, 0.05, 0.2], dtype=torch.float64)
    left = projected(of(atoms, cs.Damage(None, loss=rates)), cs.Moment(6.0))
    other = projected(of(atoms.replace(occupancies=torch.exp(-6.0 * rates)[classes])), None)
    torch.testing.assert_close(left, other, rtol=0, atol=2e-6 * float(other.abs().max()))


def test_classes_of_equal_rates_are_one_source(generator):
    atoms = some_atoms(generator, classes=torch.arange(40) % 4)
    rates = torch.tensor([0.1, 0.2, 0.1, 0.2], dtype=torch.float64)
    slices = tilted_slices(
        of(atoms, cs.Damage(None, loss=rates)), 0.0, (64, 63), 0.8, 4.0, moment=cs.Moment(6.0), voltage=300.0
    )
    assert len(slices.atoms.parts) == 2
    asked = rates.clone().requires_grad_()
    slices = tilted_slices(
        of(atoms, cs.Damage(None, loss=asked)), 0.0, (64, 63), 0.8, 4.0, moment=cs.Moment(6.0), voltage=300.0
    )
    (gradient,) = torch.autograd.grad(slices.total().sum(), asked)
    assert bool((gradient < 0).all())  # each class has its own


def test_a_class_without_a_rate(generator):
    atoms = some_atoms(generator, classes=torch.full((40,), 3))
    with pytest.raises(ValueError, match=r"Damage.loss: expected a rate for class 3.*got 2 rates"):
        projected(of(atoms, cs.Damage(None, loss=torch.tensor([0.1, 0.2]))), cs.Moment(1.0))


def test_the_voltage_is_needed(generator):
    with pytest.raises(ValueError, match="expected the voltage"):
        projected(of(some_atoms(generator), cs.Damage()), cs.Moment(1.0), voltage=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"b_growth": -1.0}, "Damage.b_growth"),
        ({"loss": torch.tensor([0.1, float("nan")])}, "Damage.loss"),
        ({"water_diffusion": torch.tensor([1.0, 2.0])}, "Damage.water_diffusion"),
        ({"voltage_factor": 0.0}, "Damage.voltage_factor"),
    ],
)
def test_rates_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        cs.Damage(**fields)


@pytest.mark.parametrize("fields", [{"scale": -1.0}, {"exponent": 0.0}, {"offset": float("nan")}])
def test_curves_that_cannot_be(fields):
    with pytest.raises(ValueError, match="CriticalExposure"):
        cs.CriticalExposure(**fields)


# water ----------------------------------------------------------------------------------------------------------------


def test_water_diffuses_and_does_not_fade(generator):
    """<u^2> of 1.1 / 3 Å^2 per e-/Å^2 and axis: B = 8 pi^2 u^2, 29 Å^2."""
    water = CLASSES.index("water")
    rate = decay_rate(cs.Damage(), torch.tensor(0.04, dtype=torch.float64), water)
    assert float(rate) == pytest.approx(8 * math.pi**2 * 1.1 / 3 * 0.04 / 4)
    assert 8 * math.pi**2 * 1.1 / 3 == pytest.approx(28.95, abs=0.01)
    assert water_decay(cs.Damage(), 300.0) * 0.04 == pytest.approx(float(rate))


def test_shares_of_frames_have_the_covariance_of_their_means():
    """Against an Ornstein-Uhlenbeck process summed over short steps."""
    x, n = torch.tensor([0.03, 0.4, 2.0, 9.0], dtype=torch.float64), 400
    rows = [frame_shares(x, f) for f in range(3)]  # (noise, x)
    steps = torch.arange(3 * n, dtype=torch.float64) / n
    fine = torch.exp(-x[:, None, None] * (steps[:, None] - steps).abs())
    wanted = fine.unflatten(1, (3, n)).unflatten(3, (3, n)).mean((2, 4))  # (x, frame, frame)
    for i in range(3):
        for j in range(i + 1):
            both = (rows[i][: j + 1] * rows[j]).sum(0)
            torch.testing.assert_close(both, wanted[:, i, j], rtol=2e-3, atol=1e-5)


def test_frames_of_structured_ice_forget(generator):
    """Neighbouring frames are alike at coarse detail, less so at fine; without damage they are the same."""
    ice = cs.Ice(60.0, structure="water", seed=3)
    nothing = cs.Atoms(torch.zeros(1, 3, dtype=torch.float64), [6], occupancies=torch.zeros(1, dtype=torch.float64))

    def spectra(damage, dose):
        out = []
        for f in range(3):
            moment = cs.Moment(5.0, dose, frame=f, frames=3)
            slices = tilted_slices(of(nothing, damage, ice=ice), 0.0, (96, 95), 0.9, 8.0, moment=moment, voltage=300.0)
            v = sum(slices[i] for i in range(len(slices))).double()
            out.append(torch.fft.rfft2(v - v.mean()))
        return out

    same = spectra(None, 3.0)
    assert torch.equal(same[0], same[2])
    k = cs.core.fourier.squared_frequencies((96, 95), 0.9, half=True, dtype=torch.float64).sqrt()
    seen = spectra(cs.Damage(), 3.0)  # 1 e-/Å^2 a frame
    for low, high in ((0.1, 0.15), (0.2, 0.25), (0.3, 0.35)):
        ring = (k > low) & (k < high)
        alike = (seen[0] * seen[1].conj()).real[ring].sum() / (seen[0].abs()[ring].norm() * seen[1].abs()[ring].norm())
        x = water_decay(cs.Damage(), 300.0) * k[ring] ** 2
        own, other = 2 * (x - 1 + torch.exp(-x)) / x**2, ((1 - torch.exp(-x)) / x) ** 2
        power = seen[0].abs()[ring].square().mean() / same[0].abs()[ring].square().mean()
        assert float(alike) == pytest.approx(float((other / own).mean()), abs=0.1)
        assert float(power) == pytest.approx(float(own.mean()), rel=0.2)


def test_flooding_keeps_damage_and_motion(generator):
    """So that the gradient in the diffusion is there where the error message sends for it."""
    diffusion = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    motion = cs.Motion(torch.zeros(1, 1, 3))
    dry = of(some_atoms(generator), cs.Damage(water_diffusion=diffusion), ice=cs.Ice(20.0), motion=motion)
    wet = cs.flooded(dry.replace(size=(24.0, 24.0, 20.0)), generator=generator)
    assert wet.motion is motion
    moment = cs.Moment(1.0, 1.0)
    slices = tilted_slices(wet, 0.0, (40, 40), 0.8, 4.0, voltage=300.0, moment=moment, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(slices.total().square().sum(), diffusion)
    assert float(gradient) < 0


def test_no_silent_gradient_in_the_fluctuations(generator):
    damage = cs.Damage(water_diffusion=torch.tensor(1.1, requires_grad=True))
    with pytest.raises(ValueError, match="no gradient"):
        projected(of(some_atoms(generator), damage, ice=cs.Ice(40.0, structure="water")), cs.Moment(1.0, 1.0))


# classes of a structure file ------------------------------------------------------------------------------------------


def test_classes_of_a_protein():
    """Ubiquitin has 5 aspartates, 6 glutamates and a free end: 11 x 3 atoms and OXT; no cysteine."""
    atoms = io.read_atoms(example_path("ubiquitin"), waters=True)
    counted = {name: int((atoms.classes == i).sum()) for i, name in enumerate(CLASSES)}
    assert counted["carboxyl"] == 34
    lines = example_path("ubiquitin").read_text().splitlines()
    assert counted["water"] == sum(line.startswith("HETATM") and line[17:20] == "HOH" for line in lines)
    assert counted["sulfur"] == counted["metal"] == counted["nucleic acid"] == 0


def test_classes_follow_the_copies(generator):
    atoms = some_atoms(generator, classes=torch.arange(40) % 5)
    poses = Poses(torch.eye(3, dtype=torch.float64).expand(2, 3, 3), torch.zeros(2, 3, dtype=torch.float64))
    both = cs.specimen.specimen.assemble(cs.Specimen((atoms,), (poses,), (60.0, 60.0, 60.0)))
    assert torch.equal(both.classes, atoms.classes.repeat(2))
