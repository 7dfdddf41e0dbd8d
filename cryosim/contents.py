"""Sections of a run description that tell what stands in the ice and on it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cryosim.section import Direction, Length, Section


def _with_length(axis: Direction) -> Direction:
    if not any(axis):
        raise ValueError(f"expected a direction (x, y, z), got {axis}")
    return axis


_Axis = Annotated[Direction, AfterValidator(_with_length)]


class InterfaceSection(Section):
    fraction: float = Field(default=0.0, ge=0, le=1)
    """Of the copies that stick to the surfaces of the ice [1]."""
    side: Literal["both", "top", "bottom"] = "both"
    """Top is where the beam leaves."""
    depth: float = Field(default=20.0, ge=0)
    """Their nearest atom is up to so far from the surface [Å]."""
    axis: _Axis = (0.0, 0.0, 1.0)
    """(x, y, z) of the molecule that points out of the ice [1]."""
    spread: float = Field(default=15.0, gt=0)
    """Standard deviation of the axis about the normal [deg]."""


class Molecule(Section):
    structure: str = Field(default="apoferritin", min_length=1)
    """A structure file (.pdb, .cif, .gz), or the name of a packaged one: apoferritin, ubiquitin."""
    assembly: int | None = Field(default=None, ge=1)
    """Biological assembly to build from the file's operators; null takes the atoms as they stand."""
    chains: list[str] | None = Field(default=None, min_length=1)
    """Of the file, those to keep, by name; null takes all."""
    copies: int = Field(default=1, ge=0)
    """How many to place, where no abundance is given."""
    abundance: float | None = Field(default=None, gt=0)
    """Number of copies relative to others with an abundance, to fill specimen.occupancy [1]; null takes copies."""
    name: str | None = Field(default=None, pattern=r"^\w[\w .-]*$", max_length=60)
    """In the files of poses and labels; null takes the structure's."""
    interface: InterfaceSection = InterfaceSection()
    """How they stick to the air-water interfaces."""


class Embedded(Section):
    structure: str = Field(default="ubiquitin", min_length=1)
    """A structure file or the name of a packaged one."""
    assembly: int | None = Field(default=None, ge=1)
    """Biological assembly; null takes the atoms as they stand."""
    chains: list[str] | None = Field(default=None, min_length=1)
    """Of the file, those to keep, by name; null takes all."""
    copies: int = Field(default=1, ge=0)
    """In each membrane."""
    axis: _Axis = (0.0, 0.0, 1.0)
    """(x, y, z) of the molecule that stands along the outward normal [1]."""
    height: float = 0.0
    """Of its centre above the middle of the bilayer, outwards [Å]."""


class MembraneSection(Section):
    shape: Literal["sphere", "ellipsoid", "torus", "vesicle", "patch"] = "vesicle"
    """A vesicle is a sphere with the undulations of a bilayer; a patch is a sheet."""
    copies: int = Field(default=1, ge=0)
    """How many; irregular ones are each drawn anew."""
    radius: float = Field(default=200.0, gt=0)
    """Of the middle of the bilayer; of a torus, of its circle; half the side of a patch [Å]."""
    aspect: tuple[Length, Length, Length] = (1.0, 1.0, 1.3)
    """Half axes (x, y, z) of an ellipsoid over the radius [1]."""
    tube: float = Field(default=90.0, gt=0)
    """Radius of the tube of a torus [Å]."""
    bending: float = Field(default=20.0, gt=0)
    """Bending modulus of vesicles and patches over the thermal energy [1]."""
    amplitude: float | None = Field(default=None, ge=0, lt=0.8)
    """Standard deviation of the radius of a vesicle over its mean [1]; null takes what bending makes, 0.04 for 20."""
    degree: int = Field(default=16, ge=2, le=64)
    """Highest degree of the harmonics that shape a vesicle; for an amplitude of 0.1 take 8, for 0.2 take 4."""
    spacing: float | None = Field(default=None, ge=4, le=20)
    """Of the sites that stand for lipids [Å]; null takes one a lipid."""
    embedded: list[Embedded] = Field(default=[])
    """Proteins that stand in it."""


class FilamentSection(Section):
    structure: str = Field(default="ubiquitin", min_length=1)
    """Of the subunit: a structure file or the name of a packaged one."""
    assembly: int | None = Field(default=None, ge=1)
    """Biological assembly; null takes the atoms as they stand."""
    chains: list[str] | None = Field(default=None, min_length=1)
    """Of the file, those to keep, by name; null takes all."""
    symmetry: Literal["helix", "actin", "microtubule"] = "helix"
    """Actin and microtubule have their own numbers; helix takes rise, twist and cyclic."""
    offset: float | None = Field(default=None, ge=0)
    """Of the subunit's centre from the axis [Å]; null leaves the file's own frame, whose z is the axis."""
    rise: float = Field(default=27.6, gt=0)
    """From one subunit to the next along the axis [Å]."""
    twist: float = -166.6
    """From one subunit to the next about the axis, right-handed [deg]."""
    cyclic: int = Field(default=1, ge=1)
    """Subunits at every height."""
    persistence: float | None = Field(default=90000.0, gt=0)
    """Length over which its direction is kept [Å]; null is straight."""
    length: float = Field(default=600.0, gt=0)
    """[Å]."""
    copies: int = Field(default=1, ge=0)
    """How many filaments."""
    name: str | None = Field(default=None, pattern=r"^\w[\w .-]*$", max_length=60)
    """In the files of poses and labels; null takes the structure's."""


class GoldSection(Section):
    copies: int = Field(default=0, ge=0)
    """Beads in the ice."""
    diameter: float = Field(default=100.0, gt=0, le=1000)
    """[Å]."""


class CarbonSection(Section):
    thickness: float = Field(default=0.0, ge=0)
    """Of a film in the ice [Å]; 0 is none, 100 to 300 are usual."""
    hole_radius: float = Field(default=6000.0, ge=0)
    """Of the hole in it [Å]."""
    hole_centre: tuple[float, float] = (5800.0, 0.0)
    """(x, y) of the middle of the hole [Å]: its edge crosses the field where it is a radius away."""
    height: float = 0.0
    """z of the middle of the film [Å]."""


class LamellaSection(Section):
    wedge: float = Field(default=0.0, ge=-30, le=30)
    """Angle between the two surfaces of the ice [deg]."""
    direction: float = Field(default=90.0, ge=-360, le=360)
    """In which it thickens, from x towards y [deg]."""
    curtains: float = Field(default=0.0, ge=0)
    """Standard deviation of the height of ridges along that direction [Å]."""
    platinum: float = Field(default=0.0, ge=0)
    """Thickness of the sputtered layer on the side the beam leaves by [Å]; 20 to 200 are usual."""
    grain: float = Field(default=30.0, ge=10)
    """Size of its grains [Å]."""


class ContaminationSection(Section):
    crystals: int = Field(default=0, ge=0)
    """Of ice on both surfaces, in the field of view."""
    radii: tuple[float, float] = (100.0, 300.0)
    """Least and largest [Å]."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not 0 < self.radii[0] <= self.radii[1]:
            raise ValueError(f"expected radii above 0 and in order [Å], got {self.radii}")
        return self
