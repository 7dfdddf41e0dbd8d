"""The outside world's files. Nothing below this package knows of any of them."""

from cryosim.io.examples import example_path as example_path
from cryosim.io.files import FormatError as FormatError
from cryosim.io.files import atomic_write as atomic_write
from cryosim.io.mdoc import Mdoc as Mdoc
from cryosim.io.mdoc import read_mdoc as read_mdoc
from cryosim.io.mdoc import write_mdoc as write_mdoc
from cryosim.io.mrc import read_stack as read_stack
from cryosim.io.mrc import read_volume as read_volume
from cryosim.io.mrc import write_stack as write_stack
from cryosim.io.mrc import write_volume as write_volume
from cryosim.io.series import read_series as read_series
from cryosim.io.series import write_series as write_series
from cryosim.io.star import read_poses as read_poses
from cryosim.io.star import write_poses as write_poses
from cryosim.io.structure import read_atoms as read_atoms
from cryosim.io.tilts import read_tilts as read_tilts
from cryosim.io.tilts import write_tlt as write_tlt
