# %% [markdown]
# # How much physics does a specimen need?
#
# There are four ways here to send an electron wave through a specimen, all with the same arguments. They differ in
# what they forget:
#
# | | heights of the atoms | waves that scatter again | transforms per slice |
# |---|---|---|---|
# | `projection` | forgotten: all matter acts at z = 0 | in one plane | 0 |
# | `ewald` | kept | forgotten | 1 |
# | `rytov` | kept | as if the phases only added up | 1 |
# | `multislice` | kept | kept | 2 |
#
# A microscopist's question is which of them is enough for *this* specimen, at *this* voltage, to *this* resolution.
# Rules of thumb exist. Here we measure.

# %%
import math

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

import cryosim as cs
from cryosim import io
from cryosim.core.inelastic import ICE_INNER_POTENTIAL
from cryosim.core.rotation import random_rotations
from cryosim.io.examples import example_path
from cryosim.microscope.ladder import depth_of_field, scattering_error
from cryosim.specimen.atoms import concatenate
from cryosim.specimen.potential import Slices

# %% [markdown]
# **Specimens.** Layers of protein in ice, 40 to 2000 Å thick and 96 Å wide: one ubiquitin for every 10 Å of depth, each
# at a random place and turned at random. That is 150 mg/ml, somewhat less than in a cell. What matters to the wave is
# how the protein differs from the ice it displaces, so the mean potential of ice is taken off. (The single molecules of
# the ice scatter too. They are left out here.)

# %%
WIDTH, PIXEL, SLICE = 96.0, 0.75, 4.0  # [Å]
ubiquitin = io.read_atoms(example_path("ubiquitin")).centred()
generator = torch.Generator().manual_seed(1)


def protein_layer(thickness):
    """Slices of a layer of protein, held in memory."""
    n = round(thickness / 10)
    room = torch.tensor([WIDTH, WIDTH, thickness - 36.0], dtype=torch.float64)  # ubiquitin is 36 Å long
    places = (torch.rand(n, 3, generator=generator, dtype=torch.float64) - 0.5) * room
    turns = random_rotations(n, generator=generator)
    atoms = concatenate([ubiquitin.moved(turn, place) for turn, place in zip(turns, places, strict=True)])
    across = (atoms.positions[:, :2] + WIDTH / 2) % WIDTH - WIDTH / 2  # the field repeats itself
    atoms = atoms.replace(positions=torch.cat([across, atoms.positions[:, 2:]], 1))
    n_slices = 2 * math.ceil((thickness / 2 + 8) / SLICE) + 1
    n_pixels = round(WIDTH / PIXEL)
    source = cs.potential_slices(
        atoms, (n_pixels, n_pixels), PIXEL, SLICE, n_slices, solvent=ICE_INNER_POTENTIAL, dtype=torch.float32
    )
    return Slices(torch.stack([source[i] for i in range(n_slices)]), PIXEL, SLICE)


# %% [markdown]
# **One specimen.** `scattering_error` runs all four and compares the exit waves, ring by ring in Fourier space, with
# that of multislice. It also asks how wrong multislice itself is because its slices are not infinitely thin, by making
# them two and four times as thick. `.at(d)` sums up all detail coarser than d.

# %%
optics = cs.Optics(voltage=300.0)
layer = protein_layer(400.0)
errors = scattering_error(layer, optics)
for resolution in (20.0, 6.0, 3.0):
    parts = ", ".join(f"{name} {float(value):.2%}" for name, value in errors.at(resolution).items())
    print(f"to {resolution:2g} Å: {parts}")
print(f"1 % to 20 Å needs {errors.cheapest(20.0, 0.01)}, 10 % to 3 Å needs {errors.cheapest(3.0, 0.1)}")

# %% [markdown]
# Two kinds of error are seen. That of `projection` grows quickly towards fine detail: to move an atom by z changes the
# wave at the frequency k by the phase pi lambda k² z, next to nothing for coarse detail, a full turn for fine. That of
# `ewald` is the same at every resolution: a wave that scatters a second time does not ask how fine the detail is.
# `rytov` has little of either, and is off by one percent.
#
# **Thickness.** For weak matter spread evenly over a thickness t the error of a flat projection has a closed form,
#
# $$\sqrt{2 - 2 \sin(a) / a},\qquad a = \pi \lambda k^2 t / 2.$$
#
# The customary limit, t = 0.7 d² / lambda, is where it reaches 62 % in the ring at d: the specimen's top and bottom are
# then out of step with its middle by 63°. So the limit says where detail gets lost, not up to where it is right.

# %%
thicknesses = [40, 55, 70, 95, 125, 170, 220, 300, 400, 520, 700, 900, 1200, 1550, 2000]  # [Å]
VOLTAGES, DETAIL = (300.0, 100.0), 3.0
measured = {v: [] for v in VOLTAGES}
for t in thicknesses:
    specimen = protein_layer(t)
    for v in VOLTAGES:
        measured[v].append(scattering_error(specimen, cs.Optics(voltage=v)))


def flat_error(thickness, voltage, of):
    """The closed form, in all rings to `DETAIL`, weighted as the measured errors are."""
    a = math.pi * cs.wavelength(voltage) * of.frequency**2 * thickness / 2
    inside = of.frequency <= 1 / DETAIL
    squares = (2 - 2 * torch.sin(a) / a) * of.energy
    return float((squares[inside].sum() / of.energy[inside].sum()).sqrt())


# %%
COLOURS = {"projection": "#0072B2", "ewald": "#E69F00", "rytov": "#009E73", "multislice": "#444444"}
MARKERS = {"projection": "o", "ewald": "s", "rytov": "^"}
figure, axes = plt.subplots(2, 2, figsize=(10.5, 8), sharey=True, layout="constrained")
for ax, v in zip(axes[0], VOLTAGES, strict=True):
    for name in ("projection", "ewald", "rytov"):
        values = [float(e.at(DETAIL)[name]) for e in measured[v]]
        ax.loglog(thicknesses, values, MARKERS[name] + "-", color=COLOURS[name], label=name, markersize=4)
    slicing = [float(e.at(DETAIL)["slicing"]) for e in measured[v]]
    ax.loglog(thicknesses, slicing, ":", color=COLOURS["multislice"], label=f"multislice, by its {SLICE:g} Å slices")
    closed = [flat_error(t, v, e) for t, e in zip(thicknesses, measured[v], strict=True)]
    ax.loglog(thicknesses, closed, "--", color=COLOURS["projection"], linewidth=1, label="projection, closed form")
    limit = depth_of_field(DETAIL, v)
    ax.axvline(limit, color="0.6", linewidth=1)
    ax.text(limit * 1.05, 2.5e-4, f"0.7 d²/λ\n= {limit:.0f} Å", color="0.4", fontsize=9, va="bottom")
    ax.set(title=f"all detail to {DETAIL:g} Å, {v:g} kV", xlabel="thickness [Å]", ylim=(3e-5, 2), xlim=(35, 2300))
STANDING = thicknesses.index(520)
for ax, v in zip(axes[1], VOLTAGES, strict=True):
    e = measured[v][STANDING]
    for name in ("projection", "ewald", "rytov"):
        ax.loglog(e.frequency, getattr(e, name), "-", color=COLOURS[name])
    ax.loglog(e.frequency, e.slicing, ":", color=COLOURS["multislice"])
    a = math.pi * cs.wavelength(v) * e.frequency**2 * thicknesses[STANDING] / 2
    ax.loglog(e.frequency, (2 - 2 * torch.sin(a) / a).sqrt(), "--", color=COLOURS["projection"], linewidth=1)
    finest = math.sqrt(thicknesses[STANDING] * cs.wavelength(v) / 0.7)  # [Å]
    ax.axvline(1 / finest, color="0.6", linewidth=1)
    ax.text(0.95 / finest, 2.5e-4, f"0.7 d²/λ = t\nat {finest:.1f} Å", color="0.4", fontsize=9, va="bottom", ha="right")
    ticks = [50, 20, 10, 5, 3]
    ax.set_xticks([1 / d for d in ticks], [f"{d}" for d in ticks])
    ax.minorticks_off()
    ax.set(title=f"a layer of {thicknesses[STANDING]:g} Å, {v:g} kV", xlabel="resolution of the ring [Å]")
for ax in axes[:, 0]:
    ax.set_ylabel("relative error of the exit wave")
for ax in axes.flat:
    ax.grid(which="major", color="0.92", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)

# %% [markdown]
# `projection` follows its closed form, from below where the layer is hardly more than one round molecule deep. So a
# protein is weak enough that its heights are nearly all that a projection gets wrong. `ewald` is worse than a flat
# projection wherever the layer is thin: it takes 1 + i phi for exp(i phi), which weakness would heal, but thinness does
# not. `rytov` repairs that with one exponential, and holds to 5 % at 2000 Å and 300 kV. At 100 kV the wavelength is 1.9
# times as long and matter 1.4 times as strong, so every error comes at a smaller thickness.
#
# **Which one, then?** `cheapest` gives the first in the order of cost that is good to a tolerance. In each map the
# white line is t = 0.7 d² / lambda: below it, to the right, lies what the rule of thumb allows a projection.

# %%
STEPS = ("projection", "ewald", "rytov", "multislice")
resolutions = [2.5 * 1.12**i for i in range(22)]  # [Å]
tolerances = (0.1, 0.03, 0.01)
maps, axes = plt.subplots(1, 3, figsize=(12, 3.9), sharey=True, layout="constrained")
for ax, tolerance in zip(axes, tolerances, strict=True):
    chosen = [[STEPS.index(e.cheapest(d, tolerance)) for d in resolutions] for e in measured[300.0]]
    colours = ListedColormap([COLOURS[step] for step in STEPS])
    ax.pcolormesh(resolutions, thicknesses, chosen, cmap=colours, vmin=-0.5, vmax=3.5, alpha=0.75, shading="nearest")
    ax.plot(resolutions, [depth_of_field(d, 300.0) for d in resolutions], color="white", linewidth=2)
    ax.text(4.4, 900, "0.7 d²/λ", color="white", rotation=58, ha="center", va="center", fontsize=9)
    ax.set(xscale="log", yscale="log", xlabel="finest detail that matters [Å]", title=f"to {tolerance:.0%}, 300 kV")
    ax.set(xlim=(2.5, 25), ylim=(thicknesses[0], thicknesses[-1]))
    ax.set_xticks([3, 5, 10, 20], ["3", "5", "10", "20"])
    ax.minorticks_off()
axes[0].set_ylabel("thickness [Å]")
for step in STEPS:
    axes[-1].plot([], [], "s", color=COLOURS[step], alpha=0.75, markersize=9, label=step)
maps.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center", frameon=False)

# %% [markdown]
# The white line has the right slope. Its height depends on what is asked: to 10 % of the wave a projection may be half
# as thick as the rule says, or somewhat more; to 3 % about a quarter, to 1 % a tenth. Where it ends, `ewald` may do if
# ten percent will; where less is asked it is `rytov`, at the same price. Multislice is needed where one percent is
# asked of a thick specimen, and then for coarse detail too: heights do not show there, but waves that scatter twice do.
#
# Three warnings. These are errors of waves: near a zero of the contrast transfer an image shows little else. They are
# those of protein: gold beads, crystals and the ice's own molecules scatter more strongly. And all four steps are of
# elastic scattering; the electrons that lose energy are another matter. So measure your own specimen: a crop of it
# costs seconds.
