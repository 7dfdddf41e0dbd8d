# %% [markdown]
# # Plan the session
#
# Before a grid goes into the microscope, much is decided: the order of the tilts, their range and step, the defocus,
# the thickness that is still worth it. `forecast` says in seconds what each choice will bring, by the Fisher
# information of the images and the correlation that two half tomograms can have. Nothing is simulated. Where series
# were simulated, aligned and reconstructed, its figures held (`tests/inverse/test_expected.py`).

# %%
import matplotlib.pyplot as plt

import cryosim as cs
import inverse as inv
from cryosim import io
from cryosim.io.examples import example_path

DOSE = 120.0  # [e-/Å^2]
optics = cs.Optics(300.0, 30_000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
camera = cs.Detector.falcon4i((1024, 1024), 2.2)
cage = io.read_atoms(example_path("apoferritin"), assembly=1)
molecules = inv.molecules_in_ice(cage, occupied=0.2, finest=4.4)  # a fifth of the volume, as in a cell

# %% [markdown]
# **One plan.** The dose-symmetric scheme through 2000 Å of ice. Shifts are told to a fraction of an Å, if an alignment
# is found at all; a defocus, by the rings of one image alone, to some ten Å at 0 degrees and hardly at 60, where there
# is less signal, more ice and a slope. `fit_series_ctf` helps high tilts with what the others say.

# %%
symmetric = cs.TiltScheme.dose_symmetric(60, 3, DOSE)
plan = inv.forecast(symmetric, optics, camera, molecules, thickness=2000.0)
print("\n".join([plan.lines()[0], plan.lines()[-10], *plan.lines()[len(symmetric) :]]))
errors = plan.standard_errors
assert errors["shifts"][0].max() < 2 and errors["defocus"][0] < 0.1 * errors["defocus"][-1]

# %% [markdown]
# **In which order?** Electrons that come late find less detail, and electrons at high tilt pass twice the ice. The
# dose-symmetric scheme spends the fresh specimen at low tilt, on both sides alike (Hagen, Wan & Briggs 2017). What is
# it worth, in the number of molecules to average for the same resolution?

# %%
schemes = {
    "dose-symmetric": symmetric,
    "bidirectional from 0°": cs.TiltScheme.bidirectional(60, 3, DOSE),
    "bidirectional from 21°": cs.TiltScheme.bidirectional(60, 3, DOSE, start=21),
    "unidirectional": cs.TiltScheme.unidirectional(60, 3, DOSE),
}
told = {
    (name, deep): inv.forecast(scheme, optics, camera, molecules, thickness=deep)
    for name, scheme in schemes.items()
    for deep in (1000.0, 3000.0)
}
PERIODS = (5.0, 8.0, 15.0)  # [Å]
print("molecules for 5, 8, 15 Å, over those of the dose-symmetric scheme, through 1000 and 3000 Å")
for name in schemes:
    ratios = [
        told[name, deep].molecules_for(d) / told["dose-symmetric", deep].molecules_for(d)
        for deep in (1000.0, 3000.0)
        for d in PERIODS
    ]
    print(f"{name:24s}" + "".join(f"{ratio:7.2f}" for ratio in ratios))
    if name != "dose-symmetric":
        assert all(1 <= thin < thick for thin, thick in zip(ratios[:3], ratios[3:], strict=True))

# %% [markdown]
# So the order is worth little by itself in thin ice: the electrons of all tilts add up to the same. Through 3000 Å a
# bidirectional series from 0 degrees needs up to 5 % more molecules, one that begins at 21 degrees up to 15 %, and one
# that begins at -60 degrees as much as 80 %: its fresh specimen is seen through twice the ice.
#
# What a mean over all directions hides: of one tomogram, and of molecules that all lie one way, the bidirectional
# series has fine detail on one side only. Its tilt of -3 degrees comes after half of the dose.

# %%
beside = {}
for name in ("dose-symmetric", "bidirectional from 0°"):
    one = told[name, 1000.0]
    fine = int((one.halves.frequency - 1 / 8).abs().argmin())
    beside[name] = float(one.snr[one.angles == -3, fine] / one.snr[one.angles == 0, fine])
    print(f"{name}: at 8 Å the image at -3° has {beside[name]:.1%} of the signal of that at 0°")
assert beside["dose-symmetric"] > 10 * beside["bidirectional from 0°"]

# %% [markdown]
# **How far, how densely, how much out of focus?** The same dose on other tilts, and another focus.


# %%
def changed(extent: float = 60, step: float = 3, defocus: float = 30_000.0) -> inv.Forecast:
    scheme = cs.TiltScheme.dose_symmetric(extent, step, DOSE)
    return inv.forecast(scheme, optics.replace(defocus=defocus), camera, molecules, thickness=2000.0)


plans = {
    "±60° by 3°, 3 µm": plan,
    "±60° by 2°, 3 µm": changed(step=2),
    "±51° by 3°, 3 µm": changed(extent=51),
    "±60° by 3°, 1.5 µm": changed(defocus=15_000.0),
    "±60° by 3°, 5 µm": changed(defocus=50_000.0),
}
for name, one in plans.items():
    shift = float(one.standard_errors["shifts"].square().mean().sqrt())
    print(
        f"{name:20s} halves to {one.resolution:5.1f} Å, truth to {one.truth.resolution(0.5):5.1f} Å, "
        f"shifts ± {shift:.2f} Å, {one.molecules_for(8.0):.0f} molecules for 8 Å"
    )
usual = plans["±60° by 3°, 3 µm"]
dense, bright = plans["±60° by 2°, 3 µm"], plans["±60° by 3°, 5 µm"]
assert dense.truth.resolution(0.5) < usual.truth.resolution(0.5) and abs(dense.resolution / usual.resolution - 1) < 0.05
assert dense.standard_errors["shifts"].mean() < usual.standard_errors["shifts"].mean()
assert bright.halves.correlation[1] > usual.halves.correlation[1] > plans["±60° by 3°, 1.5 µm"].halves.correlation[1]

# %% [markdown]
# Smaller steps share the same electrons: halves agree as far as before, gaps between the tilts close, so the truth is
# met to finer detail, and an image is found more exactly between nearer neighbours, though it has fewer electrons. A
# smaller range has no worst tilts; what it leaves out is in the missing wedge, which no curve of *measured* directions
# shows. The defocus moves the zeros of the lens, and a correlation falls below 0.143 in the first of them that is deep
# enough: so read the curves, not the one figure. Less underfocus carries further, with less to see at 40 Å and beyond.

# %%
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00")
figure, (ax, bx, cx) = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
for name, colour, mark in zip(schemes, COLOURS, "os^v", strict=True):
    one = told[name, 1000.0]
    order = one.angles.argsort()
    if name != "bidirectional from 21°":
        ax.semilogy(one.angles[order], one.snr[order, fine], mark + "-", ms=3, lw=1, color=colour, label=name)
    k = one.halves.frequency
    for deep, line, label in ((1000.0, "--", None), (3000.0, "-", name)):
        ratio = told[name, deep].molecules / told["dose-symmetric", deep].molecules
        bx.plot(k[4:], ratio[4:], line, color=colour, lw=1.5, label=label)
ax.set(xlabel="tilt [deg]", ylabel="signal over noise, in power [1]", title="each image, 8 Å detail, 1000 Å of ice")
ax.set(xlim=(-62, 62), ylim=(1e-7, 1))
ax.set_xticks(range(-60, 61, 30))
ax.legend(frameon=False, loc="lower center")
bx.set(ylabel="molecules, over dose-symmetric", title="molecules to average, 3000 Å of ice", ylim=(0.95, 2.1))
bx.text(1 / 6.6, 1.28, "dashed: 1000 Å", color="0.3")
bx.legend(frameon=False, loc="upper left")
for defocus, colour in (("1.5 µm", COLOURS[2]), ("3 µm", COLOURS[0]), ("5 µm", COLOURS[3])):
    k, correlation = plans[f"±60° by 3°, {defocus}"].halves
    cx.plot(k, correlation, color=colour, label=defocus)
cx.axhline(0.143, color="0.6", lw=1)
cx.set(ylabel="correlation of halves", title="two half tomograms, 2000 Å of ice", ylim=(0, 1.02))
cx.legend(frameon=False, title="defocus")
for axis, ticks, end in ((bx, (20, 10, 7, 5), 1 / 4.5), (cx, (50, 30, 20, 15, 10), 1 / 9)):
    axis.set_xticks([1 / d for d in ticks], [f"{d}" for d in ticks])
    axis.set(xlabel="resolution [Å]", xlim=(1 / 60, end))
figure.savefig("plan_the_session.png", dpi=80)

# %% [markdown]
# **What the forecast leaves out**: the fluctuations of the water itself, motion and doming, charging, a stage that does
# not settle, the errors of the alignment in the tomogram, and neighbours that overlap a molecule. All of these take
# something away, so read its figures as the best that can be had, and its ratios as what a choice is worth.
