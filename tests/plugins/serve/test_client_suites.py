"""Suites and tools of others against the server. What each of them shows is in docs/clients.md."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from serving import serving

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL
from tilewright_serve import create_app

pytestmark = pytest.mark.slow


@contextmanager
def demo(*names: str, max_seq_len: int = 128) -> Iterator[tuple[LLMEngine, str]]:
    """An engine with the bundled model under some names, and the URL where they are served."""
    with LLMEngine.from_plugins() as engine:
        for name in names:
            runtime = RuntimeConfig(weight_dtype="float32", max_seq_len=max_seq_len)
            engine.init_model(name, DEMO_MODEL, runtime)
        with serving(create_app(engine)) as url:
            yield engine, url


# --- the tests of OpenAI's client ----------------------------------------------------------------

OPENAI_FILES = [
    f"tests/api_resources/{name}.py" for name in ("test_completions", "chat/test_completions")
] + ["tests/api_resources/test_models.py"]

OPENAI_MODELS = (
    "gpt-3.5-turbo-instruct",
    "gpt-6-astra",
    "model",
    "ft:gpt-4o-mini:acemeco:suffix:abc123",
)
"""The names that these tests use."""

CREATED = {
    "test_method_create_with_all_params",  # best_of = 0, max_tokens = 0
}
NOT_SERVED = {
    f"test_{how}_{what}"
    for how in ("method", "raw_response", "streaming_response")
    for what in ("list", "retrieve", "update", "delete")
} | {"test_method_list_with_all_params"}
"""Chat completions are not stored, and a model cannot be deleted through the server."""


def expected_to_fail(where: str, name: str) -> bool:
    plain = name.partition("[")[0].removesuffix("_overload_1").removesuffix("_overload_2")
    if "test_models" in where:
        return plain in NOT_SERVED and plain.endswith("_delete")
    return plain in CREATED | NOT_SERVED


def test_openai_s_own_tests(tmp_path: Path) -> None:
    pytest.importorskip("pytest_asyncio")
    wanted = f"openai=={version('openai')}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--no-build-isolation", "-d", str(tmp_path), wanted], check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / sdist.name.removesuffix(".tar.gz")
    (folder / "empty.ini").write_text("[pytest]\n")
    with demo(*OPENAI_MODELS, max_seq_len=48) as (_, url):
        options = ["-q", "-c", "empty.ini", "--rootdir", ".", "-p", "no:xdist", "--junitxml=r.xml"]
        asyncio = ["asyncio_mode=auto", "asyncio_default_fixture_loop_scope=session"]
        options += [part for one in asyncio for part in ("-o", one)]
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, *OPENAI_FILES],
            cwd=folder,
            env={**os.environ, "TEST_API_BASE_URL": f"{url}/v1"},
            check=False,
            timeout=900,
        )
    cases = list(ElementTree.parse(folder / "r.xml").iter("testcase"))
    failed = {(c.get("classname", ""), c.get("name", "")) for c in cases if len(c)}
    every = {(c.get("classname", ""), c.get("name", "")) for c in cases}
    assert failed == {one for one in every if expected_to_fail(*one)}
    assert len(every - failed) > 100


# --- lm-eval ------------------------------------------------------------------------------------

QUESTIONS = [
    ("We hold these truths to be", [" self-evident", " a farce", " hidden"], 0),
    ("When in the Course of", [" a meal", " human events", " the war"], 1),
    ("that all men are created", [" late", " free", " equal"], 2),
    ("We, therefore, the", [" undersigned", " Representatives", " people"], 0),
]


def written_tasks(folder: Path) -> Path:
    """Two tasks of lm-eval over a file of JSON lines: multiple choice, and generation."""
    data = folder / "data.jsonl"
    keys = ("question", "choices", "answer")
    data.write_text("".join(json.dumps(dict(zip(keys, q, strict=True))) + "\n" for q in QUESTIONS))
    shared = (
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {data}, cache_dir: {folder / 'cache'}}}\n"
        "test_split: train\n"
        'doc_to_text: "{{question}}"\n'
        "target_delimiter: ''\n"
    )
    (folder / "choose.yaml").write_text(
        "task: tw_choose\noutput_type: multiple_choice\n"
        + shared
        + 'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "go_on.yaml").write_text(
        "task: tw_go_on\noutput_type: generate_until\n"
        + shared
        + 'doc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs: {until: [","], max_gen_toks: 8, do_sample: false}\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


def test_lm_eval_scores_as_through_the_engine(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(written_tasks(tmp_path)), include_defaults=False)

    def scores(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found = simple_evaluate(
            model=model,
            tasks=["tw_choose", "tw_go_on"],
            task_manager=tasks,
            log_samples=True,
            bootstrap_iters=0,
        )
        answers = {
            name: [one["resps"] for one in sorted(samples, key=lambda one: one["doc_id"])]
            for name, samples in found["samples"].items()
        }
        return found["results"], answers

    with demo("demo", max_seq_len=64) as (engine, url):

        class ThroughEngine(TemplateLM):  # type: ignore[misc]
            """lm-eval's own splitting of contexts and continuations, over an LLMEngine."""

            @property
            def eot_token_id(self) -> int:
                return engine.model("demo").text.assets.turn_end_ids[0]

            def tok_encode(self, string: str, **kwargs: Any) -> list[int]:
                return engine.model("demo").text.encode(string, False)

            def _loglikelihood_tokens(
                self, requests: Sequence[Any], **kwargs: Any
            ) -> list[tuple[float, bool]]:
                made = []
                for _, context, continuation in requests:
                    config = GenerateConfig(max_new_tokens=1, prompt_logprobs=1, temperature=0)
                    result = engine.generate_result("demo", [*context, *continuation], config)
                    found = result.prompt_logprobs[len(context) :]
                    greedy = all(one.token_id == one.top[0][0] for one in found)
                    made.append((sum(one.logprob for one in found), greedy))
                return made

            def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
                made = []
                for context, options in (one.args for one in requests):
                    config = GenerateConfig(
                        max_new_tokens=options["max_gen_toks"],
                        stop=tuple(options["until"]),
                        temperature=0,
                    )
                    ids = self.tok_encode(context)
                    made.append(engine.generate_result("demo", ids, config).text)
                return made

            def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
                raise NotImplementedError

        expected, answers = scores(ThroughEngine())
        for concurrent, batch, tokens in ((1, 1, True), (4, 1, True), (1, 4, True), (2, 1, False)):
            served = LocalCompletionsAPI(
                base_url=f"{url}/v1/completions",
                model="demo",
                tokenizer=str(DEMO_MODEL),
                tokenizer_backend="huggingface",
                num_concurrent=concurrent,
                batch_size=batch,
                tokenized_requests=tokens,
                max_length=64,
            )
            found, said = scores(served)
            assert {n: scored(r) for n, r in found.items()} == {
                n: scored(r) for n, r in expected.items()
            }
            assert said["tw_go_on"] == answers["tw_go_on"]
            pairs = zip(said["tw_choose"], answers["tw_choose"], strict=True)
            for ours, theirs in pairs:
                for ((one, greedy),), ((other, as_greedy),) in zip(ours, theirs, strict=True):
                    assert float(one) == pytest.approx(float(other), abs=1e-4)
                    assert greedy == as_greedy
    assert expected["tw_choose"]["acc,none"] > 0.5


def scored(results: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in results.items() if isinstance(value, float)}


# --- simonw's llm ---------------------------------------------------------------------------------


def test_llm_by_its_file_of_extra_models(tmp_path: Path) -> None:
    pytest.importorskip("llm")
    with demo("demo") as (_, url):
        models = [
            {"model_id": "ours", "model_name": "demo", "supports_schema": True},
            {"model_id": "ours-text", "model_name": "demo", "completion": True},
        ]
        for model in models:
            model["api_base"] = f"{url}/v1"
        (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML

        def llm(*arguments: str, stdin: str = "") -> str:
            done = subprocess.run(
                [sys.executable, "-m", "llm", *arguments],
                env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        assert "ours" in llm("models", "list")
        greedy = ["-o", "temperature", "0", "-o", "max_tokens", "12"]
        asked = ["prompt", "-m", "ours", "We hold these truths to be", *greedy]
        streamed = llm(*asked)
        assert streamed
        assert llm(*asked, "--no-stream") == streamed
        (line,) = json.loads(llm("logs", "list", "--json", "-n", "1"))
        assert (line["model"], line["response"].strip()) == ("ours", streamed)
        assert line["output_tokens"] == 12
        text = llm("prompt", "-m", "ours-text", "We hold these truths to be", *greedy)
        assert text.startswith("self-evident, that all men are")
        assert streamed in llm(
            "chat", "-m", "ours", *greedy, stdin="We hold these truths to be\nexit\n"
        )
        assert llm("prompt", "--continue", "And then?", *greedy)
        schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        schema["additionalProperties"] = False
        made = llm("prompt", "-m", "ours", "--schema", json.dumps(schema), "Is it well?")
        assert json.loads(made) in ({"ok": True}, {"ok": False})
