"""The hand: a chiral specimen goes through simulate -> files -> read -> reconstruct and comes back as itself.

`chain` takes the specimen all the way and returns what a user would look at; `verdicts` says what is right about it.
Then every sign on the way is flipped, one at a time, and each flip must be noticed.
"""

import itertools

import pytest
import torch

import cryosim.acquisition.simulate
import cryosim.core.rotation
import cryosim.io.mrc
import cryosim.io.series
import cryosim.microscope.imaging
import cryosim.microscope.scattering
import cryosim.specimen.specimen
import inverse.physics.rows
import inverse.preparation
from cryosim.acquisition.simulate import simulate
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import rotation_y, rotation_z
from cryosim.io.series import read_series, write_series
from cryosim.microscope.detector import Detector
from cryosim.microscope.optics import Optics
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.specimen import Poses, Specimen
from inverse.reconstruction import reconstruct

PIXEL, SIDE, DEPTH = 6.0, 48, 40
# (x, y, z) [Å] and weight of five heavy points: no rotation or mirror maps them on one another
POINTS = torch.tensor(
    [
        [72.0, 18.0, 66.0, 3.0],
        [-60.0, 30.0, -72.0, 2.5],
        [18.0, -72.0, 48.0, 2.0],
        [-30.0, -42.0, -54.0, 2.0],
        [30.0, 60.0, -36.0, 2.0],
    ],
    dtype=torch.float64,
)


def chiral_specimen() -> Specimen:
    points = Atoms(
        positions=POINTS[:, :3],
        numbers=torch.full((5,), 79),
        b_factors=torch.full((5,), 800.0, dtype=torch.float64),
        occupancies=20 * POINTS[:, 3],
    )
    pose = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
    return Specimen((points,), (pose,), (288.0, 288.0, 240.0))


def chain(folder):
    """Tomogram (z, y, x) by way of files, and the image (y, x) of the untilted specimen in focus."""
    specimen, detector = chiral_specimen(), Detector((SIDE, SIDE), PIXEL)
    tilts = TiltScheme.dose_symmetric(60, 6, 4e5, axis_angle=25.0)
    optics = Optics(300.0, 15000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
    generator = torch.Generator().manual_seed(0)
    write_series(folder / "hand.mrc", simulate(specimen, tilts, optics, detector, generator=generator))
    tomogram = reconstruct(read_series(folder / "hand.mrc"), "wbp", thickness=DEPTH * PIXEL, low_pass=24.0)
    upright = TiltScheme(torch.zeros(1, dtype=torch.float64), torch.full((1,), 1e7, dtype=torch.float64))
    write_series(folder / "focus.mrc", simulate(specimen, upright, Optics(300.0), detector, generator=generator))
    return tomogram.volume.values.double(), read_series(folder / "focus.mrc").images[0].double()


def verdicts(tomogram: torch.Tensor, focused: torch.Tensor) -> dict[str, bool]:
    """What is right: brightness, hand and orientation, and which points lie above the focus."""
    noise = float((tomogram - tomogram.mean()).abs().median())

    def brightness(*signs):  # where the points would be, were the axes (x, y, z) mirrored by these signs
        x, y, z = (POINTS[:, :3] * torch.tensor(signs) / PIXEL).round().long().T
        return tomogram[DEPTH // 2 + z, SIDE // 2 + y, SIDE // 2 + x] / noise

    right = brightness(1, 1, 1)
    mirrored = [float(brightness(*signs).mean()) for signs in itertools.product((1, -1), repeat=3) if min(signs) < 0]
    swapped = tomogram[DEPTH // 2, SIDE // 2, SIDE // 2] / noise  # no point is at the centre
    # in focus, effective underfocus is the height: points above are dark, points below are bright
    x, y = (POINTS[:, :2] / PIXEL).round().long().T + SIDE // 2
    seen = focused[y, x] - focused.median()
    return {
        "matter is bright": float(right.min()) > 10 > float(swapped),
        "the hand and the axes are right": float(right.mean()) > 4 * max(mirrored),
        "height adds to the underfocus": bool((torch.sign(seen) == -torch.sign(POINTS[:, 2])).all()),
    }


def test_the_hand_comes_back(tmp_path):
    assert all(verdicts(*chain(tmp_path)).values())


def _negated_angles(path, *args, **kwargs):
    series = _read(path, *args, **kwargs)
    return series.replace(tilts=series.tilts.replace(angles=-series.tilts.angles))


def _negated_axis(path, *args, **kwargs):
    series = _read(path, *args, **kwargs)
    return series.replace(tilts=series.tilts.replace(axis_angle=-series.tilts.axis_angle))


def _flipped_rows(path, *args, **kwargs):
    series = _read(path, *args, **kwargs)
    return series.replace(images=series.images.flip(1).roll(1, 1))


def _flipped_columns(path, *args, **kwargs):
    series = _read(path, *args, **kwargs)
    return series.replace(images=series.images.flip(2).roll(1, 2))


_read = read_series
_transmission = cryosim.microscope.backward.Step.transmission
_propagator = cryosim.microscope.scattering.propagator
_transfer = cryosim.microscope.imaging.transfer
_ctf = inverse.preparation.contrast_transfer
_slopes = inverse.physics.rows.slopes
_frame = inverse.preparation.to_tilt_frame

FLIPS = {
    "tilt of the specimen": (
        "cryosim.specimen.tilted.tilt_rotation",
        lambda angle, axis=0.0: rotation_z(axis) @ rotation_y(-angle),
    ),
    "in-plane turn of the specimen": (
        "cryosim.specimen.tilted.tilt_rotation",
        lambda angle, axis=0.0: rotation_z(-axis) @ rotation_y(angle),
    ),
    "order of the slices": (
        "cryosim.specimen.potential.AtomSlices.in_order",
        lambda self: (self[i] for i in reversed(range(len(self)))),
    ),
    "phase of the transmission": (
        "cryosim.microscope.backward.Step.transmission",
        lambda self, potential: _transmission(self, -potential),
    ),
    "phase of the flight": (
        "cryosim.microscope.scattering.propagator",
        lambda slices, optics, distance, *rest: _propagator(slices, optics, -distance, *rest),
    ),
    "phase of the lens": (
        "cryosim.microscope.imaging.transfer",
        lambda *args, **kwargs: _transfer(*args, **kwargs).conj(),
    ),
    "angles in the file": ("tests_hand.read_series", _negated_angles),
    "tilt axis in the file": ("tests_hand.read_series", _negated_axis),
    "rows in the file": ("tests_hand.read_series", _flipped_rows),
    "columns in the file": ("tests_hand.read_series", _flipped_columns),
    "contrast transfer in the reconstruction": (
        "inverse.preparation.contrast_transfer",
        lambda *args, **kwargs: -_ctf(*args, **kwargs),
    ),
    "tilt in the reconstruction": (
        "inverse.physics.rows.slopes",
        lambda angles: -_slopes(angles),
    ),
    "turn in the reconstruction": (
        "inverse.preparation.to_tilt_frame",
        lambda images, shifts, axis_angle: _frame(images, shifts, -axis_angle),
    ),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_every_flipped_sign_is_noticed(flip, tmp_path, monkeypatch):
    target, replacement = FLIPS[flip]
    if target == "tests_hand.read_series":
        monkeypatch.setitem(globals(), "read_series", _once_for_tilts(replacement))
    else:
        monkeypatch.setattr(target, replacement)
    tomogram, focused = chain(tmp_path)
    monkeypatch.undo()
    assert not all(verdicts(tomogram, focused).values())


def _once_for_tilts(replacement):
    original = read_series
    return lambda path, *args, **kwargs: (
        replacement(path, *args, **kwargs) if path.stem == "hand" else original(path, *args, **kwargs)
    )
