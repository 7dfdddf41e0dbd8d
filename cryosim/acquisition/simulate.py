"""Exposure by exposure: tilt the specimen, send the wave through, count electrons."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.constants import wavelength
from cryosim.core.fourier import BAND, fast_length, number
from cryosim.core.record import Record, static
from cryosim.microscope.detector import Detector
from cryosim.microscope.energy_loss import ICE_LOSSES, LossSpectrum
from cryosim.microscope.exposure import expected_counts
from cryosim.microscope.optics import Optics, check_per_tilt, displacement
from cryosim.microscope.scattering import SliceSource, multislice
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.scattering_factors import Parametrization
from cryosim.specimen.specimen import Specimen, assemble, tilted_slices

LARGEST_DOSE = 1e9
"""Of one exposure [e-/Å^2]; a million times what destroys any specimen, and still countable."""

_USUAL_LOSS = 50.0
"""Energy [eV] that few electrons lose more than: those that do make an even background."""

LARGEST_FIELD = 16384
"""Side of the simulated field [px] beyond which `sampling_for` asks whether it is meant: one wave has 2 GiB there."""


class Sampling(Record):
    """The grid the wave is computed on. Made by `sampling_for`, or by hand.

    Attributes
    ----------
    shape : (int, int)
        (y, x) [px].
    pixel_size : float
        [Å].
    thickness : float
        Of a slice [Å].
    parametrization : {"lobato", "kirkland", "peng"}
    width : int
        As in `potential_slices`.
    dtype : torch.dtype
    """

    shape: tuple[int, int] = static()
    pixel_size: float = static()
    thickness: float = static()
    parametrization: Parametrization = static("lobato")
    width: int = static(8)
    dtype: torch.dtype = static(torch.float32)


def sampling_for(detector: Detector, optics: Optics, **choices) -> Sampling:
    """Sampling that gives the detector its full band, without edges in sight.

    pixel size
        two thirds of the detector's over the square root of 2, so that what multislice keeps, a disk, reaches the
        corners of the detector's band; scattering from beyond the disk is left out (of apoferritin's contrast, 1 to 3 %
        at detector pixels of 3 to 6 Å: choose a finer pixel where that matters);
    field
        the detector's and, on either side, as far as the lens carries a wave of the detector's Nyquist frequency: by
        defocus and aberrations, tilt of the beam, and the chromatic defocus of an average loss where the slit is open;
    thickness
        at most 10 Å, and so thin that flight through a slice turns no kept wave by more than 0.25 rad: for protein that
        is an error of 1e-3 of what is scattered, over the whole band (`tests/limits/test_slice_thickness.py`).

    Parameters
    ----------
    detector : Detector
    optics : Optics
    **choices
        Fields of `Sampling` to set instead.

    Raises
    ------
    ValueError
        When the field needs more than `LARGEST_FIELD` pixels a side and no `shape` says that this is meant.
    """
    spacing = number(detector.pixel_size)
    pixel = number(choices.get("pixel_size", BAND / math.sqrt(2) * spacing))
    wave = float(wavelength(torch.as_tensor(optics.voltage, dtype=torch.float64).detach()).max())
    defocus = float(torch.as_tensor(optics.defocus).detach().abs().max())
    margin = max(wave * defocus / (2 * spacing), _displacement(optics, 0.5 / spacing, wave)) + 10.0  # [Å]
    field = [n * spacing + 2 * margin for n in detector.shape]
    if "shape" not in choices and not max(field) <= LARGEST_FIELD * pixel:
        raise ValueError(
            f"sampling_for: expected a simulated field of at most {LARGEST_FIELD} px a side, got "
            f"{max(field) / pixel:.0f} px of {pixel:g} Å: a detector of {tuple(detector.shape)} px of "
            f"{spacing:g} Å and a margin of {margin:.0f} Å, over which a defocus of {defocus:g} Å "
            "spreads. Take larger pixels, a smaller detector or less defocus, or set the shape by hand."
        )
    edge = BAND / (2 * pixel)  # [1/Å]
    defaults = {
        "shape": tuple(fast_length(math.ceil(length / pixel)) for length in field),
        "pixel_size": pixel,
        "thickness": min(10.0, 0.25 / (math.pi * wave * edge**2)),
    }
    return Sampling(**(defaults | choices))


def _displacement(optics: Optics, edge: float, wave: float) -> float:
    """How far [Å] the lens carries detail of up to the frequency `edge` [1/Å], at the wavelength [Å]."""
    turns = torch.arange(16, dtype=torch.float64) * (math.pi / 8)
    radii = torch.linspace(0, edge, 9, dtype=torch.float64)[:, None]
    with torch.no_grad():
        moved = displacement(optics, radii * torch.cos(turns), radii * torch.sin(turns))
        slit, cc, voltage = (
            torch.as_tensor(x, dtype=torch.float64).abs()
            for x in (optics.slit, optics.chromatic_aberration, optics.voltage)
        )
        loss = torch.clamp(slit / 2, max=_USUAL_LOSS)  # [eV]
        chromatic = float((1e4 * cc * loss / voltage).max())  # [Å] of defocus
    return max(float(d.abs().max()) for d in moved) + wave * edge * chromatic


def expected_exposure(
    specimen: Specimen,
    tilts: TiltScheme,
    optics: Optics,
    detector: Detector,
    which: int,
    *,
    sampling: Sampling | None = None,
    scattering: Callable[[SliceSource, Optics], torch.Tensor] = multislice,
    losses: LossSpectrum = ICE_LOSSES,
    atoms: Atoms | None = None,
) -> torch.Tensor:
    """Expected counts (y, x) [e-/px] of exposure `which`; differentiable. Arguments as in `simulate`."""
    check_per_tilt(optics, len(tilts))
    sampling = sampling or sampling_for(detector, optics)
    which = range(len(tilts))[which]
    mine = optics.index(which)
    contrast = mine.amplitude_contrast
    if specimen.absorption is not None and isinstance(contrast, (int, float)) and contrast > 0:
        warnings.warn(
            f"Specimen.absorption and Optics.amplitude_contrast = {contrast:g} both absorb; give one of the two.",
            UserWarning,
            stacklevel=2,
        )
    slices = tilted_slices(
        specimen,
        tilts.angles[which],
        sampling.shape,
        sampling.pixel_size,
        sampling.thickness,
        axis_angle=tilts.axis_angle,
        shift=tilts.shifts[which],
        parametrization=sampling.parametrization,
        width=sampling.width,
        dtype=sampling.dtype,
        atoms=atoms,
        voltage=mine.voltage,
        frame=which,
    )
    return expected_counts(slices, mine, detector, dose=tilts.doses[which], scattering=scattering, losses=losses)


def simulate(
    specimen: Specimen,
    tilts: TiltScheme,
    optics: Optics,
    detector: Detector,
    *,
    generator: torch.Generator | None = None,
    sampling: Sampling | None = None,
    scattering: Callable[[SliceSource, Optics], torch.Tensor] = multislice,
    losses: LossSpectrum = ICE_LOSSES,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> TiltSeries:
    """Tilt series with Poisson counts.

    The defocus needs no formula of the tilt: atoms that the tilt lifts to a height z are seen at defocus + z.

    Parameters
    ----------
    specimen : Specimen
    tilts : TiltScheme
        Exposures in their order.
    optics : Optics
        Fields () or (tilt,).
    detector : Detector
    generator : torch.Generator, optional
        Of the counts; the same seed gives the same counts.
    sampling : Sampling, optional
        `sampling_for(detector, optics)` when left out.
    scattering : callable
        `multislice`, or another step of the ladder.
    losses : LossSpectrum
        Of the electrons that lose energy, where `optics.slit` lets them pass.
    workers : int
        Exposures computed at once, each by a thread of its own. Worth more than threads inside a transform of these
        sizes: set torch's own to one then.
    progress : callable, optional
        Called with (exposures done, exposures in all).

    Returns
    -------
    TiltSeries
        Images (tilt, y, x) [e-/px], whole numbers.

    Raises
    ------
    ValueError
        When a dose is negative, not a number or beyond counting, or from the parts.
    """
    if not ((tilts.doses >= 0) & (tilts.doses <= LARGEST_DOSE)).all():
        raise ValueError(f"simulate: expected TiltScheme.doses between 0 and {LARGEST_DOSE:g} e-/Å^2 each.")
    sampling = sampling or sampling_for(detector, optics)
    atoms = assemble(specimen)

    how: dict[str, Any] = {"sampling": sampling, "scattering": scattering, "losses": losses}

    def expose(i: int) -> torch.Tensor:
        with torch.no_grad():
            return expected_exposure(specimen, tilts, optics, detector, i, atoms=atoms, **how)

    images = []
    pool = ThreadPoolExecutor(workers)
    try:
        for mean in pool.map(expose, range(len(tilts))):
            images.append(torch.poisson(mean, generator=generator))
            if progress:
                progress(len(images), len(tilts))
    finally:
        pool.shutdown(cancel_futures=True)
    return TiltSeries(torch.stack(images), detector.pixel_size, tilts, optics)
