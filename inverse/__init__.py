"""inverse: from tilt series to volumes and parameters, on deepinv's operators.

The names below are loaded when they are first used: deepinv takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inverse.calibration.alignment import Alignment as Alignment
    from inverse.calibration.alignment import align as align
    from inverse.calibration.applied import applied as applied
    from inverse.calibration.conventions import Conventions as Conventions
    from inverse.calibration.conventions import check_conventions as check_conventions
    from inverse.calibration.ctf_fit import CtfFit as CtfFit
    from inverse.calibration.ctf_fit import fit_ctf as fit_ctf
    from inverse.calibration.expected import Forecast as Forecast
    from inverse.calibration.expected import forecast as forecast
    from inverse.calibration.expected import molecules_in_ice as molecules_in_ice
    from inverse.calibration.field_fit import Calibration as Calibration
    from inverse.calibration.field_fit import calibrate as calibrate
    from inverse.calibration.series_ctf import SeriesCtf as SeriesCtf
    from inverse.calibration.series_ctf import fit_series_ctf as fit_series_ctf
    from inverse.metrics.coverage import Coverage as Coverage
    from inverse.metrics.coverage import coverage as coverage
    from inverse.metrics.coverage import interval_coverage as interval_coverage
    from inverse.metrics.coverage import spread_skill as spread_skill
    from inverse.metrics.directional import DirectionalCorrelation as DirectionalCorrelation
    from inverse.metrics.directional import directional_fsc as directional_fsc
    from inverse.metrics.fsc import ShellCorrelation as ShellCorrelation
    from inverse.metrics.fsc import fsc as fsc
    from inverse.metrics.fsc import measured_region as measured_region
    from inverse.metrics.halves import half_maps as half_maps
    from inverse.metrics.local_resolution import local_resolution as local_resolution
    from inverse.physics.contrast import ContrastProjection as ContrastProjection
    from inverse.physics.contrast import EwaldProjection as EwaldProjection
    from inverse.physics.contrast import fading_by_tilt as fading_by_tilt
    from inverse.physics.deformed import DeformedProjection as DeformedProjection
    from inverse.physics.gaussian import GaussianModel as GaussianModel
    from inverse.physics.gaussian import marginal_log_likelihood as marginal_log_likelihood
    from inverse.physics.gaussian_estimate import ModelEstimate as ModelEstimate
    from inverse.physics.gaussian_estimate import estimate_model as estimate_model
    from inverse.physics.multislice import MultisliceProjection as MultisliceProjection
    from inverse.physics.noise import CountingFidelity as CountingFidelity
    from inverse.physics.noise import CountingNoise as CountingNoise
    from inverse.physics.noise import TiltGaussianFidelity as TiltGaussianFidelity
    from inverse.physics.noise import TiltGaussianNoise as TiltGaussianNoise
    from inverse.physics.noise import counting_model as counting_model
    from inverse.physics.tilt import TiltProjection as TiltProjection
    from inverse.physics.wedge import crowther_resolution as crowther_resolution
    from inverse.physics.wedge import elongation as elongation
    from inverse.physics.wedge import measured as measured
    from inverse.physics.wedge import measured_share as measured_share
    from inverse.physics.wedge import noise_gain as noise_gain
    from inverse.priors.amortised import AmortisedGaussian as AmortisedGaussian
    from inverse.priors.denoiser import NoiseConditionalUNet as NoiseConditionalUNet
    from inverse.priors.implicit import HashGrid as HashGrid
    from inverse.priors.implicit import Siren as Siren
    from inverse.priors.local import LocalNetwork as LocalNetwork
    from inverse.priors.wrappers import Affine as Affine
    from inverse.priors.wrappers import Equivariant as Equivariant
    from inverse.priors.wrappers import Tiled as Tiled
    from inverse.reconstruction import Reconstruction as Reconstruction
    from inverse.reconstruction import reconstruct as reconstruct
    from inverse.solvers.amortised import amortised as amortised
    from inverse.solvers.diffusion import Diffusion as Diffusion
    from inverse.solvers.diffusion import diffusion as diffusion
    from inverse.solvers.gaussian_law import LowRankGaussian as LowRankGaussian
    from inverse.solvers.gaussian_law import StationaryPrior as StationaryPrior
    from inverse.solvers.implicit import Implicit as Implicit
    from inverse.solvers.implicit import deep_image_prior as deep_image_prior
    from inverse.solvers.implicit import implicit as implicit
    from inverse.solvers.krylov import cgls as cgls
    from inverse.solvers.krylov import lsqr as lsqr
    from inverse.solvers.langevin import Damped as Damped
    from inverse.solvers.langevin import Langevin as Langevin
    from inverse.solvers.langevin import langevin as langevin
    from inverse.solvers.langevin import score_of as score_of
    from inverse.solvers.linear import least_squares as least_squares
    from inverse.solvers.linear import wbp as wbp
    from inverse.solvers.local import Local as Local
    from inverse.solvers.local import local as local
    from inverse.solvers.nonlinear import gauss_newton as gauss_newton
    from inverse.solvers.plug_and_play import PlugAndPlay as PlugAndPlay
    from inverse.solvers.plug_and_play import plug_and_play as plug_and_play
    from inverse.solvers.primal_dual import primal_dual as primal_dual
    from inverse.solvers.regularised import matching_weight as matching_weight
    from inverse.solvers.regularised import tgv as tgv
    from inverse.solvers.regularised import tv as tv
    from inverse.solvers.regularised import wavelets as wavelets
    from inverse.solvers.sirt import sirt as sirt
    from inverse.solvers.unrolled import Unrolled as Unrolled
    from inverse.solvers.variational import RegularisedByDenoising as RegularisedByDenoising
    from inverse.solvers.variational import Variational as Variational
    from inverse.solvers.variational import variational as variational
    from inverse.solvers.wiener import Wiener as Wiener
    from inverse.solvers.wiener import posterior_samples as posterior_samples
    from inverse.solvers.wiener import posterior_std as posterior_std
    from inverse.solvers.wiener import wiener as wiener
    from inverse.streamed import reconstruct_to as reconstruct_to
    from inverse.train import train_denoiser as train_denoiser
    from inverse.train_scenes import train_to as train_to
    from inverse.weights import load_denoiser as load_denoiser
    from inverse.weights import write_network as write_network

_HOMES = {
    "calibration.alignment": ["Alignment", "align"],
    "calibration.applied": ["applied"],
    "calibration.conventions": ["Conventions", "check_conventions"],
    "calibration.ctf_fit": ["CtfFit", "fit_ctf"],
    "calibration.expected": ["Forecast", "forecast", "molecules_in_ice"],
    "calibration.field_fit": ["Calibration", "calibrate"],
    "calibration.series_ctf": ["SeriesCtf", "fit_series_ctf"],
    "metrics.coverage": ["Coverage", "coverage", "interval_coverage", "spread_skill"],
    "metrics.directional": ["DirectionalCorrelation", "directional_fsc"],
    "metrics.fsc": ["ShellCorrelation", "fsc", "measured_region"],
    "metrics.halves": ["half_maps"],
    "metrics.local_resolution": ["local_resolution"],
    "physics.contrast": ["ContrastProjection", "EwaldProjection", "fading_by_tilt"],
    "physics.deformed": ["DeformedProjection"],
    "physics.gaussian": ["GaussianModel", "marginal_log_likelihood"],
    "physics.gaussian_estimate": ["ModelEstimate", "estimate_model"],
    "physics.multislice": ["MultisliceProjection"],
    "physics.noise": [
        "CountingFidelity",
        "CountingNoise",
        "TiltGaussianFidelity",
        "TiltGaussianNoise",
        "counting_model",
    ],
    "physics.tilt": ["TiltProjection"],
    "physics.wedge": ["crowther_resolution", "elongation", "measured", "measured_share", "noise_gain"],
    "priors.amortised": ["AmortisedGaussian"],
    "priors.denoiser": ["NoiseConditionalUNet"],
    "priors.implicit": ["HashGrid", "Siren"],
    "priors.local": ["LocalNetwork"],
    "priors.wrappers": ["Affine", "Equivariant", "Tiled"],
    "reconstruction": ["Reconstruction", "reconstruct"],
    "solvers.amortised": ["amortised"],
    "solvers.diffusion": ["Diffusion", "diffusion"],
    "solvers.gaussian_law": ["LowRankGaussian", "StationaryPrior"],
    "solvers.implicit": ["Implicit", "deep_image_prior", "implicit"],
    "solvers.krylov": ["cgls", "lsqr"],
    "solvers.langevin": ["Damped", "Langevin", "langevin", "score_of"],
    "solvers.linear": ["least_squares", "wbp"],
    "solvers.local": ["Local", "local"],
    "solvers.nonlinear": ["gauss_newton"],
    "solvers.plug_and_play": ["PlugAndPlay", "plug_and_play"],
    "solvers.primal_dual": ["primal_dual"],
    "solvers.regularised": ["matching_weight", "tgv", "tv", "wavelets"],
    "solvers.sirt": ["sirt"],
    "solvers.unrolled": ["Unrolled"],
    "solvers.variational": ["RegularisedByDenoising", "Variational", "variational"],
    "solvers.wiener": ["Wiener", "posterior_samples", "posterior_std", "wiener"],
    "streamed": ["reconstruct_to"],
    "train": ["train_denoiser"],
    "train_scenes": ["train_to"],
    "weights": ["load_denoiser", "write_network"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(f"inverse.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'inverse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
