# %% [markdown]
# # One molecule to one image
#
# From the atoms of a protein to the picture a microscope takes of it, one step a cell: atoms, their potential, the
# electron wave behind them, the image through the lens, the electrons that are counted.

# %%
import matplotlib.pyplot as plt
import torch

import cryosim as cs
from cryosim import io
from cryosim.io.examples import example_path

# %% [markdown]
# **Atoms.** Ubiquitin, 1UBI, from its PDB file. Positions are (x, y, z) in Å; we put their middle at the origin, which
# is the centre of every box in this package.

# %%
atoms = io.read_atoms(example_path("ubiquitin")).centred()
print(atoms)

# %% [markdown]
# **Potential.** The electrons feel the electrostatic potential. We cut it into slices, 2 Å thick, and project each:
# V·Å. A slice is computed only when it is asked for, so a large specimen costs no memory.

# %%
pixel = 0.5  # [Å]
slices = cs.potential_slices(atoms, shape=(128, 128), pixel_size=pixel, thickness=2.0, n_slices=27, dtype=torch.float32)
projected = sum(slices[i] for i in range(len(slices)))
print(f"the strongest column turns the wave by {float(projected.max()) * cs.interaction_constant(300.0):.2f} rad")

# %% [markdown]
# **Wave.** Slice by slice the wave is turned in phase and flies on. Behind a thin protein it has lost nothing: its
# modulus is still 1 almost everywhere, which is why a protein in focus cannot be seen.

# %%
optics = cs.Optics(voltage=300.0, defocus=3000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
wave = cs.multislice(slices, optics)
in_focus = cs.image(wave, optics.replace(defocus=0.0, spherical_aberration=0.0), pixel)
defocused = cs.image(wave, optics, pixel)
print(f"contrast in focus {float(in_focus.std()):.3f}, at 0.3 µm underfocus {float(defocused.std()):.3f}")

# %% [markdown]
# **Lens.** For a weak object the whole chain is one multiplication in Fourier space, by the contrast transfer function.
# The full wave agrees with it where the object is weak; the rest is what multislice is for.

# %%
transfer = cs.ctf(optics, (128, 128), pixel).to(projected)
sigma = cs.interaction_constant(300.0)
linear = 1 + 2 * sigma * torch.fft.ifft2(transfer * torch.fft.fft2(projected)).real
both = torch.stack([linear.flatten(), defocused.flatten()])
print(f"linear and full image correlate by {float(torch.corrcoef(both)[0, 1]):.3f}")

# %% [markdown]
# **Counts.** Twenty electrons fall on each Å². What the detector counts is a Poisson number.

# %%
detector = cs.Detector(shape=(64, 64), pixel_size=1.0)
mean = cs.expected_counts(slices, optics, detector, dose=20.0)  # [e-/px]
counts = torch.poisson(mean, generator=torch.Generator().manual_seed(0))
print(f"{float(mean.mean()):.1f} electrons a pixel")

# %%
figure, axes = plt.subplots(1, 5, figsize=(15, 3.3))
for ax, (title, picture) in zip(
    axes,
    {
        "projected potential": projected,
        "in focus": in_focus,
        "0.3 µm underfocus": defocused,
        "expected counts": mean,
        "counts": counts,
    }.items(),
    strict=True,
):
    ax.imshow(picture, cmap="gray", origin="lower")
    ax.set_title(title)
    ax.axis("off")
figure.tight_layout()

# %% [markdown]
# **Everything is differentiable.** How does the image change when the defocus does? One call, and it equals the
# difference quotient.

# %%
defocus = torch.tensor(3000.0, dtype=torch.float64, requires_grad=True)
fine = cs.potential_slices(atoms, (128, 128), pixel, 2.0, 27)  # float64


def brightness(value):
    return cs.expected_counts(fine, optics.replace(defocus=value), detector, dose=20.0)[32, 32]


brightness(defocus).backward()
step = 1.0  # [Å]
quotient = (brightness(3000.0 + step) - brightness(3000.0 - step)) / (2 * step)
print(f"gradient {float(defocus.grad):.6f}, difference quotient {float(quotient):.6f} electrons per Å of defocus")
assert abs(float(defocus.grad) - float(quotient)) < 1e-3 * abs(float(quotient)) + 1e-8
