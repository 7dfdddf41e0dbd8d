# %% [markdown]
# # Align a tilt series
#
# A stage does not return to where it was: from tilt to tilt the image is displaced, by many pixels, and the tilt axis
# is off by degrees. `align` finds both from the images alone, without beads and without a volume. Here the truth is
# known, so the answer can be checked; then it goes to a file that other programs read, and comes back.

# %%
import math

import matplotlib.pyplot as plt
import torch

import cryosim as cs
import inverse as inv
from cryosim import io
from cryosim.io.examples import example_path

PIXEL, SHAPE, SIZE = 9.0, (96, 112), (2100.0, 1050.0, 180.0)  # [Å], (y, x) [px], (x, y, z) [Å]
generator = torch.Generator().manual_seed(3)
cage = io.read_atoms(example_path("apoferritin"), assembly=1)
small = io.read_atoms(example_path("ubiquitin"))
specimen = cs.place_randomly([cage, small], [48, 20], SIZE, ice=cs.Ice(220.0), generator=generator)

# %% [markdown]
# **A series as it comes from a microscope**: dose-symmetric, wider than what is seen, displaced by up to 45 Å either
# way, about an axis at 5 degrees where the microscope says 3. One thick slice is enough at pixels of 9 Å.

# %%
asked = cs.TiltScheme.dose_symmetric(extent=60, step=6, total_dose=120, axis_angle=3.0)
moved = 45 * (2 * torch.rand(len(asked), 2, generator=generator, dtype=torch.float64) - 1)
true = asked.replace(shifts=moved, axis_angle=5.0)
optics = cs.Optics(300.0, 40_000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
detector = cs.Detector(SHAPE, PIXEL)
sampling = cs.sampling_for(detector, optics, thickness=220.0, width=4, copies="reference")
simulated = cs.simulate(specimen, true, optics, detector, sampling=sampling, generator=generator)
io.write_series("series.mrc", simulated.replace(tilts=asked))

# %% [markdown]
# **Align it.** Up to 28 Å a lens 40,000 Å out of focus shows all of one sign, so it need not be known here; where finer
# detail counts, give the series the optics of `fit_series_ctf`.

# %%
series = io.read_series("series.mrc")
found = inv.align(series.replace(optics=None), thickness=200.0)
print("\n".join(found.lines()[-3:]))


# %% [markdown]
# **Against the truth.** Where the specimen as a whole is moved by (X, Y, Z), its images move by X cos t + Z sin t
# across the axis and by Y along it. No image can tell that from shifts, so it is taken off before the two are compared.
# The standard errors tell how much is left.


# %%
def of_specimen(shifts: torch.Tensor) -> torch.Tensor:
    """The part of shifts (tilt, 2) that a displaced specimen makes, by least squares [Å]."""
    a, t = math.radians(5.0), torch.deg2rad(asked.angles)
    turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)
    across, along = (shifts @ turn).T
    basis = torch.stack([torch.cos(t), torch.sin(t)], 1)
    across = basis @ torch.linalg.lstsq(basis, across[:, None]).solution[:, 0]
    return torch.stack([across, along.mean().expand_as(across)], 1) @ turn.T


left = found.shifts - moved
left = left - of_specimen(left)
errors = found.standard_errors["shifts"]
rms = [float(shifts.square().mean().sqrt()) / PIXEL for shifts in (moved - of_specimen(moved), left, errors)]
print(f"shifts: {rms[0]:.2f} px rms before, {rms[1]:.3f} px left, standard error {rms[2]:.3f} px")
print(f"axis: {found.axis_angle:.2f} ± {float(found.standard_errors['axis_angle']):.2f} deg, 5 in truth")
assert rms[1] < 2 * rms[2] < 0.1 and abs(found.axis_angle - 5) < 0.5

# %% [markdown]
# **To a file and back.** `applied` puts what was found onto the series, and the suffix tells whose file it shall be:
# .xf (IMOD, with the angles in a .tlt), .aln (AreTomo), .star (RELION 5) or .xml (Warp). `import_series` reads any of
# them. From the shell: `inverse align series.mrc -o series.xf`.

# %%
print(*(path.name for path in io.write_calibration("series.xf", inv.applied(series, alignment=found))))
again = io.import_series("series.mrc", alignment="series.xf")
print(f"{float((again.tilts.shifts - found.shifts).abs().max()):.0e} Å apart")

# %% [markdown]
# **What it is worth.** Tomograms before and after, in the truth's own place.

# %%
INNER, VOXELS = (slice(None), slice(12, 84), slice(12, 100)), (24, *SHAPE)
truth = cs.potential_volume(specimen, VOXELS, PIXEL).values
volumes = {"truth": truth[INNER]}
for name, one in (("as it came", series), ("aligned", again)):
    shifts = one.tilts.shifts + of_specimen(moved - one.tilts.shifts)
    placed = one.replace(tilts=one.tilts.replace(shifts=shifts))
    volumes[name] = inv.reconstruct(placed, thickness=24 * PIXEL, low_pass=30.0).volume.values[INNER]
region = inv.measured_region(volumes["truth"].shape, asked.angles)
curves = {name: inv.fsc(volumes[name], volumes["truth"], PIXEL, region=region) for name in ("as it came", "aligned")}
for name, curve in curves.items():
    print(f"{name}: correlation with the truth falls below 0.5 at {curve.resolution(0.5):.0f} Å")
assert curves["aligned"].resolution(0.5) < 45 < curves["as it came"].resolution(0.5)

# %%
figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
for axis, (name, volume) in zip(axes, volumes.items(), strict=False):
    axis.imshow(volume[9:15].mean(0), cmap="gray_r", origin="lower")
    axis.set_title(name)
    axis.set_axis_off()
for name, curve in curves.items():
    axes[3].plot(curve.frequency[2:], curve.correlation[2:], label=name)
axes[3].set(xlim=(0, 1 / 30), ylim=(-0.05, 1), xlabel="frequency [1/Å]", title="correlation with the truth")
axes[3].legend()
figure.savefig("align_a_tilt_series.png", dpi=80)
