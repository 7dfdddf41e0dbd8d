"""The gradient of multislice in constant memory: equal to plain autograd on either path, at a flat cost in memory."""

import functools
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cryosim as cs
from cryosim.core.fourier import squared_frequencies
from cryosim.core.record import Record, item, static
from cryosim.microscope import backward
from cryosim.microscope.detector import Detector
from cryosim.microscope.exposure import expected_counts
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.potential import Slices, potential_slices
from cryosim.specimen.specimen import Ice, Poses, Specimen
from cryosim.specimen.tilted import tilted_slices

DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
REVERSED, REPLAYED = ["_Reversed"], ["_Replayed"]


@pytest.fixture
def paths(monkeypatch):
    """Names of the paths that backward passes take, in their order."""
    taken = []

    def spy(name):
        original = getattr(backward, name)

        class Spy(original):
            def __init__(self, *arguments):
                taken.append(name)
                super().__init__(*arguments)

        monkeypatch.setattr(backward, name, Spy)

    for name in (*REVERSED, *REPLAYED):
        spy(name)
    return taken


def smooth(shape, generator, strength=20.0, dtype=torch.float64):
    """Random slices (..., y, x) with nothing, to 1e-9, beyond two thirds of Nyquist [V·Å]."""
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    k2 = squared_frequencies(tuple(shape[-2:]), dtype=torch.float64)
    field = torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-200 * k2)).real
    return (strength * field / field.std()).to(dtype)


def rough(shape, generator, strength=150.0, dtype=torch.float64):
    """White noise: a slice that scatters far beyond the band."""
    return (strength * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def score(wave, seed=1):
    """A number to be differentiated, in which phase and size of the wave count everywhere."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(wave.shape, generator=generator, dtype=torch.complex128)
    k2 = squared_frequencies(tuple(wave.shape[-2:]), dtype=torch.float64)
    weights = torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-30 * k2)).to(wave)
    intensity = wave.real**2 + wave.imag**2
    return (wave * weights).real.mean() + (intensity**2 * weights.real).mean()


def gradients(wave_of, inputs, memory):
    """By name, the gradients of `score(wave_of(inputs, memory))`."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    found = torch.autograd.grad(score(wave_of(leaves, memory)), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def assert_equal_to_autograd(wave_of, inputs, tolerance):
    constant, graph = (gradients(wave_of, inputs, memory) for memory in ("constant", "graph"))
    assert_equal(constant, graph, tolerance)


def assert_equal(constant, graph, tolerance):
    """The slope of a single number sums terms of either sign: in single precision autograd itself errs more there."""
    for name, wanted in graph.items():
        assert wanted.norm() > 0, name
        assert constant[name].dtype == wanted.dtype
        error = float((constant[name] - wanted).norm() / wanted.norm())
        assert error < (10 * tolerance if wanted.numel() < 10 else tolerance), f"{name}: {error:.1e}"


def through_everything(leaves, memory):
    """The wave from whichever of all inputs are given."""
    given = {"pixel_size": 1.0, "thickness": 6.0, "plane": 0.0, "incident": None} | leaves
    optics = Optics(**{name: leaves[name] for name in ("voltage", "amplitude_contrast", "beam_tilt") if name in leaves})
    slices = Slices(given["values"], given["pixel_size"], given["thickness"])
    return multislice(slices, optics, plane=given["plane"], incident=given["incident"], memory=memory)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def inputs_of(values, generator):
    noise = smooth((2, *values.shape[-2:]), generator, strength=0.3).to(values.real.dtype)
    return {
        "values": values,
        "pixel_size": number(1.0),
        "thickness": number(6.0),
        "voltage": number(200.0),
        "amplitude_contrast": number(0.07),
        "beam_tilt": number([3.0, -2.0]),
        "incident": torch.complex(1 + noise[0], noise[1]),
        "plane": number(17.0),
    }


FLIGHTS = {"pixel_size", "thickness", "voltage", "beam_tilt", "plane"}
"""What the flights depend on: their gradients are sums in which much cancels, made from checkpoints."""


def without_flights(every):
    return {name: value for name, value in every.items() if name not in FLIGHTS}


# equal to plain autograd ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_slices", [1, 2, 5, 37])
@pytest.mark.parametrize("absorbing", [False, True])
def test_smooth_slices(absorbing, n_slices, dtype, paths, generator):
    """All inputs at once; in single precision by the steps in reverse where the flights need no gradient."""
    values = smooth((n_slices, 15, 14), generator, dtype=dtype)
    if absorbing:
        values = torch.complex(values, 0.2 * smooth((n_slices, 15, 14), generator, dtype=dtype).abs())
    every = inputs_of(values, generator)
    assert_equal_to_autograd(through_everything, every, TOLERANCE[dtype])
    assert paths == REPLAYED
    assert_equal_to_autograd(through_everything, without_flights(every), TOLERANCE[dtype])
    assert paths == REPLAYED + (REPLAYED if dtype == torch.float64 else REVERSED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_slices", [1, 2, 5, 37])
def test_rough_slices(n_slices, dtype, paths, generator):
    """What the band limit cuts off cannot be rebuilt: checkpoints."""
    values = rough((n_slices, 15, 14), generator, dtype=dtype)
    assert_equal_to_autograd(through_everything, inputs_of(values, generator), TOLERANCE[dtype])
    assert paths == REPLAYED


NAMES = ["values", "pixel_size", "thickness", "voltage", "amplitude_contrast", "beam_tilt", "incident", "plane"]


@pytest.mark.parametrize("make", [smooth, rough])
@pytest.mark.parametrize("name", NAMES)
def test_one_input_alone(name, make, paths, generator):
    """The others need no gradient, and none is made."""
    every = inputs_of(make((5, 11, 12), generator, dtype=torch.float32), generator)

    def wave_of(leaves, memory):
        return through_everything(every | leaves, memory)

    assert_equal_to_autograd(wave_of, {name: every[name]}, 1e-4)
    assert paths == (REVERSED if make is smooth and name not in FLIGHTS else REPLAYED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [smooth, rough])
@pytest.mark.parametrize("batch", [(), (3,), (2, 1), (2, 3)])
def test_batches_and_optics_of_each_tilt(batch, make, dtype, paths, generator):
    """Specimens (2,) by tilts (3,): what is shared gathers the gradients of all that share it."""
    tilts = {
        "voltage": number([100.0, 200.0, 300.0]),
        "amplitude_contrast": number([0.0, 0.05, 0.2]),
        "beam_tilt": number([[0.0, 0.0], [2.0, 1.0], [-3.0, 5.0]]),
    }
    every = inputs_of(make((*batch, 5, 11, 12), generator, dtype=dtype), generator)
    assert_equal_to_autograd(through_everything, every | tilts, TOLERANCE[dtype])
    assert_equal_to_autograd(through_everything, without_flights(every | tilts), TOLERANCE[dtype])
    assert paths == REPLAYED + (REVERSED if make is smooth and dtype == torch.float32 else REPLAYED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_incident_wave_for_each_specimen(dtype, generator):
    every = inputs_of(smooth((2, 5, 11, 12), generator, dtype=dtype), generator)
    incident = every["incident"] * torch.tensor([1.0, 0.5j]).to(every["incident"])[:, None, None]
    assert_equal_to_autograd(through_everything, every | {"incident": incident}, TOLERANCE[dtype])
    shared = every | {"values": every["values"][0], "incident": incident}
    assert_equal_to_autograd(through_everything, shared, TOLERANCE[dtype])


@pytest.mark.parametrize("options", [{"flight": "exact"}, {"limit_transmission": True}, {"band_limit": "soft"}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(options, dtype, paths, generator):
    """A band limit that is given may be soft, and cannot be undone: checkpoints, or none of this."""
    k2 = squared_frequencies((11, 12), dtype=dtype)
    options = {"band_limit": torch.exp(-3 * k2)} if "band_limit" in options else options

    def wave_of(leaves, memory):
        slices = Slices(leaves["values"], leaves["pixel_size"], leaves["thickness"])
        return multislice(slices, Optics(voltage=leaves["voltage"]), memory=memory, **options)

    every = inputs_of(smooth((7, 11, 12), generator, dtype=dtype), generator)
    inputs = {name: every[name] for name in ("values", "pixel_size", "thickness", "voltage")}
    assert_equal_to_autograd(wave_of, inputs, TOLERANCE[dtype])
    assert paths == ([] if "limit_transmission" in options else REPLAYED)
    paths.clear()
    assert_equal_to_autograd(lambda leaves, memory: wave_of(every | leaves, memory), {"values": every["values"]}, 1e-4)
    if "flight" in options and dtype == torch.float32:
        assert paths == REVERSED
    else:
        assert paths == ([] if "limit_transmission" in options else REPLAYED)


# the reversed path guards itself --------------------------------------------------------------------------------


def test_one_rough_slice_where_nobody_looked(paths, generator):
    """The trial sees smooth slices; that the rebuilt incident wave is wrong is seen at the end."""
    values = smooth((12, 15, 14), generator, dtype=torch.float32)
    values[5] = rough((15, 14), generator, dtype=torch.float32)
    assert_equal_to_autograd(through_everything, {"values": values}, 1e-4)
    assert paths == REVERSED + REPLAYED


@pytest.mark.parametrize("by", ["imaginary potential", "amplitude contrast"])
def test_strong_absorbers(by, paths):
    """Where next to nothing of the wave passes, what is rebuilt from it is rounding."""
    y, x = torch.arange(48)[:, None] - 24.0, torch.arange(45) - 22.0
    values = (300 * torch.exp(-(x**2 + y**2) / 100)).expand(100, 48, 45)  # exp(-20) in the middle
    if by == "imaginary potential":
        inputs = {"values": torch.complex(0 * values, values)}
    else:
        inputs = {"values": values, "amplitude_contrast": number(0.999)}
    assert_equal_to_autograd(through_everything, inputs, 1e-4)
    assert paths == REVERSED + REPLAYED


def test_a_reversed_pass_that_is_wrong_changes_nothing(paths, monkeypatch, generator):
    """Whatever it had gathered is thrown away."""
    original = backward._Reversed.before

    def wrong(self, *arguments):
        wave, gradient = original(self, *arguments)
        return wave * 1.001, gradient

    monkeypatch.setattr(backward._Reversed, "before", wrong)
    every = inputs_of(smooth((6, 15, 14), generator, dtype=torch.float32), generator)
    assert_equal_to_autograd(through_everything, without_flights(every), 1e-4)
    assert paths == REVERSED + REPLAYED


# atoms ------------------------------------------------------------------------------------------------------------


def molecule(generator, n=30, number=None, b_factor=30.0):
    positions = 6 * (2 * torch.rand(n, 3, generator=generator, dtype=torch.float64) - 1)
    light = torch.tensor([6, 7, 8, 16])[torch.randint(4, (n,), generator=generator)]
    numbers = light if number is None else torch.full((n,), number)
    return Atoms(positions, numbers, b_factor + 10 * torch.rand(n, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["light", "heavy"])
def test_atoms(kind, dtype, paths, generator):
    """From the atoms, whose slices are built anew in the backward pass."""
    atoms = molecule(generator) if kind == "light" else molecule(generator, number=79, b_factor=2.0)

    def wave_of(leaves, memory):
        mine = Atoms(leaves["positions"], atoms.numbers, leaves["b_factors"], leaves["occupancies"])
        pixel_size, thickness = leaves.get("pixel_size", 0.7), leaves.get("thickness", 2.0)
        slices = potential_slices(mine, (27, 26), pixel_size, thickness, 7, dtype=dtype)
        optics = Optics(voltage=leaves.get("voltage", 300.0), amplitude_contrast=0.05)
        return multislice(slices, optics, memory=memory)

    inputs = {
        "positions": atoms.positions,
        "b_factors": atoms.b_factors,
        "occupancies": atoms.occupancies,
    }
    if dtype == torch.float64:  # of the thickness next to no slope: shares and flight cancel
        inputs |= {"pixel_size": number(0.7), "voltage": number(300.0), "thickness": number(2.0)}
    assert_equal_to_autograd(wave_of, inputs, TOLERANCE[dtype])
    assert paths == (REVERSED if kind == "light" and dtype == torch.float32 else REPLAYED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tilted_specimen_in_ice(dtype, paths, generator):
    inner = molecule(generator, 12)
    turns = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)

    def wave_of(leaves, memory):
        poses = Poses(turns, leaves["places"])
        ice = Ice(leaves["ice thickness"], leaves["ice potential"])
        specimen = Specimen((inner.replace(positions=leaves["positions"]),), (poses,), (30.0, 30.0, 30.0), ice)
        slices = tilted_slices(specimen, leaves["angle"], (25, 28), 0.8, 2.5, shift=leaves["shift"], dtype=dtype)
        return multislice(slices, Optics(amplitude_contrast=0.1), memory=memory)

    inputs = {
        "positions": inner.positions,
        "places": number([[-3.0, 2.0, 4.0], [2.0, -3.0, -5.0]]),
        "ice thickness": number(300.0),
        "ice potential": number(3.5),
        "angle": number(25.0),
        "shift": number([0.3, -0.4]),
    }
    assert_equal_to_autograd(wave_of, inputs, TOLERANCE[dtype])
    assert paths == (REPLAYED if dtype == torch.float64 else REVERSED)


# against differences ----------------------------------------------------------------------------------------------


STEPS = {"pixel_size": 1e-5, "amplitude_contrast": 1e-5, "incident": 1e-4}


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences(name, generator):
    """Of the constant-memory gradient itself, with no autograd to compare with."""
    every = inputs_of(smooth((5, 11, 12), generator, strength=40.0), generator)
    gradient = gradients(through_everything, every, "constant")[name]
    direction = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
    step = STEPS.get(name, 1e-3)
    ends = [
        score(through_everything(every | {name: every[name] + s * step * direction}, "constant")) for s in (1.0, -1.0)
    ]
    slope = (gradient.conj() * direction).real.sum()
    assert float(slope) == pytest.approx(float((ends[0] - ends[1]) / (2 * step)), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_counts(dtype, paths, generator):
    """From the slices and the microscope through lens and detector to the counts."""
    detector = Detector((9, 8), 1.3)

    def counts(leaves, memory):
        optics = Optics(
            voltage=leaves.get("voltage", 200.0),
            defocus=leaves["defocus"],
            beam_tilt=leaves.get("beam_tilt", (3.0, -2.0)),
            amplitude_contrast=leaves["amplitude_contrast"],
        )
        slices = Slices(leaves["values"], 1.0, 6.0)
        scattering = functools.partial(multislice, memory=memory)
        return expected_counts(slices, optics, detector, dose=leaves["dose"], scattering=scattering)

    every = inputs_of(smooth((2, 6, 15, 14), generator, dtype=dtype), generator)
    names = ("values", "amplitude_contrast", *(("voltage", "beam_tilt") if dtype == torch.float64 else ()))
    inputs = {name: every[name] for name in names} | {"defocus": number(40.0), "dose": number([20.0, 30.0])}
    found = []
    for memory in ("constant", "graph"):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        slopes = torch.autograd.grad(counts(leaves, memory).square().sum(), list(leaves.values()))
        found.append(dict(zip(leaves, slopes, strict=True)))
    assert_equal(*found, TOLERANCE[dtype])
    assert paths == (REPLAYED if dtype == torch.float64 else REVERSED)


# as any other function of torch ---------------------------------------------------------------------------------


class Fading:
    """A source that is no record: a blob, fainter with depth; its slices hang on a tensor it does not show."""

    pixel_size, thickness = 1.0, 6.0

    def __init__(self, blob, decay):
        self._blob, self._decay = blob, decay

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return self._blob * torch.exp(-self._decay * i)


def test_a_source_that_is_no_record(paths, generator):
    """It is differentiated all the same, slice by slice by autograd."""
    blob, decay = smooth((11, 12), generator, strength=30.0), number(0.2).requires_grad_()
    stacked = Slices(torch.stack([blob * torch.exp(-decay * i) for i in range(5)]), 1.0, 6.0)
    found, wanted = (
        torch.autograd.grad(score(multislice(s, Optics())), decay)[0] for s in (Fading(blob, decay), stacked)
    )
    assert paths == REPLAYED  # of the second alone
    torch.testing.assert_close(found, wanted)
    step = 1e-4
    with torch.no_grad():
        ends = [score(multislice(Fading(blob, decay + s * step), Optics())) for s in (1, -1)]
    assert float(found) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-6)


class FadingRecord(Record):
    """The same as a record: lazily built slices of a blob (y, x)."""

    blob: torch.Tensor = item(2)
    decay: torch.Tensor = item(0)
    pixel_size: float = item(0, default=1.0)
    thickness: float = item(0, default=6.0)
    n: int = static(5)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.blob * torch.exp(-self.decay * i)


class ScaledSlices(Record):
    """A record that holds `values` but whose slices are others."""

    values: torch.Tensor = item(3)
    pixel_size: float = item(0, default=1.0)
    thickness: float = item(0, default=6.0)

    def __len__(self):
        return self.values.shape[-3] - 1

    def __getitem__(self, i):
        return self.values[..., i, :, :] * self.values[..., i + 1, :, :]


@pytest.mark.parametrize("make", [smooth, rough])
def test_any_record_is_a_source(make, paths, generator):
    blob = make((11, 12), generator, dtype=torch.float32)

    def wave_of(leaves, memory):
        return multislice(FadingRecord(leaves["blob"], leaves["decay"]), Optics(), memory=memory)

    assert_equal_to_autograd(wave_of, {"blob": blob, "decay": torch.tensor(0.2)}, 1e-4)
    assert paths == (REVERSED if make is smooth else REPLAYED)


def test_a_record_whose_slices_are_not_its_values(generator):
    def wave_of(leaves, memory):
        return multislice(ScaledSlices(leaves["values"]), Optics(), memory=memory)

    assert_equal_to_autograd(wave_of, {"values": smooth((6, 11, 12), generator, strength=3.0)}, 1e-9)


def test_backward_may_be_called_again(generator):
    """Gradients add up in the leaves and are the same each time."""
    every = {
        name: value.requires_grad_() for name, value in inputs_of(smooth((5, 11, 12), generator), generator).items()
    }
    total = score(through_everything(every, "constant"))
    total.backward(retain_graph=True)
    once = [value.grad.clone() for value in every.values()]
    total.backward(retain_graph=True)
    total.backward()
    for value, first in zip(every.values(), once, strict=True):
        torch.testing.assert_close(value.grad, 3 * first, rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_second_derivatives(generator):
    """Right in constant memory too, which the second derivative then takes up."""
    values = smooth((3, 9, 8), generator, strength=200.0).requires_grad_()
    direction = smooth((3, 9, 8), generator)

    def slope(memory, at):
        wave = multislice(Slices(at, 1.0, 6.0), Optics(), memory=memory)
        return torch.autograd.grad(score(wave), at, create_graph=True)[0]

    step = 1e-3
    ends = [slope("constant", values + s * step * direction) for s in (1, -1)]
    difference = (ends[0] - ends[1]).detach() / (2 * step)
    for memory in ("constant", "graph"):
        (curvature,) = torch.autograd.grad((slope(memory, values) * direction).sum(), values)
        assert (curvature - difference).norm() < 1e-6 * curvature.norm()


@pytest.mark.parametrize("memory", ["constant", "graph"])
def test_no_second_derivative_is_lost(memory, generator):
    """A penalty on the slope counts."""
    values = smooth((3, 9, 8), generator, strength=200.0).requires_grad_()
    total = score(multislice(Slices(values, 1.0, 6.0), Optics(), memory=memory))
    (slope,) = torch.autograd.grad(total, values, create_graph=True)
    square = slope.square().sum()
    fit = total + (total / square).detach() * square
    (alone,) = torch.autograd.grad(total, values, retain_graph=True)
    (both,) = torch.autograd.grad(fit, values)
    assert (both - alone).norm() > 0.1 * alone.norm()


def test_values_changed_in_between_are_noticed(generator):
    leaf = smooth((3, 9, 8), generator).requires_grad_()
    values = 1.0 * leaf
    wave = multislice(Slices(values, 1.0, 6.0), Optics())
    with torch.no_grad():
        values.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        score(wave).backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_wave_is_the_same_with_and_without_gradients(dtype, generator):
    values = smooth((5, 11, 12), generator, dtype=dtype)
    wanted = multislice(Slices(values, 1.0, 6.0), Optics())
    assert not wanted.requires_grad
    for memory in ("constant", "graph"):
        wave = multislice(Slices(values.clone().requires_grad_(), 1.0, 6.0), Optics(), memory=memory)
        assert wave.requires_grad
        torch.testing.assert_close(wave.detach(), wanted, rtol=0, atol=0)
    with torch.no_grad():
        assert not multislice(Slices(values.requires_grad_(), 1.0, 6.0), Optics()).requires_grad


# memory -----------------------------------------------------------------------------------------------------------


def lazy(n_slices, make, generator, shape=(31, 32)):
    blob = make(shape, generator, dtype=torch.float32)
    blob = (blob / (10 if make is smooth else 1)).requires_grad_()  # faint, as there are many of them
    return FadingRecord(blob, torch.tensor(0.01), thickness=1.0, n=n_slices)


def saved_waves(n_slices, memory, generator):
    """What is kept from the forward to the backward pass, in waves."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        wave = multislice(lazy(n_slices, smooth, generator), Optics(), memory=memory)
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / (wave.numel() * wave.element_size())


def test_few_waves_are_kept_for_the_backward_pass(generator):
    """The exit wave, two flights and the blob, however many slices there are; with the graph, some for every slice."""
    few, many = (saved_waves(n, "constant", generator) for n in (50, 400))
    assert few == many < 5
    assert saved_waves(50, "graph", generator) > 50


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget():
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, forget)


def peak_waves(n_slices, make, memory, generator):
    """The most that forward and backward pass hold at one time, in waves."""
    slices = lazy(n_slices, make, generator)
    with LiveMemory() as live:
        wave = multislice(slices, Optics(), memory=memory)
        torch.autograd.grad(wave.real.sum(), slices.blob)
    return live.peak / (wave.numel() * wave.element_size())


def test_peak_memory_in_reverse_is_flat(paths, generator):
    few, many = (peak_waves(n, smooth, "constant", generator) for n in (50, 400))
    assert paths == 2 * REVERSED
    assert many <= few + 0.01
    assert many < 25
    assert peak_waves(50, smooth, "graph", generator) > 100


def test_peak_memory_with_checkpoints_grows_with_the_square_root(paths, generator):
    """2 sqrt(n) waves: 14 for 49 slices and 40 for 400."""
    few, many = (peak_waves(n, rough, "constant", generator) for n in (49, 400))
    assert paths == 2 * REPLAYED
    assert many - few == pytest.approx(2 * (20 - 7), abs=2)


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from cryosim.core.record import Record, item, static
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice

class Blob(Record):
    blob: torch.Tensor = item(2)
    pixel_size: float = item(0, default=1.0)
    thickness: float = item(0, default=5.0)
    n: int = static(1)
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        return self.blob * (1 + 0.1 * (i % 7))

x = torch.arange(512) - 256
blob = 20 * torch.exp(-(x[:, None] ** 2 + x ** 2) / 800.0)
for n in (2, int(sys.argv[1])):
    source = Blob(blob.clone().requires_grad_(), n=n)
    wave = multislice(source, Optics(), memory=sys.argv[2])
    assert wave.dtype == torch.complex64
    wave.real.sum().backward()
    assert source.blob.grad.norm() > 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def resident(n_slices, memory):
    """Peak resident memory [KiB] of a fresh process: forward and backward at 512 x 512.

    Of its own: what `getrusage` tells holds what the process that started it had, too.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(n_slices), memory],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_resident_memory_is_flat():
    few, many = resident(50, "constant"), resident(400, "constant")
    assert many < 1.1 * few
    assert many - few < 16 * 2048  # KiB: 16 waves; one for every tenth slice would be 35
    assert resident(50, "graph") > 1.5 * few


def test_gradients_that_may_be_differentiated_again_count_every_input_once():
    """Positions shared by two portions, potential and volumes: with create_graph the same gradient as without."""
    generator = torch.Generator().manual_seed(1)
    places = 4 * torch.randn(6, 3, generator=generator, dtype=torch.float64)
    kinds: dict = {"numbers": torch.tensor([6, 8, 79, 7, 6, 79]), "classes": torch.tensor([0, 0, 6, 1, 0, 6])}
    where = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    poses = Poses(torch.eye(3, dtype=torch.float64)[None], where)
    atoms = Atoms(places, b_factors=torch.full((6,), 30.0, dtype=torch.float64), **kinds)
    specimen = Specimen((atoms,), (poses,), (40.0, 40.0, 40.0), Ice(60.0), cs.Absorption(), cs.Damage())
    weights = torch.randn(32, 32, generator=generator, dtype=torch.float64)

    def score(size):
        how = {"voltage": 300.0, "moment": cs.Moment(3.0, 2.0), "dtype": torch.float64}
        slices = tilted_slices(specimen, 20.0, (32, 32), size, 4.0, **how)
        return (cs.multislice(slices, cs.Optics()).abs() ** 2 * weights).sum()

    size = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    once = torch.autograd.grad(score(size), (where, size))
    again = torch.autograd.grad(score(size), (where, size), create_graph=True)
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(other.detach(), one, rtol=1e-8, atol=1e-10)
