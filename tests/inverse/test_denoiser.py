"""The noise-conditional network: what holds of it whatever it has learned."""

import pytest
import torch

from inverse.priors.denoiser import NoiseConditionalUNet, gathered, spread


def network(dtype=torch.float64, **how) -> NoiseConditionalUNet:
    """One with weights drawn at random, none of them 0."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = NoiseConditionalUNet(**{"widths": (6, 8), "blocks": 1, "scale": 0.8} | how).to(dtype)
        for value in made.parameters():
            torch.nn.init.normal_(value, std=0.1)
    return made.requires_grad_(False)


def test_gathering_voxels_loses_nothing():
    x = torch.arange(2 * 3 * 4 * 6 * 8.0).reshape(2, 3, 4, 6, 8)
    assert torch.equal(spread(gathered(x)), x)
    assert torch.equal(gathered(x)[0, :8, 0, 0, 0], x[0, 0, :2, :2, :2].flatten())


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 9, 13), (1, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_and_precision(shape, dtype):
    x = torch.randn(2, 1, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    made = network(dtype)(x, torch.tensor([0.2, 3.0]))
    assert made.shape == x.shape and made.dtype == dtype and torch.isfinite(made).all()


def test_without_noise_the_volume_comes_back_and_in_much_noise_nothing_does(generator):
    """c_skip and c_out of equation (2) at both ends, whatever the network says."""
    x = torch.randn(1, 1, 8, 8, 8, dtype=torch.float64, generator=generator)
    made = network()
    assert float((made(x, 1e-6) - x).abs().max()) < 1e-5
    noisy = x + 1e4 * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    assert float(made(noisy, 1e4).norm() / noisy.norm()) < 1e-3


def test_items_of_a_batch_have_their_own_levels_and_do_not_mix(generator):
    x = torch.randn(3, 1, 8, 12, 8, dtype=torch.float64, generator=generator)
    levels = torch.tensor([0.1, 0.7, 4.0], dtype=torch.float64)
    together = network()(x, levels)
    for i, level in enumerate(levels.tolist()):
        assert float((network()(x[i : i + 1], level)[0] - together[i]).abs().max()) < 1e-12


def test_a_part_is_seen_as_it_is_among_the_rest(generator):
    """Beyond the reach of the convolutions nothing of the surroundings is felt: no statistics of the volume."""
    x = torch.randn(1, 1, 8, 8, 96, dtype=torch.float64, generator=generator)
    other = x.clone()
    other[..., 64:] = torch.randn(1, 1, 8, 8, 32, dtype=torch.float64, generator=generator)
    made, changed = network()(x, 0.5), network()(other, 0.5)
    assert float((made - changed)[..., :32].abs().max()) < 1e-14
    assert float((made - changed)[..., 64:].abs().max()) > 1e-3


def test_the_gradient_is_that_of_finite_differences(generator):
    x = torch.randn(1, 1, 4, 4, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    level = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network(), (x, level), atol=1e-7)


def test_bad_volumes_and_levels_are_refused():
    with pytest.raises(ValueError, match=r"expected volumes \(batch, 1, z, y, x\), got \(4, 4, 4\)"):
        network()(torch.zeros(4, 4, 4), 0.1)
    with pytest.raises(ValueError, match="expected positive noise levels"):
        network()(torch.zeros(1, 1, 4, 4, 4), 0.0)
