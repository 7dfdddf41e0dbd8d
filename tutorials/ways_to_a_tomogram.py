# %% [markdown]
# # Ways to a tomogram, and what to believe of it
#
# One noisy tilt series, reconstructed in five ways from the same prepared images. Which is nearest to the truth, how
# far each may be off, and which part of it the images have determined at all.

# %%
import matplotlib.pyplot as plt
import torch

import cryosim as cs
import inverse as inv
from cryosim import io, plot
from cryosim.io.examples import example_path

SHAPE, VOXEL = (32, 64, 64), 8.0  # (z, y, x) [voxel], [Å]

# %% [markdown]
# **Specimen and images.** Five apoferritins and a crowd of ubiquitin; 100 electrons per Å^2 over 41 tilts leave each
# image with some 150 electrons per pixel.

# %%
generator = torch.Generator().manual_seed(5)
shells = io.read_atoms(example_path("apoferritin"), assembly=1)
small = io.read_atoms(example_path("ubiquitin"))
specimen = cs.place_randomly([shells, small], [5, 40], (480.0, 480.0, 220.0), ice=cs.Ice(250.0), generator=generator)
truth = cs.potential_volume(specimen, SHAPE, VOXEL).values
tilts = cs.TiltScheme.dose_symmetric(extent=60, step=3, total_dose=100)
optics = cs.Optics(voltage=300.0, defocus=30000.0, amplitude_contrast=0.07)
series = cs.simulate(specimen, tilts, optics, cs.Detector((64, 64), VOXEL), generator=generator)

# %% [markdown]
# **Five ways.** Back-projection takes the images at their word. Least squares damps what noise drowns. SIRT stops
# before it meets the noise. The Wiener filter first asks the images themselves, by their marginal likelihood, how
# strong the specimen is at each size and how strong the noise of each tilt, and then weighs them as well as a linear
# method can. Total variation expects few edges; how much it may smooth follows from the counting noise. No method is
# given a knob here.

# %%
methods = ("wbp", "least-squares", "sirt", "wiener", "tv")
made = {method: inv.reconstruct(series, method, thickness=SHAPE[0] * VOXEL) for method in methods}


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


print("               correlation   std [V]   misfit   not measured")
for method, result in made.items():
    values = result.volume.values
    invented = float((values - result.measured.values).norm() / values.norm())
    std, misfit = float(result.std.mean()), result.consistency
    print(f"{method:15s}   {correlation(values, truth):.2f}        {std:.2f}      {misfit:.2f}     {invented:.0%}")

# %%
figure = plot.ortho_slices({"truth": cs.Volume(truth, VOXEL), **{name: r.volume for name, r in made.items()}}, slab=3)

# %% [markdown]
# **Error bars.** `std` is of two kinds. For most methods it is what the noise of the images alone does to a voxel; what
# the missing wedge hides is not in it. The Wiener filter's is that of its posterior: noise and missing views.
# `misfit` is the mean square of what a volume leaves of the images, over the noise: about 1 is right, less has
# taken up noise, more has missed something.
#
# **Measured or made up.** `measured` keeps the part of a volume that the tilts determine in spite of their noise. The
# rest came from the method. Total variation writes sharp edges into the missing wedge, where nothing was measured:
# often right, since few edges are a good guess, but a guess.

# %%
result = made["tv"]
parts = {"total variation": result.volume.values, "measured": result.measured.values}
parts["the rest"] = parts["total variation"] - parts["measured"]
figure, axes = plt.subplots(1, 3, figsize=(11, 2.5), layout="constrained")
top = float(parts["total variation"].abs().max()) / 2
for axis, (name, part) in zip(axes, parts.items(), strict=True):
    axis.imshow(part[:, 32], cmap="RdBu_r", vmin=-top, vmax=top, origin="lower")
    axis.set_title(name)
    axis.set_axis_off()

# %% [markdown]
# **Other priors.** The same solver takes other expectations: `inv.tgv` for densities that are smooth rather than flat,
# `inv.wavelets`, and for all of them `positivity=` and a `support=`. The weight is the one that was found above.

# %%
physics = inv.TiltProjection(made["tv"].angles, SHAPE)
noise = float(made["tv"].noise.mean())
slab = torch.zeros(SHAPE)
slab[3:29] = 1  # the specimen is 220 Å thick
for name, how in {"TV": {}, "TV in the slab": {"support": slab}}.items():
    found = inv.tv(physics, made["tv"].images, float(made["tv"].weight), noise=noise, iterations=60, **how)
    print(f"{name:15s} {correlation(found, truth):.3f}")
smooth = inv.tgv(physics, made["tv"].images, float(made["tv"].weight), noise=noise, iterations=60)
print(f"{'TGV':15s} {correlation(smooth, truth):.3f}")
