"""Storage of the KV cache in tensors on the CPU."""

import pytest
import torch

from tilewright import kv_storage
from tilewright.errors import OutOfPagesError
from tilewright.types import KvCacheSpec


def spec(**changed):
    """Two layers of three heads of size 4, in pages of five tokens, in float32."""
    sizes = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 4, "page_size": 5, "dtype": "float32"}
    return KvCacheSpec(**sizes | changed)


@pytest.mark.parametrize(("row_order", "shape"), [("NHD", (7, 5, 3, 4)), ("HND", (7, 3, 5, 4))])
def test_layers_have_the_declared_row_order_and_are_zero_initialised(row_order, shape):
    layers = kv_storage.allocate(spec(row_order=row_order, dtype="bfloat16"), 7)
    assert len(layers) == 2
    tensors = [tensor for layer in layers for tensor in (layer.key, layer.value)]
    for tensor in tensors:
        assert tensor.shape == shape
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()
        assert not tensor.any()
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]


def test_a_cache_too_large_to_allocate_is_an_error_that_gives_its_size():
    large = spec(num_kv_heads=2**20, head_dim=2**20, page_size=2**20)
    with pytest.raises(
        OutOfPagesError, match=r"2 pages takes \d+\.0 GiB, which could not be allocated"
    ):
        kv_storage.allocate(large, 2)
    for pages in (10**12, 10**25):
        with pytest.raises(
            OutOfPagesError, match=rf"{pages} pages takes .* which could not be allocated"
        ):
            kv_storage.allocate(spec(), pages)
