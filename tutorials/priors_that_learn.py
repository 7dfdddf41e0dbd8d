# %% [markdown]
# # Priors that learn, and what they invent
#
# A network that has seen many simulated cells knows what a cell looks like. It takes noise away and fills the missing
# wedge: better than anything that was not taught, and with things that nobody measured. Here are both, and how to tell
# one from the other.

# %%
import matplotlib.pyplot as plt
import torch

import cryosim as cs
import inverse as inv
from cryosim import io
from cryosim.io.examples import example_path
from inverse.design import estimated_damping

SHAPE, VOXEL = (32, 64, 64), 10.0  # (z, y, x) [voxel], [Å]

# %% [markdown]
# **A scene that the network has not seen.** It was taught with the large subunit of a ribosome, its proteins, and
# filaments, rings and vesicles. Apoferritin and ubiquitin were kept from it.

# %%
generator = torch.Generator().manual_seed(3)
cage = io.read_atoms(example_path("apoferritin"), assembly=1)
small = io.read_atoms(example_path("ubiquitin"))
specimen = cs.place_randomly([cage, small], [7, 60], (600.0, 600.0, 280.0), ice=cs.Ice(320.0), generator=generator)
truth = cs.potential_volume(specimen, SHAPE, VOXEL).values  # [V]

angles = torch.linspace(-60, 60, 41)  # [deg]
physics = inv.TiltProjection(angles, SHAPE)
clean = physics.A(truth[None, None])[0, 0]  # (tilt, y, x) [V·voxel]
noise = float(clean.var())  # as strong as the signal
images = clean + noise**0.5 * torch.randn(clean.shape, generator=generator)

# %% [markdown]
# **Plug and play.** Half-quadratic splitting takes turns: least squares with the images, in closed form, then the
# denoiser. `load_denoiser` gives the network that comes with the project; it works in volts, as the volume does, and
# warns where voxels are not of the size it was taught with.

# %%
denoiser = inv.load_denoiser(voxel_size=VOXEL)
plugged = inv.plug_and_play(physics, images, denoiser, noise, strength=0.5)
variation = inv.tv(physics, images, noise=noise)
low_passed = inv.wbp(physics, images, low_pass=4.0)

region = inv.measured_region(SHAPE, angles)


def likeness(volume: torch.Tensor, where: torch.Tensor) -> float:
    """Correlation with the truth among some of the Fourier samples."""
    a, b = (torch.fft.irfftn(torch.fft.rfftn(v - v.mean()) * where, s=SHAPE) for v in (volume, truth))
    return float((a * b).sum() / (a.norm() * b.norm()))


for name, volume in (("back-projection", low_passed), ("total variation", variation), ("network", plugged.volume)):
    print(f"{name:16s} measured {likeness(volume, region):.3f}   missing wedge {likeness(volume, ~region):.3f}")
print(f"the images are met to {float(plugged.misfits[-1]):.2f} of their noise")
assert likeness(plugged.volume, region) > likeness(variation, region)

# %% [markdown]
# **Error bars.** Plug and play gives one volume, and no hint of how many others would do. `diffusion` draws volumes
# that the images and the network both hold possible: their mean is the better estimate, their spread the error bar.
# Whether the bar is honest can be seen here, where the truth is known: nine times in ten it should hold it.

# %%
drawn = inv.diffusion(physics, images, denoiser, noise, samples=4, steps=20, generator=generator)
held = inv.coverage(drawn.samples, truth, region=region)
print(f"90 % intervals hold the truth: voxels {held.voxels:.0%}, measured {held.inside:.0%}, wedge {held.outside:.0%}")

figure, axes = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
shown = {"truth": truth, "back-projection": low_passed, "total variation": variation}
shown |= {"plug and play": plugged.volume, "mean of samples": drawn.mean, "their deviation": drawn.std}
for axis, (name, volume) in zip(axes.flat, shown.items(), strict=True):
    top = 1.0 if name == "their deviation" else 3.0
    axis.imshow(volume[16], cmap="gray" if top > 1 else "viridis", vmin=-top / 4 if top > 1 else 0, vmax=top)
    axis.set_title(name)
    axis.set_axis_off()
figure.savefig("priors_that_learn.png", dpi=90)

# %% [markdown]
# **What it invents.** Now tilts of 30 degrees at most, and ten times the noise. The network still makes clean pictures.
# `measured` splits it into what the images determine in spite of their noise, and the rest: most of that picture is the
# network's own, and where the samples disagree it is a guess.

# %%
narrow = inv.TiltProjection(torch.linspace(-30, 30, 21), SHAPE)
faint = narrow.A(truth[None, None])[0, 0]
loud = 10 * float(faint.var())
seen = faint + loud**0.5 * torch.randn(faint.shape, generator=generator)
made = inv.plug_and_play(narrow, seen, denoiser, loud, strength=0.5)
drowned = estimated_damping(seen, torch.tensor(loud), narrow.angles[0], narrow.geometry)  # weaker is not measured
kept, invented = inv.measured(made.volume, narrow.angles[0], narrow.geometry, cutoff=drowned)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


true_kept, true_rest = inv.measured(truth, narrow.angles[0], narrow.geometry, cutoff=drowned)
print(f"determined by the images: {float(kept.norm() / made.volume.norm()):.0%} of the volume's strength")
print(f"truth in what is measured {correlation(kept, true_kept):.2f}, in what is invented "
      f"{correlation(invented, true_rest):.2f}")  # fmt: skip
assert correlation(kept, true_kept) > correlation(invented, true_rest) + 0.2

# %% [markdown]
# **A denoiser of your own.** Any three-dimensional model of deepinv will do. Most expect values from 0 to 1: `Affine`
# translates, and `Tiled` works through volumes that do not fit into memory, tile by tile. This one is not trained and
# stands for yours.

# %%
from deepinv.models import DRUNet

own = DRUNet(in_channels=1, out_channels=1, nc=(4, 8, 8, 8), nb=1, dim=3, pretrained=None).requires_grad_(False)
with torch.no_grad():
    tiled = inv.Tiled(inv.Affine(own, low=-1.0, high=5.0), tile=32, halo=16)(truth[None, None], 0.5)
print("volumes go in and come out:", tuple(tiled.shape))

# %% [markdown]
# **A network of your own.** `inverse train scenes.yaml -o mine.safetensors` simulates what a description says (it may
# be one of `cryosim config new --dataset`, or a finished dataset), trains, and goes on with `--resume` where it was
# stopped. In Python it is a function of volumes; here, for a moment, at the scale of a test.

# %%
from inverse.train import Plan

with torch.random.fork_rng():
    torch.manual_seed(0)
    young = inv.NoiseConditionalUNet(widths=(8, 16), blocks=1, scale=float(truth.std()), voxel_sizes=(VOXEL, VOXEL))
inv.train_denoiser(young, [truth], Plan(steps=40, batch=2, crop=16))
inv.write_network("mine.safetensors", young, {"data": "one small scene"})
assert inv.load_denoiser("mine.safetensors", voxel_size=VOXEL).scale == young.scale
