"""inverse: from tilt series to volumes and parameters, on deepinv's operators.

The names below are loaded when they are first used: deepinv takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inverse.metrics.fsc import ShellCorrelation as ShellCorrelation
    from inverse.metrics.fsc import fsc as fsc
    from inverse.metrics.fsc import measured_region as measured_region
    from inverse.physics.contrast import ContrastProjection as ContrastProjection
    from inverse.physics.contrast import EwaldProjection as EwaldProjection
    from inverse.physics.noise import CountingFidelity as CountingFidelity
    from inverse.physics.noise import CountingNoise as CountingNoise
    from inverse.physics.noise import TiltGaussianFidelity as TiltGaussianFidelity
    from inverse.physics.noise import TiltGaussianNoise as TiltGaussianNoise
    from inverse.physics.noise import counting_model as counting_model
    from inverse.physics.tilt import TiltProjection as TiltProjection
    from inverse.reconstruction import Reconstruction as Reconstruction
    from inverse.reconstruction import reconstruct as reconstruct
    from inverse.solvers.linear import least_squares as least_squares
    from inverse.solvers.linear import wbp as wbp

_HOMES = {
    "metrics.fsc": ["ShellCorrelation", "fsc", "measured_region"],
    "physics.contrast": ["ContrastProjection", "EwaldProjection"],
    "physics.noise": [
        "CountingFidelity",
        "CountingNoise",
        "TiltGaussianFidelity",
        "TiltGaussianNoise",
        "counting_model",
    ],
    "physics.tilt": ["TiltProjection"],
    "reconstruction": ["Reconstruction", "reconstruct"],
    "solvers.linear": ["least_squares", "wbp"],
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
