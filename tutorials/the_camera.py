# %% [markdown]
# # The camera
#
# A camera that counts electrons misses some, puts some into the wrong place, and takes two that come together for one.
# Three curves say how much that matters, and each is measured on images that anyone can take: of nothing at all, and of
# an edge. Here we take those images with simulated cameras, find the curves that we put in, and then look at what they
# do not tell: coincidences, gain and defects, what halves of an exposure share, and where gradients end.

# %%
import math

import matplotlib.pyplot as plt
import torch

import cryosim as cs
from cryosim.microscope.camera_curves import measured_mtf, measured_nps
from cryosim.microscope.counting import recorded_counts, sample_counts, sample_events, thin
from cryosim.microscope.detector import detect, dqe, mtf, nps, quantum_efficiency
from cryosim.microscope.events import histogram
from cryosim.microscope.gain import gain_corrected, measure_gain
from cryosim.microscope.likelihood import gaussian_counts, negative_log_likelihood, score_function

generator = torch.Generator().manual_seed(5)
F64 = torch.float64

# %% [markdown]
# **Three curves.** With frequencies f in units of the Nyquist frequency, and n electrons per pixel falling in:
#
# - **MTF**, modulation transfer: a weak wave of the frequency f is recorded with its contrast times MTF(f).
# - **NPS**, noise power spectrum: how strong the noise of a flat image is, relative to white noise of as many counts.
# - **DQE**, detective quantum efficiency: the signal-to-noise ratio, in power, that comes out over that which went
#   in. It is the fraction of the electrons that an ideal camera would have needed for the same image.
#
# With d counts for each electron that falls in, the signal is d n MTF and the noise power d n NPS, hence
#
# $$\mathrm{DQE}(f) = d\,\mathrm{MTF}(f)^2 / \mathrm{NPS}(f).$$
#
# A `Detector` is given its DQE and NPS; the MTF follows. Of two cameras with one DQE one may look much sharper than the
# other: it only has more noise in its fine detail as well.

# %%
SHAPE, PIXEL = (200, 210), 1.0  # [px], [Å]
falcon4i, falcon3 = cs.Detector.falcon4i(SHAPE, PIXEL), cs.Detector.falcon3(SHAPE, PIXEL)
print(
    "      f    " + "  ".join(f"{name:>14}" for name in ("Falcon 4i DQE", "MTF", "NPS", "Falcon III DQE", "MTF", "NPS"))
)
for f in (0.0, 0.25, 0.5, 0.75, 1.0):
    values = [float(curve(camera, f)) for camera in (falcon4i, falcon3) for curve in (dqe, mtf, nps)]
    print(f"{f:7.2f}    " + "  ".join(f"{v:14.3f}" for v in values))

# %% [markdown]
# **Measured as in a laboratory.** Flat images give the NPS. The shadow of a blade, slanted so that it crosses pixels in
# all ways, gives the MTF: its image is compared with what an ideal camera would see. What goes in, 20 electrons per
# pixel, is known from the current. Coincidences are left out for now, and come below.

# %%
IMAGES, INCIDENT = 120, 20.0  # [1], [e-/px]
FINE = 2  # pixels of the scene along a pixel of the camera
y, x = (torch.arange(-(FINE * n // 2), FINE * n - FINE * n // 2, dtype=F64)[:, None] for n in SHAPE)
shadow = torch.ones(FINE * SHAPE[0], FINE * SHAPE[1], dtype=F64)
for angle, row, column in ((0.13, -90, -100), (0.92, 90, -90), (0.61, -80, 100), (1.35, 95, 95)):  # four blades
    across = (x.T - column) * math.cos(angle) + (y - row) * math.sin(angle)
    along = (y - row) * math.cos(angle) - (x.T - column) * math.sin(angle)
    shadow[(across.abs() < 40) & (along.abs() < 55)] = 0.2


def counted(scene, camera, images):
    """Counts (image, y, x) of the scene, whose pixels are half those of the camera."""
    electrons = INCIDENT * quantum_efficiency(camera) * detect(scene, PIXEL / FINE, camera)
    return sample_counts(electrons.expand(images, -1, -1), camera, generator=generator)


ideal = detect(shadow, PIXEL / FINE, cs.Detector(SHAPE, PIXEL))
cameras = {
    "Falcon 4i": falcon4i.replace(coincidence_radius=0.0, counting="poisson"),
    "Falcon III": falcon3,
}
curves = {}
for name, camera in cameras.items():
    flats = counted(torch.ones_like(shadow), camera, IMAGES)
    at, noise = measured_nps(flats, bins=12)
    there, passed = measured_mtf(counted(shadow, camera, IMAGES), ideal, bins=12)
    per_electron = float(flats.mean()) / INCIDENT  # d
    efficiency = per_electron * passed**2 / noise
    curves[name] = at, noise, there, passed, efficiency
    wrong = [
        float((found / wanted - 1).abs()[1:].max())
        for found, wanted in (
            (noise, nps(camera, at)),
            (passed, mtf(camera, there)),
            (efficiency, dqe(camera, (at + there) / 2)),
        )
    ]
    print(
        f"{name}: {per_electron:.3f} counts per electron; NPS found to {wrong[0]:.1%}, MTF to {wrong[1]:.1%}, "
        f"DQE to {wrong[2]:.1%}"
    )
    assert max(wrong) < 0.08

# %%
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained", width_ratios=(1, 1.35, 1.35, 1.35))
axes[0].imshow(counted(shadow, cameras["Falcon 4i"], 1)[0], cmap="gray", origin="lower")
axes[0].set(title="blades, one image", xlabel="x [px]", ylabel="y [px]")
fine = torch.linspace(0, 1, 101, dtype=F64)
for (name, camera), colour, mark in zip(cameras.items(), (BLUE, VERMILION), "os", strict=True):
    at, noise, there, passed, efficiency = curves[name]
    for ax, where, found, curve in (
        (axes[1], at, noise, nps),
        (axes[2], there, passed, mtf),
        (axes[3], (at + there) / 2, efficiency, dqe),
    ):
        ax.plot(fine, curve(camera, fine), "-", color=colour, linewidth=1)
        ax.plot(where, found, mark, color=colour, markersize=5, label=name)
for ax, title in zip(axes[1:], ("NPS, of flat images", "MTF, of the blades", "DQE = d MTF² / NPS"), strict=True):
    ax.set(title=title, xlabel="frequency [Nyquist]", ylabel=title[:3] + " [1]", xlim=(0, 1), ylim=(0, 1.1))
axes[3].legend(title="marks found, lines put in", frameon=False, loc="lower left")

# %% [markdown]
# The Falcon III renders each electron as a small spot: signal and noise are damped alike, and the DQE does not know.
# The Falcon 4i puts each electron into the pixel where it was found: its noise is white, and its MTF is what is left of
# the DQE. So an MTF alone says nothing about how good a camera is.
#
# **Coincidence.** In one camera frame, two electrons nearer than a radius r are one. Of n electrons per pixel and frame
# the fraction
#
# $$\frac{1 - e^{-nA}}{nA},\qquad A = \pi r^2,$$
#
# is counted: those of which no earlier one lies within r. r = 2.394 px fits the Falcon 4i. Its pixels are *binary*,
# too: each can tell only whether it was hit. That costs nothing more, as two that share a pixel are nearer than r
# anyway. `recorded_counts` is the mean, `sample_counts` draws the electrons one by one. At 240 frames per second:

# %%
SMALL = (125, 126)
camera = cs.Detector.falcon4i(SMALL, PIXEL)
area = math.pi * float(camera.coincidence_radius) ** 2  # [px²]
RATES = (0.24, 1.0, 2.4, 5.0, 10.0, 24.0, 48.0)  # [e-/px/s]
kept = {"drawn": [], "mean": []}
for rate in RATES:
    n = rate / camera.frame_rate  # [e-/px/frame], detected ones
    frames = math.ceil(3e5 / (n * SMALL[0] * SMALL[1]))
    electrons = torch.full(SMALL, n * frames, dtype=F64)
    kept["drawn"].append(float(sample_counts(electrons, camera, frames, generator=generator).sum() / electrons.sum()))
    kept["mean"].append(float(recorded_counts(electrons, camera, frames).sum() / electrons.sum()))
    form = -math.expm1(-n * area) / (n * area)
    print(f"{rate:5.2f} e-/px/s: counted {kept['drawn'][-1]:.3f}, mean {kept['mean'][-1]:.3f}, closed form {form:.3f}")
    assert abs(kept["drawn"][-1] - form) < 0.01 and abs(kept["mean"][-1] - form) < 0.01

# %% [markdown]
# **What coincidence does to the noise.** Electrons that were kept keep their distance, so they are spread more evenly
# than by chance: the noise dips at low frequencies. Does that make a better camera? The signal suffers as well. Where
# the beam is a little brighter, more electrons are lost, so a weak wide wave is recorded with the slope of counts
# against electrons, exp(-nA), which is less than the fraction counted. `recorded_counts` has a gradient, so we ask it.

# %%
dips = {}
for rate in (2.4, 5.0, 10.0):
    n, frames, images = rate / camera.frame_rate, 20, 150
    flat = torch.full((images, *SMALL), n * frames, dtype=F64)
    at, noise = measured_nps(sample_counts(flat, camera, frames, generator=generator), bins=16)
    dips[rate] = at, noise
    electrons = torch.tensor(n * frames, dtype=F64, requires_grad=True)
    counts = recorded_counts(electrons.expand(SMALL), camera, frames).mean()
    (slope,) = torch.autograd.grad(counts, electrons)
    fraction = float(counts.detach() / electrons.detach())
    lowest = float(slope) ** 2 / (fraction * float(noise[0]))
    print(
        f"{rate:4.1f} e-/px/s: counted {fraction:.3f}, slope {float(slope):.3f} "
        f"(exp(-nA) = {math.exp(-n * area):.3f}), "
        f"NPS {float(noise[0]):.2f} and slope² / (counted NPS) = {lowest:.2f} in the lowest ring"
    )
    assert abs(float(slope) - math.exp(-n * area)) < 0.01
    assert noise[0] < 1 - n * area / 3 and (abs(lowest - fraction) < 0.06 or rate > 5)
assert lowest < 0.9 * fraction  # at the last and highest rate

# %%
figure, (ax, bx) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
rates = torch.logspace(-0.9, 1.9, 100, dtype=F64)  # [e-/px/s]
n = rates / camera.frame_rate
ax.semilogx(rates, -torch.expm1(-n * area) / (n * area), "-", color=BLUE, linewidth=1, label="(1 - exp(-nA)) / nA")
ax.semilogx(RATES, kept["drawn"], "o", color=BLUE, label="drawn, binary pixels and coincidence")
ax.semilogx(rates, torch.exp(-n * area), "-.", color=VERMILION, label="slope exp(-nA): what is left of the signal")
ax.semilogx(rates, -torch.expm1(-n) / n, "--", color=GREEN, label="binary pixels alone, (1 - exp(-n)) / n")
ax.set(xlabel="dose rate [e-/px/s], 240 frames/s", ylabel="fraction counted [1]", ylim=(0, 1.05))
ax.legend(frameon=False, loc="lower left", fontsize=9)
for (rate, (at, noise)), colour, mark in zip(dips.items(), (GREEN, ORANGE, VERMILION), "os^", strict=True):
    bx.plot(at, noise, mark + "-", color=colour, linewidth=1, markersize=4, label=f"{rate:g} e-/px/s")
bx.axhline(1.0, color="0.6", linewidth=1)
bx.set(xlabel="frequency [Nyquist]", ylabel="NPS [1], of independent counts 1", xlim=(0, 1), ylim=(0.4, 1.25))
bx.legend(frameon=False, loc="lower right")

# %% [markdown]
# At usual rates the quieter noise nearly makes up for the weaker signal: what is lost is about the fraction of
# electrons not counted. At 10 e-/px/s it is more. So counts may look better than they are: judge a dose rate by the
# DQE, not by the noise. And count the electrons that fall in, not those that are recorded, if you want to know what the
# specimen took.
#
# **Gain and defects.** Pixels differ by some percent, a few are dead, a few are hot: they tell of electrons that never
# came. All of this is in the counts. It is taken out with what a laboratory has: a mean of many flat images.

# %%
SIDE = (60, 64)
gain = 1 + 0.06 * torch.randn(SIDE, generator=generator, dtype=F64)
gain[:, 32:] *= 1.08  # read out by other amplifiers
gain[20, 11] = gain[41, 50] = 0.0  # dead
gain = gain / gain.mean()
dark = torch.zeros(SIDE, dtype=F64)
dark[8, 40] = dark[50, 20] = 0.5  # hot: events per frame
faulty = cs.Detector(SIDE, PIXEL, gain=gain, dark=dark)
FLAT, FRAMES = 200.0, 400  # [e-/px], [1]
flats = sample_counts((FLAT * gain).expand(2000, -1, -1), faulty.replace(dark=None), FRAMES, generator=generator)
reference = measure_gain(flats)
counts = sample_counts(FLAT * gain, faulty, FRAMES, generator=generator)
corrected = gain_corrected(counts, faulty.replace(gain=reference))
off = float((reference - gain).abs().max())
spread = [float(v.std() / v.mean()) for v in (counts, corrected)]
shot = 1 / math.sqrt(FLAT)
print(f"gain found to {off:.3f} at worst; spread of a flat image {spread[0]:.1%} raw, {spread[1]:.1%} corrected,")
print(f"where electrons that come at random make {shot:.1%}")
assert off < 0.01 and spread[0] > 1.3 * shot and abs(spread[1] / shot - 1) < 0.05

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
for ax, picture, title, unit, span in (
    (axes[0], counts, "counts", "[counts/px]", (120, 280)),
    (axes[1], reference, "gain, of 2000 flat images", "[1]", (0.8, 1.2)),
    (axes[2], corrected, "corrected", "[counts/px]", (120, 280)),
):
    shown = ax.imshow(picture, cmap="cividis", origin="lower", vmin=span[0], vmax=span[1])
    ax.set(title=title, xlabel="x [px]", ylabel="y [px]")
    figure.colorbar(shown, ax=ax, label=unit)
for name, spots, mark in (("dead", gain == 0, "o"), ("hot", dark > 0, "s")):
    for row, column in spots.nonzero().tolist():
        axes[0].plot(column, row, mark, markersize=10, markerfacecolor="none", markeredgecolor="white")
        axes[0].annotate(name, (column, row), (6, 6), textcoords="offset points", color="white", weight="bold")

# %% [markdown]
# **Halves.** To know how much of an image is signal one compares two that share the signal and nothing else. `thin`
# deals the electrons of one exposure out into two, each by the toss of a coin. Of Poisson counts both halves are
# Poisson and independent, exactly. Of coincident ones not quite: they avoid one another, and their halves inherit that.

# %%
pairs = {}
for name, radius in (("no coincidence", 0.0), ("coincidence", float(camera.coincidence_radius))):
    counting = cs.Detector(SMALL, PIXEL, coincidence_radius=radius)
    n, frames, images = 5.0 / camera.frame_rate, 40, 60
    flat = torch.full((images, *SMALL), n * frames, dtype=F64)
    one, other = thin(sample_counts(flat, counting, frames, generator=generator), generator=generator)
    blocks = [v[:, :120, :120].reshape(images, 15, 8, 15, 8).sum((2, 4)) for v in (one, other)]  # 8 x 8 px
    pairs[name] = [
        float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) for a, b in ((one, other), blocks)
    ]
    print(f"{name}: halves of noise correlate by {pairs[name][0]:+.4f} per pixel, {pairs[name][1]:+.4f} in 8 x 8 px")
assert abs(pairs["no coincidence"][0]) < 0.005 and abs(pairs["no coincidence"][1]) < 0.04
assert -0.3 < pairs["coincidence"][1] < -0.05

events = sample_events(torch.full(SMALL, 2.0, dtype=F64), camera, 100, generator=generator)
first, second = thin(events, generator=generator)
print(f"{len(events)} events dealt out into {len(first)} and {len(second)}, each with its frame and sub-pixel place")
assert torch.equal(histogram(first) + histogram(second), histogram(events))

# %% [markdown]
# The halves of coincident counts are anticorrelated in coarse detail, so a Fourier shell correlation of such halves is
# a little too low there. That errs on the safe side, and is gone where the dose rate is low.
#
# **Likelihood.** How likely are these counts, if so many electrons are expected? `negative_log_likelihood` answers for
# counts of either kind. Binary pixels show why it is worth asking: with 0.7 electrons per pixel and frame their counts
# miss over a quarter, but nothing is wrong with them. Who asks for the dose under which they are likeliest gets it
# back.

# %%
binary = cs.Detector((40, 41), PIXEL, counting="binary")
TRUE, FRAMES = 0.7, 20  # [e-/px/frame], [1]
hits = sample_counts(torch.full(binary.shape, TRUE * FRAMES, dtype=F64), binary, FRAMES, generator=generator)
guess = torch.tensor(1.0, dtype=F64, requires_grad=True)
solver = torch.optim.LBFGS([guess], max_iter=50, line_search_fn="strong_wolfe")


def unlikely():
    """-log likelihood of the hits per pixel."""
    solver.zero_grad()
    expected = (guess * FRAMES).expand(binary.shape)
    value = negative_log_likelihood(hits, expected, binary, FRAMES) / hits.numel()
    value.backward()
    return value


solver.step(unlikely)
naive, likeliest = float(hits.mean()) / FRAMES, float(guess.detach())
error = math.sqrt(math.expm1(TRUE) / (FRAMES * hits.numel()))  # of the likeliest, from Fisher's information
print(f"{TRUE} e-/px/frame put in: counted {naive:.4f}, likeliest {likeliest:.4f} ± {error:.4f}")
assert naive < 0.8 * TRUE and abs(likeliest - TRUE) < 4 * error

# %% [markdown]
# **Why a draw has no gradient.** The likelihood needs none: counts are data, and it is smooth in what is expected. But
# sometimes what one minimises is an average over counts yet to be drawn, say how well some estimator does at another
# defocus. A count is a whole number. Raise the expected electrons by a hair and it is the same as before, nearly
# always; so its derivative is 0 nearly everywhere, which is useless, and `torch.poisson` returns just that. Here it is
# refused:

# %%
tiny = cs.Detector((1, 1), PIXEL)
MEAN, TARGET, DRAWS = 5.0, 2.0, 100_000  # [e-/px], [counts/px], [1]


def pixels():
    """Single pixels in which 5 electrons are expected (draw, 1, 1), to be differentiated."""
    return torch.full((DRAWS, 1, 1), MEAN, dtype=F64, requires_grad=True)


expected = pixels()
refused = False
try:
    ((sample_counts(expected, tiny, generator=generator) - TARGET) ** 2).sum().backward()
except RuntimeError as error_message:
    refused = True
    print(error_message)
assert refused

# %% [markdown]
# There are three ways out. Take the loss (counts - 2)², whose average over Poisson counts of mean m is m + (m - 2)²,
# with the slope 1 + 2 (m - 2): 7 at m = 5.
#
# - The loss of the *expected* counts, (m - 2)²: no noise, but the slope is 6, because the counts scatter more where
#   more are expected, and that is left out.
# - `gaussian_counts`: normal numbers with the mean and variance of the counts, as m + sqrt(m) times a number that does
#   not depend on m. Right for losses up to quadratic, and with the least noise of the two that are random.
# - `score_function`: the loss times the slope of the log likelihood. Right for every loss, and noisier. A `baseline`,
#   the loss that is usual, takes some of the noise away.

# %%


def drawn_loss(electrons, baseline=None):
    """Surrogate loss of Poisson counts."""
    counts = sample_counts(electrons.detach(), tiny, generator=generator)
    return score_function((counts - TARGET) ** 2, counts, electrons, tiny, baseline=baseline)


ways = {
    "expected counts": lambda e: ((e - TARGET) ** 2).sum(),
    "gaussian_counts": lambda e: ((gaussian_counts(e, tiny, generator=generator) - TARGET) ** 2).sum(),
    "score_function": drawn_loss,
    "score_function, baseline": lambda e: drawn_loss(e, MEAN + (MEAN - TARGET) ** 2),
}
right, slopes = 1 + 2 * (MEAN - TARGET), {}
for name, loss in ways.items():
    expected = pixels()
    (slope,) = torch.autograd.grad(loss(expected), expected)
    slopes[name] = float(slope.mean()), float(slope.std())
    print(f"{name:25s} slope {slopes[name][0]:5.2f}, of one draw ± {slopes[name][1]:4.1f} (right: {right:g})")
    if name != "expected counts":
        assert abs(slopes[name][0] - right) < 5 * slopes[name][1] / math.sqrt(DRAWS)
assert abs(slopes["expected counts"][0] - 6) < 1e-6
assert slopes["gaussian_counts"][1] < slopes["score_function, baseline"][1] < slopes["score_function"][1]

# %%
figure, (ax, bx) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained", width_ratios=(1, 1.1))
doses = torch.linspace(0.46, 0.94, 81, dtype=F64)
with torch.no_grad():
    values = negative_log_likelihood(
        hits.expand(81, -1, -1), (doses * FRAMES)[:, None, None].expand(-1, *binary.shape), binary, FRAMES
    )
ax.plot(doses, values - values.min(), color=BLUE)
ax.axvline(TRUE, color="0.6", linewidth=1)
ax.text(TRUE + 0.005, float((values - values.min()).max()) * 0.9, "put in", color="0.4", fontsize=9)
ax.axvline(naive, color=VERMILION, linewidth=1, linestyle="--")
ax.text(naive + 0.005, float((values - values.min()).max()) * 0.9, "counted", color=VERMILION, fontsize=9)
ax.set(xlabel="expected electrons [e-/px/frame]", ylabel="-log likelihood, above its least [1]")
ax.set_title("binary pixels")
for i, (mean, deviation) in enumerate(slopes.values()):
    bx.errorbar(mean, i, xerr=deviation, fmt="osD^"[i], color=(GREEN, BLUE, VERMILION, ORANGE)[i], capsize=4)
bx.axvline(right, color="0.6", linewidth=1)
bx.set_yticks(range(len(slopes)), list(slopes))
bx.invert_yaxis()
bx.set(xlabel="slope of the loss, mean ± deviation of a draw [px/e-]", title="(counts - 2)², 5 electrons")

# %% [markdown]
# So fit with the likelihood, design with `gaussian_counts`, and take `score_function` where counts are few and the loss
# is no parabola. Two limits to bear in mind: the likelihood takes pixels to be independent, which coincidence makes
# only nearly true, and it refuses cameras that render their electrons (`Detector.nps`), whose pixels are not
# independent.
