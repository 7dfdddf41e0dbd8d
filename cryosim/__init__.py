"""cryosim: from atoms to cryo-electron tilt series.

The names below are loaded when they are first used, so that `cryosim --help` need not load torch. Files are read and
written by `cryosim.io`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryosim import io as io
    from cryosim.acquisition.series import TiltSeries as TiltSeries
    from cryosim.acquisition.simulate import Sampling as Sampling
    from cryosim.acquisition.simulate import expected_exposure as expected_exposure
    from cryosim.acquisition.simulate import sampling_for as sampling_for
    from cryosim.acquisition.simulate import simulate as simulate
    from cryosim.acquisition.tilts import TiltScheme as TiltScheme
    from cryosim.core.constants import interaction_constant as interaction_constant
    from cryosim.core.constants import wavelength as wavelength
    from cryosim.core.volume import Volume as Volume
    from cryosim.microscope.detector import Detector as Detector
    from cryosim.microscope.exposure import expected_counts as expected_counts
    from cryosim.microscope.imaging import image as image
    from cryosim.microscope.optics import Optics as Optics
    from cryosim.microscope.optics import ctf as ctf
    from cryosim.microscope.scattering import multislice as multislice
    from cryosim.microscope.scattering import projection as projection
    from cryosim.specimen.atoms import Atoms as Atoms
    from cryosim.specimen.potential import Slices as Slices
    from cryosim.specimen.potential import potential_slices as potential_slices
    from cryosim.specimen.potential_volume import potential_volume as potential_volume
    from cryosim.specimen.specimen import Ice as Ice
    from cryosim.specimen.specimen import Poses as Poses
    from cryosim.specimen.specimen import Specimen as Specimen
    from cryosim.specimen.specimen import place_randomly as place_randomly
    from cryosim.specimen.specimen import tilted_slices as tilted_slices

_HOMES = {
    "acquisition.series": ["TiltSeries"],
    "acquisition.simulate": ["Sampling", "expected_exposure", "sampling_for", "simulate"],
    "acquisition.tilts": ["TiltScheme"],
    "core.constants": ["interaction_constant", "wavelength"],
    "core.volume": ["Volume"],
    "microscope.detector": ["Detector"],
    "microscope.exposure": ["expected_counts"],
    "microscope.imaging": ["image"],
    "microscope.optics": ["Optics", "ctf"],
    "microscope.scattering": ["multislice", "projection"],
    "specimen.atoms": ["Atoms"],
    "specimen.potential": ["Slices", "potential_slices"],
    "specimen.potential_volume": ["potential_volume"],
    "specimen.specimen": ["Ice", "Poses", "Specimen", "place_randomly", "tilted_slices"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "io"])  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "io":
        return import_module("cryosim.io")
    if name in _HOME_OF:
        value = getattr(import_module(f"cryosim.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'cryosim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
