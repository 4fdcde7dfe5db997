"""The conformance suite of weight formats."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from tilewright.types import DTYPES, TensorSource
from tilewright_testing.models import dtype_name, same_bits
from tilewright_testing.state import left_alone
from tilewright_testing.suite import Implementation
from tilewright_testing.tensor_source import Open, TensorSourceSuite, refused
from tilewright_testing.values import check_values, unseen

if TYPE_CHECKING:
    from torch import Tensor

Write = Callable[[Path, "Mapping[str, Tensor]"], float]

_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "scalars": ((),),
    "empty tensors": ((0,), (0, 4), (3, 0, 2)),
    "odd sizes": ((1,), (7,), (1, 1), (3, 5), (2, 3, 5), (127, 33), (1, 4097)),
    "many tensors": ((3,),) * 300,
}


class WeightFormatSuite(TensorSourceSuite):
    """Checks one weight format against ``WeightFormatHooks`` and ``TensorSource``.

    Fixtures to give: ``plugin``; ``write``, unless the plugin implements the hook write_weights;
    and ``options`` where needed.
    """

    kind: ClassVar[str] = "weight_format"

    @pytest.fixture
    def write(self, implementation: Implementation) -> Write:
        """A callable of (directory, tensors by name) that writes them in the format.

        It returns the largest error of a value that is read back, as ``write_weights`` does, and
        raises TypeError for a dtype and ValueError for a shape that the format does not support.
        """
        if not implementation.implements("write_weights"):
            pytest.skip(
                "no weights to open: give the suite a fixture 'write', or implement write_weights"
            )

        def write(directory: Path, tensors: "Mapping[str, Tensor]") -> float:
            tolerance = implementation.call("write_weights", directory=directory, tensors=tensors)
            assert isinstance(tolerance, (int, float)), (
                "write_weights() must return the largest error of a value that is read back, 0.0 "
                f"if every bit is kept, found {tolerance!r}"
            )
            return tolerance

        return write

    @pytest.fixture
    def tensors(self) -> "dict[str, Tensor]":
        """Content of the files in most tests, in float32: large enough to detect reads."""
        return _random({"model.a": (64, 512), "model.b": (513, 63), "c": (5,), "d": (2, 3, 4)})

    @pytest.fixture
    def directory(self, tmp_path: Path, write: Write, tensors: "dict[str, Tensor]") -> Path:
        """Directory with the tensors, written in the first dtype that the format supports."""
        for dtype in DTYPES:
            folder = tmp_path / f"some wéights in {dtype}"
            folder.mkdir()
            try:
                write(folder, {name: _as(tensor, dtype) for name, tensor in tensors.items()})
            except TypeError:
                continue
            return folder
        pytest.fail(
            f"write must support at least one of the dtypes {', '.join(DTYPES)}", pytrace=False
        )

    @pytest.fixture
    def files(self, directory: Path) -> Path:
        return directory

    @pytest.fixture
    def opened(self, implementation: Implementation, directory: Path) -> Open:
        return lambda: _open(implementation, directory)

    # --- finding ---------------------------------------------------------------------------------

    def test_can_open_finds_its_own_files(
        self, implementation: Implementation, directory: Path
    ) -> None:
        assert _can_open(implementation, directory), (
            "can_open() must return True for a directory with weights in this format"
        )
        (directory / "README.md").write_text("# A model\n")
        (directory / "config.json").write_text("{}")
        assert _can_open(implementation, directory), (
            "can_open() must return True also when there are other files beside the weights"
        )

    def test_can_open_looks_at_names_only(
        self, implementation: Implementation, directory: Path
    ) -> None:
        for path in directory.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
        assert _can_open(implementation, directory), (
            "can_open() must look at file names only, but returned False for empty files"
        )

    def test_can_open_is_false_for_other_directories(
        self, implementation: Implementation, tmp_path: Path
    ) -> None:
        empty, others = tmp_path / "empty", tmp_path / "others"
        empty.mkdir()
        others.mkdir()
        for name in ("config.json", "tokenizer.json", "README.md", "weights.txt", ".gitattributes"):
            (others / name).write_text("{}")
        file = tmp_path / "file"
        file.write_text("")
        for what, directory in (
            ("an empty directory", empty),
            ("a directory without weights", others),
            ("a directory that does not exist", tmp_path / "absent"),
            ("a path to a file", file),
        ):
            assert not _can_open(implementation, directory), (
                f"can_open() must return False for {what}"
            )

    def test_can_open_leaves_the_process_unchanged(
        self, implementation: Implementation, tmp_path: Path
    ) -> None:
        with left_alone("can_open()"):
            _can_open(implementation, tmp_path)

    # --- opening ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_tensors_are_read_as_written(
        self, implementation: Implementation, write: Write, tmp_path: Path, dtype: str
    ) -> None:
        """Two square matrices of equal size show a wrong axis, and a wrong name."""
        tensors = _random({"a": (33, 17), "b.c.weight": (200,), "d": (24, 24), "e": (24, 24)})
        _round_trip(implementation, write, tmp_path, {n: _as(t, dtype) for n, t in tensors.items()})

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_special_values_are_read_bit_for_bit(
        self, implementation: Implementation, write: Write, tmp_path: Path, dtype: str
    ) -> None:
        import torch

        special = [float("nan"), float("inf"), float("-inf"), -0.0, 1e-45, 6e-8, 65504.0, 1e30]
        tensors = {"s": _as(torch.tensor(special), dtype)}
        _round_trip(implementation, write, tmp_path, tensors, special=True)

    @pytest.mark.parametrize("shapes", _SHAPES)
    def test_tensors_of_any_shape_are_read(
        self, implementation: Implementation, write: Write, tmp_path: Path, shapes: str
    ) -> None:
        tensors = _random({f"tensor.{i}": shape for i, shape in enumerate(_SHAPES[shapes])})
        _round_trip(implementation, write, tmp_path, tensors)

    def test_the_location_names_the_file(self, opened: Open, directory: Path) -> None:
        source = opened()
        for name in source.names():
            location = Path(source.info(name).location)
            assert directory in (location, *location.parents), (
                f"info({name!r}).location must be the path of its file in the directory, found "
                f"{str(location)!r}"
            )

    def test_a_directory_without_weights_raises_model_error(
        self, implementation: Implementation, tmp_path: Path
    ) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        for what, directory in (("an empty", empty), ("a missing", tmp_path / "absent")):
            opened = refused(partial(_open, implementation, directory), f"with {what} directory")
            assert opened is None, f"open_weights() must raise ModelError for {what} directory"


def _can_open(implementation: Implementation, directory: Path) -> bool:
    found = implementation.call("can_open", directory=directory)
    assert isinstance(found, bool), f"can_open() must return True or False, found {found!r}"
    return found


def _open(implementation: Implementation, directory: Path) -> TensorSource:
    source: TensorSource = implementation.call(
        "open_weights", directory=directory, options=implementation.options
    )
    return source


def _random(shapes: Mapping[str, tuple[int, ...]]) -> "dict[str, Tensor]":
    import torch

    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _as(tensor: "Tensor", dtype: str) -> "Tensor":
    import torch

    converted: Tensor = tensor.to(getattr(torch, dtype))
    return converted


def _round_trip(
    implementation: Implementation,
    write: Write,
    folder: Path,
    tensors: "Mapping[str, Tensor]",
    special: bool = False,
) -> None:
    """Fail unless tensors are read as written, within the error that the format states; skip what
    the format does not support. special: whether no error is allowed."""
    directory = folder / "weights"
    directory.mkdir()
    try:
        tolerance = write(directory, tensors)
    except TypeError as error:
        pytest.skip(f"the format does not support this dtype: {error}")
    except ValueError as error:
        pytest.skip(f"the format does not support this shape: {error}")
    if special and tolerance:
        pytest.skip(f"the format does not keep special values: it states an error of {tolerance:g}")
    source = _open(implementation, directory)
    assert set(source.names()) == set(tensors), (
        f"names() must return the names that were written, {sorted(tensors)[:8]}, found "
        f"{sorted(source.names())[:8]}"
    )
    if tolerance:
        hidden = list(unseen(tensors, tolerance))
        assert not hidden, (
            f"the error that write_weights() returns, {tolerance:g}, must be small enough to show "
            f"mistakes, but {hidden[0]} would not show"
        )
        check_values({name: source.get(name) for name in tensors}, tensors, tolerance)
        return
    for name, written in tensors.items():
        tensor = source.get(name)
        assert same_bits(tensor, written), (
            f"get({name!r}) must return the tensor bit for bit as written: {dtype_name(written)} "
            f"{list(written.shape)}, found {dtype_name(tensor)} {list(tensor.shape)}"
            f"{' with other values' if tensor.shape == written.shape else ''}"
        )
        info = source.info(name)
        said = (info.shape, info.dtype, info.nbytes)
        assert said == (tuple(written.shape), dtype_name(written), written.nbytes), (
            f"info({name!r}) must return the shape, dtype and nbytes that were written, found "
            f"{said}"
        )
