# %% [markdown]
# # Events to a tomogram
#
# A camera that counts electrons writes down where and when each of them came. This tutorial makes such files for a
# protein that fades and drifts in the beam, and goes back from them to a tomogram: events, frames, their alignment,
# their weights by dose, the sum, the volume. Then the same electrons, split into two halves, tell how far the
# tomogram can be trusted, without a look at the truth.

# %%
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import cryosim as cs
import inverse as inv
from cryosim import io
from cryosim.core.rotation import random_rotations
from cryosim.io.examples import example_path

folder = Path(tempfile.mkdtemp())
generator = torch.Generator().manual_seed(4)

# %% [markdown]
# **The experiment.** Two apoferritins in ice; 13 tilts, each in two frames. The stage is not yet at rest when an
# exposure begins: it drifts by some 25 Å. The critical exposures of Grant and Grigorieff say how fast detail fades. The
# camera is a Falcon 4i: a pixel tells in each of its 240 frames a second whether it was hit.

# %%
protein = io.read_atoms(example_path("apoferritin"), assembly=1)
tilts = cs.TiltScheme.dose_symmetric(extent=60, step=10, total_dose=120).replace(frames=2, dose_rate=0.5)
drift = cs.stage_drift(tilts.doses, tilts.frames, distance=25.0, settling=4.0, generator=generator)
places = torch.tensor([[-70.0, -25.0, 10.0], [70.0, 25.0, -10.0]], dtype=torch.float64)  # (x, y, z) [Å]
poses = cs.Poses(random_rotations(2, generator), places)
specimen = cs.Specimen(
    (protein.centred(),), (poses,), (290.0, 200.0, 160.0), cs.Ice(200.0), damage=cs.Damage(), motion=drift
)
optics = cs.Optics(voltage=300.0, defocus=25000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
camera = cs.Detector.falcon4i((72, 72), 4.0)

# %% [markdown]
# **Events.** `simulate` hands over the electrons of each exposure as soon as they are counted, and we write them: one
# EER file a tilt. Nothing but one exposure is ever in memory. Only such small cameras as ours earn a warning: most
# programs read EER files of 4096 × 4096 pixels only.


# %%
warnings.filterwarnings("ignore", message=".*4096 x 4096 pixels only")
warnings.filterwarnings("ignore", message="simulate: the specimen moves")  # by more than a pixel in two frames: it does


def write(which: int, frames: list[cs.Events]) -> None:
    io.write_eer(folder / f"{which:02d}.eer", frames, pixel_size=4.0, dose=float(tilts.doses[which]))


series = cs.simulate(
    specimen, tilts, optics, camera, sampling=cs.sampling_for(camera, optics, width=6), generator=generator,
    movies=write, supersampling=4,
)  # fmt: skip
first = io.read_eer(folder / "00.eer")
info = io.eer_info(folder / "00.eer")
print(f"untilted: {len(first):,} electrons in {info.n_frames} camera frames, {info.events_per_pixel:.1f} a pixel")
print(f"of {float(tilts.doses[0]) * 16:.0f} electrons that fell on each pixel's {4}² Å²")
print(f"the first: camera frame {int(first.frame[0])}, y = {float(first.y[0])}, x = {float(first.x[0])} px")

# %% [markdown]
# **Frames.** `render_eer` adds camera frames up. We ask for two images an exposure and look for the shift between them.
# A shift is an operator, exact and differentiable (`cs.shifted`), so the alignment is a fit: move the frames back until
# they agree, first in coarse detail, so that they do not lock in one ring too far, and then in finer.


# %%
def low_passed(images: torch.Tensor, resolution: float) -> torch.Tensor:
    ky, kx = torch.fft.fftfreq(images.shape[-2], 4.0)[:, None], torch.fft.rfftfreq(images.shape[-1], 4.0)
    spectrum = torch.fft.rfft2(images - images.mean((-2, -1), keepdim=True))
    return torch.fft.irfft2(spectrum * torch.exp(-0.5 * resolution**2 * (ky**2 + kx**2)), s=images.shape[-2:])


def aligned(frames: torch.Tensor) -> torch.Tensor:
    """Shifts (frame, 2) [Å] that bring the frames into agreement, up to one that is common to all."""
    shifts = torch.zeros(len(frames), 2, requires_grad=True)

    def disagreement(images: torch.Tensor) -> torch.Tensor:
        back = cs.shifted(images, -(shifts - shifts.mean(0)) / 4.0)
        return (back - back.mean(0)).square().mean() / images.square().mean()

    for resolution in (80.0, 40.0):
        images = low_passed(frames, resolution)
        solver = torch.optim.LBFGS([shifts], max_iter=30, line_search_fn="strong_wolfe")

        def step(images=images, solver=solver) -> torch.Tensor:
            solver.zero_grad()
            value = disagreement(images)
            value.backward()
            return value

        solver.step(step)
    return (shifts - shifts.mean(0)).detach()


movies = [io.render_eer(folder / f"{i:02d}.eer", frames=info.n_frames // 2).float() for i in range(13)]
shifts = torch.stack([aligned(movie) for movie in movies])  # (tilt, frame, 2) [Å]
true = drift.drift[..., :2].float()
true = true - true.mean(1, keepdim=True)
error = (shifts - true).square().sum(-1).mean().sqrt()
moved = true.square().sum(-1).mean().sqrt()
print(f"the frames drift by {float(moved):.1f} Å rms; found to {float(error):.1f} Å")
assert error < 0.3 * moved

# %% [markdown]
# **Weights.** Later frames show less of fine detail. The best weight of a frame at each frequency is what the dose has
# left there (`cs.dose_weights`; the derivation is in *Dose and damage*). `cs.sum_frames` moves back, weights and adds.
# How far the two frames of one exposure are displaced together is no matter of frames but of the alignment of the tilts
# (a chapter of its own); here we take it from the truth.


# %%
def image(which: int, frames: torch.Tensor) -> torch.Tensor:
    moments = [tilts.moment(which, f) for f in range(tilts.frames)]
    return cs.sum_frames(frames, 4.0, shifts=shifts[which], weights=cs.dose_weights(moments, (72, 72), 4.0))


def tomogram(movies: list[torch.Tensor]) -> torch.Tensor:
    images = torch.stack([image(i, movie) for i, movie in enumerate(movies)])
    whole = cs.TiltSeries(images, 4.0, tilts.replace(shifts=drift.drift[..., :2].mean(1)), optics)
    return inv.reconstruct(whole, "least-squares", thickness=200.0, low_pass=16.0).volume.values


made = tomogram(movies)
still = specimen.replace(motion=None)
truth = cs.potential_volume(still, (50, 72, 72), 4.0).values

# %% [markdown]
# **Halves.** Deal the camera frames out by turns to two halves. A camera begins anew with every frame, so the noise of
# the halves is independent, and what their tomograms have in common is signal. (Dealing out single electrons, by
# `cs.thin`, is right for a camera without coincidence.) The correlation of the halves needs no truth; that with the
# truth is what it stands for.

# %%
halves: list[list[torch.Tensor]] = [[], []]
for i in range(13):
    events = io.read_eer(folder / f"{i:02d}.eer")
    for half, mine in zip(halves, cs.alternating(events), strict=True):
        part = mine.frame * 2 // mine.shape[0]
        half.append(torch.stack([cs.histogram(mine.index(part == f)) for f in range(2)]).float())
region = inv.measured_region((50, 72, 72), tilts.angles)
between = inv.fsc(*(tomogram(half) for half in halves), 4.0, region=region, thickness=200.0)
with_truth = inv.fsc(made, truth, 4.0, region=region, thickness=200.0)

# %%
figure, axes = plt.subplots(2, 2, figsize=(10, 8.6), constrained_layout=True)
axes = axes.flatten()
extent = (-144, 144, -144, 144)
axes[0].imshow(movies[0].sum(0), cmap="gray", extent=extent, origin="lower")
axes[0].set(title="electrons of the untilted exposure", xlabel="x [Å]", ylabel="y [Å]")
axes[1].imshow(made[23:28].mean(0), cmap="gray", extent=extent, origin="lower")
axes[1].set(title="tomogram, middle 20 Å", xlabel="x [Å]", ylabel="y [Å]")
axes[2].imshow(truth[23:28].mean(0), cmap="gray", extent=extent, origin="lower")
axes[2].set(title="truth", xlabel="x [Å]", ylabel="y [Å]")
axes[3].plot(between.frequency, between.correlation, label="half against half")
axes[3].plot(with_truth.frequency, with_truth.correlation, "--", label="tomogram against truth")
axes[3].axhline(0, color="0.7", linewidth=0.8)
axes[3].set(xlim=(0, 0.07), ylim=(-0.3, 1.05), xlabel="spatial frequency [1/Å]", ylabel="Fourier shell correlation")
axes[3].legend()
plt.show()

coarse = (with_truth.frequency > 1 / 100) & (with_truth.frequency < 1 / 40)
print(f"between 100 and 40 Å: {float(with_truth.correlation[coarse].nanmean()):.2f} with the truth, ", end="")
print(f"{float(between.correlation[coarse].nanmean()):.2f} between the halves")
halves_say = (2 * between.correlation / (1 + between.correlation)).clamp_min(0).sqrt()[coarse].nanmean()
print(f"the halves would have foretold sqrt(2 F / (1 + F)) = {float(halves_say):.2f} with the truth")
assert abs(float(halves_say) - float(with_truth.correlation[coarse].nanmean())) < 0.15
assert float(with_truth.correlation[coarse].nanmean()) > 0.7

# %% [markdown]
# The rings of the CTF end both curves near 22 Å, the first zero at this defocus; nothing here corrects more than its
# sign. What to do next: fit the drift with the tilt series as a whole, take the CTF into the operator, or use the
# electrons themselves as data, `cs.event_negative_log_likelihood`.
