"""Exposure by exposure: tilt the specimen, send the wave through, count electrons."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.constants import wavelength
from cryosim.core.fourier import BAND, SamplingWarning, fast_length, number
from cryosim.core.record import Record, static
from cryosim.core.slices import SliceSource, column
from cryosim.microscope.counting import recorded_counts, sample_counts, sample_events
from cryosim.microscope.detector import Detector, detect, quantum_efficiency
from cryosim.microscope.energy_loss import ICE_LOSSES, LossSpectrum
from cryosim.microscope.events import Events, histogram
from cryosim.microscope.exposure import expected_counts
from cryosim.microscope.gain import gain_corrected
from cryosim.microscope.optics import Optics, check_per_tilt, largest_displacement
from cryosim.microscope.scattering import multislice
from cryosim.specimen.ice import ImmersedSlices
from cryosim.specimen.moment import Moment
from cryosim.specimen.motion import Motion
from cryosim.specimen.portions import Copies
from cryosim.specimen.scattering_factors import Parametrization
from cryosim.specimen.specimen import Specimen
from cryosim.specimen.tilted import tilted_slices

LARGEST_DOSE = 1e9
"""Of one exposure [e-/Å^2]; a million times what destroys any specimen, and still countable."""

LARGEST_BATCH = 2**23
"""Pixels of the simulated waves of frames that are computed side by side."""

_KEPT = 0.7
"""Share of the electrons below which a camera is told to be too slow."""

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
    copies : {"atoms", "reference"}
        As in `tilted_slices`.
    """

    shape: tuple[int, int] = static()
    pixel_size: float = static()
    thickness: float = static()
    parametrization: Parametrization = static(default="lobato")
    width: int = static(default=8)
    dtype: torch.dtype = static(default=torch.float32)
    copies: Copies = static(default="atoms")


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
    with torch.no_grad():
        slit, cc, voltage = (
            torch.as_tensor(x, dtype=torch.float64).abs()
            for x in (optics.slit, optics.chromatic_aberration, optics.voltage)
        )
        loss = torch.clamp(slit / 2, max=_USUAL_LOSS)  # [eV]
        chromatic = float((1e4 * cc * loss / voltage).max())  # [Å] of defocus
    return largest_displacement(optics, edge) + wave * edge * chromatic


def expected_frames(
    specimen: Specimen,
    tilts: TiltScheme,
    optics: Optics,
    detector: Detector,
    which: int,
    frames: Sequence[int] | None = None,
    *,
    sampling: Sampling | None = None,
    scattering: Callable[[SliceSource, Optics], torch.Tensor] = multislice,
    losses: LossSpectrum = ICE_LOSSES,
    supersampling: int = 1,
) -> torch.Tensor:
    """Expected counts (frame, y, x) [e-/px] in the frames of exposure `which`; differentiable.

    Parameters
    ----------
    which : int
        Exposure.
    frames : sequence of int, optional
        Which of its frames; all when left out.
    supersampling : int
        As in `expected_counts`.

    The other arguments and errors are those of `simulate`.
    """
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

    def expected(moments: Sequence[Moment]) -> torch.Tensor:
        slices = _seen(specimen, tilts, which, sampling, voltage=mine.voltage, moment=moments)
        how: dict[str, Any] = {"scattering": scattering, "losses": losses, "supersampling": supersampling}
        seen = expected_counts(slices, mine, detector, dose=moments[0].during, **how)
        return seen.expand(len(moments), *seen.shape[-2:])  # also where no atom is in sight, and nothing fades

    moments = [tilts.moment(which, f) for f in (range(tilts.frames) if frames is None else frames)]
    if _constant(specimen):
        return expected(moments[:1]).expand(len(moments), -1, -1)
    most = frames_at_once(specimen, sampling)
    return torch.cat([expected(moments[i : i + most]) for i in range(0, len(moments), most)])


def frames_at_once(specimen: Specimen, sampling: Sampling) -> int:
    """How many frames are computed side by side: those of a specimen that stands still share most of the work."""
    structured = specimen.ice is not None and specimen.ice.structure == "water"
    if structured or specimen.motion is not None:
        return 1
    return max(1, LARGEST_BATCH // (sampling.shape[0] * sampling.shape[1]))


def _constant(specimen: Specimen) -> bool:
    """Whether all frames of an exposure are alike."""
    return specimen.damage is None and specimen.motion is None


def expected_exposure(
    specimen: Specimen, tilts: TiltScheme, optics: Optics, detector: Detector, which: int, **choices
) -> torch.Tensor:
    """Expected counts (y, x) [e-/px] of exposure `which`: the sum of `expected_frames`, whose arguments it takes."""
    return expected_frames(specimen, tilts, optics, detector, which, **choices).sum(0)


def projected_potential(
    specimen: Specimen, tilts: TiltScheme, detector: Detector, which: int, *, sampling: Sampling
) -> torch.Tensor:
    """Potential (y, x) [V·Å] of the fresh molecules above the ice, along the beam: no lens, no noise.

    Parameters
    ----------
    specimen : Specimen
    tilts : TiltScheme
    detector : Detector
        Whose pixels it is sampled on, as an ideal camera of them would.
    which : int
        Exposure.
    sampling : Sampling
    """
    fresh = specimen.replace(absorption=None, damage=None, motion=None)
    slices = _seen(fresh, tilts, which, sampling)
    return detect(column(slices.atoms), sampling.pixel_size, Detector(detector.shape, detector.pixel_size))


def _seen(specimen: Specimen, tilts: TiltScheme, which: int, sampling: Sampling, **more: Any) -> ImmersedSlices:
    """Slices of exposure `which`, with what more `tilted_slices` is to know."""
    return tilted_slices(
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
        copies=sampling.copies,
        **more,
    )


def _ahead(pool: ThreadPoolExecutor, work: Callable[[int], torch.Tensor], n: int, most: int) -> Iterator[torch.Tensor]:
    """work(0), ..., work(n - 1) in order, computed by the pool with no more than `most` waiting to be taken."""
    waiting = deque(pool.submit(work, i) for i in range(min(most, n)))
    for i in range(len(waiting), n + len(waiting)):
        done = waiting.popleft().result()
        if i < n:
            waiting.append(pool.submit(work, i))
        yield done


def _check_dose_rate(tilts: TiltScheme, detector: Detector) -> None:
    """Warn where the camera is so slow that it misses many of the electrons."""
    electrons = tilts.dose_rate * number(detector.pixel_size) ** 2 * number(quantum_efficiency(detector))
    rate = torch.tensor([[electrons / detector.frame_rate]], dtype=torch.float64)  # [e- / (px · frame)]
    flat = detector.replace(shape=(1, 1), dqe=1.0, nps=None, gain=None, dark=None)
    kept = float(recorded_counts(rate, flat) / rate)
    if kept < _KEPT:
        warnings.warn(
            f"simulate: at {tilts.dose_rate:g} e-/Å^2/s the camera records {kept:.0%} of the electrons it detects, "
            f"{float(rate):.2g} per pixel in each of its frames ({detector.frame_rate:g} a second). "
            f"{0.015 / float(rate) * tilts.dose_rate:.2g} e-/Å^2/s would be usual: set TiltScheme.dose_rate.",
            SamplingWarning,
            stacklevel=3,
        )


def _check_motion(motion: Motion | None, detector: Detector) -> None:
    """Warn where the specimen, which stands still within a frame, would blur by more than a pixel in it."""
    if motion is None or not any(bool((x != 0).any()) for x in (motion.drift, motion.field) if x is not None):
        return
    frames, pixel = motion.drift.shape[1], number(detector.pixel_size)
    if frames == 1:
        said, right = "moves, but exposures have one frame", "several"
    else:
        most = float(motion.drift.detach()[..., :2].diff(dim=1).norm(dim=-1).max())
        if motion.field is not None:
            most += float(motion.field.detach().diff(dim=1).norm(dim=2).max())
        if most <= pixel:
            return
        said, right = f"moves by up to {most:.3g} Å from one frame to the next", f"{math.ceil(frames * most / pixel)}"
    warnings.warn(
        f"simulate: the specimen {said}; within a frame it stands still, so its blur is left out. Right would be "
        f"{right} frames for pixels of {pixel:g} Å: set TiltScheme.frames, and make the motion for as many.",
        SamplingWarning,
        stacklevel=3,
    )


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
    movies: Callable[[int, list[Events] | torch.Tensor], None] | None = None,
    means: Callable[[int, torch.Tensor], None] | None = None,
    supersampling: int | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> TiltSeries:
    """Tilt series with counted electrons.

    The defocus needs no formula of the tilt: atoms that the tilt lifts to a height z are seen at defocus + z. Damage
    and motion of the specimen act in each of the `TiltScheme.frames` of an exposure, in the order of exposure.

    Parameters
    ----------
    specimen : Specimen
    tilts : TiltScheme
        Exposures in their order.
    optics : Optics
        Fields () or (tilt,).
    detector : Detector
        How electrons are counted.
    generator : torch.Generator, optional
        Of the counts; the same seed gives the same counts.
    sampling : Sampling, optional
        `sampling_for(detector, optics)` when left out.
    scattering : callable
        `multislice`, or another step of the ladder.
    losses : LossSpectrum
        Of the electrons that lose energy, where `optics.slit` lets them pass.
    movies : callable, optional
        Called with (exposure, its frames) once each exposure is counted: counts (frame, y, x) [e-/px] as the camera
        gives them, or, with `supersampling`, a list of one `Events` a frame, of the camera frames taken in it.
    means : callable, optional
        Called with (exposure, expected counts (y, x) [e-/px]) likewise: the image without noise.
    supersampling : int, optional
        Count single electrons and tell so many places along each side of a pixel; 4 is what EER files hold. Detail
        beyond the pixels' Nyquist frequency then comes in, as it does in a camera, and aliases in their sums. An image
        of 4096^2 needs some 12 GB for each worker.
    workers : int
        Exposures computed at once, each by a thread of its own. Worth more than threads inside a transform of these
        sizes: set torch's own to one then.
    progress : callable, optional
        Called with (exposures done, exposures in all).

    Returns
    -------
    TiltSeries
        Images (tilt, y, x) [e-/px]: whole numbers, the sums of the frames as they are; divided by the gain where the
        detector has one, and without its defects. The likelihood of a detector with gain is that of what `movies` gets.

    Warns
    -----
    SamplingWarning
        When the dose rate is so high that the camera misses more than 30 % of the electrons, or the specimen moves by
        more than a pixel from frame to frame.

    Raises
    ------
    ValueError
        When a dose is beyond counting, or from the parts.
    """
    if not (tilts.doses <= LARGEST_DOSE).all():
        raise ValueError(f"simulate: expected TiltScheme.doses between 0 and {LARGEST_DOSE:g} e-/Å^2 each.")
    sampling = sampling or sampling_for(detector, optics)
    _check_dose_rate(tilts, detector)
    _check_motion(specimen.motion, detector)
    fine = 1 if supersampling is None else supersampling
    how: dict[str, Any] = {"sampling": sampling, "scattering": scattering, "losses": losses, "supersampling": fine}
    seen = tilts.replace(frames=1) if _constant(specimen) and movies is None and supersampling is None else tilts
    together = seen.frames if _constant(specimen) else frames_at_once(specimen, sampling)
    parts = [range(i, min(i + together, seen.frames)) for i in range(0, seen.frames, together)]

    def expose(n: int) -> torch.Tensor:
        with torch.no_grad():
            which, part = divmod(n, len(parts))
            return expected_frames(specimen, seen, optics, detector, which, parts[part], **how)

    def count(which: int, mean: torch.Tensor) -> tuple[torch.Tensor, Events | None]:
        n = seen.camera_frames(which, detector.frame_rate)
        if supersampling is None:
            return sample_counts(mean, detector, n, generator=generator), None
        events = sample_events(mean, detector, n, supersampling=supersampling, generator=generator)
        return histogram(events).to(mean), events

    images = []
    pool = ThreadPoolExecutor(workers)
    try:
        computed = _ahead(pool, expose, len(tilts) * len(parts), workers)
        for which in range(len(tilts)):
            total, kept, mean_total = torch.zeros(()), [], torch.zeros(())
            for mean in itertools.chain.from_iterable(next(computed) for _ in parts):  # frame by frame
                counts, events = count(which, mean)
                total, mean_total = total + counts, mean_total + mean
                kept += [] if movies is None else [counts if events is None else events]
            if movies is not None:
                movies(which, torch.stack(kept) if supersampling is None else kept)
            if means is not None:
                means(which, torch.nn.functional.avg_pool2d(mean_total[None], fine, divisor_override=1)[0])
            images.append(gain_corrected(total, detector))
            if progress:
                progress(len(images), len(tilts))
    finally:
        pool.shutdown(cancel_futures=True)
    return TiltSeries(torch.stack(images), detector.pixel_size, tilts, optics)
