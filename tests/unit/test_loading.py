"""From a source to a model that is ready to run."""

import pytest

from tilewright.errors import OutOfPagesError
from tilewright.loading import num_pages
from tilewright.types import KvCacheSpec


def spec(**changed):
    """Two layers of three heads of size 4, in pages of five tokens, in float32."""
    sizes = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 4, "page_size": 5, "dtype": "float32"}
    return KvCacheSpec(**sizes | changed)


PAGE = 2 * 2 * 3 * 4 * 5 * 4
"""Bytes: keys and values, layers, heads, head size, tokens, bytes of a number."""


def test_the_number_of_pages_is_as_asked():
    assert num_pages(spec(), 2, max_sequences=3, max_seq_len=11) == 2
    assert num_pages(spec(memory_limit=1), 7, max_sequences=3, max_seq_len=11) == 7


def test_without_a_number_all_sequences_fit_at_their_longest():
    assert num_pages(spec(), None, max_sequences=3, max_seq_len=11) == 3 * 3
    assert num_pages(spec(), None, max_sequences=3, max_seq_len=10) == 3 * 2


@pytest.mark.parametrize(("limit", "pages"), [(PAGE, 1), (4 * PAGE + 1, 4), (99 * PAGE, 9)])
def test_without_a_number_the_pages_stay_within_the_memory_limit(limit, pages):
    assert spec().page_bytes == PAGE
    assert num_pages(spec(memory_limit=limit), None, max_sequences=3, max_seq_len=11) == pages


def test_a_memory_limit_below_one_page_is_an_error_that_gives_the_sizes():
    with pytest.raises(
        OutOfPagesError, match=rf"may take {PAGE - 1} bytes, but one page of 5 .* {PAGE}: free"
    ):
        num_pages(spec(memory_limit=PAGE - 1), None, max_sequences=3, max_seq_len=11)
