# %% [markdown]
# # One series teaches itself
#
# A network that denoises needs examples. Where no volume like yours is known, the tilt series itself can teach one: its
# noise is dealt out to two sets of images, and a network that is shown the volume of one has to foretell the other. It
# cannot foretell noise. On average that is as good as the truth, wherever a tilt has looked.

# %%
import matplotlib.pyplot as plt
import torch

import cryosim as cs
import inverse as inv
from cryosim import io
from cryosim.io.examples import example_path
from inverse.preparation import prepare
from inverse.rotate import Rotate3D
from inverse.self_supervised import SelfSupervisedPlan, self_supervised, thinned
from inverse.self_supervised_losses import equivariance_by

SHAPE, VOXEL = (32, 48, 48), 9.0  # (z, y, x) [voxel], [Å]
generator = torch.Generator().manual_seed(5)
cage = io.read_atoms(example_path("apoferritin"), assembly=1)
small = io.read_atoms(example_path("ubiquitin"))
specimen = cs.place_randomly([cage, small], [4, 40], (400.0, 400.0, 260.0), ice=cs.Ice(300.0), generator=generator)
truth = cs.potential_volume(specimen, SHAPE, VOXEL).values  # [V]
truth = truth - truth.mean()

# %% [markdown]
# **A noisy series**: as much noise as signal in each image. Nothing else is given to what follows.

# %%
angles = torch.linspace(-60, 60, 41)
physics = inv.TiltProjection(angles, SHAPE)
clean = physics.A(truth[None, None])[0, 0]
noise = float(clean.var(dim=(1, 2)).mean())
images = clean + noise**0.5 * torch.randn(clean.shape, generator=generator)

# %% [markdown]
# **Two losses.** `noise2noise` deals out the noise; `tilt_splitting` leaves out tilts. Here for a minute, at the scale
# of a test; more steps, and more than one series, teach more.

# %%
made = self_supervised(
    physics, images, noise, losses=("noise2noise", "tilt_splitting"), plan=SelfSupervisedPlan(steps=50, rate=2e-3)
)
volumes = {
    "truth": truth,
    "back-projection": max(
        (inv.wbp(physics, images, low_pass=period) for period in (2.5, 3.0, 4.0, 6.0)),
        key=lambda volume: float(torch.corrcoef(torch.stack([volume.flatten(), truth.flatten()]))[0, 1]),
    ),
    "self-supervised": made.volume,
}


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


true_parts = inv.measured(truth, angles)
for name, volume in volumes.items():
    seen, unseen = (correlation(a, b) for a, b in zip(inv.measured(volume, angles), true_parts, strict=True))
    print(f"{name:16s} with the truth {correlation(volume, truth):.3f}; measured {seen:.3f}, not measured {unseen:.3f}")
assert correlation(made.volume, truth) > correlation(volumes["back-projection"], truth)

figure, axes = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
for column, (name, volume) in zip(axes.T, volumes.items(), strict=True):
    column[0].imshow(volume[SHAPE[0] // 2], cmap="gray", vmin=-0.8, vmax=3)
    column[1].imshow(volume[:, SHAPE[1] // 2], cmap="gray", vmin=-0.8, vmax=3)
    column[0].set_title(name, fontsize=9)
    for axis in column:
        axis.set_axis_off()
figure.savefig("one_series_teaches_itself.png", dpi=90)

# %% [markdown]
# **What no tilt has seen** is filled with what the same molecules show from other sides. The misfit does not see it;
# `equivariance` and `missing_wedge` do, and ask that a turned specimen be restored as well as it stood before.
# They take longer to teach, and what they fill in is a guess.
#
# **Counts** are dealt out electron by electron, which is exact at any dose, and a rotation of your own may take the
# place of those of the cube:

# %%
tilts = cs.TiltScheme(angles=angles, doses=torch.full_like(angles, 3.0))
brightness = 20.0  # [counts/px]
counts = torch.poisson(brightness * (1 - 0.1 * clean / clean.abs().max()), generator=generator)
series = cs.TiltSeries(images=counts, pixel_size=VOXEL, tilts=tilts, optics=cs.Optics(300.0, defocus=30_000.0))
prepared, variances = prepare(series)
brief = self_supervised(
    physics,
    prepared,
    variances,
    losses=("noise2noise", equivariance_by(Rotate3D("any"))),
    weights=(1.0, 0.1),
    split=thinned(series),
    plan=SelfSupervisedPlan(steps=2, averages=1),
)
print(tuple(brief.volume.shape))
