# %% [markdown]
# # Through the lens, and back
#
# An operator of tomography usually says: an image is a projection. A microscope says: it is a projection seen through a
# lens whose focus depends on the height, and in a tilted specimen everything has another height. This tutorial looks at
# what that costs, takes it into the operator, and then asks of the result which part of it was measured at all.

# %%
import matplotlib.pyplot as plt
import torch

import cryosim as cs
import inverse as inv
from inverse.physics.wedge import measured

generator = torch.Generator().manual_seed(4)

# %% [markdown]
# **A small, hard case.** At 10 kV electrons are 0.12 Å long, so that 72 Å are thick already: detail finer than
# sqrt(lambda t / 0.7) = 3.5 Å notices that the Ewald sphere is curved. At 300 kV the same happens in 100 nm at 5 Å, in
# a box that would not fit here. The specimen is a random texture, which has detail of every size.

# %%
SHAPE, VOXEL = (48, 16, 40), 1.5  # (z, y, x) [voxel], [Å]
truth = torch.zeros(SHAPE)
truth[:, 4:12, 8:32] = torch.randn(48, 8, 24, generator=generator)
angles = torch.linspace(-60, 60, 31)
focus = torch.tensor([200.0, 350.0, 500.0]).repeat(11)[:31]  # [Å]: no frequency is lost in all tilts
optics = cs.Optics(voltage=10.0, defocus=focus, spherical_aberration=0.0)

# %% [markdown]
# **The images.** `EwaldProjection` gives every voxel the defocus of its height. Its arguments are a volume in volts and
# nothing else, its result is intensity - 1, and of a weak specimen multislice gives the same to 2e-6. The curvature has
# a sign: seen with the wrong hand, the specimen would be upside down.

# %%
images = inv.EwaldProjection(angles, SHAPE, VOXEL, optics).A(truth[None, None])
models = {
    "curved": inv.EwaldProjection(angles, SHAPE, VOXEL, optics, tolerance=1e-3),
    "tilted plane": inv.ContrastProjection(angles, SHAPE, VOXEL, optics, tolerance=1e-3),
    "one defocus": inv.ContrastProjection(angles, SHAPE, VOXEL, optics, heights="none", tolerance=1e-3),
    "curved, wrong hand": inv.EwaldProjection(angles, SHAPE, VOXEL, optics, hand=-1, tolerance=1e-3),
}

# %% [markdown]
# **Back.** Damped least squares with each operator, and the correlation of what comes back with the truth, shell by
# shell.

# %%
found, curves = {}, {}
for name, physics in models.items():
    found[name] = inv.least_squares(physics, images, 0.01 * physics.squared_norm())[0, 0]
    curves[name] = inv.fsc(truth, found[name], VOXEL)
    fine = (curves[name].frequency > 1 / 3.5) & (curves[name].frequency < 1 / 3.1)
    print(f"{name:20s} mean correlation from 3.5 to 3.1 Å: {float(curves[name].correlation[fine].mean()):.2f}")

# %% [markdown]
# The curved operator knows best, and the wrong hand is worse than none. The tilted plane alone does not help here: in a
# specimen as thick as it is wide, u tells little about the height. In the usual thin and wide one it is what matters.

# %% [markdown]
# **What was measured?** 31 tilts between -60 and 60 degrees see part of Fourier space. `measured` splits any volume,
# also one that a network made, into the part that the projections determine and the rest that something else has put
# there. The truth itself has a part that no reconstruction from these images can know.

# %%
projection = inv.TiltProjection(angles, SHAPE, grid="stretched")
seen, unseen = measured(truth, angles, projection.geometry)
share = float(seen.square().sum() / truth.square().sum())
print(f"of the truth's power {share:.0%} is measured; no method can know the rest")
toward = inv.directional_fsc(truth, found["curved"], VOXEL, half_angle=20.0)

# %% [markdown]
# Correlation in every direction at once shows where: along x all is well, along the beam nothing is.

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for name, curve in curves.items():
    left.plot(curve.frequency, curve.correlation, label=name)
left.set(xlabel="frequency [1/Å]", ylabel="correlation with the truth", title="operators", ylim=(0, 1))
left.legend(fontsize=8)
cones = {"along x": (1.0, 0.0, 0.0), "along the tilt axis": (0.0, 1.0, 0.0), "along the beam": (0.0, 0.0, 1.0)}
for name, direction in cones.items():
    middle.plot(toward.frequency, toward.along(direction).correlation, label=name)
middle.set(xlabel="frequency [1/Å]", ylabel="correlation in a cone of 20°", title="directions", ylim=(-0.1, 1))
middle.legend(fontsize=8)
power = torch.fft.fftshift(torch.fft.fftn(seen).abs().square().sum(1).log10())
right.imshow(power, origin="lower", extent=(-0.5, 0.5, -0.5, 0.5), cmap="gray", vmin=float(power.max()) - 3)
right.set(xlabel="kx [1/voxel]", ylabel="kz [1/voxel]", title="power of the measured part")
figure.savefig("through_the_lens.png", dpi=150)

x, beam = (toward.along(direction).correlation[5:15].mean() for direction in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0)))
assert float(x) > float(beam) + 0.3
