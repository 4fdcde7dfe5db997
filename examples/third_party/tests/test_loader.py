from pathlib import Path

import pytest

from acme_tilewright import loader
from tilewright.errors import ModelError
from tilewright.loading import InstalledFormats
from tilewright.plugins import new_manager
from tilewright_testing import LoaderSuite
from tilewright_testing.models import Model, make_model


class TestConformance(LoaderSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "acme-tilewright:acme-model"

    @pytest.fixture
    def expected(self) -> Model:
        """What write_sample writes, but for what acme.toml has no key for."""
        return make_model(architecture="Acme")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("heads = 0", "heads must be an integer from 1"),
        ("layers = true", "layers must be an integer from 1"),
        ("dtype = 'int8'", "dtype must be one of"),
        ("norm_eps = 'small'", "norm_eps must be a number above 0"),
        ("qk_norm = 1", "qk_norm must be true or false"),
        ("end = [999]", "a token id must be an integer from 0 to 130, found 999"),
        ("begin = 'x'", "begin must be an integer from 0 to 130"),
        ("vocabulary = 30", "has token 130, where acme.toml has vocabulary = 30"),
        ("hidden = ", "invalid TOML"),
    ],
)
def test_what_is_wrong_in_acme_toml_is_said(tmp_path: Path, line: str, said: str) -> None:
    loader.write_sample(tmp_path)
    path = tmp_path / "acme.toml"
    key = line.split()[0]
    lines = [line if old.split()[0] == key else old for old in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    formats = InstalledFormats(new_manager(), {})
    with pytest.raises(ModelError) as caught:
        loader.load_model(str(tmp_path), weight_format=None, formats=formats)
    assert said in str(caught.value)
