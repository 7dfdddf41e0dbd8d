# %% [markdown]
# # A network for any tilts
#
# A denoiser works on volumes, and has to be called again and again between steps on the data. The local network looks
# at the data themselves, once: for each voxel, at the surroundings of its projection in every tilt. It was taught with
# thousands of simulated series of all kinds, so it needs no training for yours: any number of tilts, any angles, a lens
# or none. It says how far it expects to be off, voxel by voxel. It takes a second where plug-and-play takes a minute;
# plug-and-play is the better of the two.

# %%
import time

import matplotlib.pyplot as plt
import torch

import cryosim as cs
import inverse as inv
from cryosim import io
from cryosim.io.examples import example_path

SHAPE, VOXEL = (32, 64, 64), 9.0  # (z, y, x) [voxel], [Å]

# %% [markdown]
# **A specimen that the network has not seen**, wider than the camera: what lies beside the field comes into it at high
# tilts, as in a real cell.

# %%
generator = torch.Generator().manual_seed(5)
cage = io.read_atoms(example_path("apoferritin"), assembly=1)
small = io.read_atoms(example_path("ubiquitin"))
size = (1100.0, 576.0, 260.0)  # [Å]
specimen = cs.place_randomly([cage, small], [12, 110], size, ice=cs.Ice(300.0), generator=generator)
wide = cs.potential_volume(specimen, (32, 64, 128), VOXEL).values  # [V]
truth = wide[:, :, 32:96].contiguous()

# %% [markdown]
# **Three series of it**: the usual one, one with few and uneven tilts, and a noisy one. Noise is white and known.


# %%
def seen(angles: torch.Tensor, noise_over_signal: float) -> tuple[torch.Tensor, float]:
    clean = inv.TiltProjection(angles, (32, 64, 128), (64, 64)).A(wide[None, None])[0, 0]
    noise = noise_over_signal * float(clean.var(dim=(1, 2)).mean())
    return clean + noise**0.5 * torch.randn(clean.shape, generator=generator), noise


schemes = {
    "41 tilts": (torch.linspace(-60, 60, 41), 0.3),
    "14 uneven tilts": (torch.cat([torch.linspace(-48, 0, 8), torch.linspace(9, 58, 6)]), 0.3),
    "41 noisy tilts": (torch.linspace(-60, 60, 41), 3.0),
}
network = inv.load_denoiser("local")  # the weights that come with the project
region = inv.measured_region(SHAPE, torch.linspace(-60, 60, 41))
everything = torch.ones_like(region)


def likeness(volume: torch.Tensor, where: torch.Tensor) -> float:
    """Correlation with the truth among some of the Fourier samples."""
    a, b = (torch.fft.irfftn(torch.fft.rfftn(v - v.mean()) * where, s=SHAPE) for v in (volume, truth))
    return float((a * b).sum() / (a.norm() * b.norm()))


figure, axes = plt.subplots(3, 4, figsize=(11, 8.5), layout="constrained")
for row, (name, (angles, share)) in zip(axes, schemes.items(), strict=True):
    images, noise = seen(angles, share)
    physics = inv.TiltProjection(angles, SHAPE)
    start = time.perf_counter()
    made = inv.local(physics, images, network, noise=noise)
    took = time.perf_counter() - start
    candidates = [inv.wbp(physics, images, low_pass=period) for period in (2.5, 3.0, 4.0, 6.0, 8.0)]
    plain = max(candidates, key=lambda volume: likeness(volume, everything))  # the best low pass there is
    off = float(((made.volume - truth) / made.std).square().mean().sqrt())
    print(f"{name:16s} error of the network over the expected one {off:.2f}, {took:.1f} s; correlation with the truth:")
    for what, where in (("all", everything), ("between the tilts", region), ("missing wedge", ~region)):
        print(
            f"    {what:18s} back-projection {likeness(plain, where):.3f}, network {likeness(made.volume, where):.3f}"
        )
    assert likeness(made.volume, everything) > likeness(plain, everything) + 0.03
    for axis, (title, volume) in zip(
        row,
        {"truth": truth, "back-projection": plain, "network": made.volume, "expected error": made.std}.items(),
        strict=True,
    ):
        error = title == "expected error"
        axis.imshow(volume[16], cmap="viridis" if error else "gray", vmin=0 if error else -0.8, vmax=1 if error else 3)
        axis.set_title(f"{name}: {title}" if title == "truth" else title, fontsize=9)
        axis.set_axis_off()
figure.savefig("a_network_for_any_tilts.png", dpi=90)

# %% [markdown]
# **Measured and invented.** Like every network this one fills what no tilt has seen with what such scenes usually hold.
# `measured` splits its volume: trust the first part as far as the expected error allows; the second is a guess.

# %%
kept, invented = inv.measured(made.volume, angles)
true_kept, true_rest = inv.measured(truth, angles)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


print(f"with the truth: measured {correlation(kept, true_kept):.2f}, invented {correlation(invented, true_rest):.2f}")
assert correlation(kept, true_kept) > correlation(invented, true_rest)

# %% [markdown]
# **On a tilt series** with a lens, doses and counts: `inv.reconstruct(series, "local")`, or `inverse reconstruct
# series.mrc --method local`. The network is told what lens and dose have left of the contrast in each tilt.
#
# **One of your own**, of volumes that you have the truth of, here for a moment, at the scale of a test:

# %%
from inverse.train_local import LocalPlan, train_local

with torch.random.fork_rng():
    torch.manual_seed(0)
    young = inv.LocalNetwork(features=2, width=8, scale=float(truth.std()), voxel_sizes=(VOXEL, VOXEL))
train_local(young, [wide], LocalPlan(steps=10, crop=16, lens=0.5))
inv.write_network("mine.safetensors", young, {"data": "one small scene"})
