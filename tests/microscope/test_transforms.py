"""Transforms of torch.func on the forward model: vmap is a loop, jvp a difference, grad autograd; so they compose."""

import dataclasses
import functools
import math

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from cryosim.core.fourier import squared_frequencies
from cryosim.microscope.detector import Detector
from cryosim.microscope.exposure import expected_counts
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import ewald, multislice, projection, rytov
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.potential import Slices, potential_slices

SHAPE = (15, 14)
LADDER = [projection, ewald, rytov, multislice]


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def smooth(*batch, seed=0, strength=40.0):
    """Random slices (..., slice, y, x) inside the band, hardly anywhere negative [V·Å]."""
    noise = torch.randn(*batch, 4, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k2 = squared_frequencies(SHAPE, dtype=torch.float64)
    field = torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-80 * k2)).real
    return strength * (3 + field / field.std())


BASE = {
    "values": smooth(),
    "pixel_size": number(2.0),
    "thickness": number(5.0),
    "voltage": number(200.0),
    "defocus": number(300.0),
    "astigmatism": number(90.0),
    "beam_tilt": number([2.0, -3.0]),
    "amplitude_contrast": number(0.1),
    "dose": number(20.0),
    "pixel": number(2.6),
}
OTHERS = {  # three values of each
    "values": smooth(3, seed=1),
    "pixel_size": number([1.9, 2.0, 2.2]),
    "thickness": number([2.0, 5.0, 9.0]),
    "voltage": number([150.0, 200.0, 300.0]),
    "defocus": number([-200.0, 0.0, 500.0]),
    "astigmatism": number([-100.0, 0.0, 50.0]),
    "beam_tilt": number([[0.0, 0.0], [1.0, 3.0], [-2.0, 2.0]]),
    "amplitude_contrast": number([0.0, 0.07, 0.5]),
    "dose": number([0.0, 1.0, 50.0]),
    "pixel": number([2.2, 2.6, 3.0]),
}
STEPS = {
    "amplitude_contrast": 1e-5,
    "pixel_size": 1e-5,
    "pixel": 1e-5,
    "beam_tilt": 1e-4,
    "voltage": 1e-2,
    "defocus": 0.01,
}
NAMES = list(BASE)
PAIRS = [(f, name) for f in LADDER for name in NAMES if not (f is projection and name == "thickness")]  # it has none


def counts(scattering=multislice, **given):
    """Expected counts (..., y, x) from whatever is given, the rest as in BASE."""
    p = BASE | given
    optics = Optics(
        voltage=p["voltage"],
        defocus=p["defocus"],
        astigmatism=p["astigmatism"],
        astigmatism_angle=20.0,
        spherical_aberration=2.7,
        beam_tilt=p["beam_tilt"],
        amplitude_contrast=p["amplitude_contrast"],
    )
    detector = Detector((8, 9), p["pixel"])
    slices = Slices(p["values"], p["pixel_size"], p["thickness"])
    return expected_counts(slices, optics, detector, dose=p["dose"], scattering=scattering)


WEIGHTS = torch.randn(8, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def score(scattering=multislice, **given):
    """One number of all counts."""
    return (counts(scattering, **given) * WEIGHTS).sum(dim=(-2, -1))


def direction_of(name, seed=3):
    return torch.randn(BASE[name].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def difference(function, at, along, step):
    """Central difference of fourth order."""
    ends = [function(at + m * step * along) for m in (1, -1, 2, -2)]
    return (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * step)


def close(found, wanted, tolerance):
    assert found.shape == wanted.shape
    assert wanted.norm() > 0
    error = float((found - wanted).norm() / wanted.norm())
    assert error < tolerance, f"{error:.1e}"


# one parameter of the counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scattering", LADDER)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name, scattering):
    several = OTHERS[name]
    found = vmap(lambda value: counts(scattering, **{name: value}))(several)
    wanted = torch.stack([counts(scattering, **{name: value}) for value in several])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scattering", "name"), PAIRS)
def test_jvp_is_a_difference(name, scattering):
    along, function = direction_of(name), lambda value: counts(scattering, **{name: value})
    value, slope = jvp(function, (BASE[name],), (along,))
    torch.testing.assert_close(value, function(BASE[name]))
    close(slope, difference(function, BASE[name], along, STEPS.get(name, 1e-3)), 1e-7)


@pytest.mark.parametrize(("scattering", "name"), PAIRS)
def test_grad_is_autograd(name, scattering):
    """Of torch.func, which keeps the graph, and plain, which for multislice does not."""
    leaf = BASE[name].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(score(scattering, **{name: leaf}), leaf)
    close(grad(lambda value: score(scattering, **{name: value}))(BASE[name]), wanted, 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_grad(name):
    def slope(value):
        return grad(lambda v: score(**{name: v}))(value)

    wanted = []
    for value in OTHERS[name]:
        leaf = value.clone().requires_grad_()
        wanted.append(torch.autograd.grad(score(**{name: leaf}), leaf)[0])
    close(vmap(slope)(OTHERS[name]), torch.stack(wanted), 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_jvp_of_vmap(name):
    along = torch.stack([direction_of(name, seed) for seed in range(3)])
    _, found = jvp(vmap(lambda value: counts(**{name: value})), (OTHERS[name],), (along,))
    wanted = [
        jvp(lambda v: counts(**{name: v}), (value,), (d,))[1] for value, d in zip(OTHERS[name], along, strict=True)
    ]
    close(found, torch.stack(wanted), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_jvp(name):
    """Many directions at one point."""
    along = torch.stack([direction_of(name, seed) for seed in range(3)])
    found = vmap(lambda d: jvp(lambda v: counts(**{name: v}), (BASE[name],), (d,))[1])(along)
    wanted = [jvp(lambda v: counts(**{name: v}), (BASE[name],), (d,))[1] for d in along]
    close(found, torch.stack(wanted), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_forward_over_reverse_is_a_second_derivative(name):
    along = direction_of(name)

    def slope(value):
        return grad(lambda v: score(**{name: v}))(value)

    _, found = jvp(slope, (BASE[name],), (along,))
    if name == "dose":  # counts are linear in it
        assert abs(found) < 1e-12
        return

    def plain(value):
        leaf = value.clone().requires_grad_()
        return torch.autograd.grad(score(**{name: leaf}), leaf)[0]

    close(found, difference(plain, BASE[name], along, STEPS.get(name, 1e-3)), 1e-5)


def test_the_fisher_matrix_of_the_lens():
    """sum of (d counts / d a) (d counts / d b) / counts by forward and by reverse mode: symmetric and positive."""
    names = ("voltage", "defocus", "astigmatism", "dose", "pixel")
    at = torch.stack([BASE[name] for name in names])

    def model(p):
        return counts(**dict(zip(names, p.unbind(), strict=True)))

    forward, reverse = jacfwd(model)(at), jacrev(model)(at)
    close(forward, reverse, 1e-9)
    fisher = torch.einsum("yxa,yxb->ab", forward / model(at)[..., None], forward)
    assert torch.linalg.eigvalsh(fisher / torch.outer(fisher.diagonal().sqrt(), fisher.diagonal().sqrt())).min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_mode_without_torch_func(dtype):
    """Dual tensors of torch.autograd carry the slope too."""
    values, along = BASE["values"].to(dtype), direction_of("values").to(dtype)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(values, along)
        slope = torch.autograd.forward_ad.unpack_dual(counts(values=dual)).tangent
    _, wanted = jvp(lambda v: counts(values=v), (values,), (along,))
    close(slope, wanted, 1e-5 if dtype == torch.float32 else 1e-12)


# many at once, and records -----------------------------------------------------------------------------------------


def test_grad_of_many_parameters_at_once():
    def total(p):
        return score(**p)

    found = grad(total)(BASE)
    leaves = {name: value.clone().requires_grad_() for name, value in BASE.items()}
    wanted = torch.autograd.grad(score(**leaves), list(leaves.values()))
    for name, slope in zip(leaves, wanted, strict=True):
        close(found[name], slope, 1e-9)


def lens(batch=()):
    """Optics of tensors of float64 throughout."""
    set_ = Optics(
        defocus=400.0,
        astigmatism=100.0,
        astigmatism_angle=15.0,
        spherical_aberration=2.7,
        phase_shift=30.0,
        amplitude_contrast=0.1,
        coma=500.0,
        trefoil=300.0,
        trefoil_angle=10.0,
        chromatic_aberration=2.0,
        energy_spread=0.4,
        convergence=0.05,
        aperture=2.5,
        beam_tilt=(1.0, -2.0),
    )
    fields = {f.name: torch.as_tensor(getattr(set_, f.name), dtype=torch.float64) for f in dataclasses.fields(set_)}
    return Optics(**{name: value.expand([*batch, *value.shape]).clone() for name, value in fields.items()})


def seen_through(optics):
    return expected_counts(Slices(BASE["values"], 2.0, 5.0), optics, Detector((8, 9), 2.6), dose=20.0)


def total_through(optics):
    return (seen_through(optics) * WEIGHTS).sum()


def test_grad_over_a_lens():
    """A record in, a record of slopes out, each that of autograd; none is lost and none is NaN."""
    slopes = grad(total_through)(lens())
    assert isinstance(slopes, Optics)
    names = [f.name for f in dataclasses.fields(Optics)]
    leaves = {name: getattr(lens(), name).clone().requires_grad_() for name in names}
    wanted = torch.autograd.grad(total_through(Optics(**leaves)), list(leaves.values()), allow_unused=True)
    moving = 0
    for name, slope in zip(names, wanted, strict=True):
        found = getattr(slopes, name)
        slope = torch.zeros_like(found) if slope is None else slope
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")
        moving += bool((found != 0).any())
    assert moving > 14


def test_jvp_along_a_lens():
    at = lens()
    along = dataclasses.replace(
        torch.utils._pytree.tree_map(torch.zeros_like, at), defocus=number(1.0), voltage=number(0.02), coma=number(-3.0)
    )
    _, slope = jvp(seen_through, (at,), (along,))

    def moved(step):
        return seen_through(
            at.replace(defocus=at.defocus + step, voltage=at.voltage + 0.02 * step, coma=at.coma - 3.0 * step)
        )

    close(slope, difference(moved, number(0.0), number(1.0), 0.05), 1e-7)


def test_vmap_over_a_lens_for_each_tilt():
    """One lens a tilt by vmap equals the fields' own leading axis."""
    lenses = lens((3,)).replace(defocus=number([100.0, 400.0, 900.0]), voltage=number([100.0, 200.0, 300.0]))
    torch.testing.assert_close(vmap(seen_through)(lenses), seen_through(lenses), rtol=1e-12, atol=1e-12)
    slopes = vmap(grad(total_through))(lenses)
    for i in range(3):
        alone = grad(total_through)(lenses.index(i))
        torch.testing.assert_close(slopes.defocus[i], alone.defocus)
        torch.testing.assert_close(slopes.beam_tilt[i], alone.beam_tilt)


def test_grad_over_slices_and_detector_as_records():
    def total(slices, pixel):
        return (expected_counts(slices, Optics(defocus=300.0), Detector((8, 9), pixel), dose=2.0) * WEIGHTS).sum()

    at = Slices(BASE["values"], BASE["pixel_size"], BASE["thickness"])
    slopes, of_pixel = grad(total, argnums=(0, 1))(at, BASE["pixel"])
    assert isinstance(slopes, Slices)
    leaves = [x.clone().requires_grad_() for x in (at.values, at.pixel_size, at.thickness, BASE["pixel"])]
    wanted = torch.autograd.grad(total(Slices(*leaves[:3]), leaves[3]), leaves)
    found = (slopes.values, slopes.pixel_size, slopes.thickness, of_pixel)
    for one, other in zip(found, wanted, strict=True):
        close(one, other, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vmap_over_specimens_and_lenses_together(dtype):
    """All pairs by two maps equal the broadcast of a batch."""
    values, defoci = OTHERS["values"].to(dtype), number([-300.0, 500.0])
    inner = vmap(lambda v, d: counts(values=v, defocus=d), in_dims=(None, 0))
    found = vmap(inner, in_dims=(0, None))(values, defoci)
    assert found.shape == (3, 2, 8, 9)
    assert found.dtype == dtype
    together = counts(values=values[:, None], defocus=defoci)
    torch.testing.assert_close(found, together, rtol=0, atol=1e-12 if dtype == torch.float64 else 3e-4)


@pytest.mark.parametrize("options", [{"flight": "exact"}, {"limit_transmission": True}, {"incident": True}])
def test_options_of_multislice(options):
    """The slope passes every branch."""
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    options = {"incident": torch.complex(*(0.1 * noise)) + 1} if "incident" in options else options
    scattering = functools.partial(multislice, **options)
    along = direction_of("values")
    _, slope = jvp(lambda v: counts(scattering, values=v), (BASE["values"],), (along,))
    close(slope, difference(lambda v: counts(scattering, values=v), BASE["values"], along, 1e-2), 1e-7)
    several = vmap(lambda v: counts(scattering, values=v))(OTHERS["values"])
    torch.testing.assert_close(several, counts(scattering, values=OTHERS["values"]), rtol=1e-12, atol=1e-12)


# atoms ------------------------------------------------------------------------------------------------------------


def atoms_of(kind):
    generator = torch.Generator().manual_seed(8)
    positions = 3 * torch.randn(7, 3, generator=generator, dtype=torch.float64).clamp(-1.7, 1.7)
    if kind == "one element, one B":
        return Atoms(positions, torch.full((7,), 6), torch.full((7,), 20.0, dtype=torch.float64))
    b_factors = 15 + 20 * torch.rand(7, generator=generator, dtype=torch.float64)
    return Atoms(positions, torch.tensor([6, 7, 8, 16, 1, 15, 6]), b_factors)


KINDS = ["one element, one B", "many"]
FIELDS = ["positions", "b_factors", "occupancies"]


def counts_of(atoms):
    slices = potential_slices(atoms, (21, 20), 0.9, 3.0, 7, width=12)
    return expected_counts(slices, Optics(defocus=300.0, amplitude_contrast=0.1), Detector((8, 9), 1.3), dose=20.0)


def of_field(kind, field):
    return lambda value: counts_of(atoms_of(kind).replace(**{field: value}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", FIELDS)
def test_grad_to_atoms(field, kind):
    function, at = of_field(kind, field), getattr(atoms_of(kind), field)
    found = grad(lambda value: (function(value) * WEIGHTS).sum())(at)
    leaf = at.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((function(leaf) * WEIGHTS).sum(), leaf)
    close(found, wanted, 1e-9)
    along = torch.randn(at.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    slope = difference(lambda value: (function(value) * WEIGHTS).sum(), at, along, 1e-3)
    assert float((found * along).sum()) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", FIELDS)
def test_jvp_along_atoms(field, kind):
    """Forward mode sees the same slope as a difference."""
    function, at = of_field(kind, field), getattr(atoms_of(kind), field)
    along = torch.randn(at.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    _, slope = jvp(function, (at,), (along,))
    close(slope, difference(function, at, along, 1e-3), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", FIELDS)
def test_dual_tensors_of_atoms(field, kind):
    function, at = of_field(kind, field), getattr(atoms_of(kind), field)
    along = torch.randn(at.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        seen = function(torch.autograd.forward_ad.make_dual(at, along))
        slope = torch.autograd.forward_ad.unpack_dual(seen).tangent
    close(slope, difference(function, at, along, 1e-3), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["positions", "b_factors"])
def test_second_derivatives_to_atoms(field, kind):
    """Forward over reverse against a difference of slopes."""
    function, at = of_field(kind, field), getattr(atoms_of(kind), field)
    along = torch.randn(at.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def plain(value):
        leaf = value.clone().requires_grad_()
        return torch.autograd.grad((function(leaf) * WEIGHTS).sum(), leaf)[0]

    _, found = jvp(grad(lambda value: (function(value) * WEIGHTS).sum()), (at,), (along,))
    close(found, difference(plain, at, along, 1e-3), 1e-4)


def test_grad_over_atoms_as_a_record():
    """Whole numbers have no slope: the record is put together around those that have."""
    atoms = atoms_of("many")

    def total(p):
        return (counts_of(atoms.replace(**p)) * WEIGHTS).sum()

    at = {field: getattr(atoms, field) for field in FIELDS}
    found = grad(total)(at)
    for field in FIELDS:
        leaf = at[field].clone().requires_grad_()
        close(found[field], torch.autograd.grad(total(at | {field: leaf}), leaf)[0], 1e-9)


def test_jacobians_of_positions_agree():
    """Forward and reverse mode, of the defocus-like height of one atom among others."""
    atoms = atoms_of("many")

    def model(height):
        lift = torch.zeros(7, 3, dtype=torch.float64).index_put((torch.tensor(3), torch.tensor(2)), height)
        return counts_of(atoms.replace(positions=atoms.positions + lift))

    close(jacfwd(model)(number(0.3)), jacrev(model)(number(0.3)), 1e-9)
    assert math.isfinite(float(model(number(0.3)).sum()))
