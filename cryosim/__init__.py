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
    from cryosim.core.fourier import SamplingWarning as SamplingWarning
    from cryosim.core.inelastic import absorption_potential as absorption_potential
    from cryosim.core.inelastic import inelastic_contrast as inelastic_contrast
    from cryosim.core.inelastic import log_ratio_thickness as log_ratio_thickness
    from cryosim.core.inelastic import mean_free_path as mean_free_path
    from cryosim.core.volume import Volume as Volume
    from cryosim.microscope.coherence import partially_coherent_image as partially_coherent_image
    from cryosim.microscope.detector import Detector as Detector
    from cryosim.microscope.energy_loss import LossSpectrum as LossSpectrum
    from cryosim.microscope.energy_loss import energy_filtered_image as energy_filtered_image
    from cryosim.microscope.exposure import expected_counts as expected_counts
    from cryosim.microscope.imaging import image as image
    from cryosim.microscope.ladder import ScatteringError as ScatteringError
    from cryosim.microscope.ladder import depth_of_field as depth_of_field
    from cryosim.microscope.ladder import scattering_error as scattering_error
    from cryosim.microscope.optics import Optics as Optics
    from cryosim.microscope.optics import ctf as ctf
    from cryosim.microscope.optics import envelope as envelope
    from cryosim.microscope.optics import transfer as transfer
    from cryosim.microscope.scattering import absorbed_depth as absorbed_depth
    from cryosim.microscope.scattering import ewald as ewald
    from cryosim.microscope.scattering import multislice as multislice
    from cryosim.microscope.scattering import projection as projection
    from cryosim.microscope.scattering import rytov as rytov
    from cryosim.specimen.atoms import Atoms as Atoms
    from cryosim.specimen.ice import Absorption as Absorption
    from cryosim.specimen.ice import Ice as Ice
    from cryosim.specimen.ice import Relief as Relief
    from cryosim.specimen.ice import meniscus as meniscus
    from cryosim.specimen.ice import rough_relief as rough_relief
    from cryosim.specimen.potential import Slices as Slices
    from cryosim.specimen.potential import potential_slices as potential_slices
    from cryosim.specimen.potential_volume import potential_volume as potential_volume
    from cryosim.specimen.specimen import Poses as Poses
    from cryosim.specimen.specimen import Specimen as Specimen
    from cryosim.specimen.specimen import flooded as flooded
    from cryosim.specimen.specimen import place_randomly as place_randomly
    from cryosim.specimen.specimen import tilted_slices as tilted_slices
    from cryosim.specimen.water import WaterField as WaterField
    from cryosim.specimen.water import water_molecules as water_molecules

_HOMES = {
    "acquisition.series": ["TiltSeries"],
    "acquisition.simulate": ["Sampling", "expected_exposure", "sampling_for", "simulate"],
    "acquisition.tilts": ["TiltScheme"],
    "core.constants": ["interaction_constant", "wavelength"],
    "core.fourier": ["SamplingWarning"],
    "core.inelastic": ["absorption_potential", "inelastic_contrast", "log_ratio_thickness", "mean_free_path"],
    "core.volume": ["Volume"],
    "microscope.coherence": ["partially_coherent_image"],
    "microscope.detector": ["Detector"],
    "microscope.energy_loss": ["LossSpectrum", "energy_filtered_image"],
    "microscope.exposure": ["expected_counts"],
    "microscope.imaging": ["image"],
    "microscope.ladder": ["ScatteringError", "depth_of_field", "scattering_error"],
    "microscope.optics": ["Optics", "ctf", "envelope", "transfer"],
    "microscope.scattering": ["absorbed_depth", "ewald", "multislice", "projection", "rytov"],
    "specimen.atoms": ["Atoms"],
    "specimen.ice": ["Absorption", "Ice", "Relief", "meniscus", "rough_relief"],
    "specimen.potential": ["Slices", "potential_slices"],
    "specimen.potential_volume": ["potential_volume"],
    "specimen.specimen": ["Poses", "Specimen", "flooded", "place_randomly", "tilted_slices"],
    "specimen.water": ["WaterField", "water_molecules"],
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
