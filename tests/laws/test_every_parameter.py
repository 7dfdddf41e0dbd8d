"""One law for every parameter between atoms and counts: its gradient is the slope of the expected counts.

`TABLE` names every differentiable field of every noun on that path. A field that is missing from it is an error.
"""

import dataclasses
import importlib
import math
import pkgutil
from typing import NamedTuple

import pytest
import torch

import cryosim
from cryosim.acquisition.simulate import Sampling, expected_exposure
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.record import Record
from cryosim.core.rotation import random_rotations
from cryosim.microscope.counting import recorded_counts
from cryosim.microscope.detector import Detector
from cryosim.microscope.energy_loss import LossSpectrum
from cryosim.microscope.exposure import expected_counts
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import ewald, multislice, projection, rytov
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.damage import CriticalExposure, Damage
from cryosim.specimen.ice import Absorption, Ice, Relief
from cryosim.specimen.motion import Motion
from cryosim.specimen.potential import Slices, potential_slices
from cryosim.specimen.specimen import Poses, Specimen
from cryosim.specimen.tilted import tilted_slices

SHAPE, SEEN = (32, 31), (15, 14)  # of the simulated field and of the detector (y, x) [px]


class Parameter(NamedTuple):
    """How a parameter is tried.

    `routes` are ways from it to the counts, see `counts`; it takes the value `base`, and differences of +-`step` in a
    random direction; `neutral` is the value that switches it off, at which the gradient must be finite. Steps are so
    small that no surface of the ice crosses the border of a slice, and no edge of the aperture a sample.
    """

    routes: str
    base: object
    step: float
    neutral: float | None = None


def _optics(base: float, step: float, neutral: float | None = 0.0) -> Parameter:
    return Parameter("exposure", base, step, neutral)


_ROTATIONS = random_rotations(2, torch.Generator().manual_seed(3))
_POSITIONS = [[2.1, 0.7, -1.9], [-1.3, 2.4, 1.1], [0.4, -2.2, 2.6]]
_HEIGHTS = 2 + torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
_DRIFT = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
_FIELD = torch.randn(2, 2, 3, 4, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
_GAIN = 1 + 0.1 * torch.rand(*SEEN, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
_DARK = 0.01 + 0.01 * torch.rand(*SEEN, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
_VALUES = 20 * torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

TABLE = {
    "Atoms.positions": Parameter("exposure", _POSITIONS, 1e-4),
    "Atoms.b_factors": Parameter("exposure", [25.0, 40.0, 31.0], 1e-2, 0.0),
    "Atoms.occupancies": Parameter("exposure", [1.0, 0.8, 0.9], 1e-3, 0.0),
    "Poses.rotations": Parameter("exposure", _ROTATIONS, 1e-4),  # along generators of rotations, see `_direction`
    "Poses.positions": Parameter("exposure", [[1.0, -2.0, 1.7], [-3.0, 3.0, -2.2]], 1e-4),
    "Ice.thickness": Parameter("exposure relief water", 63.0, 1e-5),
    "Ice.inner_potential": Parameter("exposure relief water", 4.5, 1e-3, 0.0),
    "Relief.heights": Parameter("relief water", _HEIGHTS, 1e-5, 0.0),
    "Absorption.medium": Parameter("exposure relief", 3750.0, 1.0, math.inf),
    "Absorption.molecules": Parameter("exposure relief", 1970.0, 1.0, math.inf),
    "CriticalExposure.scale": Parameter("exposure relief slices", 0.24499, 1e-4, math.inf),
    "CriticalExposure.exponent": Parameter("exposure relief slices", 1.6649, 1e-4),
    "CriticalExposure.offset": Parameter("exposure relief slices", 2.8141, 1e-3, 0.0),
    "Damage.b_growth": Parameter("exposure slices", [2.0, 3.0, 1.0, 1.0, 1.0, 1.0], 1e-3, 0.0),
    "Damage.loss": Parameter("exposure slices", [0.01, 0.02, 0.01, 0.01, 0.01, 0.03], 1e-4, 0.0),
    "Damage.water_diffusion": Parameter("exposure slices", 1.1, 1e-3, 0.0),
    "Damage.voltage_factor": Parameter("exposure slices", 0.9, 1e-4),
    "Motion.drift": Parameter("exposure relief water", _DRIFT, 1e-5, 0.0),
    "Motion.field": Parameter("exposure relief", _FIELD, 1e-4, 0.0),
    "TiltScheme.angles": Parameter("exposure relief water", [20.0, -33.0], 1e-5, 0.0),
    "TiltScheme.doses": Parameter("exposure", [3.0, 2.0], 1e-2, 0.0),
    "TiltScheme.shifts": Parameter("exposure relief water", [[1.1, -0.7], [0.4, 0.6]], 1e-5, 0.0),
    "TiltScheme.axis_angle": Parameter("exposure relief water", -80.0, 1e-5, 0.0),
    "Detector.pixel_size": Parameter("exposure", 1.37, 1e-5),
    "Detector.dqe": Parameter("exposure values", [0.92, 0.72, 0.5], 1e-4),
    "Detector.nps": Parameter("values", [1.1, 0.9, 0.8], 1e-4),
    "Detector.gain": Parameter("exposure values", _GAIN, 1e-4, 0.0),
    "Detector.dark": Parameter("exposure values", _DARK, 1e-4, 0.0),
    "Detector.coincidence_radius": Parameter("exposure values", 1.2, 1e-4, 0.0),
    "LossSpectrum.plasmon_energy": Parameter("slices", 22.0, 1e-3),
    "LossSpectrum.width": Parameter("slices", 15.0, 1e-3),
    "Slices.values": Parameter("values", _VALUES, 1e-3, 0.0),
    "Slices.pixel_size": Parameter("values atoms slices", 0.9, 1e-6),
    "Slices.thickness": Parameter("values atoms slices", 5.0, 1e-2),
    "potential_slices.solvent": Parameter("atoms", 4.5, 1e-3, 0.0),
    "Optics.voltage": _optics(290.0, 1e-2, None),
    "Optics.defocus": _optics(600.0, 0.1),
    "Optics.astigmatism": _optics(150.0, 0.1),
    "Optics.astigmatism_angle": _optics(20.0, 1e-2),
    "Optics.spherical_aberration": _optics(2.7, 1e-3),
    "Optics.phase_shift": _optics(20.0, 1e-2),
    "Optics.amplitude_contrast": _optics(0.04, 1e-5),
    "Optics.coma": _optics(3e4, 10.0),
    "Optics.coma_angle": _optics(40.0, 1e-2),
    "Optics.trefoil": _optics(4e4, 10.0),
    "Optics.trefoil_angle": _optics(15.0, 1e-2),
    "Optics.C32": _optics(2e6, 1e3),
    "Optics.phi32": _optics(25.0, 1e-2),
    "Optics.C34": _optics(2e6, 1e3),
    "Optics.phi34": _optics(35.0, 1e-2),
    "Optics.C41": _optics(5e8, 1e5),
    "Optics.phi41": _optics(10.0, 1e-2),
    "Optics.C43": _optics(5e8, 1e5),
    "Optics.phi43": _optics(20.0, 1e-2),
    "Optics.C45": _optics(5e8, 1e5),
    "Optics.phi45": _optics(30.0, 1e-2),
    "Optics.C50": _optics(5e10, 1e7),
    "Optics.C52": _optics(5e10, 1e7),
    "Optics.phi52": _optics(40.0, 1e-2),
    "Optics.C54": _optics(5e10, 1e7),
    "Optics.phi54": _optics(15.0, 1e-2),
    "Optics.C56": _optics(5e10, 1e7),
    "Optics.phi56": _optics(25.0, 1e-2),
    "Optics.chromatic_aberration": _optics(2.2, 1e-4),
    "Optics.energy_spread": _optics(0.7, 1e-4),
    "Optics.voltage_ripple": _optics(1e-6, 1e-9),
    "Optics.lens_ripple": _optics(8e-7, 1e-9),
    "Optics.convergence": _optics(0.6, 1e-4),
    "Optics.aperture": _optics(6.13, 1e-5, math.inf),
    "Optics.beam_tilt": _optics([0.8, -0.5], 1e-4),  # pyright: ignore[reportArgumentType]
    "Optics.slit": _optics(24.3, 1e-4, math.inf),
}

# fmt: off
NOUNS = (
    Atoms, Poses, Ice, Relief, Absorption, CriticalExposure, Damage, Motion, TiltScheme, Optics, LossSpectrum, Detector,
    Slices,
)
# fmt: on
"""Whose fields the table must name."""

OTHERS = {
    "Specimen": "of nouns, and a size that only places molecules",
    "Sampling": "static",
    "Moment": "made by TiltScheme.moment",
    "AtomSlices": "made by potential_slices",
    "Sites": "made by potential_slices",
    "SummedSlices": "of other sources of slices",
    "RadialBasis": "made by potential_slices",
    "ImmersedSlices": "made by tilted_slices",
    "Surfaces": "made by tilted_slices",
    "MergedSlices": "of another source of slices",
    "ScatteringError": "a result",
    "Species": "drawn from, by crowd",
    "Interface": "drawn from, by crowd",
    "MolecularShape": "of whole voxels, by which crowd places molecules",
    "Surface": "drawn from, by membrane",
    "Ellipsoid": "drawn from, by membrane",
    "Torus": "drawn from, by membrane",
    "Vesicle": "drawn from, by membrane",
    "Patch": "drawn from, by membrane",
    "Alignment": "read from a file",
    "Volume": "a result",
    "TiltSeries": "a result",
    "Stack": "where a result stands: a file and its sections",
    "Events": "a result",
}
"""Records that are not on the list, and why."""

NOT_DIFFERENTIABLE = {"Atoms.numbers", "Atoms.classes", "Poses.instances"}


# the way to the counts ------------------------------------------------------------------------------------------------


def _values(noun: type, name: str, value) -> dict:
    """Fields of a noun as the table has them, one of them replaced."""
    prefix = f"{noun.__name__}."
    fields = {key: TABLE[key].base for key in TABLE if key.startswith(prefix)} | (
        {name: value} if name.startswith(prefix) else {}
    )
    return {key.removeprefix(prefix): x for key, x in fields.items()}


def _tensor(value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)


def counts(route: str, name: str, value: torch.Tensor) -> torch.Tensor:
    """Recorded counts (y, x) [e-/px] with every parameter at its base but for one.

    exposure  a specimen in ice through `expected_exposure`, with absorption, damage and motion, in two frames
    relief    the same, and the ice has a relief
    water     a relief and structure, without absorption, zero loss
    slices    `tilted_slices` at a pixel size and thickness that may carry gradients
    atoms     `potential_slices` of bare atoms, zero loss
    values    slices held in memory
    """
    kinds = {"numbers": torch.tensor([6, 8, 16]), "classes": torch.tensor([0, 1, 5])}
    atoms = Atoms(**{k: _tensor(v) for k, v in _values(Atoms, name, value).items()}, **kinds)
    tilts = TiltScheme(**_values(TiltScheme, name, value), frames=2)
    camera = {k: _tensor(v) for k, v in _values(Detector, name, value).items()}
    if name != "Detector.nps":
        del camera["nps"]  # such counts have no likelihood, and no other parameter acts on it
    detector = Detector(SEEN, **camera)
    optics = Optics(**_values(Optics, name, value))
    if route in ("water", "atoms"):
        optics = optics.replace(slit=0.0)
    losses = LossSpectrum(**_values(LossSpectrum, name, value), bins=6, most_events=3)

    def recorded(source, dose) -> torch.Tensor:
        return recorded_counts(expected_counts(source, optics, detector, dose=dose, losses=losses), detector, 40)

    if route == "values":
        return recorded(Slices(**_values(Slices, name, value)), 3.0)
    grid = _values(Slices, name, value)
    pixel, thickness = grid["pixel_size"], grid["thickness"]
    if route == "atoms":
        solvent = value if name == "potential_slices.solvent" else TABLE["potential_slices.solvent"].base
        source = potential_slices(atoms, SHAPE, pixel, thickness, 5, solvent=solvent, width=14)
        return recorded(source, 3.0)
    poses = Poses(**{k: _tensor(v) for k, v in _values(Poses, name, value).items()})
    ice = Ice(**_values(Ice, name, value), structure="water" if route == "water" else "constant", seed=1)
    if route in ("relief", "water"):
        ice = ice.replace(relief=Relief(**_values(Relief, name, value), spacing=9.3))
    absorption = None if route == "water" else Absorption(**_values(Absorption, name, value))
    critical = CriticalExposure(**_values(CriticalExposure, name, value))
    rates = {k: _tensor(v) for k, v in _values(Damage, name, value).items()}
    if name != "Damage.voltage_factor":
        del rates["voltage_factor"]  # taken from the voltage
    motion = Motion(**_values(Motion, name, value), spacing=12.0)
    specimen = Specimen((atoms,), (poses,), (40.0, 40.0, 40.0), ice, absorption, Damage(critical, **rates), motion)
    if route == "slices":
        source = tilted_slices(
            specimen,
            tilts.angles[0],
            SHAPE,
            pixel,
            thickness,
            axis_angle=tilts.axis_angle,
            shift=tilts.shifts[0],
            width=14,
            dtype=torch.float64,
            voltage=optics.voltage,
            moment=tilts.moment(0, 1),
        )
        return recorded(source, tilts.doses[0])
    sampling = Sampling(SHAPE, pixel, thickness, width=14, dtype=torch.float64)
    return recorded_counts(expected_exposure(specimen, tilts, optics, detector, 1, sampling=sampling), detector, 40)


def score_of(route: str, name: str):
    """A random linear functional of the counts, as a function of one parameter."""
    weights = torch.randn(SEEN, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return lambda value: (counts(route, name, value) * weights).sum()


def _direction(name: str, value: torch.Tensor) -> torch.Tensor:
    """In which a value is changed; a rotation R by a generator, R' = R + step W R with W antisymmetric."""
    generator = torch.Generator().manual_seed(7)
    if name == "Poses.rotations":
        wheel = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return (wheel - wheel.mT) @ value
    return torch.randn(value.shape, generator=generator, dtype=torch.float64) if value.ndim else torch.ones_like(value)


CASES = [(route, name) for name, parameter in TABLE.items() for route in parameter.routes.split()]
quiet = pytest.mark.filterwarnings("ignore::cryosim.SamplingWarning")


@quiet
@pytest.mark.parametrize(("route", "name"), CASES, ids=[f"{name}-{route}" for route, name in CASES])
def test_gradient_is_the_slope(route, name):
    parameter, score = TABLE[name], score_of(route, name)
    value = _tensor(parameter.base).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(value), value)
    direction = _direction(name, value.detach())
    with torch.no_grad():
        up, down = (score(value + sign * parameter.step * direction) for sign in (1, -1))
    slope = float(up - down) / (2 * parameter.step)
    size = parameter.step * abs(slope)
    assert size > 1e-10, "the counts do not depend on it"
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)


NEUTRAL = [(route, name) for route, name in CASES if TABLE[name].neutral is not None]


@quiet
@pytest.mark.parametrize(("route", "name"), NEUTRAL, ids=[f"{name}-{route}" for route, name in NEUTRAL])
def test_gradient_is_finite_where_a_parameter_is_switched_off(route, name):
    value = torch.full_like(_tensor(TABLE[name].base), TABLE[name].neutral).requires_grad_()
    score = score_of(route, name)(value)
    (gradient,) = torch.autograd.grad(score, value)
    assert torch.isfinite(score) and torch.isfinite(gradient).all()


@quiet
def test_gradients_are_finite_where_every_parameter_of_the_lens_is_switched_off():
    names = [key for key in TABLE if key.startswith("Optics.") and key != "Optics.voltage"]
    values = [torch.full_like(_tensor(TABLE[k].base), TABLE[k].neutral).requires_grad_() for k in names]
    slices = Slices(_VALUES, 0.9, 6.0)
    optics = Optics(**{k.removeprefix("Optics."): v for k, v in zip(names, values, strict=True)})
    seen = expected_counts(slices, optics, Detector(SEEN, 1.37), dose=3.0)
    for name, gradient in zip(names, torch.autograd.grad(seen.square().sum(), values), strict=True):
        assert torch.isfinite(gradient).all(), name


@quiet
@pytest.mark.parametrize("scattering", [projection, rytov, ewald, multislice])
def test_every_step_of_the_ladder_passes_gradients(scattering):
    """Voltage, beam tilt and amplitude contrast act in the specimen too; the others are those of the slices."""
    weights = torch.randn(SEEN, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    names = ["voltage", "beam_tilt", "amplitude_contrast", "pixel_size", "thickness", "values"]
    base = [300.0, [0.8, -0.5], 0.04, 0.9, 6.0, _VALUES / 10]
    steps = [1e-2, 1e-4, 1e-5, 1e-6, 1e-4, 1e-3]
    values = [_tensor(x).clone().requires_grad_() for x in base]

    def score(*given):
        fields = dict(zip(names, given, strict=True))
        slices = Slices(*(fields.pop(x) for x in ("values", "pixel_size", "thickness")))
        optics = Optics(defocus=600.0, **fields)
        seen = expected_counts(slices, optics, Detector(SEEN, 1.37), dose=3.0, scattering=scattering)
        return (seen * weights).sum()

    gradients = torch.autograd.grad(score(*values), values, allow_unused=True)
    for i, (name, value, gradient, step) in enumerate(zip(names, values, gradients, steps, strict=True)):
        direction = _direction(name, value.detach())
        with torch.no_grad():
            up, down = (score(*values[:i], value + s * step * direction, *values[i + 1 :]) for s in (1, -1))
        if scattering is projection and name == "thickness":  # it has none
            assert gradient is None and up == down
            continue
        assert gradient is not None, name
        assert float((gradient * direction).sum()) == pytest.approx(float(up - down) / (2 * step), rel=1e-4), name


# the table is complete ------------------------------------------------------------------------------------------------


def fields_of(noun: type) -> set[str]:
    """Names of the fields that may carry gradients: items of numbers."""
    return {
        f"{noun.__name__}.{field.name}"
        for field in dataclasses.fields(noun)
        if "item_ndim" in field.metadata and not field.metadata.get("static")
    } - NOT_DIFFERENTIABLE


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: noun.__name__)
def test_no_field_is_missing(noun):
    named = {key for key in TABLE if key.startswith(f"{noun.__name__}.")}
    assert named == fields_of(noun)


def test_no_noun_is_missing():
    """Every record of the package is on one list or the other."""
    for package in ("specimen", "microscope", "acquisition", "core"):
        for module in pkgutil.iter_modules(importlib.import_module(f"cryosim.{package}").__path__):
            importlib.import_module(f"cryosim.{package}.{module.name}")
    found, left = set(), [Record]
    while left:
        mine = left.pop().__subclasses__()
        found |= {c.__name__ for c in mine if c.__module__.startswith(f"{cryosim.__name__}.")}
        left += mine
    assert found - OTHERS.keys() == {noun.__name__ for noun in NOUNS}


def test_every_part_of_a_specimen_is_tried():
    """Fields that are not items of numbers are nouns of the list, structure, or the size."""
    known = {"molecules": Atoms, "poses": Poses, "ice": Ice, "absorption": Absorption}
    known |= {"damage": Damage, "motion": Motion}
    assert {field.name for field in dataclasses.fields(Specimen)} == {*known, "size", "names", "kinds"}
    assert set(known.values()) <= set(NOUNS)
