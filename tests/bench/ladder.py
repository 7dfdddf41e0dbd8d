"""The ladder: reconstruction methods on scenes of 128 x 128 x 64 voxels, each at the best of its settings.

    python -m tests.bench.ladder phantom      blobs and a vesicle, white noise of 10, 0 and -10 dB, no lens
    python -m tests.bench.ladder scene        crowded ice through the simulator: lens, counts, three doses
    python -m tests.bench.ladder molecules    molecules that no packaged network has seen, with a vesicle, voxels of
                                              10 Å; noise as of the phantom, no lens; trained networks beside the others

The best setting is the one with the largest correlation with the truth, which a user does not have: an oracle's, the
same for all methods, and printed. Correlations are of all frequencies, of those between the outermost tilts, and of the
missing wedge; resolution is where the Fourier shell correlation with the wedge masked falls below 1/2; the error is the
root of the mean squared difference over the truth's own root mean square, after the best scale.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

import cryosim as cs
import inverse as inv
from cryosim import io
from cryosim.io.examples import example_path
from cryosim.specimen.potential_volume import potential_volume
from inverse.physics.base import TiltPhysics
from inverse.priors.classic import GeneralizedVariation, Prior, TotalVariation, Wavelets
from inverse.solvers.regularised import matching_weight

SHAPE = (64, 128, 128)
ANGLES = torch.linspace(-60, 60, 41)


class Rung(NamedTuple):
    """A method with the settings it is tried at: setting -> volume (z, y, x)."""

    name: str
    settings: Iterable[float]
    make: Callable[[float], torch.Tensor]


def phantom(seed: int = 0) -> torch.Tensor:
    """Blob proteins that do not overlap and a vesicle of two leaflets (z, y, x)."""
    generator = torch.Generator().manual_seed(seed)
    z, y, x = (torch.arange(n) - n // 2 for n in SHAPE)
    z, y, x = z[:, None, None], y[:, None], x
    radius = ((x + 28) ** 2 + (y - 20) ** 2 + z**2).sqrt()
    volume = sum(torch.exp(-((radius - r) ** 2) / (2 * 1.2**2)) for r in (18.0, 23.0))
    volume = torch.as_tensor(volume)
    centres: list[torch.Tensor] = []
    while len(centres) < 70:
        centre = (torch.rand(3, generator=generator) - 0.5) * torch.tensor([112.0, 112.0, 44.0])
        clear = all(float((centre - c).norm()) > 13 for c in centres)
        if clear and abs(float((centre - torch.tensor([-28.0, 20.0, 0.0])).norm()) - 20.5) > 11:
            centres.append(centre)
    for centre in centres:
        for _ in range(6):
            at = centre + 3.5 * torch.randn(3, generator=generator).clamp(-1.2, 1.2)
            distance = (x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2
            volume = volume + torch.exp(-distance / (2 * 1.8**2))
    return volume.float()


def climb(rungs: Iterable[Rung], truth: torch.Tensor, voxel_size: float) -> None:
    """Print one line for each rung, at its best setting."""
    region = inv.measured_region(SHAPE, ANGLES)
    for rung in rungs:
        best: tuple[float, float, torch.Tensor, float] | None = None
        for setting in rung.settings:
            start = time.perf_counter()
            volume = rung.make(setting)
            took = time.perf_counter() - start
            value = correlation(truth, volume)
            if best is None or value > best[0]:
                best = (value, setting, volume, took)
        assert best is not None
        _, setting, volume, took = best
        inside, outside = (correlation(filtered(truth, r), filtered(volume, r)) for r in (region, ~region))
        shells = inv.fsc(truth, volume, voxel_size, region=region, thickness=SHAPE[0] * voxel_size)
        scale = (volume * truth).sum() / volume.square().sum()
        error = float((scale * volume - truth).norm() / truth.norm())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{rung.name:34s} {setting:8.3g}  {best[0]:.3f} {inside:.3f} {outside:.3f}  "
            f"{shells.resolution(0.5) / voxel_size:5.2f} voxels  {error:.3f}  {took:6.1f} s  {peak:.1f} GB so far",
            flush=True,
        )


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))


def filtered(volume: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfftn(torch.fft.rfftn(volume) * region, s=volume.shape)


def with_priors(physics: TiltPhysics, images: torch.Tensor, noise: float, factors: Sequence[float]) -> list[Rung]:
    """Rungs of total variation, its generalisation and wavelets, at factors of the weight that meets the noise."""
    batch, rungs = images[None, None], []
    kinds: list[tuple[str, Prior, Any]] = [
        ("TV", TotalVariation(), inv.tv),
        ("TGV", GeneralizedVariation(), inv.tgv),
        ("wavelets", Wavelets(), inv.wavelets),
    ]
    for name, prior, solve in kinds:
        matched: list[float] = []

        def make(
            factor: float, prior: Prior = prior, solve: Any = solve, matched: list[float] = matched
        ) -> torch.Tensor:
            if not matched:
                matched.append(matching_weight(physics, batch, prior, noise, iterations=60)[0])
            return solve(physics, images, factor * matched[0], noise=noise)

        rungs.append(Rung(f"{name}, weight / that of the noise", factors, make))
    return rungs


def on_the_phantom() -> None:
    truth = phantom()
    clean = inv.TiltProjection(ANGLES, SHAPE).A(truth[None, None])[0, 0]
    for decibel in (10, 0, -10):
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(clean.shape, generator=generator) * clean.std() * 10 ** (-decibel / 20)
        print(f"\n{decibel} dB: setting, correlation of all, measured, wedge; resolution, error, time, memory")
        climb(phantom_rungs(clean + noise, float(noise.var())), truth, 1.0)


def phantom_rungs(images: torch.Tensor, noise: float) -> list[Rung]:
    physics = inv.TiltProjection(ANGLES, SHAPE)
    norm = float(physics.squared_norm())

    def damped(weight: float) -> torch.Tensor:
        return inv.least_squares(physics, images, weight * norm, open_sides=True)

    lows, stops = [2.5, 3, 4, 5, 6, 8, 10, 13], [1, 2, 4, 8, 16, 32]
    return [
        Rung("WBP, ramp", [0.0], lambda _: inv.wbp(physics, images)),
        Rung("WBP, low-pass [voxel]", lows, lambda p: inv.wbp(physics, images, low_pass=p)),
        Rung("SIRT, iterations", stops, lambda n: inv.sirt(physics, images, iterations=int(n))),
        Rung("CGLS, iterations", [1, 2, 3, 5, 8], lambda n: inv.cgls(physics, images, iterations=int(n))),
        Rung("least squares, weight / |A|^2", [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0], damped),
        Rung("Wiener, nothing to tune", [0.0], lambda _: inv.wiener(physics, images).volume),
        *with_priors(physics, images, noise, [0.3, 0.6, 1.0]),
    ]


def molecules() -> torch.Tensor:
    """Apoferritin, its subunit and ubiquitin crowded about a vesicle (z, y, x) [V], 10 Å voxels."""
    generator = torch.Generator().manual_seed(8)
    size, voxel = (1240.0, 1240.0, 600.0), 10.0
    surface = cs.irregular_vesicle(170.0, amplitude=0.05, generator=generator)
    place = torch.tensor([[-260.0, 200.0, 0.0]], dtype=torch.float64)
    lipids = cs.Specimen(
        (cs.membrane(surface, generator=generator),),
        (cs.Poses(torch.eye(3, dtype=torch.float64)[None], place),),
        size,
        cs.Ice(620.0),
        names=("membrane",),
        kinds=("membrane",),
    )
    cage, subunit = (io.read_atoms(example_path("apoferritin"), assembly=assembly) for assembly in (1, None))
    ubiquitin = io.read_atoms(example_path("ubiquitin"))
    species = [
        cs.Species(cage, "apoferritin", copies=50),
        cs.Species(subunit, "subunit", copies=300),
        cs.Species(ubiquitin, "ubiquitin", copies=300),
    ]
    specimen = cs.crowd(species, size, obstacles=lipids, voxel_size=5.0, generator=generator).specimen
    return potential_volume(specimen, SHAPE, voxel).values.float()


def on_the_molecules() -> None:
    truth = molecules()
    clean = inv.TiltProjection(ANGLES, SHAPE).A(truth[None, None])[0, 0]
    for decibel in (10, 0, -10):
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(clean.shape, generator=generator) * clean.std() * 10 ** (-decibel / 20)
        print(f"\n{decibel} dB: setting, correlation of all, measured, wedge; resolution, error, time, memory")
        images, variance = clean + noise, float(noise.var())
        climb(phantom_rungs(images, variance), truth, 10.0)
        climb(learned_rungs(images, variance, truth), truth, 10.0)


def learned_rungs(images: torch.Tensor, noise: float, truth: torch.Tensor) -> list[Rung]:
    physics, denoiser = inv.TiltProjection(ANGLES, SHAPE), inv.load_denoiser(voxel_size=10.0)

    def plugged(strength: float) -> torch.Tensor:
        return inv.plug_and_play(physics, images, denoiser, noise, strength=strength).volume

    def drawn(samples: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(4)
        made = inv.diffusion(physics, images, denoiser, noise, samples=int(samples), generator=generator)
        held = inv.coverage(made.samples, truth, region=inv.measured_region(SHAPE, ANGLES))
        print(
            f"  90 % interval: voxels {held.voxels:.3f}, measured {held.inside:.3f}, wedge {held.outside:.3f}; error "
            f"over spread {held.spread_skill:.2f}"
        )
        return made.mean

    network = inv.load_denoiser("local", voxel_size=10.0)

    def looked(_: float) -> torch.Tensor:
        return inv.local(physics, images, network, noise=noise).volume

    return [
        Rung("local network", [1], looked),
        Rung("plug and play (HQS), strength", [0.125, 0.25, 0.5], plugged),
        Rung("diffusion, mean of samples", [8], drawn),
    ]


def on_the_scene() -> None:
    voxel = 6.0
    generator = torch.Generator().manual_seed(3)
    names = {"apoferritin": 1, "ubiquitin": None}
    proteins = [io.read_atoms(example_path(name), assembly=assembly) for name, assembly in names.items()]
    species = [cs.Species(proteins[0], "apoferritin", copies=14), cs.Species(proteins[1], "ubiquitin", copies=250)]
    size = (700.0, 700.0, 320.0)
    specimen = cs.crowd(species, size, ice=cs.Ice(340.0), generator=generator).specimen
    truth = potential_volume(specimen, SHAPE, voxel).values.float()
    optics = cs.Optics(300.0, 25000.0, amplitude_contrast=0.07)
    for dose in (120.0, 40.0, 13.0):
        tilts = cs.TiltScheme.dose_symmetric(60, 3, dose)
        series = cs.simulate(
            specimen, tilts, optics, cs.Detector((128, 128), voxel), generator=generator.manual_seed(5), workers=2
        )
        print(f"\n{dose:g} e-/Å^2: setting, correlation of all, measured, wedge; resolution, error, time, memory")
        climb(scene_rungs(series, voxel), truth, voxel)


def scene_rungs(series: cs.TiltSeries, voxel: float) -> list[Rung]:
    means = series.images.mean((1, 2), keepdim=True)
    contrast = series.images / means - 1
    lens: Any = {"voxel_size": voxel, "optics": series.optics, "tolerance": 1e-3}
    physics = inv.ContrastProjection(series.tilts.angles, SHAPE, **lens)
    norm = float(physics.squared_norm())

    def reconstructed(**how: Any) -> torch.Tensor:
        return inv.reconstruct(series, thickness=SHAPE[0] * voxel, std=False, **how).volume.values

    def through_the_lens(weight: float) -> torch.Tensor:
        return inv.least_squares(physics, contrast, weight * norm)

    return [
        Rung("WBP, phases flipped", [0.0], lambda _: reconstructed()),
        Rung("the same, low-pass [Å]", [15, 20, 30, 40, 60], lambda p: reconstructed(low_pass=p)),
        Rung(
            "SIRT, phases flipped, iterations", [1, 2, 4, 8], lambda n: reconstructed(method="sirt", iterations=int(n))
        ),
        Rung("least squares, phases flipped", [0.0], lambda _: reconstructed(method="least-squares")),
        Rung("Wiener, phases flipped", [0.0], lambda _: reconstructed(method="wiener")),
        Rung("TV, phases flipped", [0.0], lambda _: reconstructed(method="tv")),
        Rung("least squares through the lens, weight", [3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0], through_the_lens),
        *with_priors(physics, contrast, float((1 / means).mean()), [0.3, 0.6, 1.0])[:1],
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"phantom": on_the_phantom, "scene": on_the_scene, "molecules": on_the_molecules}[
        sys.argv[1] if len(sys.argv) > 1 else "phantom"
    ]()
