"""Events: where electrons may lie, and what they add up to."""

import pytest
import torch

from cryosim.microscope.events import Events, histogram


def some(generator, n=1000, shape=(7, 13, 10), dtype=torch.float32):
    frame = torch.randint(shape[0], (n,), generator=generator)
    y, x = (torch.rand(n, generator=generator, dtype=dtype) * size for size in shape[1:])
    return Events(frame, y, x, shape)


@pytest.mark.parametrize("supersampling", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_event_is_in_its_pixel(supersampling, dtype, generator):
    events = some(generator, dtype=dtype)
    counts = histogram(events, supersampling)
    assert counts.shape == (13 * supersampling, 10 * supersampling) and int(counts.sum()) == 1000
    wanted = torch.zeros_like(counts)
    for y, x in zip(events.y.tolist(), events.x.tolist(), strict=True):
        wanted[int(y * supersampling), int(x * supersampling)] += 1
    assert torch.equal(counts, wanted)
    coarse = counts.unflatten(0, (13, supersampling)).unflatten(2, (10, supersampling)).sum((1, 3))
    assert torch.equal(coarse, histogram(events))


def test_some_of_them(generator):
    events = some(generator)
    late = events.index(events.frame >= 4)
    assert len(late) == int((events.frame >= 4).sum()) and late.shape == events.shape


def test_none_at_all():
    empty = Events(torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0), (2, 3, 4))
    assert len(empty) == 0 and not histogram(empty).any()


@pytest.mark.parametrize(
    ("frame", "y", "x", "shape", "message"),
    [
        ([0, 1], [0.5], [0.5], (2, 3, 4), "one shape"),
        ([2], [0.5], [0.5], (2, 3, 4), r"Events.frame: expected values from 0 to below 2, got 2 to 2"),
        ([-1], [0.5], [0.5], (2, 3, 4), "Events.frame"),
        ([0], [3.0], [0.5], (2, 3, 4), "Events.y"),
        ([0], [0.5], [-1e-3], (2, 3, 4), "Events.x"),
        ([0], [float("nan")], [0.5], (2, 3, 4), "Events.y"),
        ([0], [0.5], [0.5], (2, 3), "Events.shape"),
        ([0], [0.5], [0.5], (0, 3, 4), "Events.shape"),
    ],
)
def test_events_that_cannot_be(frame, y, x, shape, message):
    with pytest.raises(ValueError, match=message):
        Events(torch.tensor(frame), torch.tensor(y), torch.tensor(x), shape)


def test_frames_are_whole():
    with pytest.raises(ValueError, match="whole numbers"):
        Events(torch.zeros(1), torch.zeros(1), torch.zeros(1), (1, 1, 1))
