"""Training: it lowers the loss, goes on where it was stopped, and repeats itself."""

import pytest
import torch

from cryosim.core.volume import Volume
from cryosim.io.files import FormatError
from inverse.priors.denoiser import NoiseConditionalUNet
from inverse.train import Plan, train_denoiser
from inverse.train_scenes import new_network

PLAN = Plan(steps=12, batch=2, crop=16, rate=2e-3)


def blobs(n: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    axis = torch.arange(24.0)
    z, y, x = axis[:20, None, None], axis[:22, None], axis
    volumes = []
    for _ in range(n):
        places = torch.rand(8, 3, generator=generator) * 20
        volumes.append(sum(3 * torch.exp(-((z - a) ** 2 + (y - b) ** 2 + (x - c) ** 2) / 8) for a, b, c in places))
    return volumes


def small(seed: int = 0) -> NoiseConditionalUNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NoiseConditionalUNet((8, 12), 1, scale=0.9, noise_levels=(0.05, 8.0))


def weights(network) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in network.state_dict().values()])


def test_the_loss_falls_and_noise_is_taken_away():
    volumes = blobs()
    plan = Plan(steps=250, batch=2, crop=16, rate=5e-3)
    network = train_denoiser(small(), volumes, plan)
    noise = torch.randn(volumes[0].shape, generator=torch.Generator().manual_seed(9))
    x = volumes[0][None, None]
    for level in (0.5, 2.0):
        noisy = x + level * noise
        shrunk = noisy / (1 + (level / 0.9) ** 2)  # what the untrained network does
        assert float((network(noisy, level) - x).norm()) < 0.8 * float((shrunk - x).norm())


def test_a_run_that_was_stopped_gives_the_weights_of_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr("inverse.train._SAVED_EVERY", 5)
    whole = weights(train_denoiser(small(), blobs(), PLAN))
    state = tmp_path / "state.safetensors"

    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_denoiser(small(), blobs(), PLAN, state=state, progress=stop)
    steps = []
    again = train_denoiser(
        small(seed=8), blobs(), PLAN, state=state, resume=True, progress=lambda i, n: steps.append(i)
    )
    assert steps == list(range(6, 13))
    assert torch.equal(weights(again), whole)


def test_a_state_of_another_plan_or_network_is_refused(tmp_path):
    state = tmp_path / "state.safetensors"
    train_denoiser(small(), blobs(), PLAN, state=state)
    with pytest.raises(FormatError, match=r"plan: expected Plan\(steps=13"):
        train_denoiser(small(), blobs(), PLAN._replace(steps=13), state=state, resume=True)
    with pytest.raises(FormatError, match="tensor .*: expected the shape"):
        train_denoiser(NoiseConditionalUNet((6, 12), 1), blobs(), PLAN, state=state, resume=True)


def test_volumes_smaller_than_a_crop_are_refused():
    with pytest.raises(ValueError, match=r"at least 16 voxels along each axis, got \(4, 30, 30\)"):
        train_denoiser(small(), [torch.zeros(4, 30, 30)], PLAN)
    with pytest.raises(ValueError, match="got none"):
        train_denoiser(small(), [], PLAN)


def test_a_new_network_is_made_for_its_volumes_and_by_its_seed():
    volumes = [Volume(blob, size) for blob, size in zip(blobs(), (8.0, 9.0, 10.0), strict=True)]
    before = torch.random.get_rng_state()
    one, same, other = new_network(volumes, 4), new_network(volumes, 4), new_network(volumes, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights(one), weights(same)) and not torch.equal(weights(one), weights(other))
    variance = torch.stack([blob.var() for blob in blobs()]).mean()
    assert one.scale == pytest.approx(float(variance.sqrt()), rel=1e-6) and one.voxel_sizes == (8.0, 10.0)
