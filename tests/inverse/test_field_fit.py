"""Fields of the nouns, found again from counts that were simulated with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import cryosim as cs
import inverse as inv
from cryosim.acquisition.simulate import Sampling, expected_frames, sampling_for
from cryosim.core.volume import Volume
from cryosim.io import read_atoms
from cryosim.microscope.counting import sample_counts
from cryosim.specimen.ice import Absorption, Ice
from cryosim.specimen.motion import Motion
from cryosim.specimen.specimen import Specimen, place_randomly
from inverse.calibration.field_fit import _data
from inverse.calibration.field_model import Model
from inverse.calibration.named_fields import Setting, parameter_of, with_fields
from inverse.calibration.volume_exposure import expected_of_volume
from tests.inverse.test_ctf_fit import MICROGRAPH

UBIQUITIN = MICROGRAPH.parents[2] / "cryosim" / "data" / "1ubi.pdb"
FRAMES = 3


def setting(shape: tuple[int, int] = (40, 37), **changes: Any) -> Setting:
    """A few molecules in ice, three tilts of three frames, and a camera that blurs."""
    generator = torch.Generator().manual_seed(11)
    ice = Ice(300.0)
    specimen = place_randomly([read_atoms(UBIQUITIN)], [2], (120.0, 120.0, 90.0), ice=ice, generator=generator)
    drift = torch.zeros(3, FRAMES, 3, dtype=torch.float64)
    specimen = specimen.replace(
        absorption=Absorption(),
        damage=cs.Damage(b_growth=1.0, loss=0.002),
        motion=Motion(drift) if changes.get("moves") else None,
    )
    tilts = cs.TiltScheme(
        angles=torch.tensor([0.0, 40.0, -40.0], dtype=torch.float64),
        doses=torch.tensor([60.0, 60.0, 60.0], dtype=torch.float64),
        axis_angle=20.0,
        frames=FRAMES if changes.get("moves") else 1,
    )
    optics = cs.Optics(
        290.0,
        defocus=9_000.0,
        astigmatism=400.0,
        astigmatism_angle=30.0,
        spherical_aberration=2.7,
        chromatic_aberration=2.7,
        energy_spread=0.7,
        phase_shift=20.0,
        coma=8_000.0,
        coma_angle=10.0,
        beam_tilt=(0.4, -0.3),
    )
    detector = cs.Detector(
        shape,
        2.4,
        dqe=torch.tensor([0.9, 0.7, 0.4], dtype=torch.float64),
        gain=0.9 + 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64),
    )
    return Setting(specimen, tilts, optics, detector)


def grid(given: Setting, dtype: torch.dtype = torch.float32) -> Sampling:
    lens = given.optics.replace(defocus=1.2 * float(torch.as_tensor(given.optics.defocus).max()))
    return sampling_for(given.detector, lens, dtype=dtype, pixel_size=1.5, thickness=20.0)


def counted(given: Setting, seed: int = 0, frames: bool = False) -> torch.Tensor:
    """Counts (tilt, y, x) or (tilt, frame, y, x)."""
    specimen, tilts, optics, detector = given
    assert isinstance(specimen, Specimen)
    generator, images = torch.Generator().manual_seed(seed), []
    for i in range(len(tilts)):
        seen = expected_frames(specimen, tilts, optics, detector, i, sampling=grid(given))
        n = tilts.camera_frames(i, detector.frame_rate)
        images.append(torch.stack([sample_counts(one, detector, n, generator=generator) for one in seen]))
    made = torch.stack(images)
    return made if frames else made.sum(1)


def fitted(counts: torch.Tensor, given: Setting, names: list[str], **more: Any) -> inv.Calibration:
    specimen, tilts, optics, detector = given
    nouns = {"tilts": tilts, "optics": optics, "detector": detector, "sampling": grid(given)}
    return inv.calibrate(counts, specimen, names, **(nouns | more))


# slopes ---------------------------------------------------------------------------------------------------------------

NAMES = [
    "optics.voltage",
    "optics.defocus",
    "optics.astigmatism",
    "optics.astigmatism_angle",
    "optics.spherical_aberration",
    "optics.energy_spread",
    "optics.phase_shift",
    "optics.coma",
    "optics.beam_tilt",
    "specimen.damage.critical.scale",
    "specimen.damage.critical.exponent",
    "specimen.damage.b_growth",
    "specimen.damage.loss",
    "specimen.ice.thickness",
    "specimen.absorption.medium",
    "specimen.poses.0.positions",
    "specimen.motion.drift",
    "tilts.angles",
    "tilts.shifts",
    "tilts.doses",
    "tilts.axis_angle",
    "detector.dqe",
    "detector.gain",
]


@pytest.fixture(scope="module")
def small() -> tuple[Setting, torch.Tensor]:
    given = setting((15, 14), moves=True)
    return given, counted(given, frames=True)


ONE_OF_EACH_KIND = ("optics.defocus", "tilts.doses", "specimen.damage.critical.scale", "detector.gain")
SLOPES = [("binary", name) for name in ONE_OF_EACH_KIND] + [
    ("poisson", name) if name in ONE_OF_EACH_KIND else pytest.param("poisson", name, marks=pytest.mark.slow)
    for name in NAMES
]


@pytest.mark.parametrize(("counting", "name"), SLOPES)
def test_the_slope_is_that_of_finite_differences(name, counting, small):
    given, counts = small
    given = given._replace(detector=given.detector.replace(counting=counting))
    data = _data(counts, *given)
    parameter = parameter_of(given, name)
    model = Model(data, [parameter], {name: 3.0}, grid(given, torch.float64), cs.multislice)
    generator = torch.Generator().manual_seed(2)
    way = torch.rand(parameter.value.shape, generator=generator, dtype=torch.float64)
    step = 1e-4 * (float(parameter.value.abs().max()) or 1.0)
    low, high = (model.value_of({name: parameter.value + s * step * way}) for s in (-1, 1))
    point = model.point({name: parameter.value + 0.0})
    slope = point.slope if point.pixel_slope is None else point.pixel_slope
    expected = (high - low) / (2 * step)
    assert float((slope * way.reshape(slope.shape)).sum()) == pytest.approx(expected, rel=2e-4, abs=1e-8 / step)
    assert math.isfinite(point.value) and point.value == pytest.approx(
        model.value_of({name: parameter.value}), rel=1e-9
    )


def test_the_information_is_the_mean_square_of_the_slope(small):
    """Over draws of the counts; and what is elsewhere is zero: shifts of one tilt say nothing of another."""
    given, _ = small
    names = ["optics.defocus", "tilts.shifts"]
    slopes, information = [], torch.zeros(0)
    for seed in range(150):
        generator = torch.Generator().manual_seed(100 + seed)
        if seed == 0:
            rates = torch.stack([expected_frames(*given, i, sampling=grid(given)) for i in range(3)])  # type: ignore[arg-type]
        counts = torch.poisson(rates, generator=generator)
        free = [parameter_of(given, name) for name in names]
        model = Model(_data(counts, *given), free, {}, grid(given), cs.multislice)
        if seed == 0:
            information = model.point({p.name: p.value for p in free}).information
            places, columns = zip(
                *(model._slopes({p.name: p.value for p in free}, i, 1) for i in range(3)), strict=True
            )
        slope = torch.zeros(7, dtype=torch.float64)
        for i in range(3):
            residual = (counts[i] / rates[i] - 1).double()
            slope.index_add_(0, places[i], columns[i].flatten(1) @ residual.flatten())
        slopes.append(slope)
    covariance = torch.stack(slopes).T.cov()
    size = information.diagonal().sqrt()
    difference = (covariance - information) / size[:, None] / size
    assert float(difference.abs().max()) < 4.5 / math.sqrt(150)
    assert float(information[1:3, 3:].abs().max()) == 0


# recovery -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen() -> tuple[Setting, torch.Tensor]:
    given = setting()
    return given, counted(given)


@pytest.mark.parametrize(
    "offsets",
    [
        {"optics.defocus": 500.0, "tilts.shifts": 0.8, "tilts.doses": -4.0},
        {"optics.astigmatism": 150.0, "optics.astigmatism_angle": -8.0, "tilts.axis_angle": 2.0},
        {"optics.beam_tilt": 0.5},
        {"optics.coma": 4_000.0, "optics.coma_angle": 12.0},
        {"optics.phase_shift": 8.0},
        {"optics.spherical_aberration": 0.8},
        {"optics.energy_spread": 0.6},
        {"specimen.damage.critical.scale": 0.15, "optics.defocus": 200.0},
        {"specimen.damage.b_growth": 2.0},
        {"specimen.damage.loss": 0.003},
        {"specimen.ice.thickness": 60.0, "optics.defocus": 200.0},
        {"specimen.absorption.medium": 500.0},
        {"detector.dqe": -0.05},
        {"tilts.angles": 1.5},
        pytest.param({"specimen.poses.0.positions": 1.0}, marks=pytest.mark.slow),
    ],
    ids=lambda offsets: next(iter(offsets)),
)
def test_what_was_simulated_is_found_within_three_standard_errors(offsets, seen):
    given, counts = seen
    values = {name: parameter_of(given, name).value for name in offsets}
    start = with_fields(given, {name: values[name] + off for name, off in offsets.items()})
    found = fitted(counts, start, list(offsets))
    assert found.converged and found.gained > 0
    assert found.dispersion == pytest.approx(1, abs=0.1)
    for name in offsets:
        errors = found.standard_errors[name]
        assert bool(torch.isfinite(errors).all())
        assert float(((found.values[name] - values[name]) / errors).abs().max()) < 3.3 if errors.numel() > 3 else 3
        torch.testing.assert_close(parameter_of(Setting(*found[:4]), name).value, found.values[name], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_motion_of_each_frame_is_found():
    given = setting((32, 31), moves=True)
    specimen, tilts = given.specimen, given.tilts.replace(doses=torch.full((3,), 600.0, dtype=torch.float64))
    given = given._replace(specimen=specimen.replace(damage=None), tilts=tilts)
    generator = torch.Generator().manual_seed(3)
    drift = torch.cat([torch.randn(3, FRAMES, 2, generator=generator), torch.zeros(3, FRAMES, 1)], -1).double()
    moved = with_fields(given, {"specimen.motion.drift": drift})
    found = fitted(counted(moved, frames=True), given, ["specimen.motion.drift"], prior={"specimen.motion.drift": 30.0})
    off = found.values["specimen.motion.drift"] - drift
    errors = found.standard_errors["specimen.motion.drift"]
    assert float((off / errors)[..., :2].square().mean().sqrt()) < 1.6 and float(errors[..., :2].max()) < 1.0
    assert float(errors[..., 2].min()) > 20  # along the beam it is nearly all prior


def test_the_gain_of_every_pixel_is_found_with_the_dose():
    given = setting((21, 20))
    tilts = given.tilts.replace(doses=torch.full((3,), 600.0, dtype=torch.float64))
    given = given._replace(tilts=tilts)
    true, flat = given.detector.gain, torch.ones(21, 20, dtype=torch.float64)
    assert true is not None
    start = with_fields(given, {"detector.gain": flat})
    found = fitted(counted(given), start, ["detector.gain"])
    off = (found.values["detector.gain"] - true) / found.standard_errors["detector.gain"]
    assert float(off.square().mean()) == pytest.approx(1, abs=0.25)
    assert float(found.standard_errors["detector.gain"].max()) < 0.02


# what cannot be told --------------------------------------------------------------------------------------------------


def _without_damage(seen: tuple[Setting, torch.Tensor]) -> tuple[Setting, torch.Tensor]:
    """The doses are factors then, and nothing else; and a flat camera."""
    given, counts = seen
    specimen = given.specimen.replace(damage=None)
    return given._replace(specimen=specimen, detector=given.detector.replace(dqe=0.7)), counts


def test_a_pair_that_acts_as_one_is_flagged(seen):
    given, counts = _without_damage(seen)
    found = fitted(counts, given, ["optics.defocus", "tilts.doses", "detector.dqe"])
    assert "optics.defocus" not in found.undetermined
    rows = {row.name: row for row in found.table}
    assert {name for name in rows if math.isinf(rows[name].error)} == set(found.undetermined)
    assert {f"tilts.doses[{i}]" for i in range(3)} <= set(found.undetermined)
    assert "detector.dqe" in rows["tilts.doses[0]"].partner
    assert "not told" in "\n".join(found.lines())


def test_a_prior_tells_what_the_images_do_not(seen):
    given, counts = _without_damage(seen)
    names = ["tilts.doses", "detector.dqe"]
    assert len(fitted(counts, given, names).undetermined) == 4
    found = fitted(counts, given, names, prior={"detector.dqe": 0.02})
    assert found.undetermined == () and float(found.standard_errors["detector.dqe"]) == pytest.approx(0.02, rel=0.01)


def test_a_field_that_acts_on_nothing_is_not_determined(seen):
    given, counts = seen
    found = fitted(counts, given, ["optics.phi56", "optics.defocus"])
    assert "optics.phi56" in found.undetermined and "optics.defocus" not in found.undetermined
    assert math.isfinite(float(found.standard_errors["optics.defocus"]))


def test_thickness_and_mean_free_path_are_doubtful_and_profiled(seen):
    """Ice absorbs by their ratio; only what molecules displace tells them apart."""
    given, counts = seen
    found = fitted(counts, given, ["specimen.ice.thickness", "specimen.absorption.medium"])
    row = found.table[0]
    assert row.partner == "specimen.absorption.medium" and row.error > 10 * row.alone
    low, high = found.intervals["specimen.ice.thickness"]
    assert low < row.value < high and high - low > 10 * row.alone


def test_where_a_profile_is_a_parabola_it_gives_the_standard_error(seen):
    given, counts = seen
    found = fitted(counts, given, ["tilts.doses", "optics.defocus"], profile=["doses[1]"])
    low, high = found.intervals["tilts.doses[1]"]
    assert (high - low) / 2 == pytest.approx(found.table[1].error, rel=0.1)


def test_a_value_at_its_bound_stays_there_and_the_others_are_found(seen):
    given, counts = seen
    detector = given.detector.replace(dqe=1.0)
    found = fitted(counts, given._replace(detector=detector), ["optics.defocus", "detector.dqe"], iterations=8)
    assert 0 < float(found.values["detector.dqe"]) <= 1 and float(found.standard_errors["optics.defocus"]) < 600


# a volume -------------------------------------------------------------------------------------------------------------


def test_a_volume_is_seen_through_the_same_waist(generator):
    """Blobs as a volume, turned and displaced, against the projection through the lens; and its defocus found again."""
    values = torch.zeros(16, 24, 24, dtype=torch.float64)
    values[8, 12, 15], values[6, 9, 10] = 30.0, 20.0
    k = [torch.fft.fftfreq(n, dtype=torch.float64) for n in values.shape]
    square = k[0][:, None, None] ** 2 + k[1][:, None] ** 2 + k[2] ** 2
    values = torch.fft.ifftn(torch.fft.fftn(values) * torch.exp(-2 * (math.pi * 1.2) ** 2 * square)).real * 20
    volume = Volume(values, 3.0)
    tilts = cs.TiltScheme(
        angles=torch.tensor([0.0, 30.0], dtype=torch.float64),
        doses=torch.tensor([400.0, 300.0], dtype=torch.float64),
        shifts=torch.tensor([[0.0, 0.0], [4.0, -7.0]], dtype=torch.float64),
        axis_angle=15.0,
    )
    optics, detector = cs.Optics(300.0, defocus=6_000.0, spherical_aberration=2.7), cs.Detector((32, 30), 3.0)
    given = Setting(volume, tilts, optics, detector)
    seen = torch.cat([expected_of_volume(volume, tilts, optics, detector, i, cs.multislice) for i in range(2)])
    counts = torch.poisson(seen, generator=generator)
    names = ["optics.defocus", "tilts.shifts", "tilts.axis_angle"]
    start = with_fields(given, {"optics.defocus": torch.tensor(6_600.0), "tilts.axis_angle": torch.tensor(14.0)})
    found = inv.calibrate(counts, volume, names, tilts=start.tilts, optics=start.optics, detector=detector)
    for name in names:
        off = (found.values[name] - parameter_of(given, name).value) / found.standard_errors[name]
        assert float(off.abs().max()) < 3.5
    assert float(found.standard_errors["optics.defocus"]) < 600


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["optics.focus"], {}, "the name of a field of optics.voltage"),
        (["thickness_of_ice"], {}, "specimen.*, tilts.*"),
        (["numbers", "defocus"], {}, "finite real numbers|several"),
        (["specimen.motion.drift"], {}, "drift"),
        (["detector.dark"], {}, "is None. Give it a value"),
        (["defocus", "optics.defocus"], {}, "each once"),
        ([], {}, "one or more"),
        (["defocus"], {"prior": {"tilts.doses": 1.0}}, "parameters that are fitted"),
        (["defocus"], {"prior": {"defocus": 0.0}}, "positive deviations"),
        (["defocus"], {"profile": ["dose"]}, "profile: expected one of optics.defocus"),
        (["defocus"], {"optics": None}, "expected tilts, optics and detector"),
    ],
)
def test_names_and_arguments_that_cannot_be_are_refused(names, more, message, small):
    given, counts = small
    given = given._replace(specimen=given.specimen.replace(motion=None))
    with pytest.raises(ValueError, match=message):
        fitted(counts, given, names, iterations=1, **more)


def test_images_that_do_not_fit_are_refused(small):
    given, counts = small
    with pytest.raises(ValueError, match="expected images"):
        fitted(counts[:2], given, ["defocus"])
    with pytest.raises(ValueError, match="normalised"):
        fitted(counts - counts.mean(), given, ["defocus"])
