import pytest
import torch

from cast_serve.sparsity.nibbles import pack_nibbles, unpack_nibbles


@pytest.mark.parametrize("columns", [1, 8, 14, 288])
def test_every_integer_comes_back(columns: int) -> None:
    values = (torch.arange(5 * columns).view(5, columns) * 7 % 16 - 8).to(torch.int8)
    packed = pack_nibbles(values)
    assert (packed.dtype, packed.shape) == (torch.int32, (5, -(-columns // 8)))
    assert torch.equal(unpack_nibbles(packed, columns), values)


def test_the_first_column_is_in_the_lowest_bits() -> None:
    values = torch.tensor([[-7, 0, 7, 1, -8, 2, 3, -1, 4]], dtype=torch.int8)
    first = sum((int(v) + 8) << 4 * i for i, v in enumerate(values[0, :8]))
    assert pack_nibbles(values).tolist() == [[first, 12]]


def test_compressed_tensors_packs_the_same() -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="with vLLM"
    )
    values = torch.randint(-8, 8, (6, 45), generator=torch.Generator().manual_seed(0))
    values = values.to(torch.int8)
    assert torch.equal(pack_nibbles(values), helpers.pack_to_int32(values, 4))
