"""The conformance suite of loaders."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from attrs import fields

from tilewright import plugins
from tilewright.errors import TilewrightError
from tilewright.loading import InstalledFormats
from tilewright.paths import expanded
from tilewright.types import (
    DTYPES,
    GenerateConfig,
    LoadedModel,
    ModelConfig,
    Sample,
    TensorSource,
    TextAssets,
    WeightFormats,
)
from tilewright.weights import check_tensors
from tilewright_testing.files import files_of
from tilewright_testing.models import Model, read_some, same_bits
from tilewright_testing.samples import WRITERS, Written
from tilewright_testing.state import left_alone
from tilewright_testing.suite import Implementation, in_fresh_process, no_report, target_of
from tilewright_testing.tensor_source import Open, TensorSourceSuite, refused
from tilewright_testing.values import check_values, unseen

Load = Callable[..., LoadedModel]

_LARGEST_COPY = 2**26
"""Largest source in bytes that is copied, for tests that damage it."""

_STRANGE = ("", " ", ".", "..", "/", "a/b", "a/b@c", "x" * 5000, "a\0b", "\udcff", "~", "/dev/null")
"""Sources that users write by mistake, or that other loaders accept."""


class LoaderSuite(TensorSourceSuite):
    """Checks one loader against ``LoaderHooks``, ``LoadedModel`` and ``TensorSource``.

    Fixtures to give: ``plugin``; ``source``, unless the plugin implements the hook write_sample,
    whose Sample states the values of the weights; ``expected``, to check the configuration and the
    tokenizer, too; and ``options`` where needed.
    """

    kind: ClassVar[str] = "loader"

    @pytest.fixture
    def written(self, implementation: Implementation, tmp_path: Path) -> Written | None:
        """A sample of a shipped loader; None for the loaders of others."""
        write = WRITERS.get(getattr(implementation.plugin, "__name__", ""))
        return write(_folder(tmp_path)) if write else None

    @pytest.fixture
    def sample(
        self, implementation: Implementation, written: Written | None, tmp_path: Path
    ) -> Sample | None:
        """A model that the plugin wrote, and its tensors; None if it writes none."""
        if written:
            return Sample(source=str(written.source), tensors=written.model.tensors)
        if not implementation.implements("write_sample"):
            return None
        found = implementation.call("write_sample", directory=_folder(tmp_path))
        if not isinstance(found, Sample):
            pytest.fail(
                f"write_sample() must return a tilewright.types.Sample, found {found!r:.100}",
                pytrace=False,
            )
        return found

    @pytest.fixture
    def source(self, sample: Sample | None) -> str | Path:
        """A model that the plugin loads, as a user would name it. It is not changed."""
        if sample is None:
            pytest.skip(
                "no model to load: give the suite a fixture 'source', implement write_sample, or "
                "verify with --source"
            )
        return sample.source

    @pytest.fixture
    def expected(self, source: str | Path, written: Written | None) -> Model | None:
        """The complete model that the source's files were written from; None: not known."""
        return written.model if written and str(written.source) == str(source) else None

    @pytest.fixture
    def stated(self, sample: Sample | None) -> Sample:
        """The sample, if it states its tensors."""
        if sample is None or sample.tensors is None:
            pytest.skip(
                "the values of the weights were not checked: write_sample() must return a Sample "
                "with the tensors that the loader must return"
            )
        return sample

    @pytest.fixture
    def copied(self, source: str | Path, tmp_path: Path) -> str | Path:
        """A copy of the source, in a folder with spaces and letters beyond ASCII in its name. The
        source itself if it is not a local path or too large."""
        place = Path(expanded(str(source)))
        if not place.exists() or sum(p.stat().st_size for p in files_of(place)) > _LARGEST_COPY:
            return source
        folder = tmp_path / "a cöpy"
        if place.is_dir():
            return Path(shutil.copytree(place, folder))
        folder.mkdir()
        # Files beside it may belong to it, such as other shards.
        for path in place.parent.iterdir():
            if path.is_file() and path.stat().st_size <= _LARGEST_COPY:
                shutil.copy(path, folder)
        return folder / place.name

    @pytest.fixture
    def files(self, source: str | Path, copied: str | Path) -> Path:
        if copied is source:
            pytest.skip(f"{source} is not a local path, or is larger than {_LARGEST_COPY} bytes")
        return Path(copied)

    @pytest.fixture
    def load(self, implementation: Implementation, copied: str | Path) -> Iterator[Load]:
        """Loads the copied source, or another; loaded models are closed when the test ends."""
        loaded: list[LoadedModel] = []
        formats = InstalledFormats(plugins.new_manager(), {})

        def load(
            source: str | Path = copied,
            weight_format: str | None = None,
            formats: WeightFormats = formats,
        ) -> LoadedModel:
            model: LoadedModel = implementation.call(
                "load_model",
                source=str(source),
                options=implementation.options,
                weight_format=weight_format,
                formats=formats,
                report=no_report,
            )
            loaded.append(model)
            return model

        yield load
        for model in loaded:
            with suppress(Exception):  # already closed by the test
                model.weights.close()

    @pytest.fixture
    def opened(self, load: Load) -> Open:
        return lambda: load().weights

    # --- can_load --------------------------------------------------------------------------------

    def test_can_load_is_true_for_its_source(
        self, implementation: Implementation, copied: str | Path
    ) -> None:
        found = implementation.call("can_load", source=str(copied))
        assert found is True, (
            f"can_load() must return True for a source that it can load, found {found!r}"
        )

    def test_can_load_is_false_for_other_sources(
        self, implementation: Implementation, tmp_path: Path
    ) -> None:
        empty, others, file = tmp_path / "empty", tmp_path / "others", tmp_path / "notes.txt"
        empty.mkdir()
        others.mkdir()
        (others / "README.md").write_text("# Not a model\n")
        file.write_text("not a model")
        for what, source in (
            ("an empty directory", empty),
            ("a directory with other files", others),
            ("a path that does not exist", tmp_path / "absent"),
            ("a text file", file),
        ):
            found = implementation.call("can_load", source=str(source))
            assert found is False, f"can_load() must return False for {what}, found {found!r}"

    def test_can_load_is_cheap_and_has_no_side_effects(
        self, plugin: Any, implementation: Implementation, copied: str | Path
    ) -> None:
        target = target_of(plugin, implementation)
        sources = [str(copied), *_STRANGE]
        found = in_fresh_process("probe_loader", target, sources)
        bad = [
            f"{source!r:.40} it {answer}"
            for source, answer in zip(sources, found["answers"], strict=True)
            if not isinstance(answer, bool)
        ]
        assert not bad, f"can_load() must return True or False for any source, but for {bad[0]}"
        assert not found["torch"], (
            "can_load() must be cheap: it and its module must not import torch, which takes seconds"
        )
        assert not found["effects"], (
            f"can_load() must not have side effects, found {', '.join(found['effects'][:3])}"
        )
        place = Path(copied)
        size = sum(path.stat().st_size for path in files_of(place)) if place.exists() else 0
        assert size < 2**16 or found["bytes"] < size // 2, (
            f"can_load() must not read weights, but read {found['bytes']} of the source's {size} "
            "bytes"
        )

    # --- load_model ------------------------------------------------------------------------------

    def test_it_returns_a_loaded_model_with_fields_of_the_right_types(self, load: Load) -> None:
        model = load()
        assert isinstance(model, LoadedModel), (
            f"load_model() must return a LoadedModel, found {model!r:.100}"
        )
        for part, kind in (
            ("config", ModelConfig),
            ("text", TextAssets),
            ("generation_defaults", GenerateConfig),
            ("source", str),
            ("warnings", tuple),
        ):
            found = getattr(model, part)
            assert isinstance(found, kind), (
                f"LoadedModel.{part} must be a {kind.__name__}, found {found!r:.100}"
            )
        assert model.source, "LoadedModel.source must name the source, for error messages"
        for warning in model.warnings:
            assert len(str(warning).splitlines()) == 1, (
                f"a warning must be one line, found {warning!r}"
            )

    def test_the_configuration_is_consistent(self, load: Load) -> None:
        config = load().config
        sizes = {a.name: getattr(config, a.name) for a in fields(ModelConfig) if a.type is int}
        odd = {name: size for name, size in sizes.items() if type(size) is not int or size < 1}
        assert not odd, f"sizes in ModelConfig must be positive integers, found {odd}"
        assert config.num_heads % config.num_kv_heads == 0, (
            "num_heads must be a multiple of num_kv_heads, found "
            f"{config.num_heads} and {config.num_kv_heads}"
        )
        assert config.head_dim % 2 == 0, f"RoPE needs an even head_dim, found {config.head_dim}"
        assert config.dtype in DTYPES, f"dtype must be one of {DTYPES}, found {config.dtype!r}"
        assert 0.0 <= config.norm_eps < 1.0, f"norm_eps must be in [0, 1), found {config.norm_eps}"
        windows = len(config.sliding_windows)
        assert windows in (0, config.num_layers), (
            f"sliding_windows must have one entry per layer, {config.num_layers}, or none, found "
            f"{windows}"
        )

    def test_the_weights_have_the_names_and_shapes_that_the_configuration_needs(
        self, load: Load
    ) -> None:
        model = load()
        if model.packing is not None:
            pytest.skip("packed weights have names and shapes that their executor defines")
        try:
            check_tensors(model.weights, model.config, model.source)
        except TilewrightError as error:
            pytest.fail(
                f"names and shapes must be those of tilewright.weights.expected_tensors: {error}",
                pytrace=False,
            )

    def test_the_loaded_model_matches_the_expected_one(
        self, load: Load, expected: Model | None
    ) -> None:
        if expected is None:
            pytest.skip(
                "the configuration and the tokenizer of the source are not known: give the suite a "
                "fixture 'expected'"
            )
        model = load()
        assert model.config == expected.config, "the configuration must equal that of 'expected'"
        found = read_some(model.weights)
        assert set(found) == set(expected.tensors), (
            "the tensors' names must equal those of 'expected'"
        )
        for name, tensor in expected.tensors.items():
            assert same_bits(found[name], tensor), f"tensor {name} must equal that of 'expected'"
        vocabulary = model.text.tokenizer.get_vocab()
        assert vocabulary == expected.text.tokenizer.get_vocab(), (
            "the tokenizer's vocabulary must equal that of 'expected'"
        )

    def test_the_weights_have_the_values_that_the_sample_states(
        self, load: Load, stated: Sample
    ) -> None:
        assert stated.tensors is not None
        weights = load(stated.source).weights
        assert set(weights.names()) == set(stated.tensors), (
            "Sample.tensors must name the tensors of LoadedModel.weights, but only one of them "
            f"has {sorted(set(weights.names()) ^ set(stated.tensors))[:4]}"
        )
        found = {name: weights.get(name) for name in weights.names()}
        check_values(found, stated.tensors, stated.tolerance)

    def test_the_samples_values_would_show_a_mistake(self, stated: Sample) -> None:
        assert stated.tensors is not None
        hidden = list(unseen(stated.tensors, stated.tolerance))
        assert not hidden, (
            f"the sample must have values that show mistakes, but within its tolerance of "
            f"{stated.tolerance:g} these {len(hidden)} would not show, such as {hidden[0]}: write "
            "random weights, such as those of tilewright_testing.models.make_model()"
        )
        shapes = [tuple(tensor.shape) for tensor in stated.tensors.values()]
        if not any(len(shape) == 2 and shape[0] == shape[1] for shape in shapes):
            pytest.skip(
                "no matrix of the sample is square, so that a scale along the wrong axis, or a "
                "transposed matrix, was not looked for"
            )

    def test_loading_twice_gives_equal_models(self, load: Load) -> None:
        one, other = load(), load()
        assert one.config == other.config, "loading twice must give equal configurations"
        assert one.text.tokenizer.to_str() == other.text.tokenizer.to_str(), (
            "loading twice must give equal tokenizers"
        )
        assert one.weights is not other.weights, (
            "each model must have its own weights, which are closed with it"
        )

    def test_models_may_be_loaded_in_several_threads(self, load: Load) -> None:
        expected = read_some(load().weights)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: read_some(load().weights), range(8)))
        for tensors in found:
            for name, tensor in expected.items():
                assert same_bits(tensors[name], tensor), (
                    f"tensor {name} differs when models are loaded in several threads"
                )

    def test_loading_leaves_the_process_unchanged(self, load: Load) -> None:
        with left_alone("load_model()"):
            load()

    def test_a_named_weight_format_opens_the_weights(
        self, load: Load, implementation: Implementation
    ) -> None:
        class Recorded:
            """Opens any format under any name, and records the requested names."""

            def __init__(self) -> None:
                self.names: list[str | None] = []
                self.formats = InstalledFormats(plugins.new_manager(), {})

            def open(self, directory: Path, name: str | None = None) -> TensorSource:
                self.names.append(name)
                return self.formats.open(directory)

        recorded = Recorded()
        load(formats=recorded)
        if not recorded.names:
            pytest.skip("the loader opens its weights without a weight format plugin")
        named = Recorded()
        load(weight_format="some-format", formats=named)
        assert recorded.names == [None] * len(recorded.names), (
            f"without a named format, formats.open() must be called without a name, found "
            f"{recorded.names}"
        )
        assert named.names == ["some-format"] * len(named.names), (
            f"weight_format must be passed to formats.open(), which got {named.names}"
        )

    # --- text ------------------------------------------------------------------------------------

    def test_token_ids_are_within_the_vocabulary(self, load: Load) -> None:
        model = load()
        size = model.config.vocab_size
        ids = set(model.text.tokenizer.get_vocab(with_added_tokens=True).values())
        assert max(ids, default=size) < size, (
            f"the tokenizer's ids must be below vocab_size = {size}, found {max(ids, default=None)}"
        )
        bos, eos = model.config.bos_token_id, model.config.eos_token_ids
        assert type(eos) is tuple, f"eos_token_ids must be a tuple, found {eos!r}"
        bad = [i for i in (*eos, *([] if bos is None else [bos])) if not 0 <= i < size]
        assert not bad, f"bos and eos ids must be from 0 to {size - 1}, found {bad}"
        ends = model.text.turn_end_ids
        assert type(ends) is tuple, f"turn_end_ids must be a tuple, found {ends!r}"
        bad = [i for i in ends if not 0 <= i < size]
        assert not bad, f"turn_end_ids must be from 0 to {size - 1}, found {bad}"

    def test_text_survives_a_round_trip_through_the_tokenizer(self, load: Load) -> None:
        model = load()
        tokenizer = model.text.tokenizer
        known = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
        texts = ["Hello, world! 12 + 3 = 15\n", "Grüße, 東京 🙂", tokenizer.decode(known[-20:])]
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert all(0 <= i < model.config.vocab_size for i in ids), (
                f"the ids of {text!r} must be below vocab_size, found {max(ids)}"
            )
            once = tokenizer.decode(ids)
            again = tokenizer.decode(tokenizer.encode(once, add_special_tokens=False).ids)
            assert again == once, (
                f"decoded text must encode and decode to itself, but {once!r} became {again!r}"
            )

    def test_the_tokenizer_does_not_truncate_or_pad(self, load: Load) -> None:
        tokenizer = load().text.tokenizer
        assert tokenizer.truncation is None, "truncation must be off: it would shorten long prompts"
        assert tokenizer.padding is None, "padding must be off: it would lengthen every prompt"

    def test_the_chat_template_is_valid_jinja(self, load: Load) -> None:
        text = load().text
        templates = [t for t in (text.chat_template, text.tool_chat_template) if t is not None]
        if not templates:
            pytest.skip("the model has no chat template")
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        extensions = ["jinja2.ext.loopcontrols", "jinja2.ext.do"]
        for template in templates:
            try:
                ImmutableSandboxedEnvironment(extensions=extensions).parse(template)
            except TemplateSyntaxError as error:
                if "generation" not in str(error):  # a tag that only transformers supports
                    pytest.fail(f"chat_template must be valid Jinja: {error}", pytrace=False)

    # --- invalid sources -------------------------------------------------------------------------

    def test_an_invalid_source_raises_model_error(
        self, implementation: Implementation, tmp_path: Path
    ) -> None:
        empty, file = tmp_path / "empty", tmp_path / "notes.txt"
        empty.mkdir()
        file.write_text("not a model")
        for what, source in (
            ("an empty directory", str(empty)),
            ("a path that does not exist", str(tmp_path / "absent")),
            ("a text file", str(file)),
            ("a path with a null byte", f"{empty}\0"),
        ):
            load = partial(
                implementation.call,
                "load_model",
                source=source,
                options=implementation.options,
                weight_format=None,
                formats=InstalledFormats(plugins.new_manager(), {}),
                report=no_report,
            )
            model = refused(load, f"with {what}")
            assert model is None, f"load_model() must raise ModelError for {what}"


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "sample"
    folder.mkdir()
    return folder
