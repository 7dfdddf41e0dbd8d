"""cryosim: from atoms to cryo-electron tilt series."""

from cryosim.acquisition.series import TiltSeries as TiltSeries
from cryosim.acquisition.tilts import TiltScheme as TiltScheme
from cryosim.core.constants import interaction_constant as interaction_constant
from cryosim.core.constants import wavelength as wavelength
from cryosim.core.volume import Volume as Volume
from cryosim.microscope.optics import Optics as Optics
from cryosim.microscope.optics import ctf as ctf
from cryosim.specimen.atoms import Atoms as Atoms
