"""Requirements for every ``TensorSource``, from a loader or a weight format."""

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter
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
    still_open,
)
from tilewright_testing.interleaving import Step, interrupted, steps_of
from tilewright_testing.models import dtype_name, read_some, same_bits
from tilewright_testing.state import left_alone
from tilewright_testing.suite import PluginSuite

if TYPE_CHECKING:
    from torch import Tensor

Open = Callable[[], TensorSource]
T = TypeVar("T")

_CUTS: dict[str, Callable[[int], int]] = {
    "to 0 bytes": lambda size: 0,
    "to 1 byte": lambda size: 1,
    "to 8 bytes": lambda size: 8,
    "to 100 bytes": lambda size: 100,
    "to half its size": lambda size: size // 2,
    "by 1 byte": lambda size: size - 1,
}


_SECONDS = 1.0
"""Time after which a test interrupts no further reads, once it has interrupted two."""

_SHARED = (
    "check whether calls of get() share a file position, a buffer or an object that is not yet "
    "complete; a lock must be held until the tensor has its own memory"
)


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

    def test_info_matches_the_tensors_that_get_returns(self, opened: Open) -> None:
        source = opened()
        names = source.names()
        assert len(names) == len(set(names)) > 0, (
            "names() must return each tensor's name once, and at least one name"
        )
        for name in names:
            info, tensor = source.info(name), source.get(name)
            said = (info.shape, info.dtype, info.nbytes)
            found = (tuple(tensor.shape), dtype_name(tensor), tensor.nbytes)
            assert said == found, (
                f"info({name!r}) must give the shape, dtype and nbytes of the tensor that get() "
                f"returns: {found}, found {said}"
            )
            assert type(info.shape) is tuple, (
                f"TensorInfo.shape must be a tuple, found {info.shape!r}"
            )
            assert tensor.device.type == "cpu", f"get({name!r}) must return a tensor on the CPU"
            assert info.location, f"info({name!r}).location must name the file, for error messages"

    def test_reading_a_tensor_twice_gives_the_same_values(self, opened: Open) -> None:
        source = opened()
        first = read_some(source)
        for name in reversed(list(source.names())):
            assert same_bits(source.get(name), first[name]), (
                f"get({name!r}) must return the same tensor each time, in any order of calls"
            )

    def test_an_unknown_name_raises_key_error(self, opened: Open) -> None:
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

    def test_weights_are_not_read_before_get(self, opened: Open, files: Path) -> None:
        """The files are overwritten once they are open: a later read returns other data or raises
        an error, so tensors that are unchanged were read too early."""
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
            f"memory before get() requested them, such as {kept[0]!r}"
        )

    def test_opening_reads_headers_only(self, opened: Open, files: Path) -> None:
        warm = opened()  # imported modules are read once
        weights = sum(warm.info(name).nbytes for name in warm.names())
        others = max(0, sum(path.stat().st_size for path in files_of(files)) - weights)
        allowed = 3 * others + weights // 2
        if allowed >= weights:
            pytest.skip(
                f"{weights} bytes of weights and {others} other bytes are too few for this test"
            )
        read = min(_read_by(opened) for _ in range(3))  # other threads read, too
        assert read <= allowed, (
            f"opening must read headers only, but read {read} bytes; the weights have {weights} "
            f"bytes, everything else {others}"
        )

    def test_opening_and_reading_do_not_change_files(self, opened: Open, files: Path) -> None:
        folder = files if files.is_dir() else files.parent
        before = contents(folder)
        source = opened()
        read_some(source)
        source.close()
        after = contents(folder)
        changed = [p.name for p in {**before, **after} if before.get(p) != after.get(p)]
        assert not changed, f"reading must not change the files, but changed {changed}"

    def test_several_threads_read_the_same_as_one(self, opened: Open) -> None:
        """Threads meet by chance here, also within functions in C, which no test can interrupt."""
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
            "four threads that read at once must get the same tensors as one thread, but "
            f"{wrong[0]}: check whether calls of get() share a file position"
        )

    def test_a_read_that_another_thread_interrupts_gives_the_same_values(
        self, opened: Open
    ) -> None:
        """At each step of one read, another thread reads another tensor."""
        expected = read_some(opened())
        source = opened()
        until = perf_counter() + _SECONDS
        for number, (name, other) in enumerate(_pairs(source, expected)):
            if number >= 2 and perf_counter() > until:
                break
            _check_interrupted(source, name, other, expected)

    def test_a_first_read_that_another_thread_interrupts_gives_the_same_values(
        self, opened: Open
    ) -> None:
        """Steps that only the first read takes, such as opening a file, are interrupted one by one,
        each with weights that were just opened."""
        expected = read_some(opened())
        name, other = next(_pairs(opened(), expected))
        source = opened()
        first = steps_of(partial(_read, source, name))
        later = set(steps_of(partial(_read, source, name)))
        source.close()
        del source
        # The plugin's own code before that of the libraries it calls.
        prepares = sorted({s for s in first if s not in later}, key=lambda step: len(step.place))
        before = open_files()
        until = perf_counter() + _SECONDS
        for number, step in enumerate(prepares):
            if number >= 2 and perf_counter() > until:
                break
            for second in {name, other}:
                source = opened()
                _check_interrupted(source, name, second, expected, step)
                source.close()
                del source
        left = still_open(before)
        assert not left, (
            "two threads that read first at once must not open files that close() leaves open, but "
            f"{', '.join(left)} stayed open"
        )

    def test_opening_and_reading_leave_the_process_unchanged(self, opened: Open) -> None:
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
        left = still_open(before)
        assert not left, f"close() must close the files, but {', '.join(left)} stayed open"

    def test_tensors_stay_valid_when_their_source_is_closed(self, opened: Open) -> None:
        expected = read_some(opened())
        source = opened()
        tensors = {name: source.get(name) for name in expected}
        source.close()
        del source
        open_files()  # collects garbage
        for name, tensor in tensors.items():
            assert same_bits(tensor, expected[name]), (
                f"tensors that get() returned must stay valid after close(), but {name!r} changed"
            )

    def test_closing_one_source_leaves_another_open(self, opened: Open) -> None:
        expected = read_some(opened())
        one, other = opened(), opened()
        one.close()
        for name, tensor in expected.items():
            assert same_bits(other.get(name), tensor), (
                f"closing one source must not affect another, but {name!r} changed"
            )

    # --- damaged files ---------------------------------------------------------------------------

    @pytest.mark.parametrize("cut", _CUTS)
    def test_a_truncated_file_raises_model_error(self, opened: Open, files: Path, cut: str) -> None:
        expected = read_some(opened())
        for path in files_of(files):
            data = path.read_bytes()
            length = _CUTS[cut](len(data))
            if length < len(data):
                path.write_bytes(data[:length])
                refused_or_whole(
                    lambda: self.read(opened), expected, f"with {path.name} truncated {cut}"
                )
                path.write_bytes(data)

    def test_a_missing_file_raises_model_error(self, opened: Open, files: Path) -> None:
        expected = read_some(opened())
        for path in files_of(files):
            data = path.read_bytes()
            path.unlink()
            refused_or_whole(lambda: self.read(opened), expected, f"without {path.name}")
            path.write_bytes(data)

    def test_a_file_with_other_content_raises_model_error(self, opened: Open, files: Path) -> None:
        expected = read_some(opened())
        for path in files_of(files):
            data = path.read_bytes()
            for what, other in (("zeros", bytes(1000)), ("text", b"<html>not found</html>\n" * 50)):
                path.write_bytes(other)
                refused_or_whole(lambda: self.read(opened), expected, f"with {what} in {path.name}")
            path.write_bytes(data)

    def test_a_changed_byte_raises_only_model_error(self, opened: Open, files: Path) -> None:
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


def _pairs(source: TensorSource, expected: "Mapping[str, Tensor]") -> Iterator[tuple[str, str]]:
    """Names of two tensors, in both orders: a reader of the wrong place in a file may find what it
    looks for behind one tensor, but not behind either. In one file and with different content,
    where there are such."""
    names = [name for name, tensor in expected.items() if tensor.numel()]
    for name in names:
        others = [other for other in names if not same_bits(expected[name], expected[other])]
        place = source.info(name).location
        beside = (other for other in others if source.info(other).location == place)
        other = next(beside, next(iter(others), name))
        yield name, other
        yield other, name


def _read(source: TensorSource, name: str) -> "Tensor":
    source.info(name)
    return source.get(name)


def _check_interrupted(
    source: TensorSource,
    name: str,
    other: str,
    expected: "Mapping[str, Tensor]",
    only: Step | None = None,
) -> None:
    def check(name: str, tensor: "Tensor") -> None:
        assert same_bits(tensor, expected[name]), f"get({name!r}) returned other values"

    try:
        tensor = interrupted(
            partial(_read, source, name), lambda: check(other, _read(source, other)), only
        )
        check(name, tensor)
    except Exception as error:
        why = str(error) if isinstance(error, AssertionError) else repr(error)
        pytest.fail(
            f"while one thread is in get({name!r}), another must be able to call get({other!r}), "
            f"but {' '.join(why.split())[:200]}: {_SHARED}",
            pytrace=False,
        )


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
            f"{when}, opening or reading must raise ModelError with a one-line message, not "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            pytrace=False,
        )
    assert len(lines) == 1, (
        f"a ModelError's message must be one line; {when} it has {len(lines)} lines: {lines[:2]}"
    )
    return None


def refused_or_whole(
    attempt: "Callable[[], Mapping[str, Tensor]]", expected: "Mapping[str, Tensor]", when: str
) -> None:
    """Fail unless reading raises ModelError or returns the same tensors as before: damage outside
    the weights may go unnoticed, wrong weights may not."""
    found = refused(attempt, when)
    if found is None:
        return
    wrong = [
        name
        for name in {**expected, **found}
        if name not in expected or name not in found or not same_bits(found[name], expected[name])
    ]
    assert not wrong, (
        f"{when}, opening or reading must raise ModelError, but returned different tensors: "
        f"{wrong[:3]}"
    )
