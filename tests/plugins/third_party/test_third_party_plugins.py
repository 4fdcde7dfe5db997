"""Other people's plugins in LLMEngine: the shipped ones are not needed, nor anything special."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import plugin_distributions as dists
import pytest
import torch
from attrs import evolve
from checkout import ROOT
from plugin_distributions import Install

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, plugins
from tilewright.errors import ConfigError, NonFiniteLogitsError, PluginError
from tilewright.types import SampledToken, SamplerRow, SamplingParams

GOOD = {
    "loader": "bag-random",
    "executor": "bag",
    "kv_allocator": "slab",
    "sampler": "likeliest",
}
PROMPTS = ["w1 w2 w3", "w5", "w3 w4 w5 w6 w7 w7 w7"]
PAGES_OF_TWO = RuntimeConfig(page_size=2, max_seq_len=20)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Install]:
    with dists.on_path(tmp_path / "site") as install:
        yield install


def continued(prompt: str, tokens: int, seed: int = 0, least: bool = False) -> str:
    """What the bag of words says, computed without pages, steps or plugins."""

    def weights(index: int) -> torch.Tensor:
        return torch.randn(32, 8, generator=torch.Generator().manual_seed(seed + index))

    # The embedding is the first and the head the last of the model's twelve weights.
    embed, head = weights(0), weights(11)
    ids = [int(word[1:]) for word in prompt.split()]
    for _ in range(tokens):
        logits = embed[ids].mean(0) @ head.T
        ids.append(int(logits.argmin() if least else logits.argmax()))
    return " ".join(f"w{i}" for i in ids[-tokens:])


def texts(engine: LLMEngine, config: GenerateConfig | None = None) -> list[str]:
    return [result.text for result in engine.generate_batch("m", PROMPTS, config)]


def test_an_engine_of_third_party_plugins_alone(site: Install, tmp_path: Path) -> None:
    site(dists.GOOD, dists.BROKEN_IMPORT, dists.MISSPELT_HOOK)
    told = tmp_path / "told.txt"
    options = {"loader": {"seed": "7"}, "observer": {"tally": {"path": str(told)}}}
    with LLMEngine.from_plugins(**GOOD, observers=["tally"], options=options) as engine:
        engine.init_model("m", "random:", PAGES_OF_TWO)
        assert engine.generate("m", "w1 w2 w3") == continued("w1 w2 w3", 4, seed=7)
        assert texts(engine, GenerateConfig(max_new_tokens=9)) == [
            continued(prompt, 9, seed=7) for prompt in PROMPTS
        ]
        allocator = engine.model("m").allocator
        allocator.check_integrity()
        assert allocator.free_pages + allocator.evictable_pages == allocator.total_pages
    lines = told.read_text().splitlines()
    assert lines[:6] == ["loaded m Bag", "prefill 3", *["decode 1"] * 3, "finished length"]
    assert lines[6:] == ["prefill 11", *["decode 3"] * 8, *["finished length"] * 3]


def test_shipped_plugins_and_others_work_together(site: Install) -> None:
    site(dists.GOOD)
    chosen = {**GOOD, "kv_allocator": "paged", "sampler": "top-p"}
    with LLMEngine.from_plugins(**chosen) as engine:
        engine.init_model("m", "random:", PAGES_OF_TWO)
        config = GenerateConfig(max_new_tokens=9, temperature=0)
        assert texts(engine, config) == [continued(prompt, 9) for prompt in PROMPTS]


def test_two_engines_with_different_plugins_side_by_side(site: Install, tmp_path: Path) -> None:
    site(dists.GOOD, *dists.RIVALS)
    told = tmp_path / "told.txt"
    one = LLMEngine.from_plugins(**{**GOOD, "sampler": "acme-one:rival"})
    two = LLMEngine.from_plugins(
        **{**GOOD, "sampler": "acme-two:rival", "kv_allocator": "paged"},
        observers=["tally"],
        options={"loader": {"seed": 5}, "observer": {"tally": {"path": told}}},
    )
    with one, two:
        for engine in (one, two):
            engine.init_model("m", "random:", PAGES_OF_TWO)
        streams = [e.generate("m", PROMPTS[0], GenerateConfig(stream=True)) for e in (one, two)]
        pieces = list(zip(*streams, strict=True))
    assert ["".join(text) for text in zip(*pieces, strict=True)] == [
        continued(PROMPTS[0], 4),
        continued(PROMPTS[0], 4, seed=5, least=True),
    ]
    assert told.read_text().count("loaded") == 1
    assert told.read_text().count("finished") == 1


CHILD = """
import json, sys
from tilewright import LLMEngine
with LLMEngine.from_plugins(**json.loads(sys.argv[1])) as engine:
    engine.init_model("m", "random:")
    text = engine.generate("m", "w1 w2 w3")
imported = sorted(m for m in sys.modules if m.startswith(("acme", "tilewright_")))
print(json.dumps({"text": text, "imported": imported}))
"""


def test_a_selection_is_made_again_in_another_process(site: Install) -> None:
    folder = site(dists.GOOD, dists.BROKEN_IMPORT, *dists.RIVALS)
    chosen = {**GOOD, "sampler": "Acme.Two:rival"}
    with LLMEngine.from_plugins(**chosen, options={"loader": {"seed": 3}}) as engine:
        engine.init_model("m", "random:")
        here = engine.generate("m", "w1 w2 w3")
        selection = json.dumps(engine.selection)
    done = dists.run("-c", CHILD, selection, site=folder)
    assert done.code == 0, done.err
    there = json.loads(done.out)
    assert there["text"] == here == continued("w1 w2 w3", 4, seed=3, least=True)
    assert there["imported"] == [
        "acme_bag",
        "acme_bag.executor",
        "acme_bag.loader",
        "acme_bag.slab",
        "acme_two",
    ]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("sampler", "broken", "ModuleNotFoundError: No module named 'a_library"),
        ("sampler", "misspelt", "did you mean 'create_sampler'?"),
        ("sampler", "rival", "choose 'acme-one:rival' or 'acme-two:rival'"),
        ("executor", "bags", "did you mean 'bag'?"),
        ("kv_allocator", "tally", "no kv allocator is named 'tally' (installed: paged, slab)"),
    ],
)
def test_a_selection_that_cannot_be_is_refused_and_nothing_takes_its_place(
    site: Install, kind: str, name: str, message: str
) -> None:
    site(dists.GOOD, dists.BROKEN_IMPORT, dists.MISSPELT_HOOK, *dists.RIVALS)
    with pytest.raises(PluginError) as caught:
        LLMEngine.from_plugins(**{**GOOD, kind: name})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": {"sede": 1}}, "unknown option 'sede'; did you mean 'seed'? (options: seed, "),
        ({"loader": {"words": 1}}, "'words' must be >= 2: 1"),
        ({"sampler": {"a": 1}}, "sampler 'likeliest' has no options, found 'a'"),
    ],
)
def test_options_go_to_the_plugin_that_they_are_for(
    site: Install, options: dict[str, Any], message: str
) -> None:
    site(dists.GOOD)
    with pytest.raises(ConfigError) as caught:
        LLMEngine.from_plugins(**GOOD, options=options)
    assert message in str(caught.value)


# --- what the documentation shows -----------------------------------------------------------------


def test_the_sampler_in_the_documentation_works(site: Install) -> None:
    distribution = dists.documented((ROOT / "docs/writing-plugins.md").read_text())
    assert len(distribution.files["acme_top_a.py"].splitlines()) < 60
    site(dists.GOOD, distribution)
    drawing = GenerateConfig(max_new_tokens=9, temperature=2.0, seed=11)

    def run(config: GenerateConfig, **options: str) -> list[str]:
        with LLMEngine.from_plugins(
            **{**GOOD, "sampler": "top-a"}, options={"sampler": options}
        ) as engine:
            engine.init_model("m", "random:", PAGES_OF_TWO)
            # In a batch, prompt i is sampled with seed + i.
            seeded = [evolve(config, seed=11 + i) for i in range(len(PROMPTS))]
            alone = list(map(partial(engine.generate, "m"), PROMPTS, seeded))
            assert texts(engine, config) == alone
            return alone

    greedy = [continued(prompt, 9) for prompt in PROMPTS]
    assert run(GenerateConfig(max_new_tokens=9, temperature=0)) == greedy
    assert run(drawing, a="1") == run(drawing, a="1")
    assert run(drawing, a="0") == run(drawing, a="0") != greedy

    made = plugins.load(plugins.find("sampler", "acme-top-a:top-a"))
    sampler = made.TopA(0.5)
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    tokens = {sampler.choose(logits, row(seed)) for seed in range(100)}
    # 0.5 * 0.6 ** 2 = 0.18
    assert tokens == {0, 1}
    one = sampler.choose(logits, row(0))
    assert sampler.sample(logits[None], [row(0)]) == [SampledToken(token_id=one)]
    with pytest.raises(NonFiniteLogitsError):
        sampler.choose(torch.tensor([0.0, float("nan")]), row(0))


def row(seed: int) -> SamplerRow:
    return SamplerRow(
        request_id="r",
        params=SamplingParams(temperature=1.0, seed=seed),
        prompt_token_ids=(),
        output_token_ids=(),
        position=0,
    )


def test_the_observer_in_the_readme_works(
    site: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    site(dists.GOOD, dists.documented((ROOT / "README.md").read_text()))
    with LLMEngine.from_plugins(**GOOD, observers=["step-times"]) as engine:
        engine.init_model("m", "random:")
        engine.generate("m", "w1 w2 w3")
    words = [line.split()[:2] for line in capsys.readouterr().err.splitlines()]
    assert words == [["prefill", "3"], *[["decode", "1"]] * 3]
