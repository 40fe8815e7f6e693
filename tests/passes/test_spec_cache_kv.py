"""spec-cache-kv: what its codes give back."""

from __future__ import annotations

import pytest
import torch

from tilewright.passes.memory import _few_bits as few_bits


@pytest.mark.parametrize("group", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_round_trip(bits: int, group: int) -> None:
    """An error of half a step at most (of a quarter of the range for 1 bit) and that of float16;
    what codes stand for has the same codes."""
    torch.manual_seed(bits)
    x = torch.randn(3, 8, 2 * group) * 4 + torch.tensor([0.0, 7.0, -3.0])[:, None, None]
    groups = x.unflatten(2, (2, group))
    codes = few_bits.encoded_values(x, group, bits)
    assert codes.packed.shape == (3, 8, 2 * group * bits // 8)
    near = few_bits.near_values(codes, bits).view_as(groups)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2 if bits == 1 else 2**bits - 1)
    half_ulps = 2.0**-11 * (groups.abs().amax(-1, keepdim=True) + (high - low)) + 1e-5
    assert bool(((near - groups).abs() <= step / 2 + half_ulps).all())
    torch.testing.assert_close(near, few_bits.rounded(groups, bits), rtol=0, atol=1e-6)
    levels = codes.numbers.float()
    again = torch.round((near - levels[..., 1:]) / levels[..., :1]).clamp(0, 2**bits - 1)
    torch.testing.assert_close(again * levels[..., :1] + levels[..., 1:], near, rtol=0, atol=1e-6)
    keys = few_bits.encoded_keys(x.mT, group, bits)
    assert keys.packed.shape == (3, 2 * group, bits)
    assert torch.equal(few_bits.near_keys(keys, bits).mT, near.flatten(2))


def test_one_bit_gives_the_quartiles_of_the_range() -> None:
    x = torch.tensor([[0.0, 1.0, 2.9, 3.9, 4.1, 5.0, 7.0, 8.0]])
    want = [[2.0, 2.0, 2.0, 2.0, 6.0, 6.0, 6.0, 6.0]]
    assert few_bits.near_values(few_bits.encoded_values(x, 8, 1), 1).tolist() == want


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_groups_of_one_number_are_kept(bits: int) -> None:
    x = torch.full((16, 8), 1.5)
    assert torch.equal(few_bits.near_values(few_bits.encoded_values(x, 8, bits), bits), x)
    assert torch.equal(few_bits.near_keys(few_bits.encoded_keys(x, 8, bits), bits), x)


def test_keys_share_scales_with_tokens_and_values_with_channels() -> None:
    """A channel, or a token, that is far from the others costs them nothing."""
    torch.manual_seed(2)
    x = torch.randn(2, 16, 24)
    far_channel, far_token = x.clone(), x.clone()
    far_channel[:, :, 3] += 900
    far_token[:, 5] += 900
    keys = few_bits.near_keys(few_bits.encoded_keys(far_channel, 8, 4), 4)
    values = few_bits.near_values(few_bits.encoded_values(far_token, 8, 4), 4)
    others = torch.arange(24) != 3
    assert (keys - far_channel)[:, :, others].abs().max() < 0.3
    assert (values - far_token)[:, torch.arange(16) != 5].abs().max() < 0.3
    swapped = few_bits.near_values(few_bits.encoded_values(far_channel, 8, 4), 4)
    assert (swapped - far_channel)[:, :, :3].abs().max() > 1
