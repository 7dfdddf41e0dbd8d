"""What a tilt series will tell, before it is taken: standard errors, and the resolution of the tomogram.

The specimen is weak, of power S(|k|) [V^2 Å^3], in a slab of thickness T. What a tilt t shows of it at the frequency u
of its image has, over the counting noise, which is white, the power

    s(u) = S(|u|) T / cos t  (2 sigma h f v)^2 Q n,                                                          (1)

h the lens, f what damage has left by then, Q the camera's efficiency (DQE), n the electrons that are counted for each
Å^2, and v the share of them that have lost no energy: of N that come, N exp(-T / (L cos t)) have none lost, L the mean
free path. What passes the slit with a loss counts as noise.

The lens is h = sin(theta), theta = chi - asin A, and the height z adds pi lambda k^2 z to theta. Heights spread evenly
over W leave in the mean

    of h     sin(theta) sinc(lambda k^2 W / 2),        of h^2     (1 - cos(2 theta) sinc(lambda k^2 W)) / 2.      (2)

Below one place of an image the specimen reaches over W = T / cos t; across an image of extent E its middle rises by
W = E |tan t|. Each has its own sinc. The mean of h is what images have in common that are taken to be of one height, as
`align` takes them. The mean of h^2 is what there is for a volume in which every height is given its own defocus.

Volume. At one (kx, ky) of a slab, what tilts have in common is, in units of the noise,

    A_ij = sqrt(s_i s_j) sinc(T kx (tan t_i - tan t_j)),      s_i = s at (kx / cos t_i, ky),                  (3)

the covariance of `inverse.calibration.tilt_likelihood` without edges. With W = (1 + A)^-1, the best linear estimate of
the waves of the specimen at all kz has in all the power tr W A, each in units of its own, and tr W A W of it is noise.
What stands in the traces at i belongs to waves at kz = kx tan t_i, and so to their shell:

    signal and noise   1 - W_ii,      noise   W_ii - sum over j of W_ij^2.                                   (4)

With g and n their sums over the plane, shell by shell, SSNR = (g - n) / n. Halves, with half of the electrons in each,
correlate by (g - n) / g. With the truth the estimate correlates by sqrt(g / m), m the number of waves of the shell
between the lowest and the highest tilt. Gaps between tilts are in m: they count against the second, not the first.

Molecules. N of them are turned every way and cut out as spheres of volume v; F is the transform of one. A tilt has of
all directions of a shell a share of 1 / (2 |k|) for each 1/Å of its own thickness. So, with 1/2 for h^2, its mean over
many defoci,

    SSNR = N |F|^2 / (2 |k| v) times the sum over tilts of s cos t / (S T),                                  (5)

as in Rosenthal & Henderson 2003, doi:10.1016/j.jmb.2003.07.013. Halves, each of N / 2, have an FSC of 1/7 where it is
1/3. Their alignment is taken to be right, and what overlaps them is not counted: N is a least number.

Shifts, angles and thickness have the Fisher information of `tilt_likelihood`, defoci that of `ring_model`, each as if
the others were known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.constants import interaction_constant, wavelength
from cryosim.core.fourier import fast_length, number, squared_frequencies
from cryosim.core.inelastic import ICE, ICE_INNER_POTENTIAL
from cryosim.core.inelastic import mean_free_path as free_path_at
from cryosim.core.rotation import random_rotations
from cryosim.microscope.detector import Detector, dqe
from cryosim.microscope.energy_loss import loss_probabilities
from cryosim.microscope.optics import Optics, aberration_at, check_per_tilt, envelope
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.damage import Damage, fading
from cryosim.specimen.potential import potential_slices
from cryosim.specimen.scattering_factors import displaced_solvent_factor
from inverse.calibration.climb import BANDS
from inverse.calibration.ctf_fit import covariance_of, lens_of, limits_of, tile_of
from inverse.calibration.ring_model import COARSEST, SCALES, RingModel, State
from inverse.calibration.thon_rings import tile_cells
from inverse.calibration.tilt_likelihood import Geometry, Model, Spectra, field_of
from inverse.metrics.fsc import ShellCorrelation
from inverse.physics.deformed import free_shifts

_SHELLS = 48  # up to the Nyquist frequency: so wide that zeros of the lens are averaged, but for the first
_WAVES = 4096  # (kx, ky) at which equation (4) is evaluated
_SECTORS = 6  # of the measured range
_WIDTH = 256  # [px] to which `align` bins images
_FREQUENCIES = 3000  # that stand for all of these: to 4 % of a standard error
_COARSE, _SMALL = 3.8, 128  # [Å], [px]: pixels too large, and images too small for Thon rings
_VIEWS = 24  # of a molecule
_BLOCK = 2**18  # numbers of W at once, that stay in the cache


class Molecules(NamedTuple):
    """Molecules of one kind, turned and placed at random, as `molecules_in_ice` makes them.

    Attributes
    ----------
    frequency : tensor (ring,)
        [1/Å].
    power : tensor (ring,)
        |F|^2 of one, in the mean over its rotations: F transform of the potential above that of the ice [V^2 Å^6].
    density : float
        [1/Å^3].
    radius : float
        Of the sphere that holds one [Å].
    """

    frequency: torch.Tensor
    power: torch.Tensor
    density: float
    radius: float

    def __call__(self, frequency: torch.Tensor) -> torch.Tensor:
        """S (...) [V^2 Å^3] at a frequency (...) [1/Å]: of places that have nothing to do with each other."""
        return self.density * self.of_one(frequency)

    def of_one(self, frequency: torch.Tensor) -> torch.Tensor:
        """|F|^2 (...) [V^2 Å^6] at a frequency (...) [1/Å]."""
        return _between(self.frequency, self.power.log(), frequency).exp()


Spectrum = Callable[[torch.Tensor], torch.Tensor]
"""Frequency (...) [1/Å] -> S (...) [V^2 Å^3]."""


class Forecast(NamedTuple):
    """What `forecast` returns.

    Attributes
    ----------
    angles : tensor (tilt,)
        In order of exposure [deg].
    standard_errors : dict of str to tensor
        Least possible ones (Cramér and Rao): of "shifts" (tilt, 2) [Å] and "angles" (tilt,) [deg], less what a moved or
        turned specimen makes; of "thickness" () [Å]; of "defocus" (tilt,) [Å], each image alone. Infinite where images
        do not tell.
    snr : tensor (tilt, shell)
        Power of each image over that of its noise [1]: equation (1) with the second mean of (2).
    ssnr : tensor (shell,)
        Of the tomogram, in the directions that the tilts measure [1].
    halves, truth : ShellCorrelation
        Expected Fourier shell correlation of two halves of the electrons, and with the truth; of measured directions.
    directions : tensor (sector,)
        In the plane across the tilt axis, from x towards z, as tilts are counted [deg].
    resolution_by_direction : tensor (sector,)
        Of halves, at 0.143 [Å].
    molecules : tensor (shell,) or None
        How many, averaged, have an FSC of halves of 1/7, as good as 0.143; None where no molecule was given.
    """

    angles: torch.Tensor
    standard_errors: dict[str, torch.Tensor]
    snr: torch.Tensor
    ssnr: torch.Tensor
    halves: ShellCorrelation
    truth: ShellCorrelation
    directions: torch.Tensor
    resolution_by_direction: torch.Tensor
    molecules: torch.Tensor | None

    @property
    def resolution(self) -> float:
        """Where the halves' correlation first falls below 0.143, if only at a zero of the lens [Å]."""
        return self.halves.resolution(0.143)

    def molecules_for(self, period: float) -> float:
        """How many molecules, averaged, reach a period [Å].

        Raises
        ------
        ValueError
            When no molecule was given, or the period is beyond the pixels or the curve.
        """
        if self.molecules is None:
            raise ValueError("Forecast.molecules_for: expected a forecast of molecules. Give `forecast` a specimen.")
        k = self.halves.frequency
        if not 1 / float(k[-1]) <= period <= 1 / float(k[0]):
            raise ValueError(
                f"Forecast.molecules_for: expected a period of {1 / float(k[-1]):.3g} to {1 / float(k[0]):.3g} Å, got "
                f"{period}. Finer ones need smaller pixels."
            )
        return float(_between(k, self.molecules.log(), torch.tensor(1 / period, dtype=k.dtype)).exp())

    def lines(self) -> list[str]:
        """The figures, for people."""
        error = self.standard_errors
        worst = self.resolution_by_direction.argmax()
        told = [
            f"tilt {angle:7.2f} deg  shift ± {ex:.2f} Å along x, ± {ey:.2f} Å along y  angle ± {turn:.3f} deg  "
            f"defocus ± {defocus:,.0f} Å"
            for angle, (ex, ey), turn, defocus in zip(
                self.angles.tolist(),
                error["shifts"].tolist(),
                error["angles"].tolist(),
                error["defocus"].tolist(),
                strict=True,
            )
        ]
        told.append(f"thickness ± {float(error['thickness']):.1f} Å")
        told.append(f"tomogram: halves agree to {self.resolution:.1f} Å (0.143)")
        told.append(
            f"tomogram: agrees with the truth to {self.truth.resolution(0.5):.1f} Å (0.5), where it is measured"
        )
        direction, reached = float(self.directions[worst]), float(self.resolution_by_direction[worst])
        told.append(f"halves in the worst direction, {direction:.0f} deg: {reached:.1f} Å")
        if self.molecules is not None:
            finest = 1 / float(self.halves.frequency[-1])
            periods = [period for period in (20.0, 10.0, 6.0, 4.0, 3.0) if period >= finest]
            told += [f"molecules to average for {d:g} Å: {self.molecules_for(d):,.0f} or more" for d in periods]
        return told


# the specimen ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def molecules_in_ice(molecule: Atoms, occupied: float = 0.2, *, finest: float = 2.0, seed: int = 0) -> Molecules:
    """Power of molecules of one kind in ice, by the potential that the simulator gives them.

    Parameters
    ----------
    molecule : Atoms
    occupied : float
        Share of the volume that they take [1]; 0.2 is a cell.
    finest : float
        Period up to which it is needed [Å]; about twice the pixels of the camera.
    seed : int
        Of the views whose powers are averaged.

    Returns
    -------
    Molecules

    Raises
    ------
    ValueError
        Without atoms, or for a share or a period that cannot be.

    Notes
    -----
    Of a projection, the power on a ring is that of a central slice. The volume is that of the atoms (`Ice`); places are
    taken to have nothing to do with each other, so that below 1 / (2 radius) a dense crowd has less than is told here.
    """
    if len(molecule) == 0:
        raise ValueError("molecules_in_ice: there are no atoms. Give a molecule.")
    if not 0 < occupied < 1 or not 0 < finest < math.inf:
        raise ValueError(
            f"molecules_in_ice: expected an occupied share between 0 and 1 and a positive finest period [Å], got "
            f"{occupied} and {finest}."
        )
    atoms = molecule.centred()
    still = torch.zeros((), dtype=torch.float64)
    elements, which = torch.unique(atoms.numbers, return_inverse=True)
    volume = float((displaced_solvent_factor(elements, still)[which] * atoms.occupancies).sum())
    radius = float(atoms.positions.norm(dim=1).max()) + 3.0
    pixel = finest / 3.03  # slices are exact below two thirds of their Nyquist frequency
    n = fast_length(max(32, math.ceil(4 * radius / pixel)))
    ring = (squared_frequencies((n, n), dtype=torch.float64).sqrt() * n).round().long().flatten()
    total = torch.zeros(int(ring.max()) + 1, dtype=torch.float64)
    for turn in random_rotations(_VIEWS, torch.Generator().manual_seed(seed)):
        view = potential_slices(atoms.moved(turn), (n, n), pixel, 2 * radius, 1, solvent=ICE_INNER_POTENTIAL, width=6)
        spectrum = torch.fft.fft2(view.total().double()) * pixel**2  # [V Å^3]
        total.index_add_(0, ring, spectrum.abs().square().flatten() / _VIEWS)
    power = total / torch.bincount(ring)
    kept = int(n * pixel / finest) + 1
    frequency = torch.arange(kept, dtype=torch.float64) / (n * pixel)
    return Molecules(frequency, power[:kept], occupied / volume, radius)


# the forecast ---------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """All that was given, checked: times, lenses and powers of each tilt."""

    angles: torch.Tensor
    """(tilt,) [rad]."""
    moments: list
    lenses: list[Optics]
    voltage: float
    damage: Damage | None
    electrons: torch.Tensor
    """n v^2 of equation (1), (tilt,) [1/Å^2]."""
    detector: Detector
    pixel_size: float
    extent: float
    """Of the image across the tilt axis [Å]."""
    thickness: float
    spectrum: Spectrum


@torch.no_grad()
def forecast(
    tilts: TiltScheme,
    optics: Optics,
    detector: Detector,
    specimen: Atoms | Molecules | Spectrum,
    *,
    thickness: float,
    occupied: float = 0.2,
    damage: Damage | None = Damage(),  # noqa: B008
    mean_free_path: float | None = None,
    finest: float | None = None,
) -> Forecast:
    """What a tilt series will tell: standard errors of its calibration, and the resolution of its tomogram.

    Compare schemes with it before sitting at the microscope. Nothing is simulated.

    Parameters
    ----------
    tilts : TiltScheme
        In order of exposure, which is the order of the damage.
    optics : Optics
        Fields () or (tilt,). Astigmatism, tilt of the beam and odd aberrations are left out.
    detector : Detector
        Shape, pixel size and DQE.
    specimen : Atoms, Molecules, or callable
        A molecule, of which there are many; what `molecules_in_ice` made of it; or S (...) [V^2 Å^3] of the potential
        at frequencies (...) [1/Å].
    thickness : float
        Of the slab [Å].
    occupied : float
        Share of the volume that molecules given as atoms take [1].
    damage : Damage or None
        Of all that is seen; None for none.
    mean_free_path : float, optional
        For inelastic scattering, at this voltage [Å]; that of ice when left out, inf for none.
    finest : float, optional
        Period up to which images are aligned [Å]; as `align` has it when left out.

    Returns
    -------
    Forecast

    Raises
    ------
    ValueError
        For sizes that are not positive, or tilts that cannot be aligned.

    Notes
    -----
    Left out are whatever is not counting noise: water's own fluctuations, motion, charging, stray tilts, and how well
    it is all calibrated. The derivation stands at the head of this module.
    """
    plan = _planned(tilts, optics, detector, specimen, thickness, occupied, damage, mean_free_path)
    if isinstance(specimen, Atoms):
        specimen = plan.spectrum  # pyright: ignore[reportAssignmentType]
    nyquist = 0.5 / plan.pixel_size
    edges = torch.linspace(1 / thickness, nyquist, _SHELLS + 1, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    snr = torch.stack([_precision(plan, i, middles) * _slab_power(plan, i, middles) for i in range(len(tilts))])
    return Forecast(
        angles=tilts.angles.double(),
        standard_errors=_aligned(plan, tilts, finest) | {"defocus": _focused(plan)},
        snr=snr,
        molecules=_molecules(plan, specimen, middles) if isinstance(specimen, Molecules) else None,
        **_volume(plan, edges),
    )


def _planned(
    tilts: TiltScheme,
    optics: Optics,
    detector: Detector,
    specimen: Atoms | Molecules | Spectrum,
    thickness: float,
    occupied: float,
    damage: Damage | None,
    mean_free_path: float | None,
) -> _Plan:
    n, pixel = len(tilts), number(detector.pixel_size)
    check_per_tilt(optics, n)
    if not 2 * pixel < thickness < math.inf:
        raise ValueError(f"forecast: expected a thickness above two pixels, {2 * pixel:g} Å, got {thickness}.")
    if mean_free_path is not None and not mean_free_path > 0:
        raise ValueError(f"forecast: expected a positive mean_free_path [Å], got {mean_free_path}. inf loses nothing.")
    if min(detector.shape) < 32:
        raise ValueError(f"forecast: expected a detector of 32 pixels or more a side, got {tuple(detector.shape)}.")
    exposed = tilts.doses > 0
    if int(exposed.sum()) < 3 or not bool((tilts.angles.abs() < 85).all()):
        raise ValueError(
            f"forecast: expected 3 or more tilts with a dose, all within 85 degrees, got {int(exposed.sum())} up to "
            f"{float(tilts.angles.abs().max()):g} degrees."
        )
    if isinstance(specimen, Atoms):
        specimen = molecules_in_ice(specimen, occupied, finest=2 * pixel)
    at = torch.tensor([1 / thickness, 0.25 / pixel, 0.5 / pixel], dtype=torch.float64)
    power = torch.as_tensor(specimen(at))
    if power.shape != at.shape or not bool(((power >= 0) & (power < math.inf)).all()):
        raise ValueError(
            f"forecast: expected a specimen with a power of 0 or more at every frequency [V^2 Å^3], got "
            f"{power.tolist()} at {at.tolist()} 1/Å."
        )
    lenses = [optics.index(i) for i in range(n)]
    angles = torch.deg2rad(tilts.angles.double())
    electrons = []
    for i, lens in enumerate(lenses):
        path = number(free_path_at(ICE, number(lens.voltage))) if mean_free_path is None else mean_free_path
        depth = thickness / path / math.cos(float(angles[i]))
        whole = math.exp(-depth)
        slit = number(lens.slit)
        counted = whole + float(loss_probabilities(depth, slit=slit)[1].sum()) if slit > 0 and depth > 0 else whole
        electrons.append(float(tilts.doses[i]) * whole**2 / counted)
    turned = round(number(tilts.axis_angle) / 90) % 2
    return _Plan(
        angles=angles,
        moments=[tilts.moment(i) for i in range(n)],
        lenses=lenses,
        voltage=number(lenses[0].voltage),
        damage=damage,
        electrons=torch.tensor(electrons, dtype=torch.float64),
        detector=detector,
        pixel_size=pixel,
        extent=detector.shape[0 if turned else 1] * pixel,
        thickness=float(thickness),
        spectrum=specimen,
    )


# equation (1) ---------------------------------------------------------------------------------------------------------


def _slab_power(plan: _Plan, i: int, k: torch.Tensor) -> torch.Tensor:
    """S T / cos t (...) [V^2 Å^4] of tilt i at frequencies (...) [1/Å]."""
    return plan.spectrum(k) * plan.thickness / math.cos(float(plan.angles[i]))


def _efficiency(plan: _Plan, i: int, k: torch.Tensor) -> torch.Tensor:
    """(2 sigma f v)^2 Q n (...) [1/(V^2 Å^4)] of tilt i, with the square of the envelope; 0 beyond the pixels."""
    lens = plan.lenses[i]
    sigma = number(interaction_constant(torch.as_tensor(lens.voltage, dtype=torch.float64)))
    n = 1024
    damping = envelope(_round(lens), (1, 2 * n), plan.pixel_size)[..., 0, :n].reshape(n)
    at = torch.arange(n, dtype=torch.float64) / (2 * n * plan.pixel_size)
    left = _between(at, damping, k).square() * (k * wavelength(plan.voltage) < 1e-3 * number(lens.aperture))
    if plan.damage is not None:
        left = left * fading(plan.damage, k.square(), plan.moments[i], plan.voltage).square()
    relative = 2 * plan.pixel_size * k
    seen = dqe(plan.detector, relative.clamp_max(1)) * (relative <= 1)
    return 4 * sigma**2 * left * seen * plan.electrons[i]


def _phase(plan: _Plan, i: int, k: torch.Tensor) -> torch.Tensor:
    """theta (...) of equation (2)."""
    lens = _round(plan.lenses[i])
    contrast = torch.asin(torch.as_tensor(lens.amplitude_contrast, dtype=torch.float64))
    return aberration_at(lens, k, torch.zeros_like(k)) - contrast


def _spans(plan: _Plan, i: int, k: torch.Tensor) -> list[torch.Tensor]:
    """lambda k^2 W (...) of the slab at one place and of the slope of the image [1]."""
    t = float(plan.angles[i])
    spans = plan.thickness / math.cos(t), plan.extent * abs(math.tan(t))
    return [wavelength(plan.voltage) * k.square() * span for span in spans]


def _precision(plan: _Plan, i: int, k: torch.Tensor) -> torch.Tensor:
    """s cos t / (S T) (...) of equation (1) with the second mean of (2), of tilt i."""
    seen = torch.cos(2 * _phase(plan, i, k))
    for span in _spans(plan, i, k):
        seen = seen * torch.sinc(span)
    return _efficiency(plan, i, k) * (1 - seen) / 2


def _round(lens: Optics) -> Optics:
    return lens.replace(
        astigmatism=0.0, coma=0.0, trefoil=0.0, C32=0.0, C34=0.0, C41=0.0, C43=0.0, C45=0.0, C52=0.0, C54=0.0, C56=0.0,
        beam_tilt=(0.0, 0.0),
    )  # fmt: skip


def _between(at: torch.Tensor, values: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Values (n,) at places (n,), linear between them, at k (...)."""
    upper = torch.searchsorted(at, k.contiguous()).clamp(1, len(at) - 1)
    share = ((k - at[upper - 1]) / (at[upper] - at[upper - 1])).clamp(0, 1)
    return values[upper - 1] * (1 - share) + values[upper] * share


# equations (3) to (5) -------------------------------------------------------------------------------------------------


def _volume(plan: _Plan, edges: torch.Tensor) -> dict:
    """Correlations and resolutions of the tomogram, shell by shell."""
    taken = plan.angles[plan.electrons > 0]
    largest, low, high = float(edges[-1]), float(taken.min()), float(taken.max())
    # evenly spread over |k| and azimuth: Roberts' sequence, of the root of x^3 = x + 1
    steps = 1.324717957244746 ** -torch.arange(1, 3, dtype=torch.float64)
    place = (torch.arange(_WAVES, dtype=torch.float64)[:, None] * steps + 0.5) % 1
    k, azimuth = largest * place[:, 0], math.pi / 2 * place[:, 1]
    kx, ky = k * torch.cos(azimuth), k * torch.sin(azimuth)
    share = k * (largest * math.pi / 2 / _WAVES)  # of the plane
    u = ((kx[:, None] / torch.cos(plan.angles)).square() + ky[:, None].square()).sqrt()  # (wave, tilt)
    shell = torch.searchsorted(edges, u, right=True) - 1
    inside = (shell >= 0) & (shell < _SHELLS)
    sector = ((plan.angles - low) / (high - low) * _SECTORS).long().clamp(0, _SECTORS - 1).expand_as(shell)
    label = (sector * _SHELLS + shell)[inside]

    def summed(powers: torch.Tensor) -> torch.Tensor:
        """g and n (2, sector, shell)."""
        own = (powers * share[:, None])[:, inside]
        return torch.zeros(2, _SECTORS * _SHELLS).to(own).index_add(1, label, own).unflatten(1, (_SECTORS, _SHELLS))

    whole, half = (summed(powers) for powers in _estimated(plan, kx, u))
    g, n = whole.sum(1)
    waves = plan.thickness * (high - low) / 3 * edges.pow(3).diff()
    samples = torch.bincount(shell[inside], minlength=_SHELLS).double()
    middles, reliable = (edges[1:] + edges[:-1]) / 2, torch.ones(_SHELLS, dtype=torch.bool)

    def correlation(values: torch.Tensor) -> ShellCorrelation:
        return ShellCorrelation(middles, values, samples, reliable)

    def of_halves(sums: torch.Tensor) -> ShellCorrelation:
        return correlation((1 - sums[1] / sums[0].clamp_min(1e-300)).clamp_min(0) * (sums[0] > 0))

    return {
        "ssnr": (g - n).clamp_min(0) / n.clamp_min(1e-300),
        "halves": of_halves(half.sum(1)),
        "truth": correlation((g / waves).clamp(0, 1).sqrt()),
        "directions": torch.rad2deg(low + (high - low) * (torch.arange(_SECTORS).double() + 0.5) / _SECTORS),
        "resolution_by_direction": torch.tensor([of_halves(one).resolution(0.143) for one in half.unbind(1)]).double(),
    }


def _estimated(plan: _Plan, kx: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation (4) at kx (wave,) and u (wave, tilt), each (2, wave, tilt): of all electrons, and of half of them."""
    n, tangents = len(plan.angles), torch.tan(plan.angles)
    strength = torch.stack([_precision(plan, i, u[:, i]) * _slab_power(plan, i, u[:, i]) for i in range(n)], 1).sqrt()
    apart, one = plan.thickness * (tangents[:, None] - tangents), torch.eye(n, dtype=torch.float64)
    found = []
    for some, root in zip(kx.split(_BLOCK // n**2), strength.split(_BLOCK // n**2), strict=True):
        common = root[:, :, None] * root[:, None] * torch.sinc(some[:, None, None] * apart)
        for share in (1.0, 0.5):
            w = torch.cholesky_inverse(torch.linalg.cholesky(one + share * common))
            own = w.diagonal(dim1=1, dim2=2)
            found.append(torch.stack([1 - own, own - w.square().sum(2)]))
    return torch.cat(found[::2], 1), torch.cat(found[1::2], 1)


def _molecules(plan: _Plan, specimen: Molecules, k: torch.Tensor) -> torch.Tensor:
    """N (shell,) of equation (5) for an SSNR of 1/3."""
    total = torch.stack([_efficiency(plan, i, k) / 2 for i in range(len(plan.angles))]).sum(0)
    volume = 4 / 3 * math.pi * specimen.radius**3
    return 2 * k * volume / (3 * specimen.of_one(k) * total.clamp_min(1e-300))


# calibration ----------------------------------------------------------------------------------------------------------


def _aligned(plan: _Plan, tilts: TiltScheme, finest: float | None) -> dict[str, torch.Tensor]:
    """Standard errors of shifts, angles and thickness from images binned as `align` does."""
    bin = max(1, round(min(plan.detector.shape) / _WIDTH))
    pixel, shape = plan.pixel_size * bin, [n // bin for n in plan.detector.shape]
    band = max(BANDS) if finest is None else min(max(BANDS), pixel / finest)
    least = 2.8 / min(shape)
    if not band > least:
        raise ValueError(f"forecast: expected a finest period below {pixel / least:.3g} Å, got {finest} Å.")
    taken = (plan.electrons > 0).nonzero()[:, 0]
    n, axis = len(taken), number(tilts.axis_angle)
    degrees = tilts.angles[taken].double()
    geometry = Geometry(torch.zeros(n, 2, dtype=torch.float64), degrees, axis, plan.thickness / pixel)
    field = field_of(torch.zeros(n, *shape, dtype=torch.float64), geometry, band)
    few = torch.randperm(len(field.seen), generator=torch.Generator().manual_seed(0))[:_FREQUENCIES].sort().values
    field = field._replace(
        **{name: getattr(field, name)[few] for name in ("seen", "known", "u", "row", "column")},
        share=field.share * len(field.seen) / len(few),
    )
    columns = []
    for place, i in enumerate(taken.tolist()):
        k = field.u[:, place].square().sum(-1).sqrt() / pixel
        seen = torch.sin(_phase(plan, i, k)) * _efficiency(plan, i, k).sqrt()
        for span in _spans(plan, i, k):
            seen = seen * torch.sinc(span / 2)
        columns.append(seen * (plan.spectrum(k) * plan.thickness).sqrt())
    white = Spectra(torch.ones(64, dtype=torch.float64), torch.ones(n, dtype=torch.float64))
    model = Model(field, white, geometry, torch.stack(columns, 1))
    shifts = _variances(model.shift_information(), free_shifts(degrees)).reshape(2, n).T * pixel**2
    a = math.radians(axis)
    squares = torch.tensor([[math.cos(a) ** 2, math.sin(a) ** 2], [math.sin(a) ** 2, math.cos(a) ** 2]])
    one = torch.eye(n, dtype=torch.float64)
    apart = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), one], 1))[0][:, 1:]  # without their mean
    turned = _variances(model.angle_score(field.seen)[1], apart)
    errors = {"shifts": torch.full((len(tilts), 2), torch.inf, dtype=torch.float64)}
    errors["angles"] = errors["shifts"][:, 0].clone()
    errors["shifts"][taken], errors["angles"][taken] = (shifts @ squares.double()).sqrt(), turned.sqrt()
    _, information = model.thickness_score(field.seen)
    errors["thickness"] = torch.tensor(plan.thickness * max(information, 1e-300) ** -0.5, dtype=torch.float64)
    return errors


def _variances(information: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Diagonal (parameter,) of the inverse of an information, in free directions (parameter, direction)."""
    values, vectors = torch.linalg.eigh(free.T @ information @ free)
    told = values > 1e-12 * values.max()
    spread = (free @ vectors).square()
    variance = spread @ torch.where(told, 1 / values.clamp_min(1e-300), 0)
    return torch.where((spread[:, ~told] > 1e-9).any(1), torch.inf, variance)


def _focused(plan: _Plan) -> torch.Tensor:
    """Standard error (tilt,) of the defocus of each image, from its own Thon rings [Å]."""
    errors = torch.full_like(plan.angles, torch.inf)
    if plan.pixel_size > _COARSE or min(plan.detector.shape) < _SMALL:
        return errors
    finest = limits_of("forecast", plan.pixel_size, None)[-1]
    image = torch.empty(plan.detector.shape, device="meta")
    tile = min(max(_SMALL, min(image.shape) // 2), tile_of(image, plan.pixel_size))
    one = tile_cells(torch.zeros(tile, tile), plan.pixel_size, finest, tile)[0].within(COARSEST, finest)
    one = one._replace(
        samples=one.samples * math.prod(n // tile for n in image.shape), power=torch.ones_like(one.power)
    )
    for i in plan.electrons.nonzero()[:, 0].tolist():
        t, lens = float(plan.angles[i]), _round(plan.lenses[i])
        # rings are what the two sides of the lens' delocalisation have in common, so a tile shows fewer of them
        apart = 2 * wavelength(plan.voltage) * abs(number(lens.defocus)) * one.radius
        shown = (1 - apart / one.span).clamp_min(0).square()
        # each tile at its own height: what is left is the slope across it
        model = RingModel(one._replace(samples=one.samples * shown, span=abs(math.tan(t)) * one.span), lens)
        state = lens_of(lens) | {
            "defocus": number(lens.defocus),
            "thickness": plan.thickness / math.cos(t),
            "rise_x": 1.0,
        }
        gain = (_efficiency(plan, i, one.radius) * _slab_power(plan, i, one.radius)).clamp_min(1e-9).log()
        splines = torch.linalg.solve(model.basis.T @ model.weighted + model.rough, model.weighted.T @ gain)
        information = model.information(State(state, torch.zeros_like(splines), splines), ["defocus"])[0]
        errors[i] = covariance_of(information)[0, 0].sqrt() * SCALES["defocus"]
    return errors
