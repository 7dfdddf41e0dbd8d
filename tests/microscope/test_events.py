"""Events: where electrons may lie, and what they add up to."""

import pytest
import torch

from cryosim.microscope.counting import sample_events, thin
from cryosim.microscope.detector import Detector
from cryosim.microscope.events import Events, alternating, histogram


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


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_frames_by_turns(parts, generator):
    events = some(generator)
    dealt = alternating(events, parts)
    assert sum(len(part) for part in dealt) == len(events)
    for i, part in enumerate(dealt):
        assert bool((part.frame % parts == i).all()) and part.shape == events.shape
    with pytest.raises(ValueError, match="alternating.parts"):
        alternating(events, 8)


def test_frames_by_turns_are_independent_where_electrons_are_not(generator):
    """Coincidence makes thinned halves of an exposure anticorrelated in coarse blocks, but not those of its frames."""
    camera = Detector((96, 96), 1.0, coincidence_radius=2.394)
    flat = torch.full((96, 96), 0.05 * 40)
    thinned, turned = [], []
    for _ in range(30):
        events = sample_events(flat, camera, 40, generator=generator)
        for halves, kept in ((thin(events, generator=generator), thinned), (alternating(events), turned)):
            blocks = [
                histogram(half).double().unflatten(0, (8, 12)).unflatten(2, (8, 12)).sum((1, 3)) for half in halves
            ]
            kept.append(torch.stack([block - block.mean() for block in blocks]))
    correlations = [
        float(torch.corrcoef(torch.stack(kept).movedim(1, 0).flatten(1))[0, 1]) for kept in (thinned, turned)
    ]
    sigma = (30 * 64) ** -0.5
    assert correlations[0] < -6 * sigma
    assert abs(correlations[1]) < 4 * sigma


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
