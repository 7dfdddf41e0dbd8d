# %% [markdown]
# # Fit a real micrograph
#
# `fit_ctf` starts blind: it is told the voltage, the spherical aberration and the amplitude contrast, and finds defocus
# and astigmatism from the Thon rings, with standard errors. Where the rings say nothing, it says so.
#
# The micrograph: 300 kV, 2.7 mm, Falcon camera (`data/README.md`), here in pixels of 2.22 Å; its header has a defocus
# of 18,155 Å, which is wrong.

# %%
from pathlib import Path

import inverse as inv
from cryosim import io
from cryosim.plot import to_png
from inverse.ctf_pictures import ctf_fit_figure

HERE = Path(__file__).parent if "__file__" in globals() else Path()
image, pixel_size = io.read_stack(HERE / "data" / "micrograph.mrc.gz")
fit = inv.fit_ctf(image, pixel_size, 300.0)
print("\n".join(fit.lines()))

# %% [markdown]
# **Look at it.** Left the powers of the image, over what has no rings; right the model. The curves are means on rings.

# %%
Path("fit_a_real_micrograph.png").write_bytes(to_png(ctf_fit_figure(image, pixel_size, fit)))

# %% [markdown]
# **What it does not tell.** The astigmatism is less than three of its standard errors, so its angle is not determined.
# The errors come from how the tiles of the image differ: a real specimen is neither flat nor white, and the Fisher
# information alone would be three times too sure.

# %%
print("not determined:", ", ".join(fit.undetermined))

# %% [markdown]
# **More parameters** are fitted by name. A phase shift is found to be none; with the amplitude contrast beside it,
# neither is determined, for the image only knows their sum.

# %%
shifted = inv.fit_ctf(image, pixel_size, 300.0, fit=("phase_shift",), thickness=0.0)
print(f"phase shift {shifted.optics.phase_shift:.1f} ± {shifted.standard_errors['phase_shift']:.1f} deg")
both = inv.fit_ctf(image, pixel_size, 300.0, fit=("phase_shift", "amplitude_contrast"), thickness=0.0)
print("not determined:", ", ".join(both.undetermined))

# %% [markdown]
# From the shell: `inverse fit-ctf micrograph.mrc --plot fit.png`. A tilt series with its angles beside it is fitted as
# one (`inv.fit_series_ctf`): a defocus for each tilt, one astigmatism, and the hand, with its margin.
