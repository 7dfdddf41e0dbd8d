"""A fit of the lens beside what it was fitted to: rings of the image and of the model."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from cryosim.core.fourier import frequencies
from cryosim.microscope.optics import ctf
from inverse.calibration.ctf_fit import CtfFit

_SIDE = 384  # [px] of the picture of the rings


def ctf_fit_figure(image: torch.Tensor, pixel_size: float, fit: CtfFit) -> Figure:
    """Rings of an image, left, and of its fit, right, and the same as curves.

    Parameters
    ----------
    image : tensor (y, x) or (frame, y, x)
        As given to `fit_ctf`.
    pixel_size : float
        [Å].
    fit : CtfFit
        Of an image that is not tilted, or little.

    Returns
    -------
    Figure
        Powers are shown over the background, less 1, over their strength: 0 where the lens passes nothing, 1 where all.
    """
    figure = Figure((11.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    measured, model = _plane(image, fit)
    half = measured.shape[1] // 2
    shown = np.concatenate([measured[:, :half], model[:, half:]], 1)
    edge = 1 / fit.resolution
    left.imshow(shown, cmap="gray", vmin=-0.1, vmax=1.1, origin="lower", extent=(-edge, edge, -edge, edge))
    left.axvline(0, color="tab:orange", lw=0.8)
    left.set(xlabel="kx [1/Å]", ylabel="ky [1/Å]", title="image | model")
    radius, seen = fit.radius.numpy(), ((fit.power - fit.background) / fit.gain).numpy()
    right.plot(radius, seen, color="0.8", lw=0.6)
    width = max(1.0, 0.004 * len(seen))
    right.plot(radius, gaussian_filter1d(seen, width), color="k", lw=1.0, label="image, mean on rings")
    right.plot(radius, fit.rings.numpy(), color="tab:orange", lw=1.2, label="model")
    right.set(xlabel="k [1/Å]", ylabel="squared CTF", ylim=(-0.6, 1.6), xlim=(float(radius[0]), edge))
    optics, error = fit.optics, fit.standard_errors
    right.set_title(
        f"defocus {optics.defocus:,.0f} ± {error['defocus']:.0f} Å, astigmatism {optics.astigmatism:.0f} ± "
        f"{error['astigmatism']:.0f} Å, rings to {fit.resolution:g} Å",
        fontsize=9,
    )
    right.legend(loc="upper right", frameon=False)
    return figure


def _plane(image: torch.Tensor, fit: CtfFit) -> tuple[np.ndarray, np.ndarray]:
    """Rings of image and model (ky, kx), up to the resolution of the fit, with k = 0 in the middle."""
    stack = image.double().sum(0) if image.ndim == 3 else image.double()
    n = min(stack.shape)
    square = stack[(stack.shape[0] - n) // 2 :, (stack.shape[1] - n) // 2 :][:n, :n]
    power = torch.fft.fft2((square - square.mean()) / n).abs().square()
    kept = min(n, 2 * int(n * fit.pixel_size / fit.resolution) // 2)
    power = torch.fft.fftshift(power)[(n - kept) // 2 :, (n - kept) // 2 :][:kept, :kept]
    step = max(1, kept // _SIDE)
    side = kept // step
    power = power[: side * step, : side * step].reshape(side, step, side, step).mean((1, 3))
    spacing = n * fit.pixel_size / (side * step)
    k = torch.fft.fftshift(frequencies(side, spacing, dtype=torch.float64))
    radius = (k[:, None].square() + k.square()).sqrt().numpy()
    background, gain = (np.interp(radius, fit.radius, curve) for curve in (fit.background, fit.gain))
    measured = gaussian_filter((power.numpy() - background) / gain, 1.5)
    model = torch.fft.fftshift(ctf(fit.optics, (side, side), spacing).square()).numpy()
    return measured, model
