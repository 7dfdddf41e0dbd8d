"""The detector: which part of the image it sees, with which pixels, and how much of the signal and the noise it keeps.

A camera that counts electrons is described by two curves, both functions of the frequency in units of its Nyquist
frequency. A weak modulation of n electrons per pixel is recorded as `d n MTF(f)`, with d counts per electron, and
the noise of a flat image has the power `d n NPS(f)`, NPS relative to white noise of the same mean counts. Then

    DQE(f) = (signal / noise)^2 out / (signal / noise)^2 in = (d MTF)^2 n^2 / (d n NPS) / n = d MTF^2 / NPS.

With MTF(0) = 1 this gives d = DQE(0) NPS(0) (`quantum_efficiency`) and MTF^2 = DQE NNPS / DQE(0), with
NNPS = NPS / NPS(0) (`mtf`). Of independent events, each put into the pixel where it was found, the noise is white.
(McMullan et al. 2014, DOI 10.1016/j.ultramic.2014.08.002.)
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch

from cryosim.core.fourier import frequencies, half_frequencies, number, resampling_matrix, squared_frequencies
from cryosim.core.record import Record, hidden, item, static

Number = float | torch.Tensor

_FALCON_4I = {300: (0.92, 0.72, 0.50), 200: (0.91, 0.62, 0.33)}
_FALCON_3_DQE = (0.889, 0.885, 0.792, 0.541, 0.288)
_FALCON_3_MTF = (1.0, 0.861, 0.582, 0.307, 0.150)


class Detector(Record):
    """A counting detector; as it comes, an ideal one: DQE = 1 up to its Nyquist frequency and 0 beyond.

    Attributes
    ----------
    shape : (int, int)
        (y, x) [px].
    pixel_size : float or tensor ()
        At the specimen [Å].
    dqe : float or tensor () or (n,)
        Detective quantum efficiency [1] at n evenly spaced frequencies from 0 to the Nyquist frequency; one value
        holds at all. Between them log DQE is a cubic spline, even about 0; beyond, it falls on a straight line.
    nps : tensor (n,), optional
        Noise power spectrum [1] of a flat image relative to white noise of the same mean counts, sampled in the same
        way. None is white.
    gain : tensor (y, x), optional
        Sensitivity of each pixel relative to their mean [1]; 0 is a dead pixel.
    dark : tensor (y, x), optional
        Events that no electron caused [1 / (px · camera frame)]; hot pixels have many.
    coincidence_radius : float or tensor ()
        Two electrons nearer than this in one camera frame are counted as one [px].
    frame_rate : float
        Camera frames per second [1/s]. 240 is that of Falcon 4 files.
    counting : str
        "poisson", or "binary": a pixel tells of each camera frame only whether it was hit.

    Raises
    ------
    ValueError
        When there are no pixels, a size or rate is not positive, or a curve or a map cannot be one.
    """

    shape: tuple[int, int] = static()
    pixel_size: Number = item(0)
    dqe: Number = item(1, default=1.0)
    nps: torch.Tensor | None = item(1, default=None)
    gain: torch.Tensor | None = item(2, default=None)
    dark: torch.Tensor | None = item(2, default=None)
    coincidence_radius: Number = item(0, default=0.0)
    frame_rate: float = static(default=240.0)
    counting: str = static(default="poisson")

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"Detector.shape: expected two sizes (y, x) [px] of at least 1, got {tuple(self.shape)}.")
        if isinstance(self.pixel_size, (int, float)) and not self.pixel_size > 0:
            raise ValueError(f"Detector.pixel_size: expected a positive number [Å], got {self.pixel_size}.")
        if self.counting not in ("poisson", "binary"):
            raise ValueError(f'Detector.counting: expected "poisson" or "binary", got {self.counting!r}.')
        if not (self.frame_rate > 0 and math.isfinite(self.frame_rate)):
            raise ValueError(f"Detector.frame_rate: expected a positive number [1/s], got {self.frame_rate}.")
        for name, ndims in (("dqe", (0, 1)), ("nps", (1,)), ("coincidence_radius", (0,))):
            _check_shape(name, getattr(self, name), ndims)
        for name in ("gain", "dark"):
            if (value := getattr(self, name)) is not None and tuple(value.shape) != tuple(self.shape):
                raise ValueError(
                    f"Detector.{name}: expected one value per pixel, {tuple(self.shape)}, got {tuple(value.shape)}."
                )
        if hidden():
            return
        _check_values("dqe", self.dqe, "above 0 and at most 1", lambda v: (v > 0) & (v <= 1))
        _check_values("nps", self.nps, "above 0 [1]", lambda v: v > 0)
        for name, unit in (("gain", "1"), ("dark", "1 / (px · frame)"), ("coincidence_radius", "px")):
            _check_values(name, getattr(self, name), f"of at least 0 [{unit}]", lambda v: v >= 0)

    @classmethod
    def falcon4i(cls, shape: tuple[int, int], pixel_size: Number, voltage: float = 300) -> Self:
        """Falcon 4i in counting mode, binary frames at 240 per second.

        Parameters
        ----------
        shape : (int, int)
            (y, x) [px]; the sensor has 4096 x 4096.
        pixel_size : float or tensor ()
            At the specimen [Å].
        voltage : float
            300 or 200 [kV].

        Raises
        ------
        ValueError
            When the DQE at this voltage is not known.

        Source
        ------
        DQE at 0, 1/2 and 1 Nyquist as quoted by SPECTER (Yeo & Loh) from Thermo Fisher's product page; the radius
        2.394 px as fitted there to the counts of 0.15 to 31 e-/(px·s); 240 frames/s from the headers of files.
        """
        if voltage not in _FALCON_4I:
            known = " and ".join(f"{v} kV" for v in sorted(_FALCON_4I))
            raise ValueError(
                f"Detector.falcon4i: expected a voltage whose DQE is published, {known}, got {voltage:g} kV. "
                "Take the nearer of them, or give `Detector` a DQE of your own."
            )
        dqe = torch.tensor(_FALCON_4I[int(voltage)], dtype=torch.float64)
        return cls(shape, pixel_size, dqe=dqe, coincidence_radius=2.394, frame_rate=240.0, counting="binary")

    @classmethod
    def falcon3(cls, shape: tuple[int, int], pixel_size: Number) -> Self:
        """Falcon III EC in counting mode at 300 kV: its noise is coloured by the rendering of the events.

        DQE and MTF are measured curves; the noise follows from MTF^2 = DQE NNPS / DQE(0) as
        NNPS = DQE(0) MTF^2 / DQE, with NPS(0) = 1. The frame rate is left at that of `Detector`: it is no
        measured number, and without coincidence loss nothing depends on it.

        Parameters
        ----------
        shape : (int, int)
            (y, x) [px].
        pixel_size : float or tensor ()
            At the specimen [Å].

        Source
        ------
        The tables of InSilicoTEM (Vulović et al. 2013, DOI 10.1016/j.jsb.2013.05.008) at 0, 1/4, 1/2, 3/4 and 1 of the
        Nyquist frequency.
        """
        dqe = torch.tensor(_FALCON_3_DQE, dtype=torch.float64)
        nps = dqe[0] * torch.tensor(_FALCON_3_MTF, dtype=torch.float64) ** 2 / dqe
        return cls(shape, pixel_size, dqe=dqe, nps=nps)


def dqe(detector: Detector, frequency: Number) -> torch.Tensor:
    """Detective quantum efficiency (...) [1] at frequencies (...) [fraction of the Nyquist frequency]."""
    at = _as_frequency(frequency)
    return _curve(detector.dqe, at)


def nps(detector: Detector, frequency: Number) -> torch.Tensor:
    """Noise power (...) of a flat image relative to white noise of the same mean, at frequencies (...) as in `dqe`."""
    at = _as_frequency(frequency)
    return torch.ones_like(at) if detector.nps is None else _curve(detector.nps, at)


def mtf(detector: Detector, frequency: Number) -> torch.Tensor:
    """Modulation transfer sqrt(DQE NNPS / DQE(0)) (...) [1], 1 at frequency 0.

    Parameters
    ----------
    detector : Detector
    frequency : float or tensor (...)
        [fraction of the Nyquist frequency].
    """
    at = _as_frequency(frequency)
    squared = _curve(detector.dqe, at) / _first(detector.dqe)
    if detector.nps is not None:
        squared = squared * _curve(detector.nps, at) / _first(detector.nps)
    return squared.sqrt()


def quantum_efficiency(detector: Detector) -> Number:
    """Counts per incident electron [1]: d = DQE(0) NPS(0), for DQE = d MTF^2 / NPS to hold at frequency 0.

    Of white noise, NPS = 1, it is the chance DQE(0) that an electron is detected.
    """
    first = _first(detector.dqe)
    return first if detector.nps is None else first * _first(detector.nps)


def detect(intensity: torch.Tensor, pixel_size: Number, detector: Detector, supersampling: int = 1) -> torch.Tensor:
    """Intensity (..., y, x) on the pixels of the detector, centred on the box centre.

    The intensity, periodic and band-limited, is multiplied by the detector's MTF, low-passed at its Nyquist frequency
    and evaluated at its pixels, exactly, as two matrix products; where the pixels are the same, it is cropped.

    Pixel i covers [i - 1/2, i + 1/2) about its centre. With supersampling s it is tiled by s x s sub-pixels, whose mean
    is the value of the pixel, of all frequencies that the pixels can hold: the MTF is divided by the response of the
    mean over s samples, sin(pi f) / (s sin(pi f / s)) along y and x at f cycles per pixel.

    Sub-pixels carry detail beyond the pixels' own Nyquist frequency, as a camera's electrons do, and their means over
    pixels are aliased by it; pixels (supersampling 1) are cut there. The two differ by 3 to 20 % rms of the contrast of
    a bare protein at the curve of Falcon 4i, and by more for an ideal detector. Beyond that frequency the MTF is
    extrapolated and the divisor held at its last value.

    Parameters
    ----------
    intensity : tensor (..., y, x)
    pixel_size : float or tensor ()
        Of the intensity [Å].
    detector : Detector
    supersampling : int
        Sub-pixels along the side of a pixel.

    Returns
    -------
    tensor (..., supersampling * y, supersampling * x)
        Of the detector's shape.

    Raises
    ------
    ValueError
        When the detector is larger than the image, or the supersampling is no positive whole number.
    """
    out, given = detector.shape, intensity.shape[-2:]
    ratio = detector.pixel_size / pixel_size  # may carry gradients
    if not hidden() and any(o * number(ratio) > n * (1 + 1e-9) for o, n in zip(out, given, strict=True)):
        raise ValueError(
            f"Detector: {tuple(out)} px of {number(detector.pixel_size):g} Å reach beyond the simulated field of "
            f"{tuple(given)} px of {number(pixel_size):g} Å. Simulate a larger field or use a smaller detector."
        )
    if supersampling != int(supersampling) or supersampling < 1:
        raise ValueError(f"detect.supersampling: expected a whole number of at least 1, got {supersampling}.")
    s = int(supersampling)
    if s > 1 or not _is_flat(detector):
        intensity = _transferred(intensity, ratio, detector, s)
        ratio, out = ratio / s, (s * out[0], s * out[1])
    if not isinstance(ratio, torch.Tensor) and ratio == 1.0:
        y, x = (n // 2 - o // 2 for n, o in zip(given, out, strict=True))
        return intensity[..., y : y + out[0], x : x + out[1]]
    rows, columns = (
        resampling_matrix(n, o, ratio, dtype=intensity.dtype, device=intensity.device)
        for n, o in zip(given, out, strict=True)
    )
    return rows @ intensity @ columns.T


def _transferred(intensity: torch.Tensor, ratio: Number, detector: Detector, s: int) -> torch.Tensor:
    """The intensity (..., y, x) after the MTF; where s > 1, over the mean of s samples and moved onto sub-pixels."""
    shape = (intensity.shape[-2], intensity.shape[-1])
    where: dict[str, Any] = {"dtype": intensity.dtype, "device": intensity.device}
    if isinstance(ratio, torch.Tensor):
        ratio = ratio.to(**where)
    spectrum = torch.fft.rfft2(intensity)
    if not _is_flat(detector):
        radius = squared_frequencies(shape, half=True, **where).sqrt()  # [cycles / px of the intensity]
        spectrum = spectrum * mtf(detector, 2 * radius * ratio)
    if s > 1:
        ky, kx = frequencies(shape[0], **where), half_frequencies(shape[1], **where)
        for k, n, o, view in ((ky, shape[0], detector.shape[0], (-1, 1)), (kx, shape[1], detector.shape[1], (1, -1))):
            turns = k * ratio  # [cycles / px of the detector]
            held = turns.clamp(-0.5, 0.5)
            inverse = torch.sinc(held / s) / torch.sinc(held)
            # the first sub-pixel lies (s - 1) / 2 sub-pixels before the centre of pixel 0
            offset = (s * o // 2) / s - (s - 1) / (2 * s) - o // 2  # [px of the detector]
            paired = (2 * k.abs() < 1) | (n % 2 == 1)  # the last frequency of an even n has no phase of its own
            factor = torch.polar(inverse * paired, 2 * torch.pi * offset * turns)
            spectrum = spectrum * factor.reshape(view)
    return torch.fft.irfft2(spectrum, s=shape)


def _is_flat(detector: Detector) -> bool:
    """Whether DQE and NPS are the same at all frequencies, by their shapes, so that the MTF is 1."""
    return all(not isinstance(v, torch.Tensor) or v.numel() == 1 for v in (detector.dqe, detector.nps))


def _first(values: Number) -> Number:
    """Value at frequency 0."""
    return values.reshape(-1)[0] if isinstance(values, torch.Tensor) else values


def _as_frequency(frequency: Number) -> torch.Tensor:
    return frequency if isinstance(frequency, torch.Tensor) else torch.tensor(frequency, dtype=torch.float64)


def _curve(values: Number, frequency: torch.Tensor) -> torch.Tensor:
    """Curve (...) through positive values (n,) on [0, 1] at frequencies (...): a cubic spline of their logarithm.

    Even about 0 (zero slope), without curvature at 1 and a straight line beyond. On an interval of length h, with
    t from 0 to 1, S = (1 - t) y_0 + t y_1 + h^2/6 (((1 - t)^3 - (1 - t)) m_0 + (t^3 - t) m_1), where the second
    derivatives m solve m_(i-1) + 4 m_i + m_(i+1) = 6 / h^2 (y_(i-1) - 2 y_i + y_(i+1)) (de Boor 1978).
    """
    if not isinstance(values, torch.Tensor):
        return torch.full_like(frequency, values)
    values = values.to(frequency.device)
    if frequency.is_floating_point() and values.dtype != frequency.dtype:
        values = values.to(frequency.dtype)
    if values.numel() == 1:
        return values.reshape(()) * torch.ones_like(frequency)
    n = len(values)
    y = values.log()
    m = _second_derivatives(n).to(y) @ y  # (n,), times h^2
    at = frequency.abs() * (n - 1)
    i = at.detach().floor().clamp(0, n - 2).long()
    t = at - i
    u, v = 1 - t, t
    inside = u * y[i] + v * y[i + 1] + ((u**3 - u) * m[i] + (v**3 - v) * m[i + 1]) / 6
    slope = y[-1] - y[-2] + (m[-2] + 2 * m[-1]) / 6
    return torch.where(at > n - 1, y[-1] + slope * (at - (n - 1)), inside).exp()


def _second_derivatives(n: int) -> torch.Tensor:
    """Matrix (n, n) from values to h^2 times the second derivatives of the spline of `_curve`, float64."""
    left, right = torch.zeros(2, n, n, dtype=torch.float64)
    left[0, :2], right[0, :2] = torch.tensor([2.0, 1.0]), torch.tensor([-6.0, 6.0])  # zero slope
    for i in range(1, n - 1):
        left[i, i - 1 : i + 2], right[i, i - 1 : i + 2] = torch.tensor([1.0, 4.0, 1.0]), torch.tensor([6.0, -12.0, 6.0])
    left[-1, -1] = 1  # no curvature
    return torch.linalg.solve(left, right)


def _check_shape(name: str, value: Any, ndims: tuple[int, ...]) -> None:
    if value is None and name == "nps":
        return
    number_wanted = 0 in ndims and isinstance(value, (int, float)) and not isinstance(value, bool)
    if number_wanted or (isinstance(value, torch.Tensor) and value.ndim in ndims and value.numel() > 0):
        return
    wanted = " or ".join([*(["a number"] if 0 in ndims else []), *(f"a tensor {('()', '(n,)')[d]}" for d in ndims)])
    got = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    raise ValueError(f"Detector.{name}: expected {wanted}, got {got}.")


def _check_values(name: str, value: Any, wanted: str, good: Any) -> None:
    # a tensor that is being fitted may step outside for a moment
    if value is None or (isinstance(value, torch.Tensor) and value.requires_grad):
        return
    values = torch.as_tensor(value)
    bad = values[~(good(values) & torch.isfinite(values))]
    if len(bad):
        raise ValueError(f"Detector.{name}: expected finite values {wanted}, got {float(bad[0]):g}.")
