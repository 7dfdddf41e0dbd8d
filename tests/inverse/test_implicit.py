"""Neural fields: the function is the same however it is rendered, its gradients are right, and fits stop in time."""

import math

import pytest
import torch
from torch import nn

import cryosim as cs
import inverse as inv
import inverse.priors.implicit as fields
from inverse.priors.implicit import HashGrid, Siren, rendered
from inverse.solvers.implicit import RowMisfit, WholeMisfit, deep_image_prior, implicit

EXTENT = (9.0, 7.0, 6.0)  # x, y, z
ANGLES = torch.linspace(-40, 40, 7, dtype=torch.float64)


def field_of(kind, generator, dtype=torch.float64):
    """A field whose features are of size one, so that it varies everywhere."""
    how = {"dense": {}, "hashed": {"table": 64}, "linear": {"layers": 0}, "trilinear": {"interpolation": "trilinear"}}
    if kind == "siren":
        return Siren(EXTENT, omega=6.0, omega_hidden=6.0, hidden=16, generator=generator).to(dtype)
    field = HashGrid(EXTENT, 1.5, levels=3, hidden=8, generator=generator, **how[kind]).to(dtype)
    with torch.no_grad():
        for table in field.tables:
            table.copy_(torch.randn(table.shape, generator=generator, dtype=dtype))
    return field


def blobs(shape, width=2.0):
    """Three smooth blobs (z, y, x), as good as band-limited."""
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - n // 2 for n in shape), indexing="ij")
    at = [(-1, 2, -3), (2, -4, 3), (0, 3, 5)]
    return sum(torch.exp(-((z - a) ** 2 + (y - b) ** 2 + (x - c) ** 2) / (2 * width**2)) for a, b, c in at)


def noisy(physics, volume, ratio, generator):
    """Images of a volume (tilt, y, x) with white noise of `ratio` times their variance, and that of the noise."""
    clean = physics.A(volume[None, None])[0, 0]
    noise = ratio * float(clean.var())
    return clean + noise**0.5 * torch.randn(clean.shape, generator=generator, dtype=clean.dtype), noise


@pytest.mark.parametrize("kind", ["dense", "hashed", "linear", "trilinear", "siren"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_a_volume_is_the_field_at_its_voxels(kind, dtype, close, generator, monkeypatch):
    """Whatever the path: axis by axis or point by point, whole or in blocks, all rows or some; sample n // 2 at 0."""
    field, shape = field_of(kind, generator, dtype), (6, 7, 9)
    z, y, x = torch.meshgrid(*(torch.arange(n) - n // 2 for n in shape), indexing="ij")  # voxels of size 1
    points = torch.stack([x, y, z], -1).reshape(-1, 3).to(dtype)
    volume = field.volume(shape)
    size = float(volume.detach().std())
    assert size > 0.02
    assert (volume - field(points).reshape(shape)).abs().max() < close * size
    some = torch.tensor([5, 0, 2])
    assert (field.volume(shape, some) - volume[:, some]).abs().max() < close * size
    (whole,) = torch.autograd.grad(volume.square().sum(), [field.weights[0]])
    monkeypatch.setattr(fields, "VOXELS_AT_ONCE", 40)
    blocks = field.volume(shape)
    assert (blocks - volume).abs().max() < close * size
    (again,) = torch.autograd.grad(blocks.square().sum(), [field.weights[0]])  # rendered anew on the way back
    assert (again - whole).norm() < 10 * close * whole.norm()


def test_a_volume_of_twice_the_voxels_shows_the_same_field(generator):
    field = field_of("dense", generator)
    fine = field.volume((12, 14, 18))[::2, 1::2, 1::2]  # 7 // 2 = 3 stands at 14 // 2 = 7
    assert (fine - field.volume((6, 7, 9))).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["dense", "hashed", "siren"])
def test_gradients_in_the_positions(kind, generator):
    """Against finite differences: the coordinates may be deformed."""
    field = field_of(kind, generator)
    points = (torch.rand(20, 3, generator=generator, dtype=torch.float64) - 0.5) * torch.tensor(EXTENT) * 0.9
    assert torch.autograd.gradcheck(field, [points.requires_grad_()], eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "hashed", "siren"])
def test_gradients_in_the_axes_are_those_in_the_positions(kind, generator):
    field = field_of(kind, generator)
    axes = [axis.requires_grad_() for axis in field.axes((6, 7, 9))]
    weights = torch.randn(6, 7, 9, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((field.on_axes(axes) * weights).sum(), axes)
    points = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).reshape(-1, 3)
    wanted = torch.autograd.grad((field(points) * weights.flatten()).sum(), axes)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < 1e-12 * b.norm()


def test_smoothstep_has_no_kinks_and_trilinear_has(generator):
    """The slope on both sides of a node, which stands at the centre of a grid of an odd number of nodes."""
    for kind, smooth in (("smoothstep", True), ("trilinear", False)):
        field = HashGrid((8, 8, 8), 4.0, levels=1, layers=0, interpolation=kind, generator=generator).double()
        points = torch.tensor([[-1e-9, 0.3, 0.3], [1e-9, 0.3, 0.3]], dtype=torch.float64).requires_grad_()
        (slope,) = torch.autograd.grad(field(points).sum(), points)
        jump, size = (slope[1, 0] - slope[0, 0]).abs(), slope[0, 1].abs()
        assert (jump < 1e-6 * size) == smooth


def test_a_level_has_its_own_entries_where_they_fit(generator):
    """27, 125 and 729 nodes: two levels are dense in a table of 256, the third shares 256 entries, all in use."""
    field = HashGrid((8, 8, 8), 1.0, coarsest=4.0, levels=3, table=256, generator=generator)
    assert [len(table) for table in field.tables] == [27, 125, 256]
    assert [grid.hashed for grid in field.grids] == [False, False, True]
    nodes = torch.stack(torch.meshgrid(*[torch.arange(9)] * 3, indexing="ij")).flatten(1)
    used = torch.bincount(field.grids[2].entry(tuple(nodes)), minlength=256)
    assert (used > 0).float().mean() > 0.85 and used.max() <= 16  # 729 / 256 = 2.8 on average


def test_sines_are_distributed_as_in_the_paper(generator):
    """Sitzmann et al. 2020, theorem 1.8: pre-activations of standard deviation one, activations arcsine."""
    field = Siren((2.0, 2.0, 2.0), hidden=256, layers=4, generator=generator)
    field.requires_grad_(False)
    assert field.weights[0].abs().max() <= 1 / 3
    assert float(field.weights[0].std()) == pytest.approx(1 / 3**1.5, rel=0.05)
    assert field.weights[1].abs().max() <= math.sqrt(6 / 256) / 30
    h = (2 * torch.rand(2000, 3, generator=generator) - 1).T
    for i, (omega, weight, offset) in enumerate(zip(field.omegas, field.weights, field.offsets, strict=False)):
        inside = omega * (weight @ h + offset)
        h = inside.sin()
        assert float(h.std()) == pytest.approx(0.5**0.5, abs=0.02)
        within = (h.abs() < 0.5).float().mean()  # arcsine: (2 / pi) asin(1/2) = 1/3
        assert float(within) == pytest.approx(1 / 3, abs=0.03)
        if i:  # the offsets, up to omega / 16, come on top of the paper's 1
            assert float(inside.std()) == pytest.approx(math.sqrt(1 + 30**2 / 256 / 3), rel=0.1)


@pytest.mark.parametrize(("finest", "left"), [(2.0, 0.02), (1.0, 1e-6)])
def test_a_hash_grid_fits_a_band_limited_volume(finest, left, generator):
    """Blobs of 2 voxels deviation. Measured: with nodes 2 voxels apart 1 % of the variance is left after 150 steps of
    Adam, which smoothstep between nodes cannot follow, and with nodes at the voxels 5e-8.
    """
    truth = blobs((12, 16, 20)).float()
    field = HashGrid((20, 16, 12), finest, coarsest=8.0, levels=3, generator=generator)
    adam = torch.optim.Adam(field.parameters(), 0.01, eps=1e-15)
    for _ in range(150):
        loss = (field.volume((12, 16, 20)) - truth).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        error = (field.volume((12, 16, 20)) - truth).square().mean()
    assert error < left * truth.var()


def misfits(grid, shape, generator, variance, dtype=torch.float64, held_out=0.2):
    """The misfit by rows and that of the whole, of the same images and noise by tilt."""
    physics = inv.TiltProjection(ANGLES, shape, grid=grid)
    images = torch.randn(len(ANGLES), *shape[1:], generator=generator, dtype=dtype)
    fitted = (torch.rand(images.shape, generator=generator) >= held_out).to(dtype)
    noise = torch.linspace(1, 2, len(ANGLES), dtype=dtype)[:, None, None]
    return (
        physics,
        images,
        fitted,
        noise,
        [kind(physics, images, noise, fitted, variance) for kind in (RowMisfit, WholeMisfit)],
    )


@pytest.mark.parametrize("grid", ["camera", "stretched"])
def test_the_likelihood_by_rows_is_that_of_the_whole(grid, generator):
    shape = (5, 6, 9)
    physics, images, fitted, noise, both = misfits(grid, shape, generator, 0.0)
    volume = torch.randn(shape, generator=generator, dtype=torch.float64)
    squares = (physics.A(volume[None, None])[0, 0] - images).square() / noise
    for misfit in both:
        found = misfit(volume)
        assert float(found.loss) == pytest.approx(0.5 * float((squares * fitted).mean()), rel=1e-10)
        assert found.fitted == pytest.approx(float((squares * fitted).sum()), rel=1e-10)
        assert found.held_out == pytest.approx(float((squares * (1 - fitted)).sum()), rel=1e-10)


@pytest.mark.parametrize("kind", [RowMisfit, WholeMisfit])
def test_the_covariance_metric_against_dense_matrices(kind, generator):
    """1/2 r^T (v A A^T + noise)^-1 r by rows, and its gradient either way: exact for images that a volume has."""
    shape, variance, noise = (5, 2, 7), 0.3, torch.full((len(ANGLES), 1, 1), 1.7, dtype=torch.float64)
    physics = inv.TiltProjection(ANGLES, shape, grid="stretched")
    unit = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, 1, *shape)
    matrix = physics.A(unit).flatten(1).T  # (pixel, voxel)
    truth, volume = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    images = (matrix @ truth.flatten()).view(len(ANGLES), *shape[1:])
    misfit = kind(physics, images, noise, torch.ones_like(images), variance)
    volume.requires_grad_()
    loss = misfit(volume).loss * images.numel()
    (found,) = torch.autograd.grad(loss, volume)
    covariance = variance * matrix @ matrix.T + 1.7 * torch.eye(len(matrix), dtype=torch.float64)
    residual = matrix @ (volume - truth).detach().flatten()
    pull = torch.linalg.solve(covariance, residual)
    if kind is RowMisfit:
        assert float(loss.detach()) == pytest.approx(0.5 * float(residual @ pull), rel=1e-8)
    wanted = (matrix.T @ pull).view(shape)
    assert (found - wanted).norm() < 1e-8 * wanted.norm()


@pytest.mark.parametrize("grid", ["camera", "stretched"])
@pytest.mark.parametrize("variance", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_gradients_of_some_rows_are_unbiased(grid, variance, dtype, close, generator):
    """The mean over all batches of rows, in any order, is the gradient of the whole."""
    shape = (6, 8, 9)
    misfit = misfits(grid, shape, generator, variance, dtype)[-1][0]
    field = HashGrid((9, 8, 6), 1.5, levels=2, generator=generator).to(dtype)
    with torch.no_grad():
        for table in field.tables:
            table.copy_(torch.randn(table.shape, generator=generator, dtype=dtype))
    parameters = list(field.parameters())
    whole = torch.autograd.grad(misfit(field.volume(shape)).loss, parameters)
    batches = torch.randperm(8, generator=generator).split(2)
    parts = [torch.autograd.grad(misfit(field.volume(shape, rows), rows).loss, parameters) for rows in batches]
    for i, wanted in enumerate(whole):
        mean = sum(part[i] for part in parts) / len(batches)
        assert (mean - wanted).norm() <= close * wanted.norm()


@pytest.mark.parametrize("kind", ["hash", "siren"])
def test_noise_is_not_learned(kind, generator):
    """Of images of nothing but noise: the held-out loss rises while the fitted one still falls, and the fit ends."""
    physics = inv.TiltProjection(ANGLES.float(), (8, 12, 12))
    images = torch.randn(7, 12, 12, generator=generator)
    box = (12.0, 12.0, 8.0)
    field = Siren(box, generator=generator) if kind == "siren" else HashGrid(box, 1.0, generator=generator)
    found = implicit(physics, images, 1.0, field=field, steps=300, patience=25, generator=generator)
    assert len(found.losses) == found.epoch + 26 < 300
    assert found.losses[-1] < found.losses[found.epoch] - 0.1
    assert found.held_out_losses[-1] > found.held_out_losses[found.epoch] + 0.1
    assert found.held_out_losses[found.epoch] == found.held_out_losses.min()
    explained = physics.A(found.volume[None, None]).square().mean()
    assert explained < 0.1  # of the noise


@pytest.mark.parametrize("grid", ["camera", "stretched"])
def test_images_of_a_fit_are_closer_to_those_of_the_truth_than_the_measured_ones(grid, generator):
    """At noise of the images' own variance: 6 % of it is left; on the camera grid the volume beats WBP, too."""
    truth = blobs((12, 16, 20)).float()
    physics = inv.TiltProjection(torch.linspace(-60, 60, 15), truth.shape, grid=grid)
    images, noise = noisy(physics, truth, 1.0, generator)
    found = implicit(physics, images, noise, finest=4.0, steps=80, rows=8, generator=generator)
    assert physics.A((found.volume - truth)[None, None]).square().mean() < 0.08 * noise
    if grid == "camera":  # the other one's period leaves much unseen in so small a box
        others = [inv.wbp(physics, images, low_pass=period) for period in (4.0, 5.0, 6.0, 8.0, 10.0, 13.0)]
        assert (found.volume - truth).norm() < min((v - truth).norm() for v in others)


@pytest.mark.parametrize("field", ["hash", "siren"])
def test_one_seed_one_volume(field, generator):
    physics = inv.TiltProjection(ANGLES.float(), (5, 8, 9))
    images = torch.randn(7, 8, 9, generator=generator)

    def fit(seed):
        seeded = torch.Generator().manual_seed(seed)
        return implicit(physics, images, 1.0, field=field, steps=6, rows=4, generator=seeded).volume

    assert torch.equal(fit(1), fit(1)) and not torch.equal(fit(1), fit(2))


class Blob(nn.Module):
    """One Gaussian of three unknowns: its place."""

    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(3))

    def forward(self, positions):
        return torch.exp(-(positions - self.centre).square().sum(1) / 8)


@pytest.mark.parametrize("bent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_any_module_and_any_operator(bent, generator):
    """A blob is put where it is, through the lens and in a bent specimen, the whole volume a step."""
    shape, centre = (8, 10, 12), torch.tensor([1.5, -1.0, 0.5])
    truth = Blob()
    truth.centre.data.copy_(centre)
    with torch.no_grad():
        volume = rendered(truth, [torch.arange(n, dtype=torch.float32) - n // 2 for n in shape])
    angles, optics = torch.linspace(-40, 40, 3), cs.Optics(300.0, 10000.0)
    physics = inv.ContrastProjection(angles, shape, 8.0, optics)
    if bent:
        bend = 16 * torch.randn(3, 3, 2, 2, 2, generator=generator)  # [Å], two voxels
        physics = inv.DeformedProjection(angles, shape, 8.0, optics, deformation=bend)
    images, noise = noisy(physics, volume, 0.01, generator)
    for metric in ("likelihood", "covariance"):
        how = {"field": Blob(), "steps": 50, "rate": 0.15, "held_out": 0, "metric": metric}
        found = implicit(physics, images, noise, generator=generator, **how)
        assert (found.field.centre.detach() - centre).abs().max() < 0.1  # [voxel]
        assert len(found.losses) == 50 and found.losses[-1] < 0.05 * found.losses[0]
        assert found.held_out_losses.isnan().all()


def test_deep_image_prior(generator):
    """A decoder in three dimensions learns blobs, leaves the global source of randomness alone, and has its seed."""
    truth = blobs((12, 16, 20)).float()
    physics = inv.TiltProjection(torch.linspace(-60, 60, 15), truth.shape)
    images, noise = noisy(physics, truth, 0.3, generator)

    def fit(steps):
        seeded = torch.Generator().manual_seed(3)
        return deep_image_prior(physics, images, noise, channels=8, steps=steps, generator=seeded)

    state = torch.get_rng_state()
    found = fit(25)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fit(2).volume, fit(2).volume)
    assert found.volume.shape == truth.shape
    assert found.held_out_losses.min() < 0.6 * found.held_out_losses[0]
    with torch.no_grad():
        assert torch.equal(found.field(), found.volume)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": 0.0}, "noise: expected a positive variance"),
        ({"noise": torch.ones(3)}, "noise: expected a positive variance, or one for each of 7 tilts"),
        ({"held_out": 1.0}, "held_out: expected a share"),
        ({"field": "mlp"}, "field: expected 'hash', 'siren' or a module"),
        ({"metric": "L2"}, "metric: expected 'covariance' or 'likelihood'"),
        ({"steps": 0}, "steps, patience: expected 1 or more"),
        ({"rate": -1.0}, "rate: expected a positive number"),
        ({"rows": 0}, "rows: expected 1 or more"),
        ({"finest": 0.0}, "finest: expected a positive number"),
        ({"images": torch.zeros(1, 1, 7, 6, 6)}, "images: expected one stack"),
        ({"images": torch.zeros(6, 6, 6)}, "expected images"),
    ],
)
def test_what_is_refused(change, message, generator):
    given = {"images": torch.ones(7, 6, 6), "noise": 1.0} | change
    with pytest.raises(ValueError, match=message):
        implicit(
            inv.TiltProjection(ANGLES, (5, 6, 6)), given.pop("images"), given.pop("noise"), generator=generator, **given
        )


def test_fields_that_are_refused(generator):
    for make, message in (
        (lambda: HashGrid((1, 2), 1.0, generator=generator), "extent"),
        (lambda: HashGrid(EXTENT, 0.0, generator=generator), "spacings"),
        (lambda: HashGrid(EXTENT, 1.0, table=100, generator=generator), "power of two"),
        (lambda: HashGrid(EXTENT, 1.0, interpolation="cubic", generator=generator), "interpolation"),
        (lambda: Siren(EXTENT, omega=-1.0, generator=generator), "frequencies"),
        (lambda: field_of("dense", generator)(torch.zeros(4, 2)), "positions"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
