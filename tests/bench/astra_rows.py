"""ASTRA's CPU projector on single rows (z, x) of a volume, in our geometry."""

import astra
import numpy as np


class Rows:
    """The projector of rows (z, x): ASTRA's second axis points up its rows, against our z."""

    def __init__(self, depth, width, angles):
        geometry = astra.create_vol_geom(depth, width)
        tilts = astra.create_proj_geom("parallel", 1.0, width, np.deg2rad(angles))
        self._projector = astra.create_projector("linear", tilts, geometry)

    def project(self, row):
        number, sinogram = astra.create_sino(np.ascontiguousarray(row[::-1]), self._projector)
        astra.data2d.delete(number)
        return sinogram

    def backproject(self, sinogram):
        number, row = astra.create_backprojection(sinogram, self._projector)
        astra.data2d.delete(number)
        return row[::-1]


def serve(adjoint, rows, depth, width, angles, orders, done):
    """One process of a benchmark: works through its rows each time it is told to."""
    projector = Rows(depth, width, angles)
    slices = np.random.default_rng(0).standard_normal((rows, depth, width), dtype=np.float32)
    sinogram = projector.project(slices[0])
    done.put("ready")
    while orders.get() == "go":
        for row in slices:
            projector.backproject(sinogram) if adjoint else projector.project(row)
        done.put("done")
