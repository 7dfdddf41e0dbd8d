"""The description of a run: every parameter with its unit, its default and its bounds; unknown keys are refused."""

from __future__ import annotations

import difflib
import functools
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as short_repr
from typing import Annotated, Any, Literal, Self, get_args

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from cryosim.acquisition.simulate import LARGEST_FIELD, Sampling, sampling_for
from cryosim.acquisition.tilts import TiltScheme
from cryosim.contents import (
    CarbonSection,
    ContaminationSection,
    FilamentSection,
    GoldSection,
    LamellaSection,
    MembraneSection,
    Molecule,
)
from cryosim.core.fourier import number
from cryosim.core.inelastic import ICE, ICE_INNER_POTENTIAL
from cryosim.microscope.detector import Detector
from cryosim.microscope.optics import Optics
from cryosim.section import Length, Section
from cryosim.specimen.atoms import CLASSES
from cryosim.specimen.damage import CriticalExposure, Damage, voltage_factor
from cryosim.specimen.ice import Absorption, Ice, Relief, rough_relief
from cryosim.specimen.motion import Motion, beam_induced_motion, doming, stage_drift
from cryosim.specimen.solids import wedge


class ConfigError(ValueError):
    """A run description that cannot be used: the message names the file, the key, what was expected and what came."""


_Pixels = Annotated[int, Field(ge=1, le=LARGEST_FIELD)]


class Slab(Section):
    thickness: float = Field(default=400.0, gt=0)
    """Of the ice [Å]."""
    inner_potential: float = Field(default=ICE_INNER_POTENTIAL, ge=0)
    """Mean, of the ice [V]."""
    structure: Literal["constant", "water"] = "constant"
    """Constant potential, or fluctuations as those of vitreous water, with its ring at 3.7 Å."""
    roughness: float = Field(default=0.0, ge=0)
    """Standard deviation of the height of either surface [Å]."""
    correlation: float = Field(default=300.0, ge=10)
    """Distance over which the height of a rough surface changes [Å]."""
    mean_free_path: float | None = Field(default=None, gt=0)
    """Inelastic, of the ice at 300 kV [Å]; 3750 by theory, 3150 to 3950 are in use."""


class DamageSection(Section):
    critical_exposure: float | None = Field(default=1.0, gt=0)
    """Doses after which detail is lost, relative to Grant & Grigorieff 2015 at this voltage [1]; null is no damage."""
    b_growth: float = Field(default=0.0, ge=0)
    """Growth of all B-factors besides that [Å^2 per e-/Å^2]; 1.7 to 4 is in use without critical_exposure."""
    loss: float = Field(default=0.0, ge=0)
    """Rate at which atoms leave [1 per e-/Å^2]."""
    carboxyl_loss: float | None = Field(default=None, ge=0)
    """Of side-chain carboxyl groups [1 per e-/Å^2]; null as the others."""
    sulfur_loss: float | None = Field(default=None, ge=0)
    """Of the sulfur of cysteine [1 per e-/Å^2]; null as the others."""
    metal_loss: float | None = Field(default=None, ge=0)
    """Of metals [1 per e-/Å^2]; null as the others."""
    water_diffusion: float = Field(default=1.1, ge=0)
    """Mean squared displacement of water [Å^2 per e-/Å^2]; for ice with the structure of water."""


class MotionSection(Section):
    drift: float = Field(default=0.0, ge=0)
    """Standard deviation of the way the stage drifts in x and y in each exposure [Å]."""
    settling: float = Field(default=1.0, gt=0)
    """Dose after which 1/e of the drift is left [e-/Å^2]."""
    velocity: float = Field(default=0.0, ge=0)
    """Standard deviation of the beam-induced local motion [Å per e-/Å^2]; 0.2 is usual."""
    correlation: float = Field(default=5000.0, ge=50)
    """Distance over which it changes [Å]."""
    doming: float = 0.0
    """Height to which the ice bulges along the beam [Å]."""
    hole_radius: float = Field(default=6000.0, gt=0)
    """Of the hole in which it does [Å]."""


class SpecimenSection(Section):
    molecules: list[Molecule] = Field(
        default=[Molecule(structure="apoferritin", assembly=1, copies=8), Molecule(structure="ubiquitin", copies=4)],
        min_length=1,
    )
    """What stands in the ice."""
    occupancy: float | None = Field(default=None, gt=0, le=0.6)
    """Fraction of the box to fill with molecules, in proportion to their abundances [1]; cells have 0.2 to 0.3."""
    membranes: list[MembraneSection] = Field(default=[])
    """Lipid bilayers; what lies beyond the box is cut off, as the ion beam does."""
    filaments: list[FilamentSection] = Field(default=[])
    """Of subunits on a helix."""
    gold: GoldSection = GoldSection()
    """Fiducial beads."""
    carbon: CarbonSection = CarbonSection()
    """Film that holds the ice."""
    lamella: LamellaSection = LamellaSection()
    """Marks of the ion beam."""
    contamination: ContaminationSection = ContaminationSection()
    """That settled on the ice."""
    size: tuple[Length, Length, Length] = (700.0, 700.0, 320.0)
    """(x, y, z) of the box that holds the molecules [Å]."""
    gap: float = Field(default=5.0, ge=2)
    """Least distance between atoms of two molecules [Å]."""
    tries: int = Field(default=100_000, ge=100)
    """Proposals for a copy after which there is no room left; with 2000 scenes are made sooner, a little emptier."""
    ice: Slab | None = Slab()
    """The ice around them; null for vacuum."""
    mean_free_path: float | None = Field(default=None, gt=0)
    """Inelastic, of the molecules at 300 kV [Å]; 1970 is protein; null leaves all absorption to amplitude_contrast."""
    damage: DamageSection = DamageSection()
    """By the electrons."""
    motion: MotionSection = MotionSection()
    """During the exposures."""


class TiltSection(Section):
    scheme: Literal["dose-symmetric", "bidirectional", "unidirectional"] = "dose-symmetric"
    """Order of the exposures."""
    extent: float = Field(default=60.0, ge=0, lt=89)
    """Largest tilt [deg]."""
    step: float = Field(default=3.0, gt=0)
    """Between tilts [deg]; divides the extent."""
    total_dose: float = Field(default=120.0, gt=0, le=1e9)
    """Of all exposures together [e-/Å^2]."""
    axis_angle: float = Field(default=0.0, ge=-360, le=360)
    """In-plane angle of the tilt axis from y [deg]."""
    frames: int = Field(default=1, ge=1, le=200)
    """Of each exposure, in which damage and motion are computed anew; also those of a movie."""
    dose_rate: float = Field(default=3.0, gt=0)
    """[e-/Å^2/s]; with the camera's frame rate, how many camera frames an exposure takes."""
    cosine_power: float = Field(default=0.0, ge=0, le=5)
    """Doses in proportion to 1 / cos(tilt)^power [1], with the same total."""
    angle_error: float = Field(default=0.0, ge=0, le=5)
    """Standard deviation of the true angles about those the stage tells [deg]."""
    shift_error: float = Field(default=0.0, ge=0)
    """Standard deviation of the shifts (x, y) of the images [Å]."""

    @model_validator(mode="after")
    def _is_a_scheme(self) -> Self:
        if self.extent / self.step > 1000:
            raise ValueError(f"expected at most 1000 tilts a side, got extent {self.extent} and step {self.step} [deg]")
        tilt_scheme(self)  # complains where the step does not divide the extent
        return self


class OpticsSection(Section):
    voltage: float = Field(default=300.0, gt=0)
    """[kV]."""
    defocus: float = 30000.0
    """Underfocus at the box centre [Å]."""
    astigmatism: float = 0.0
    """Largest minus smallest defocus [Å]."""
    astigmatism_angle: float = 0.0
    """Azimuth of the largest underfocus [deg]."""
    spherical_aberration: float = 2.7
    """[mm]."""
    phase_shift: float = 0.0
    """By a phase plate [deg]."""
    amplitude_contrast: float = Field(default=0.07, ge=0, le=1)
    """Fraction of the scattering that is absorption [1]; 0.07 takes half the beam in 1700 Å of ice."""
    beam_tilt: tuple[float, float] = (0.0, 0.0)
    """Direction (x, y) along which the electrons arrive [mrad]."""
    aperture: float | None = Field(default=None, gt=0)
    """Semi-angle of the objective aperture [mrad]; null is none."""
    chromatic_aberration: float = 0.0
    """[mm]; 2.7 is usual."""
    energy_spread: float = Field(default=0.0, ge=0)
    """Of the source, standard deviation [eV]; 0.3 is usual."""
    voltage_ripple: float = Field(default=0.0, ge=0)
    """Relative standard deviation of the voltage [1]."""
    lens_ripple: float = Field(default=0.0, ge=0)
    """Relative standard deviation of the lens current [1]."""
    convergence: float = Field(default=0.0, ge=0)
    """Half-angle of the illumination at 1/e of its intensity [mrad]."""
    slit: float | None = Field(default=0.0, ge=0)
    """Width of the energy slit [eV]: 0 passes electrons without a loss only, null is no filter."""
    coma: float = 0.0
    """C21 [Å]."""
    coma_angle: float = 0.0
    """[deg]."""
    trefoil: float = 0.0
    """C23 [Å]."""
    trefoil_angle: float = 0.0
    """[deg]."""
    C32: float = 0.0
    """[Å]."""
    phi32: float = 0.0
    """[deg]."""
    C34: float = 0.0
    """[Å]."""
    phi34: float = 0.0
    """[deg]."""
    C41: float = 0.0
    """[Å]."""
    phi41: float = 0.0
    """[deg]."""
    C43: float = 0.0
    """[Å]."""
    phi43: float = 0.0
    """[deg]."""
    C45: float = 0.0
    """[Å]."""
    phi45: float = 0.0
    """[deg]."""
    C50: float = 0.0
    """[Å]."""
    C52: float = 0.0
    """[Å]."""
    phi52: float = 0.0
    """[deg]."""
    C54: float = 0.0
    """[Å]."""
    phi54: float = 0.0
    """[deg]."""
    C56: float = 0.0
    """[Å]."""
    phi56: float = 0.0
    """[deg]."""


class DetectorSection(Section):
    shape: tuple[_Pixels, _Pixels] = (192, 192)
    """(y, x) [px]."""
    pixel_size: float = Field(default=4.0, gt=0)
    """At the specimen [Å]."""
    camera: Literal["ideal", "falcon4i", "falcon3"] = "ideal"
    """Its quantum efficiency, transfer and noise; ideal counts every electron."""
    frame_rate: float | None = Field(default=None, gt=0)
    """[1/s]; null takes the camera's own."""
    counting: Literal["poisson", "binary"] | None = None
    """Whether a pixel counts every electron of a camera frame, or tells only if there was one; null is the camera's."""
    coincidence_radius: float | None = Field(default=None, ge=0, le=50)
    """Within which electrons of one camera frame are not told apart [px]; null takes the camera's."""
    gain_variation: float = Field(default=0.0, ge=0, le=0.3)
    """Relative standard deviation of the pixels' sensitivities [1]."""
    dead_pixels: float = Field(default=0.0, ge=0, le=0.1)
    """Fraction of the pixels that see nothing [1]."""
    hot_pixels: float = Field(default=0.0, ge=0, le=0.1)
    """Fraction of the pixels that fire in every tenth camera frame by themselves [1]."""


Product = Literal["alignments", "halves", "clean", "labels", "tomogram", "zarr", "copick", "specimen"]
"""What may be written beside the tilt series, its truth and its poses."""


class OutputSection(Section):
    movies: Literal["none", "eer", "mrc", "tiff"] = "none"
    """Frames of every exposure in files of their own; eer holds single electrons."""
    files: list[Product] = Field(default=[])
    """Of alignments, halves, clean, labels, tomogram, zarr, copick, specimen; the README of a dataset explains each."""
    binning: int = Field(default=1, ge=1, le=64)
    """Pixels of the detector to the edge of a voxel of truth, labels and tomogram."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        if len(set(self.files)) < len(self.files):
            raise ValueError(f"expected each of output.files once, got {self.files}")
        return self


class SamplingSection(Section):
    pixel_size: float | None = Field(default=None, gt=0)
    """Of the simulated wave [Å]; null takes 0.47 of the detector's."""
    thickness: float | None = Field(default=None, ge=0.1)
    """Of a slice [Å]; null takes 10 Å or less where the wave needs it."""
    parametrization: Literal["lobato", "kirkland", "peng"] = "lobato"
    """Of the electron scattering factors."""
    width: int = Field(default=8, ge=4, le=16)
    """Grid samples over which an atom is spread: 8 is exact to 1e-6, 6 to 5e-5."""
    copies: Literal["atoms", "reference"] = "atoms"
    """Copies atom by atom, or, at simulated pixels beyond 5 Å, by a reference: up to twice as fast, 1e-3 off."""


class RunConfig(Section):
    """One simulated tilt series."""

    name: str = Field(default="series", pattern=r"^[\w.-]+$", max_length=100)
    """Of the files that are written."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Of places, poses and counts: the same seed gives the same bytes."""
    specimen: SpecimenSection = SpecimenSection()
    tilts: TiltSection = Field(default_factory=TiltSection)
    optics: OpticsSection = OpticsSection()
    detector: DetectorSection = DetectorSection()
    sampling: SamplingSection = SamplingSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _fits_a_grid(self) -> Self:
        sampling(self)  # complains where the field is too large
        section = self.specimen
        if section.ice and section.ice.roughness > section.ice.thickness / 8:
            raise ValueError(
                "expected specimen.ice.roughness of at most an eighth of specimen.ice.thickness, so that the surfaces "
                f"do not meet, got {section.ice.roughness:g} and {section.ice.thickness:g} Å"
            )
        filled = any(molecule.abundance is not None for molecule in section.molecules)
        if filled != (section.occupancy is not None):
            raise ValueError("expected both or none of specimen.occupancy and specimen.molecules[...].abundance")
        milled = section.lamella.wedge or section.lamella.curtains
        if milled and (section.ice is None or section.ice.roughness):
            raise ValueError("expected specimen.ice without roughness for a specimen.lamella with a wedge or curtains")
        film = section.carbon
        if section.ice and film.thickness and abs(film.height) + film.thickness / 2 > section.ice.thickness / 2:
            raise ValueError(
                "expected a specimen.carbon film that lies in the ice, whose surfaces are "
                f"{section.ice.thickness / 2:g} Å from its middle, got {film.thickness:g} Å about {film.height:g} Å"
            )
        if section.ice is None and (section.lamella.platinum or section.contamination.crystals):
            raise ValueError("expected specimen.ice for platinum or contamination, which stand on it")
        if section.ice and (section.mean_free_path is None) != (section.ice.mean_free_path is None):
            raise ValueError("expected both or none of specimen.mean_free_path and specimen.ice.mean_free_path")
        if section.mean_free_path and self.optics.amplitude_contrast:
            raise ValueError(
                "expected optics.amplitude_contrast 0 where mean free paths are given, as both take the same "
                f"electrons, got {self.optics.amplitude_contrast:g}"
            )
        if section.damage.critical_exposure and not _measured(self.optics.voltage):
            raise ValueError(
                "expected optics.voltage between 100 and 300 kV, where critical exposures were measured, got "
                f"{self.optics.voltage:g}. Set specimen.damage.critical_exposure to null for another"
            )
        if self.detector.camera == "falcon4i" and self.optics.voltage not in (200, 300):
            raise ValueError(f"expected optics.voltage 200 or 300 kV for a falcon4i, got {self.optics.voltage:g}")
        if self.output.movies == "eer" and self.detector.counting == "poisson":
            raise ValueError(
                "expected detector.counting to be null or binary where output.movies is eer, whose pixels tell once a "
                "camera frame whether they were hit, got poisson"
            )
        if self.output.movies == "eer" and self.detector.camera == "falcon3":
            raise ValueError("expected another output.movies than eer for a falcon3, whose images are not counts")
        if self.output.binning > min(self.detector.shape):
            raise ValueError(
                f"expected output.binning of at most the detector's shorter side, {min(self.detector.shape)} px, got "
                f"{self.output.binning}"
            )
        if "halves" in self.output.files and (self.detector.camera == "falcon3" or _uneven(self.detector)):
            raise ValueError(
                "expected a detector without gain_variation and dead or hot pixels, and another than falcon3, where "
                "output.files has halves: electrons are dealt out, and those images are not whole numbers of them"
            )
        if depth(self) > LARGEST_FIELD * self.detector.pixel_size:
            raise ValueError(
                f"expected specimen.size and specimen.ice.thickness to be at most {LARGEST_FIELD} times "
                f"detector.pixel_size deep, {LARGEST_FIELD * self.detector.pixel_size:g} Å, got {depth(self):g} Å"
            )
        return self


def _uneven(section: DetectorSection) -> bool:
    return bool(section.gain_variation or section.dead_pixels or section.hot_pixels)


def read_config(path: str | Path) -> RunConfig:
    """Run description of a YAML file.

    Raises
    ------
    ConfigError
        When the file is missing, is not YAML, or has an unknown key, a key twice or a value out of bounds.
    """
    given = read_yaml(path)
    try:
        return RunConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {explain(e)}" for e in error.errors())) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Raises
    ------
    ConfigError
        When the file is missing, is not YAML, has a key twice, or has no keys.
    """
    path = Path(path)
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Write one with `cryosim config new`.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 32nd of a month, for one
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected keys such as seed and specimen, got {type(given).__name__}.")
    return given


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The configuration with some sections replaced.

    Raises
    ------
    ConfigError
        When they do not go together.
    """
    try:
        return RunConfig.model_validate(config.model_dump() | sections)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(e) for e in error.errors())) from error


def config_text(config: RunConfig) -> str:
    """The configuration as commented YAML that `read_config` takes back."""
    return "\n".join(_lines(config, 0)) + "\n"


def depth(config: RunConfig) -> float:
    """Of the slab with all that stands on it in the field of the box, or of the box where that is deeper [Å]."""
    section = config.specimen
    return max(section.size[2], section.ice.thickness + 2 * _standing(section) if section.ice else 0.0)


def _standing(section: SpecimenSection) -> float:
    """Height above the mean surface to which platinum and crystals of ice reach [Å]: 1.5 radii of the largest."""
    highest = section.lamella.platinum + (1.5 * section.contamination.radii[1] if section.contamination.crystals else 0)
    slope = math.tan(math.radians(abs(section.lamella.wedge) / 2))
    return highest + slope * math.hypot(*section.size[:2]) / 2 if highest else 0.0


def volume_grid(config: RunConfig) -> tuple[tuple[int, int, int], float]:
    """Shape (z, y, x) [voxel] and voxel size [Å] of truth, labels and tomogram: all that there is fits in depth.

    A tilt axis nearer to x than to y exchanges height and width: the detector then sees the specimen lying down.
    """
    voxel = config.detector.pixel_size * config.output.binning
    ny, nx = (n // config.output.binning for n in config.detector.shape)
    if round(config.tilts.axis_angle / 90) % 2:
        ny, nx = nx, ny
    return (max(1, round(depth(config) / voxel)), ny, nx), voxel


def tilt_scheme(section: TiltSection) -> TiltScheme:
    """The scheme a configuration asks for."""
    make = {
        "dose-symmetric": TiltScheme.dose_symmetric,
        "bidirectional": TiltScheme.bidirectional,
        "unidirectional": TiltScheme.unidirectional,
    }[section.scheme]
    made = make(section.extent, section.step, section.total_dose, axis_angle=section.axis_angle)
    return made.cosine_compensated(section.cosine_power).replace(frames=section.frames, dose_rate=section.dose_rate)


def true_tilts(config: RunConfig) -> TiltScheme:
    """The scheme as it comes about: with the errors of the stage, the same for the same seed."""
    scheme, section = tilt_scheme(config.tilts), config.tilts
    if not section.angle_error and not section.shift_error:
        return scheme
    draws = torch.randn(
        3, len(scheme), generator=torch.Generator().manual_seed(config.seed ^ 0x71_17), dtype=torch.float64
    )
    angles = (scheme.angles + section.angle_error * draws[0]).clamp(-89, 89)
    return scheme.replace(angles=angles, shifts=section.shift_error * draws[1:].T)


def optics(section: OpticsSection) -> Optics:
    """The optics a configuration asks for."""
    fields: dict[str, Any] = section.model_dump()
    fields |= {name: math.inf for name in ("aperture", "slit") if fields[name] is None}
    return Optics(**fields)


def detector(config: RunConfig) -> Detector:
    """The detector a configuration asks for, with the same defects for the same seed."""
    section, size = config.detector, (config.detector.shape, config.detector.pixel_size)
    made = {
        "ideal": lambda: Detector(*size),
        "falcon4i": lambda: Detector.falcon4i(*size, voltage=config.optics.voltage),
        "falcon3": lambda: Detector.falcon3(*size),
    }[section.camera]()
    names = ("frame_rate", "counting", "coincidence_radius")
    made = made.replace(**{name: value for name in names if (value := getattr(section, name)) is not None})
    if config.output.movies == "eer":
        made = made.replace(counting="binary")  # all that such a file can hold
    generator = torch.Generator().manual_seed(config.seed ^ 0xCA_3E7A)  # not the numbers that place molecules
    gain, dark = None, None
    if section.gain_variation or section.dead_pixels:
        gain = (1 + section.gain_variation * torch.randn(section.shape, generator=generator)).clamp_min(0.05)
        gain = gain * (torch.rand(section.shape, generator=generator) >= section.dead_pixels)
        gain = gain / gain[gain > 0].mean()
    if section.hot_pixels:
        dark = 0.1 * (torch.rand(section.shape, generator=generator) < section.hot_pixels)
    return made.replace(gain=gain, dark=dark)


def damage(config: RunConfig) -> Damage | None:
    """The damage a configuration asks for."""
    section = config.specimen.damage
    special = {"carboxyl": section.carboxyl_loss, "sulfur": section.sulfur_loss, "metal": section.metal_loss}
    critical = None
    if section.critical_exposure is not None:
        usual = CriticalExposure()
        scale, offset = (section.critical_exposure * number(x) for x in (usual.scale, usual.offset))
        critical = CriticalExposure(scale, usual.exponent, offset)
    losses = [special.get(name) for name in CLASSES if name not in ("solid", "deposit")]  # which do not fade
    loss = torch.tensor([section.loss if rate is None else rate for rate in losses], dtype=torch.float64)
    diffuses = config.specimen.ice is not None and config.specimen.ice.structure == "water" and section.water_diffusion
    if critical is None and not section.b_growth and not bool(loss.any()) and not diffuses:
        return None
    factor = None if critical is not None or _measured(config.optics.voltage) else 1.0
    return Damage(critical, section.b_growth, loss, section.water_diffusion, factor)


def _measured(voltage: float) -> bool:
    """Whether it is known how much damage an electron of this voltage [kV] does."""
    try:
        voltage_factor(voltage)
    except ValueError:
        return False
    return True


def motion(config: RunConfig) -> Motion | None:
    """The motion a configuration asks for."""
    section, doses, frames = config.specimen.motion, tilt_scheme(config.tilts).doses, config.tilts.frames
    extent = 2 * max(config.specimen.size[:2])
    generator = torch.Generator().manual_seed(config.seed ^ 0x0D21F7)
    nodes = max(17, math.ceil(extent / section.correlation) + 1)
    parts = []
    if section.drift:
        drift = {"distance": section.drift, "settling": section.settling}
        parts.append(stage_drift(doses, frames, **drift, generator=generator))
    if section.velocity:
        wander = {"velocity": section.velocity, "correlation": section.correlation}
        parts.append(beam_induced_motion(doses, frames, extent, **wander, nodes=nodes, generator=generator))
    if section.doming:
        dome = {"height": section.doming, "radius": section.hole_radius}
        parts.append(doming(doses, frames, extent, **dome, nodes=nodes))
    return functools.reduce(operator.add, parts) if parts else None


def ice(config: RunConfig) -> Ice | None:
    """The ice a configuration asks for."""
    section = config.specimen.ice
    if section is None:
        return None
    relief, lamella = None, config.specimen.lamella
    if section.roughness > 0 or lamella.wedge or lamella.curtains > 0:
        grid, tilt = sampling(config), math.radians(config.tilts.extent)
        extent = math.hypot(*grid.shape) * grid.pixel_size / math.cos(tilt) + 2 * section.thickness * math.tan(tilt)
        generator = torch.Generator().manual_seed(config.seed ^ 0x5EA_1CE)  # not the numbers that place molecules
        if section.roughness > 0:
            relief = rough_relief(extent, section.roughness, section.correlation, generator=generator)
        else:
            relief = _milled(lamella, section.thickness, extent, generator)
    return Ice(section.thickness, section.inner_potential, relief, section.structure, config.seed)


def _milled(section: LamellaSection, thickness: float, extent: float, generator: torch.Generator) -> Relief:
    """Surfaces of a lamella of a mean thickness [Å], over an extent [Å]."""
    grows = extent * math.tan(math.radians(abs(section.wedge)) / 2)
    if grows >= thickness:
        raise ValueError(
            f"specimen.lamella.wedge: ice of {thickness:g} Å that thickens at {abs(section.wedge):g} degrees ends "
            f"within the {extent:.0f} Å that are seen. Take thicker ice or a smaller angle."
        )
    return wedge(
        extent,
        thickness - grows,
        thickness + grows,
        axis_angle=section.direction + (180 if section.wedge < 0 else 0),
        curtains=section.curtains,
        generator=generator,
    )


def absorption(section: SpecimenSection) -> Absorption | None:
    """The absorption a configuration asks for."""
    if section.mean_free_path is None:
        return None
    medium = section.ice.mean_free_path if section.ice else None
    return Absorption(medium or ICE, section.mean_free_path)


def sampling(config: RunConfig) -> Sampling:
    """The grid a configuration asks for, with `sampling_for`'s choice where it asks for none."""
    chosen = {k: v for k, v in config.sampling.model_dump().items() if v is not None}
    return sampling_for(
        Detector(config.detector.shape, config.detector.pixel_size),
        optics(config.optics),
        **chosen,
        dtype=torch.float32,
    )


class _Loader(yaml.SafeLoader):
    """Of plain YAML, but a key that stands twice is an error: one of its values would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                "while reading a section", node.start_mark, f"the key {twice} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def explain(error: Any, model: type[BaseModel] = RunConfig) -> str:
    """One sentence for one of pydantic's errors about a `model`, with the nearest name for an unknown key."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        if model is RunConfig and key == "dataset":
            return "unknown key dataset. It describes many runs: `cryosim dataset` makes them."
        *section, last = error["loc"]
        near = difflib.get_close_matches(str(last), sorted(_keys(model, section)), n=1)
        nearest = f"; did you mean {near[0]}?" if near else "."
        return f"unknown key {key}{nearest} `cryosim config new` shows every key there is."
    said = error["msg"].removeprefix("Value error, ").rstrip(".")
    got = "" if error["type"] == "value_error" else f", got {short_repr(error['input'])}"
    return f"{key}: {said}{got}." if key else f"{said}{got}."


def _keys(annotation: Any, place: Sequence[str | int]) -> set[str]:
    """Keys of the section that lies at `place` below the type `annotation`."""
    models = _models(annotation)
    if not place:
        return {name for model in models for name in model.model_fields}
    head, *rest = place
    below = [m.model_fields[head].annotation for m in models if isinstance(head, str) and head in m.model_fields]
    if not below:  # a place in a list, or which of several kinds of section it is
        return _keys(annotation, rest)
    return set().union(*(_keys(inner, rest) for inner in below))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Sections that a type names: itself, or what is in its brackets."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _lines(section: BaseModel, depth: int) -> list[str]:
    pad, lines = "  " * depth, []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if field.description:
            lines.append(f"{pad}# {field.description}")
        if isinstance(value, BaseModel):
            lines += [f"{pad}{name}:", *_lines(value, depth + 1)]
        elif isinstance(value, list) and not value:
            lines.append(f"{pad}{name}: []")
            for model in _models(field.annotation)[:1]:  # a list of sections: one of them as an example
                first, *rest = _lines(model(), depth + 2)
                lines += [f"{pad}# for example:", f"{pad}#   - {first.lstrip()}"]
                lines += [f"{pad}# {line[len(pad) :]}" for line in rest]
        elif isinstance(value, list) and isinstance(value[0], BaseModel):
            lines.append(f"{pad}{name}:")
            for entry in value:
                first, *rest = _lines(entry, depth + 2)
                lines += [f"{pad}  - {first.lstrip()}", *rest]  # a comment may follow the dash
        else:
            shown = list(value) if isinstance(value, tuple) else value
            lines.append(f"{pad}{name}: {_scalar(shown)}")
    return lines


def _scalar(value: Any) -> str:
    """A value on one line of YAML, however long it is."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    dumped = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=math.inf, allow_unicode=True)
    return dumped.splitlines()[0]
