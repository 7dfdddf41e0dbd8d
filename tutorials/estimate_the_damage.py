# %% [markdown]
# # Estimate a damage curve
#
# `calibrate` fits any field of specimen, tilts, lens and camera, by its name, to images of a specimen that is known.
# The model is the one that simulates, differentiated; the errors are those of Cramér and Rao, and a table says what the
# images cannot tell apart.
#
# Ubiquitins, looked at six times from above with 40 e⁻/Å² each; they fade faster than usual.

# %%
import math
from importlib.resources import files
from pathlib import Path

import torch
from matplotlib.figure import Figure

import cryosim as cs
import inverse as inv
from cryosim import io
from cryosim.acquisition.simulate import sampling_for
from cryosim.plot import to_png
from cryosim.specimen.damage import CriticalExposure, critical_exposure
from cryosim.specimen.specimen import place_randomly

generator = torch.Generator().manual_seed(1)
with_atoms = io.read_atoms(Path(str(files("cryosim"))) / "data" / "1ubi.pdb")
TRUE = CriticalExposure(scale=0.15)
specimen = place_randomly([with_atoms], [9], (260.0, 260.0, 80.0), ice=cs.Ice(200.0), generator=generator)
specimen = specimen.replace(damage=cs.Damage(critical=TRUE, b_growth=0.5))
tilts = cs.TiltScheme(angles=torch.zeros(6), doses=torch.full((6,), 40.0))
optics = cs.Optics(300.0, defocus=9_000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
camera = cs.Detector((96, 96), 2.4)
sampling = sampling_for(camera, optics, pixel_size=1.5, thickness=20.0)
series = cs.simulate(specimen, tilts, optics, camera, generator=generator, sampling=sampling)

# %% [markdown]
# **Begin elsewhere**: with the usual curve, and a defocus that is 300 Å off.

# %%
guess = specimen.replace(damage=cs.Damage(critical=CriticalExposure(), b_growth=0.5))
start = {"optics": optics.replace(defocus=9_300.0), "detector": camera, "sampling": sampling}
found = inv.calibrate(series, guess, ["damage.critical.scale", "optics.defocus"], **start)
print("\n".join(found.lines()))
name = "specimen.damage.critical.scale"
scale, error = float(found.values[name]), float(found.standard_errors[name])
assert all(row.error < math.inf for row in found.table)
assert abs(scale - 0.15) < 3 * error

# %% [markdown]
# **Two that act alike.** Growing B-factors fade fine detail too. Fitted together, each is worth less than it would be
# alone (the columns `std. error` and `alone`), and where they are nearly one the table names the partner. What is known
# from elsewhere is said as a prior: a standard deviation about the value to begin with.

# %%
both = ["damage.critical.scale", "damage.b_growth", "optics.defocus"]
alike = inv.calibrate(series, guess, both, profile=[], **start)
print("\n".join(alike.lines()))
known = inv.calibrate(series, guess, both, prior={"damage.b_growth": 0.1}, profile=[], **start)
print("\n".join(known.lines()))
assert float(known.standard_errors[name]) < float(alike.standard_errors[name])

# %% [markdown]
# **The curve**, with the error of its scale carried over; dotted, where it began.

# %%
k = torch.linspace(1 / 40, 1 / 5, 120, dtype=torch.float64)


def curve(value: float) -> torch.Tensor:
    return critical_exposure(k, 300.0, CriticalExposure(scale=max(value, 1e-3)))


figure = Figure((6.4, 3.8), layout="constrained")
axes = figure.subplots()
axes.fill_between(k, curve(scale - 2 * error), curve(scale + 2 * error), color="#0072b2", alpha=0.25, lw=0)
axes.plot(k, curve(scale), color="#0072b2", label="found, ± 2 standard errors")
axes.plot(k, critical_exposure(k, 300.0, TRUE), color="#d55e00", ls="--", label="true")
axes.plot(k, curve(0.24499), color="0.5", ls=":", label="begun with")
axes.set(xlabel="k [1/Å]", ylabel="critical exposure [e⁻/Å²]", yscale="log")
axes.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
axes.minorticks_off()
axes.legend(frameon=False)
Path("estimate_the_damage.png").write_bytes(to_png(figure))
