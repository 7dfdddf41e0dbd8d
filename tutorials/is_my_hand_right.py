# %% [markdown]
# # Is my hand right?
#
# A tilt series whose angles have the wrong sign gives a sharp tomogram of the mirror image, and no correlation of
# halves will tell. What tells is the lens: of a tilted specimen one side lies nearer to it, and is seen with another
# defocus. `check_conventions` weighs all combinations of signs by their likelihood, and says when the images do not
# decide.
#
# A plane of molecules, five tilts of 5 e⁻/Å², each height through the lens of its own defocus:

# %%
from pathlib import Path

import torch

import cryosim as cs
import inverse as inv
from cryosim.core.fourier import frequencies
from cryosim.plot import to_png
from inverse.conventions_page import slope_figure, write_conventions_page

ANGLES = torch.tensor([-50.0, -25.0, 0.0, 25.0, 50.0])
PIXEL, SHAPE, DOSE, AXIS = 2.5, (448, 512), 5.0, 12.0
generator = torch.Generator().manual_seed(0)


def lens(defocus: float) -> cs.Optics:
    return cs.Optics(300.0, defocus=defocus, spherical_aberration=2.7, amplitude_contrast=0.07)


def exposed(angle: float) -> torch.Tensor:
    """Counts (y, x): molecules at random places of a plane, each through the lens at its height."""
    drawn = torch.poisson(torch.full(SHAPE, 0.002, dtype=torch.float64), generator=generator) - 0.002
    ky, kx = (frequencies(n, PIXEL, dtype=torch.float64) for n in SHAPE)
    square = ky[:, None].square() + kx.square()
    shape = torch.exp(-7.5 * square) * (1 + 8 / (1 + 1600 * square))  # of 3 Å detail, and of 40 Å bodies
    seen = torch.fft.fft2(drawn / 0.002**0.5) * shape * 0.12
    y, x = ((torch.arange(n) - n // 2).double() * PIXEL for n in SHAPE)
    turn, slope = torch.deg2rad(torch.tensor([AXIS, angle], dtype=torch.float64))
    height = -torch.tan(slope) * (x * torch.cos(turn) + y[:, None] * torch.sin(turn))  # z = -u tan t
    steps = torch.linspace(float(height.min()), float(height.max()) + 1e-6, 25, dtype=torch.float64)
    contrast = torch.zeros(SHAPE, dtype=torch.float64)
    for step in steps.tolist() if angle else [0.0]:
        share = (1 - (height - step).abs() / (steps[1] - steps[0])).clamp_min(0) if angle else 1.0
        contrast += share * torch.fft.ifft2(seen * cs.ctf(lens(22_000.0 + step), SHAPE, PIXEL)).real
    return torch.poisson(DOSE * PIXEL**2 * (1 + contrast).clamp_min(0), generator=generator)


images = torch.stack([exposed(angle) for angle in ANGLES.tolist()])

# %% [markdown]
# **Declared wrongly**, with the angles negated. Eight combinations of three signs are four specimens: turning the axis
# by 180° and negating the angles leaves the same one, turned about the beam.

# %%
tilts = cs.TiltScheme(angles=-ANGLES, doses=torch.full_like(ANGLES, DOSE), axis_angle=AXIS)
declared = cs.TiltSeries(images=images, pixel_size=PIXEL, tilts=tilts, optics=lens(20_000.0))
found = inv.check_conventions(declared, defocus_range=(15_000.0, 35_000.0))
print("\n".join(found.lines()))
assert found.decided and found.best[0] == (-1, 1, 1)

# %% [markdown]
# **Why.** The slope of the specimen's heights that fits the rings best is −1 times the declared one.

# %%
Path("is_my_hand_right.png").write_bytes(to_png(slope_figure(found)))
write_conventions_page("is_my_hand_right.html", declared, found, "Is it the right way round?")

# %% [markdown]
# **The sign of the defocus** is told by two things. Rings of +d and −d differ only through the spherical aberration and
# the amplitude contrast, so they have to reach far. And what stands out of ice is denser than ice: the third cumulant
# of the images, seen again through the lens, is positive for the right sign. Where neither is enough, the hand is told
# *if* the sign is as declared, and the verdict says so.
#
# Mended, it is as declared:

# %%
mended = declared.replace(tilts=tilts.replace(angles=ANGLES))
right = inv.check_conventions(mended, defocus_range=(15_000.0, 35_000.0))
print(right.verdict)
assert right.verdict.startswith("as declared")

# %% [markdown]
# **Undecidable** is a verdict too. Of the middle three tilts at a tenth of the dose, nothing is claimed:

# %%
thinned = torch.poisson(0.1 * images[1:4], generator=generator)
few = mended.replace(images=thinned, tilts=mended.tilts.index(slice(1, 4)))
print(inv.check_conventions(few, defocus_range=(15_000.0, 35_000.0)).verdict)

# %% [markdown]
# From the shell: `inverse check-conventions series.mrc --report page.html`.
