"""Reconstruction with trained networks and neural fields: what every result tells, and when it warns."""

import math
from pathlib import Path

import pytest
import torch

import inverse.design
import inverse.reconstruction
import inverse.slabs
from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.constants import interaction_constant
from cryosim.microscope.optics import Optics
from inverse.priors.denoiser import NoiseConditionalUNet
from inverse.reconstruction import reconstruct
from inverse.weights import PACKAGED, write_network

PLATE = Optics(300.0, phase_shift=90.0)  # in focus: its ctf is -1 at every frequency
ANGLES = torch.arange(-60.0, 61.0, 6.0, dtype=torch.float64)
THICKNESS = 160.0  # [Å]


def blobs(seed: int, shape: tuple[int, int, int] = (16, 40, 32)) -> torch.Tensor:
    """Gaussian blobs (z, y, x) [V]."""
    generator = torch.Generator().manual_seed(seed)
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    volume = torch.zeros(shape, dtype=torch.float64)
    for place in torch.rand(12, 3, generator=generator, dtype=torch.float64):
        a, b, c = (4 + float(p) * (n - 8) for p, n in zip(place, shape, strict=True))
        volume += 3 * torch.exp(-((z - a) ** 2 + (y - b) ** 2 + (x - c) ** 2) / (2 * 1.6**2))
    return volume


def series_of(volume: torch.Tensor, counts: float, seed: int = 0) -> TiltSeries:
    """Counts [e-/px] of a volume in phase contrast, 10 Å pixels."""
    from inverse.physics.tilt import TiltProjection

    lines = TiltProjection(ANGLES, tuple(volume.shape)).A(volume[None, None])[0, 0] * 10.0  # [V·Å]
    contrast = -2 * float(interaction_constant(torch.tensor(300.0, dtype=torch.float64))) * lines
    expected = counts * (1 + contrast - contrast.mean((1, 2), keepdim=True)).clamp_min(0)
    images = torch.poisson(expected, generator=torch.Generator().manual_seed(seed)).float()
    return TiltSeries(images, 10.0, TiltScheme(ANGLES, torch.full_like(ANGLES, counts / 100)), PLATE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A denoiser of blobs, trained for a moment."""
    from inverse.train import Plan, train_denoiser

    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = NoiseConditionalUNet((8, 12), 1, 0.6, (10.0, 10.0), (0.03, 6.0))
    volumes = [blobs(seed).float() for seed in range(10, 16)]
    network = train_denoiser(network, volumes, Plan(steps=250, batch=2, crop=16, rate=5e-3))
    path = tmp_path_factory.mktemp("weights") / "blobs.safetensors"
    write_network(path, network, {}, torch.float32)
    return path


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    return blobs(1)


@pytest.fixture(scope="module")
def series(truth) -> TiltSeries:
    return series_of(truth, 1500.0)


def likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double() - a.double().mean(), b - b.mean()
    return float((a * b).sum() / a.norm() / b.norm())


@pytest.mark.parametrize(
    ("method", "how"),
    [("pnp", {}), ("diffusion", {"samples": 3}), ("implicit", {"iterations": 40}), ("tv", {"weight": 0.2})],
)
def test_every_result_tells_what_is_measured_how_sure_and_how_consistent(method, how, series, truth, trained):
    network = {"network": trained} if method in ("pnp", "diffusion") else {}
    made = reconstruct(series, method, thickness=THICKNESS, **how, **network)
    assert made.volume.values.shape == truth.shape and made.volume.values.dtype == torch.float32
    assert likeness(made.volume.values, truth) > 0.6
    assert made.std is not None and made.std.shape == truth.shape
    assert bool((made.std > 0).any()) and bool(torch.isfinite(made.std).all()) and float(made.std.min()) >= 0
    part = made.measured.values
    assert 0.2 * float(made.volume.values.norm()) < float(part.norm()) < 1.01 * float(made.volume.values.norm())
    assert made.consistency == pytest.approx(float(made.misfit.mean()))


def test_a_specimen_that_bends_is_fitted_with_its_displacements(truth):
    """What is left of the images is then their noise, and the displacements are like the true ones."""
    from inverse.physics.tilt import TiltProjection
    from inverse.solvers.implicit_bent import Bending

    bending = Bending(ANGLES, (truth.shape[1], truth.shape[2]), 4.0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        bending.control.copy_(1.5 * torch.randn(bending.control.shape, generator=generator, dtype=torch.float64))
        lines = TiltProjection(ANGLES, tuple(truth.shape)).A(truth[None, None])[0, 0]
        constant = -2 * float(interaction_constant(torch.tensor(300.0, dtype=torch.float64))) * 10.0
        expected = 1500.0 * (1 + constant * (bending(lines) - lines.mean((1, 2), keepdim=True))).clamp_min(0)
        images = torch.poisson(expected, generator=generator).float()
    series = series_of(truth, 1500.0).replace(images=images)
    how = {"thickness": THICKNESS, "iterations": 150, "std": False}
    bent = reconstruct(series, "implicit", bends=15.0, **how)
    with pytest.warns(UserWarning, match="differs from the images"):
        straight = reconstruct(series, "implicit", **how)
    assert straight.displacement is None and bent.displacement is not None
    assert bent.displacement.shape == (len(ANGLES), 2, 4, 4)
    moved = 10.0 * bending.displacement().detach()  # [Å]
    assert likeness(bent.displacement, moved) > 0.6
    assert likeness(bent.volume.values, truth) > 0.55
    assert bent.consistency < 1.1 and straight.consistency > 1.3
    with pytest.raises(ValueError, match="expected no bends"):
        reconstruct(series, "tv", bends=15.0)


def test_a_trained_prior_beats_least_squares(series, truth, trained):
    plain = reconstruct(series, "least-squares", thickness=THICKNESS, std=False)
    made = reconstruct(series, "pnp", thickness=THICKNESS, network=trained, std=False)
    assert likeness(made.volume.values, truth) > likeness(plain.volume.values, truth) + 0.05
    assert len(made.residuals) == len(made.misfits) == 20
    assert made.misfits[-1] == pytest.approx(made.consistency, rel=0.2)


def test_a_prior_that_pulls_away_is_told_and_one_that_does_not_is_not(series, trained, recwarn):
    quiet = reconstruct(series, "pnp", thickness=THICKNESS, network=trained, std=False)
    assert quiet.warnings == () and not [w for w in recwarn if "pulled" in str(w.message)]
    with pytest.warns(UserWarning, match="pulled it from what was measured. Lower weight"):
        far = reconstruct(series, "pnp", thickness=THICKNESS, network=trained, weight=300.0, std=False)
    assert len(far.warnings) == 1 and far.consistency > 1.3


def test_the_deviation_of_total_variation_is_that_of_repeats(truth):
    """Against volumes of six series that differ by their noise alone."""
    how = {"thickness": THICKNESS, "weight": 0.5}
    made = reconstruct(series_of(truth, 1500.0), "tv", **how)
    again = [reconstruct(series_of(truth, 1500.0, seed), "tv", **how, std=False).volume.values for seed in range(1, 7)]
    middle = torch.stack(again)[..., 8:24].std(0).square().mean((1, 2)).sqrt()
    assert made.std is not None
    ratio = made.std[3:13, 0, 0] / middle[3:13]
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.15)


def test_samples_come_again_by_their_seed(series, trained):
    how = {"thickness": THICKNESS, "network": trained, "samples": 2}
    one, same, other = (reconstruct(series, "diffusion", **how, seed=seed).volume.values for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_slabs_of_a_trained_prior_are_nearly_the_whole(series, trained, monkeypatch):
    how = {"thickness": THICKNESS, "network": trained, "std": False}
    whole = reconstruct(series, "pnp", **how).volume.values
    monkeypatch.setattr(inverse.reconstruction, "VOXELS_AT_ONCE", 100)
    monkeypatch.setattr(inverse.slabs, "ROWS", 16)
    monkeypatch.setitem(inverse.design.HALO, "pnp", 8)
    parts = reconstruct(series, "pnp", **how).volume.values
    assert 0 < float((parts - whole).norm()) < 0.02 * float(whole.norm())


def test_another_voxel_size_is_warned_of(series, trained):
    with pytest.warns(UserWarning, match="trained at voxels of 10 Å is used at 20 Å"):
        reconstruct(series, "pnp", thickness=THICKNESS, bin=2, network=trained, std=False)


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        ("wbp", {"network": "x.safetensors"}, "method wbp: expected no network"),
        ("tv", {"samples": 4}, "method tv: expected no samples"),
        ("diffusion", {"samples": 1}, "expected 2 of the samples or more"),
        ("diffusion", {"weight": 1.0}, "expected no weight"),
        ("pnp", {"low_pass": 40.0}, "expected no low_pass"),
        ("pnp", {"network": "nowhere.safetensors"}, "nowhere.safetensors: file: expected an existing file"),
        ("pnp", {"weight": math.inf}, "positive weight"),
    ],
)
def test_what_does_not_go_together_is_refused(series, method, arguments, said):
    with pytest.raises(ValueError, match=said):
        reconstruct(series, method, thickness=THICKNESS, **arguments)


def test_what_cannot_be_made_in_slabs_is_refused_where_it_is_too_large(series, monkeypatch):
    monkeypatch.setattr(inverse.design, "VOXELS_AT_ONCE", 1000)
    with pytest.raises(ValueError, match="diffusion: expected a volume of at most 1e\\+03 voxels"):
        reconstruct(series, "diffusion", thickness=THICKNESS)


@pytest.mark.skipif(not (PACKAGED / "crowded.safetensors").exists(), reason="no weights yet")
def test_the_packaged_network_is_used_unless_another_is_named(series):
    made = reconstruct(series, "pnp", thickness=THICKNESS, iterations=3, std=False)
    assert bool(torch.isfinite(made.volume.values).all())


def test_a_specimen_wider_than_the_field_is_no_worse_in_its_middle(trained):
    """At 60 degrees an image shows twice the field and more: what it brings in must not be piled up in the field."""
    wide = torch.cat([blobs(seed) for seed in (21, 22, 23)], 2)  # (16, 40, 96), of which a third is in the field
    from inverse.physics.tilt import TiltProjection

    lines = TiltProjection(ANGLES, (16, 40, 96), (40, 32)).A(wide[None, None])[0, 0] * 10.0
    contrast = -2 * float(interaction_constant(torch.tensor(300.0, dtype=torch.float64))) * lines
    expected = 3000.0 * (1 + contrast - contrast.mean((1, 2), keepdim=True))
    counts = torch.poisson(expected, generator=torch.Generator().manual_seed(3)).float()
    series = TiltSeries(counts, 10.0, TiltScheme(ANGLES, torch.full_like(ANGLES, 30.0)), PLATE)
    middle = (slice(None), slice(8, 32), slice(8, 24))
    part = wide[..., 32:64][middle]
    plain = reconstruct(series, "wbp", thickness=THICKNESS, std=False).volume.values[middle]
    for method, how in (("pnp", {"network": trained}), ("tv", {}), ("sirt", {})):
        made = reconstruct(series, method, thickness=THICKNESS, std=False, **how)
        assert made.volume.values.shape == (16, 40, 32)
        assert made.consistency < 3.0, method
        assert likeness(made.volume.values[middle], part) > likeness(plain, part) + 0.03, method


def test_the_local_network_comes_with_weights_and_takes_no_others(series, truth, trained):
    with pytest.warns(UserWarning):  # the packaged weights were not made for these blobs
        made = reconstruct(series, "local", thickness=THICKNESS)
    plain = reconstruct(series, "wbp", thickness=THICKNESS, std=False)
    assert likeness(made.volume.values, truth) > likeness(plain.volume.values, truth)
    assert made.std is not None and made.std.shape == truth.shape and float(made.std.min()) > 0
    assert made.measured.values.shape == truth.shape
    with pytest.raises(ValueError, match="expected the weights of a LocalNetwork, got those of a NoiseConditionalUNet"):
        reconstruct(series, "local", thickness=THICKNESS, network=trained)
