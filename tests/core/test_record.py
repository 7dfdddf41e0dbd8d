"""Records: frozen values that torch.func walks through."""

import dataclasses

import pytest
import torch

from cryosim.core.record import Record, item, static


class Inner(Record):
    spread: torch.Tensor = item(0)
    label: str = static("a")


class Outer(Record):
    images: torch.Tensor = item(2)
    weights: torch.Tensor = item(0)
    inner: Inner
    counts: torch.Tensor = item(0)
    pixel_size: float | torch.Tensor = item(0, default=1.5)


def outer(dtype=torch.float64, n=3):
    images = torch.arange(n * 5 * 7, dtype=dtype).reshape(n, 5, 7)
    return Outer(images, torch.arange(n, dtype=dtype), Inner(torch.ones(n, dtype=dtype), "b"), torch.arange(n))


def energy(record):
    return (record.images**2).sum((-2, -1)) @ record.weights + record.inner.spread.prod() * record.pixel_size


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        outer().pixel_size = 2.0


def test_replace_changes_a_copy():
    before = outer()
    after = before.replace(pixel_size=2.0)
    assert (before.pixel_size, after.pixel_size) == (1.5, 2.0)
    assert after.images is before.images


def test_unknown_field():
    with pytest.raises(TypeError):
        outer().replace(voxel_size=2.0)
    with pytest.raises(TypeError):
        Inner(torch.ones(1), colour="red")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_reaches_nested_records_and_spares_integers(dtype):
    record = outer(torch.float32).replace(weights=torch.ones(3, dtype=torch.complex64)).to(dtype=dtype)
    assert record.images.dtype == record.inner.spread.dtype == dtype
    assert record.weights.dtype == dtype.to_complex()
    assert record.counts.dtype == torch.int64
    assert (record.pixel_size, record.inner.label) == (1.5, "b")


@pytest.mark.parametrize(
    "which",
    [1, slice(0, 2), torch.tensor([2, 0]), torch.tensor([True, False, True])],
    ids=["int", "slice", "index", "mask"],
)
def test_index_takes_the_same_items_of_every_field(which):
    record = outer()
    taken = record.index(which)
    torch.testing.assert_close(taken.images, record.images[which])
    torch.testing.assert_close(taken.weights, record.weights[which])
    torch.testing.assert_close(taken.inner.spread, record.inner.spread[which])
    assert (taken.pixel_size, taken.inner.label) == (1.5, "b")


def test_index_leaves_a_field_without_items_axis():
    shared = outer().replace(pixel_size=torch.tensor(2.0))
    assert shared.index(2).pixel_size == 2.0


def test_repr_shows_large_tensors_by_shape():
    assert "images=<float64 (3, 5, 7)>" in repr(outer())


def test_func_grad_equals_autograd():
    record = outer().replace(pixel_size=torch.tensor(1.5, dtype=torch.float64))
    record = record.replace(counts=record.counts.double())
    gradient = torch.func.grad(energy)(record)
    assert isinstance(gradient, Outer)
    assert isinstance(gradient.inner, Inner)
    torch.testing.assert_close(gradient.images, 2 * record.images * record.weights[:, None, None])
    torch.testing.assert_close(gradient.weights, (record.images**2).sum((-2, -1)))
    torch.testing.assert_close(gradient.pixel_size, record.inner.spread.prod())


def test_func_jvp_along_a_record():
    record = Inner(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    direction = Inner(torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))
    value, slope = torch.func.jvp(lambda r: r.spread.prod(), (record,), (direction,))
    assert (value, slope) == (6.0, 1 * 6.0 - 1 * 3.0 + 0.5 * 2.0)


def test_func_vmap_over_a_record(generator):
    batch = Inner(torch.randn(4, 5, generator=generator, dtype=torch.float64), "c")
    doubled = torch.func.vmap(lambda r: r.replace(spread=2 * r.spread))(batch)
    assert isinstance(doubled, Inner)
    assert doubled.label == "c"
    torch.testing.assert_close(doubled.spread, 2 * batch.spread)


def test_func_vmap_of_grad(generator):
    batch = Inner(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    gradient = torch.func.vmap(torch.func.grad(lambda r: (r.spread**3).sum()))(batch)
    torch.testing.assert_close(gradient.spread, 3 * batch.spread**2)
