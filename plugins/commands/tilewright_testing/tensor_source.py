"""What every ``TensorSource`` must do, from a loader or a weight format."""

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from tilewright.errors import ModelError
from tilewright.types import TensorSource
from tilewright_testing.files import (
    bytes_read,
    contents,
    corruptions,
    files_of,
    invert,
    open_files,
)
from tilewright_testing.models import dtype_name, read_some, same_bits
from tilewright_testing.state import left_alone
from tilewright_testing.suite import PluginSuite

if TYPE_CHECKING:
    from torch import Tensor

Open = Callable[[], TensorSource]
T = TypeVar("T")

_CUTS: dict[str, Callable[[int], int]] = {
    "to nothing": lambda size: 0,
    "to a byte": lambda size: 1,
    "to eight bytes": lambda size: 8,
    "to a hundred bytes": lambda size: 100,
    "in half": lambda size: size // 2,
    "by a byte": lambda size: size - 1,
}


class TensorSourceSuite(PluginSuite):
    """Tests for plugins that provide tensors: loaders and weight formats.

    A kind's suite gives two fixtures: ``opened``, which opens the same weights on each call, and
    ``files``, the folder or file with the weights, which tests damage.
    """

    @pytest.fixture
    def opened(self) -> Open:
        raise NotImplementedError

    @pytest.fixture
    def files(self) -> Path:
        raise NotImplementedError

    # --- reading ---------------------------------------------------------------------------------

    def test_info_says_of_each_tensor_what_get_gives(self, opened: Open) -> None:
        source = opened()
        names = source.names()
        assert len(names) == len(set(names)) > 0, "names() must give each tensor's name, once"
        for name in names:
            info, tensor = source.info(name), source.get(name)
            said = (info.shape, info.dtype, info.nbytes)
            found = (tuple(tensor.shape), dtype_name(tensor), tensor.nbytes)
            assert said == found, (
                f"info({name!r}) must say the shape, dtype and nbytes of what get gives: "
                f"{found}, found {said}"
            )
            assert type(info.shape) is tuple, f"TensorInfo.shape must be a tuple: {info.shape!r}"
            assert tensor.device.type == "cpu", f"get({name!r}) must give a tensor on the CPU"
            assert info.location, f"info({name!r}).location must name the file, for messages"

    def test_reading_a_tensor_twice_gives_the_same(self, opened: Open) -> None:
        source = opened()
        first = read_some(source)
        for name in reversed(list(source.names())):
            assert same_bits(source.get(name), first[name]), (
                f"get({name!r}) must give the same each time and in any order"
            )

    def test_an_unknown_name_is_a_key_error(self, opened: Open) -> None:
        source = opened()
        for name in ("no.such.tensor", ""):
            for method in (source.info, source.get):
                try:
                    method(name)
                except KeyError:
                    continue
                except Exception as error:
                    pytest.fail(f"{method.__name__}({name!r}) must raise KeyError, not {error!r}")
                pytest.fail(f"{method.__name__}({name!r}) must raise KeyError for an unknown name")

    def test_weights_are_not_read_before_they_are_asked_for(
        self, opened: Open, files: Path
    ) -> None:
        """The files are overwritten after they were opened: a later read gives other data or an
        error; tensors that are unchanged were read before."""
        before = read_some(opened())
        source = opened()
        invert(files)
        kept = []
        for name, tensor in before.items():
            try:
                now = source.get(name)
            except Exception:  # such as a checksum error
                continue
            if tensor.numel() and same_bits(now, tensor):
                kept.append(name)
        assert not kept, (
            f"opening must read headers only, but {len(kept)} of {len(before)} tensors were in "
            f"memory before get() asked for them, such as {kept[0]!r}"
        )

    def test_opening_reads_headers_only(self, opened: Open, files: Path) -> None:
        warm = opened()  # imported modules are read once
        weights = sum(warm.info(name).nbytes for name in warm.names())
        others = max(0, sum(path.stat().st_size for path in files_of(files)) - weights)
        allowed = 3 * others + weights // 2
        if allowed >= weights:
            pytest.skip(f"{weights} bytes of weights beside {others} others are too few to tell")
        read = min(_read_by(opened) for _ in range(3))  # other threads read, too
        assert read <= allowed, (
            f"opening must read headers only, but read {read} bytes; the weights take {weights}, "
            f"all else {others}"
        )

    def test_opening_and_reading_change_no_file(self, opened: Open, files: Path) -> None:
        folder = files if files.is_dir() else files.parent
        before = contents(folder)
        source = opened()
        read_some(source)
        source.close()
        after = contents(folder)
        changed = [p.name for p in {**before, **after} if before.get(p) != after.get(p)]
        assert not changed, f"reading must leave the files as they are, but changed {changed}"

    def test_threads_read_what_one_thread_reads(self, opened: Open) -> None:
        expected = read_some(opened())
        source = opened()
        names = list(expected)

        def wrong_from(start: int) -> list[str]:
            wrong = []
            for name in names[start:] + names[:start]:
                try:
                    if not same_bits(source.get(name), expected[name]):
                        wrong.append(f"{name!r} differed")
                except Exception as error:
                    wrong.append(f"{name!r} raised {type(error).__name__}")
            return wrong

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                starts = [i * len(names) // 4 for i in range(4)] * 5
                wrong = [name for found in pool.map(wrong_from, starts) for name in found]
        finally:
            sys.setswitchinterval(interval)
        assert not wrong, (
            f"four threads that read at once must get what one gets, but {wrong[0]}: "
            "does get() share a file position?"
        )

    def test_opening_and_reading_leave_the_process_as_it_was(self, opened: Open) -> None:
        with left_alone("reading weights"):
            source = opened()
            read_some(source)
            source.close()

    # --- closing ---------------------------------------------------------------------------------

    def test_closing_closes_the_files(self, opened: Open) -> None:
        warm = opened()
        read_some(warm)
        warm.close()
        before = open_files()
        source = opened()
        read_some(source)
        source.close()
        left = open_files() - before
        assert not left, f"close() must let go of the files, but {', '.join(left)} stayed open"

    def test_tensors_stay_valid_when_their_source_is_closed(self, opened: Open) -> None:
        expected = read_some(opened())
        source = opened()
        tensors = {name: source.get(name) for name in expected}
        source.close()
        del source
        open_files()  # collects what is no longer used
        for name, tensor in tensors.items():
            assert same_bits(tensor, expected[name]), (
                f"tensors that were handed out must outlive close(), but {name!r} changed"
            )

    def test_closing_one_source_leaves_another_open(self, opened: Open) -> None:
        expected = read_some(opened())
        one, other = opened(), opened()
        one.close()
        for name, tensor in expected.items():
            assert same_bits(other.get(name), tensor), f"{name!r} must be read as before"

    # --- damaged files ---------------------------------------------------------------------------

    @pytest.mark.parametrize("cut", _CUTS)
    def test_a_file_that_is_cut_is_a_model_error(self, opened: Open, files: Path, cut: str) -> None:
        expected = read_some(opened())
        for path in files_of(files):
            data = path.read_bytes()
            length = _CUTS[cut](len(data))
            if length < len(data):
                path.write_bytes(data[:length])
                refused_or_whole(lambda: self.read(opened), expected, f"with {path.name} cut {cut}")
                path.write_bytes(data)

    def test_a_file_that_is_not_there_is_a_model_error(self, opened: Open, files: Path) -> None:
        expected = read_some(opened())
        for path in files_of(files):
            data = path.read_bytes()
            path.unlink()
            refused_or_whole(lambda: self.read(opened), expected, f"without {path.name}")
            path.write_bytes(data)

    def test_a_file_of_other_bytes_is_a_model_error(self, opened: Open, files: Path) -> None:
        expected = read_some(opened())
        for path in files_of(files):
            data = path.read_bytes()
            for what, other in (("zeros", bytes(1000)), ("text", b"<html>not found</html>\n" * 50)):
                path.write_bytes(other)
                refused_or_whole(lambda: self.read(opened), expected, f"with {what} in {path.name}")
            path.write_bytes(data)

    def test_a_changed_byte_raises_nothing_but_a_model_error(
        self, opened: Open, files: Path
    ) -> None:
        for what, path, data in corruptions(files, 40):
            before = path.read_bytes()
            path.write_bytes(data)
            refused(lambda: self.read(opened), f"with {what}")
            path.write_bytes(before)

    def read(self, opened: Open) -> "Mapping[str, Tensor]":
        """Open the weights and read them all, as an engine would, and close them."""
        source = opened()
        try:
            return read_some(source)
        finally:
            source.close()


def _read_by(opened: Open) -> int:
    """Number of bytes that the process reads while weights are opened."""
    before = bytes_read()
    opened()
    return bytes_read() - before


def refused(attempt: Callable[[], T], when: str) -> T | None:
    """Result of an attempt on damaged files, None for a ModelError; any other error fails the
    test, and so does a message that is not one line."""
    try:
        return attempt()
    except ModelError as error:
        lines = str(error).splitlines()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is not an Exception
        pytest.fail(
            f"{when}, opening or reading must raise ModelError with one line, not "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            pytrace=False,
        )
    assert len(lines) == 1, (
        f"a ModelError's message must be one line; {when} it has {len(lines)}: {lines[:2]}"
    )
    return None


def refused_or_whole(
    attempt: "Callable[[], Mapping[str, Tensor]]", expected: "Mapping[str, Tensor]", when: str
) -> None:
    """Fail unless reading raises ModelError or gives the same as before: damage outside the weights
    may go unnoticed, wrong weights may not."""
    found = refused(attempt, when)
    if found is None:
        return
    wrong = [
        name
        for name in {**expected, **found}
        if name not in expected or name not in found or not same_bits(found[name], expected[name])
    ]
    assert not wrong, (
        f"{when}, opening or reading must raise ModelError, but gave other tensors than before: "
        f"{wrong[:3]}"
    )
