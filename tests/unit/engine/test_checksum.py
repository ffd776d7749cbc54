from __future__ import annotations

import pytest
import torch

from trainer.engine.checksum import _weighted_sum, checksum


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(3, 5, generator=generator),
        torch.randn(9001, generator=generator).bfloat16(),
        torch.tensor(True),
        torch.zeros(0),
        torch.arange(7),
    ]


def test_equal_contents_have_equal_sums_below_two_to_the_52() -> None:
    assert checksum(tensors()) == checksum(tensors())
    assert 0 < checksum(tensors()) < 2**52
    assert float(checksum(tensors())) == checksum(tensors())


def test_every_flipped_bit_and_every_exchange_shows() -> None:
    clean = checksum(tensors())
    for index, length in ((0, 60), (1, 18002), (2, 1), (4, 56)):
        for byte in {0, length // 2, length - 1}:
            changed = tensors()
            changed[index].view(-1).view(torch.uint8)[byte] ^= 1
            assert checksum(changed) != clean
    exchanged = tensors()
    exchanged[0][0, 0], exchanged[0][1, 1] = exchanged[0][1, 1].item(), exchanged[0][0, 0].item()
    assert checksum(exchanged) != clean


@pytest.mark.parametrize("num_bytes", [0, 3, 4, 4096 * 4 - 1, 4096 * 4 * 3 + 4095 * 4 + 3])
def test_the_sum_for_devices_sees_every_single_bit(num_bytes: int) -> None:
    """On a GPU the same arithmetic runs; here it runs on the CPU."""
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    modulus = 2**52
    clean = int(_weighted_sum(data)) % modulus
    for byte in {0, num_bytes // 2, num_bytes - 1} if num_bytes else ():
        for bit in range(8):
            data[byte] ^= 1 << bit
            assert int(_weighted_sum(data)) % modulus != clean
            data[byte] ^= 1 << bit
    assert int(_weighted_sum(data)) % modulus == clean
