from pathlib import Path

import numpy as np
import pytest
import torch

from acme_tilewright.npz import open_weights, write_weights
from tilewright.errors import ModelError
from tilewright_testing import WeightFormatSuite


class TestConformance(WeightFormatSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "acme-tilewright:npz"


@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_numpys_own_are_read(tmp_path: Path, compressed: bool) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "c.d": np.array(7, dtype=np.int64),
    }
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "model.npz", **arrays)  # type: ignore[arg-type]  # of numpy's stubs
    source = open_weights(tmp_path)
    assert sorted(source.names()) == sorted(arrays)
    for name, array in arrays.items():
        assert np.array_equal(source.get(name).numpy(), array)


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    write_weights(tmp_path, {"a": torch.tensor([1.5, 2.5]), "b": torch.tensor([1.0]).bfloat16()})
    with np.load(tmp_path / "model.npz") as arrays:
        assert arrays["a"].tolist() == [1.5, 2.5]
        assert arrays["b.bfloat16"].tolist() == [0x3F80]


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", a=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ModelError, match="dtype object"):
        open_weights(tmp_path)
