"""cryosim: from atoms to cryo-electron tilt series.

The names below are loaded when they are first used, so that `cryosim --help` need not load torch. Files are read and
written by `cryosim.io`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryosim import io as io
    from cryosim.acquisition.frames import dose_weights as dose_weights
    from cryosim.acquisition.frames import sum_frames as sum_frames
    from cryosim.acquisition.series import TiltSeries as TiltSeries
    from cryosim.acquisition.simulate import Sampling as Sampling
    from cryosim.acquisition.simulate import expected_exposure as expected_exposure
    from cryosim.acquisition.simulate import expected_frames as expected_frames
    from cryosim.acquisition.simulate import projected_potential as projected_potential
    from cryosim.acquisition.simulate import sampling_for as sampling_for
    from cryosim.acquisition.simulate import simulate as simulate
    from cryosim.acquisition.tilts import TiltScheme as TiltScheme
    from cryosim.core.constants import interaction_constant as interaction_constant
    from cryosim.core.constants import wavelength as wavelength
    from cryosim.core.fourier import SamplingWarning as SamplingWarning
    from cryosim.core.fourier import shifted as shifted
    from cryosim.core.inelastic import absorption_potential as absorption_potential
    from cryosim.core.inelastic import inelastic_contrast as inelastic_contrast
    from cryosim.core.inelastic import log_ratio_thickness as log_ratio_thickness
    from cryosim.core.inelastic import mean_free_path as mean_free_path
    from cryosim.core.volume import Volume as Volume
    from cryosim.microscope.camera_curves import measured_mtf as measured_mtf
    from cryosim.microscope.camera_curves import measured_nps as measured_nps
    from cryosim.microscope.coherence import partially_coherent_image as partially_coherent_image
    from cryosim.microscope.counting import recorded_counts as recorded_counts
    from cryosim.microscope.counting import sample_counts as sample_counts
    from cryosim.microscope.counting import sample_events as sample_events
    from cryosim.microscope.counting import thin as thin
    from cryosim.microscope.detector import Detector as Detector
    from cryosim.microscope.energy_loss import LossSpectrum as LossSpectrum
    from cryosim.microscope.energy_loss import energy_filtered_image as energy_filtered_image
    from cryosim.microscope.events import Events as Events
    from cryosim.microscope.events import alternating as alternating
    from cryosim.microscope.events import histogram as histogram
    from cryosim.microscope.exposure import expected_counts as expected_counts
    from cryosim.microscope.gain import gain_corrected as gain_corrected
    from cryosim.microscope.gain import measure_gain as measure_gain
    from cryosim.microscope.imaging import image as image
    from cryosim.microscope.ladder import ScatteringError as ScatteringError
    from cryosim.microscope.ladder import depth_of_field as depth_of_field
    from cryosim.microscope.ladder import scattering_error as scattering_error
    from cryosim.microscope.likelihood import event_negative_log_likelihood as event_negative_log_likelihood
    from cryosim.microscope.likelihood import fisher_information as fisher_information
    from cryosim.microscope.likelihood import gaussian_counts as gaussian_counts
    from cryosim.microscope.likelihood import negative_log_likelihood as negative_log_likelihood
    from cryosim.microscope.likelihood import score_function as score_function
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
    from cryosim.specimen.atoms import Poses as Poses
    from cryosim.specimen.crowding import Crowd as Crowd
    from cryosim.specimen.crowding import Interface as Interface
    from cryosim.specimen.crowding import Species as Species
    from cryosim.specimen.crowding import crowd as crowd
    from cryosim.specimen.damage import CriticalExposure as CriticalExposure
    from cryosim.specimen.damage import Damage as Damage
    from cryosim.specimen.damage import critical_exposure as critical_exposure
    from cryosim.specimen.damage import fading as fading
    from cryosim.specimen.damage import optimal_exposure as optimal_exposure
    from cryosim.specimen.filaments import Helix as Helix
    from cryosim.specimen.filaments import filament as filament
    from cryosim.specimen.filaments import helix as helix
    from cryosim.specimen.filaments import microtubule as microtubule
    from cryosim.specimen.filaments import place_filaments as place_filaments
    from cryosim.specimen.ice import Absorption as Absorption
    from cryosim.specimen.ice import Ice as Ice
    from cryosim.specimen.ice import Relief as Relief
    from cryosim.specimen.ice import meniscus as meniscus
    from cryosim.specimen.ice import rough_relief as rough_relief
    from cryosim.specimen.labels import Labels as Labels
    from cryosim.specimen.labels import label_volumes as label_volumes
    from cryosim.specimen.lipids import Lipid as Lipid
    from cryosim.specimen.lipids import bilayer_potential as bilayer_potential
    from cryosim.specimen.membranes import cleared as cleared
    from cryosim.specimen.membranes import embed as embed
    from cryosim.specimen.membranes import membrane as membrane
    from cryosim.specimen.moment import Moment as Moment
    from cryosim.specimen.motion import Motion as Motion
    from cryosim.specimen.motion import beam_induced_motion as beam_induced_motion
    from cryosim.specimen.motion import doming as doming
    from cryosim.specimen.motion import stage_drift as stage_drift
    from cryosim.specimen.potential import Slices as Slices
    from cryosim.specimen.potential import potential_slices as potential_slices
    from cryosim.specimen.potential_volume import potential_volume as potential_volume
    from cryosim.specimen.solids import carbon_film as carbon_film
    from cryosim.specimen.solids import gold_bead as gold_bead
    from cryosim.specimen.solids import ice_crystals as ice_crystals
    from cryosim.specimen.solids import platinum_layer as platinum_layer
    from cryosim.specimen.solids import wedge as wedge
    from cryosim.specimen.specimen import Specimen as Specimen
    from cryosim.specimen.specimen import flooded as flooded
    from cryosim.specimen.specimen import place_randomly as place_randomly
    from cryosim.specimen.surfaces import Ellipsoid as Ellipsoid
    from cryosim.specimen.surfaces import Torus as Torus
    from cryosim.specimen.surfaces import irregular_vesicle as irregular_vesicle
    from cryosim.specimen.surfaces import patch as patch
    from cryosim.specimen.surfaces import sphere as sphere
    from cryosim.specimen.tilted import tilted_slices as tilted_slices
    from cryosim.specimen.water import WaterField as WaterField
    from cryosim.specimen.water import water_molecules as water_molecules
    from cryosim.training import SimulatedTiltSeries as SimulatedTiltSeries
    from cryosim.training import TiltSeriesDataset as TiltSeriesDataset

_HOMES = {
    "acquisition.frames": ["dose_weights", "sum_frames"],
    "acquisition.series": ["TiltSeries"],
    "acquisition.simulate": [
        "Sampling",
        "expected_exposure",
        "expected_frames",
        "projected_potential",
        "sampling_for",
        "simulate",
    ],
    "acquisition.tilts": ["TiltScheme"],
    "core.constants": ["interaction_constant", "wavelength"],
    "core.fourier": ["SamplingWarning", "shifted"],
    "core.inelastic": ["absorption_potential", "inelastic_contrast", "log_ratio_thickness", "mean_free_path"],
    "core.volume": ["Volume"],
    "microscope.camera_curves": ["measured_mtf", "measured_nps"],
    "microscope.coherence": ["partially_coherent_image"],
    "microscope.counting": ["recorded_counts", "sample_counts", "sample_events", "thin"],
    "microscope.detector": ["Detector"],
    "microscope.energy_loss": ["LossSpectrum", "energy_filtered_image"],
    "microscope.events": ["Events", "alternating", "histogram"],
    "microscope.exposure": ["expected_counts"],
    "microscope.gain": ["gain_corrected", "measure_gain"],
    "microscope.imaging": ["image"],
    "microscope.ladder": ["ScatteringError", "depth_of_field", "scattering_error"],
    "microscope.likelihood": [
        "event_negative_log_likelihood",
        "fisher_information",
        "gaussian_counts",
        "negative_log_likelihood",
        "score_function",
    ],
    "microscope.optics": ["Optics", "ctf", "envelope", "transfer"],
    "microscope.scattering": ["absorbed_depth", "ewald", "multislice", "projection", "rytov"],
    "specimen.atoms": ["Atoms", "Poses"],
    "specimen.crowding": ["Crowd", "Interface", "Species", "crowd"],
    "specimen.damage": ["CriticalExposure", "Damage", "critical_exposure", "fading", "optimal_exposure"],
    "specimen.filaments": ["Helix", "filament", "helix", "microtubule", "place_filaments"],
    "specimen.ice": ["Absorption", "Ice", "Relief", "meniscus", "rough_relief"],
    "specimen.labels": ["Labels", "label_volumes"],
    "specimen.lipids": ["Lipid", "bilayer_potential"],
    "specimen.membranes": ["cleared", "embed", "membrane"],
    "specimen.moment": ["Moment"],
    "specimen.motion": ["Motion", "beam_induced_motion", "doming", "stage_drift"],
    "specimen.potential": ["Slices", "potential_slices"],
    "specimen.potential_volume": ["potential_volume"],
    "specimen.solids": ["carbon_film", "gold_bead", "ice_crystals", "platinum_layer", "wedge"],
    "specimen.specimen": ["Specimen", "flooded", "place_randomly"],
    "specimen.surfaces": ["Ellipsoid", "Torus", "irregular_vesicle", "patch", "sphere"],
    "specimen.tilted": ["tilted_slices"],
    "specimen.water": ["WaterField", "water_molecules"],
    "training": ["SimulatedTiltSeries", "TiltSeriesDataset"],
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
