# %% [markdown]
# # One tilt series to one tomogram
#
# A small specimen, a tilt series of it, files as other programs write them, and two ways back to the volume.

# %%
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import torch

import cryosim as cs
import inverse as inv
from cryosim import io, plot
from cryosim.io.examples import example_path

# %% [markdown]
# **Specimen.** Two apoferritins (one subunit and its 24 operators) at random poses in 25 nm of ice.

# %%
apoferritin = io.read_atoms(example_path("apoferritin"), assembly=1)
generator = torch.Generator().manual_seed(2)
specimen = cs.place_randomly([apoferritin], [2], (340.0, 340.0, 180.0), ice=cs.Ice(250.0), generator=generator)

# %% [markdown]
# **Exposures.** Hagen's dose-symmetric order: the low tilts see the fresh specimen. Rows of a `TiltScheme` stand in the
# order of exposure.

# %%
tilts = cs.TiltScheme.dose_symmetric(extent=60, step=6, total_dose=120)
optics = cs.Optics(voltage=300.0, defocus=25000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
detector = cs.Detector(shape=(64, 64), pixel_size=6.0)
series = cs.simulate(specimen, tilts, optics, detector, generator=generator)
print("first angles:", tilts.angles[:7].tolist())

# %% [markdown]
# **Files.** The stack is sorted by angle, as IMOD expects; the .mdoc beside it remembers the order and the dose.

# %%
folder = Path(mkdtemp())
for path in io.write_series(folder / "series.mrc", series):
    print(path.name)
series = io.read_series(folder / "series.mrc")

# %%
figure = plot.tilt_gallery(series.images, series.tilts.angles, float(series.pixel_size))

# %% [markdown]
# **Back.** Weighted back-projection, and damped least squares in closed form: for each frequency along x one matrix,
# as large as the number of tilts, and no iterations.

# %%
truth = cs.potential_volume(specimen, (42, 64, 64), 6.0)
results = {method: inv.reconstruct(series, method, thickness=252.0).volume for method in ("wbp", "least-squares")}
region = inv.measured_region((42, 64, 64), series.tilts.angles)
for method, volume in results.items():
    curve = inv.fsc(volume.values, truth.values, 6.0, region=region, thickness=250.0)
    print(f"{method}: Fourier shell correlation with the truth at 1/60 Å {float(curve.correlation[6]):.2f}")

# %%
figure = plot.ortho_slices({"truth": truth, **results})

# %% [markdown]
# **The operator by itself.** `TiltProjection` is a deepinv physics: it has `A`, `A_adjoint`, `prox_l2`, gradients to
# the angles, and fits deepinv's solvers. Here is the least-squares step by hand, on images without noise.

# %%
physics = inv.TiltProjection(series.tilts.angles.sort().values, volume_shape=(42, 64, 64), normalize=True)
x = truth.values[None, None]
y = physics.A(x)
again = physics.prox_l2(torch.zeros_like(x), y, gamma=100.0)
print(f"with a missing wedge, {float(1 - (again - x).norm() ** 2 / x.norm() ** 2):.0%} of the power comes back")

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3))
for ax, picture in zip(axes, (x, again), strict=True):
    ax.imshow(picture[0, 0, :, 32], cmap="gray", origin="lower")
