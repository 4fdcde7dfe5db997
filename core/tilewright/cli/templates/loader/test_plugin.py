import pytest

from tilewright.testing import LoaderSuite
from tilewright.testing.models import Model, make_model

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(LoaderSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME

    @pytest.fixture
    def expected(self) -> Model:
        """What write_sample writes."""
        return make_model()
