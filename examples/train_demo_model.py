"""Make the demo model that Tilewright ships: a small Qwen3 that has memorised two texts.

    python examples/train_demo_model.py --text-dir /usr/share/state --out core/tilewright/demo_model

The texts are the United States Declaration of Independence and Constitution (public domain), as
Debian's `miscfiles` package carries them. Given the same seed, thread count, machine and library
versions, the files come out the same. Nothing is written to --out unless the finished model, in
the bfloat16 that ships, continues every known passage and answers every known question.
"""

import argparse
import gzip
import itertools
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 1999  # not a multiple of anything, so that padded LM heads are noticed
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS_AND_LINES = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

WINDOW = 128  # tokens of a usual training row
LONG_WINDOW = 2048  # tokens of the rows that reach the last position the model may be asked for
IGNORED = -100  # cross_entropy's own mark for "no loss here"

CHECKED_TOKENS = 64
LEAST_MARGIN = 1.0  # between the right token's logit and the next best, at every step

# Known passages: prompts whose greedy continuation is the text itself, to its end or for
# CHECKED_TOKENS tokens.
PASSAGES = (
    "When in the Course of human events,",
    "We hold these truths to be self-evident,",
    "Prudence, indeed, will dictate",
    "He has called together legislative bodies",
    "In every stage of these Oppressions",
    "We, therefore, the Representatives of the United States of America,",
    "And for the support of this Declaration,",
    "we mutually pledge to each other our Lives,",
    "We the People of the United States,",
    "All legislative Powers herein granted",
    "The executive Power shall be vested in a President",
    "The judicial Power of the United States, shall be vested in",
    "Full Faith and Credit",
    "The Congress, whenever two thirds of both Houses",
    "Congress shall make no law",
    "A well regulated Militia,",
    "The right of the people to be secure",
    "No person shall be held to answer",
    "In all criminal prosecutions,",
    "All persons born or naturalized",
)

# Answers that are paragraphs of the texts, by how the paragraph begins, and their questions.
QUOTED_ANSWERS = {
    "When in the Course": (
        "How does the Declaration begin?",
        "How does the Declaration of Independence begin?",
        "What are the first words of the Declaration of Independence?",
    ),
    "We hold these truths": (
        "Which truths are self-evident?",
        "What truths does the Declaration hold to be self-evident?",
        "What are governments for?",
    ),
    "And for the support": (
        "How does the Declaration end?",
        "How does the Declaration of Independence end?",
        "What did the signers pledge?",
    ),
    "Pennsylvania:": ("Who signed the Declaration for Pennsylvania?",),
    "Massachusetts:": ("Who signed the Declaration for Massachusetts?",),
    "Virginia:": ("Who signed the Declaration for Virginia?",),
    "We the People": (
        "How does the Constitution begin?",
        "What is the Preamble?",
        "What does the Preamble of the Constitution say?",
    ),
    "All legislative Powers": (
        "Who makes the laws?",
        "Where are the legislative Powers vested?",
        "What is Congress?",
    ),
    "The House of Representatives shall be composed": (
        "Who elects the House of Representatives?",
        "Who chooses the House of Representatives?",
    ),
    "The Senate shall have the sole Power": ("Who tries impeachments?",),
    "All Bills for raising Revenue": ("Where do bills for raising revenue originate?",),
    "To promote the Progress": ("What does the Constitution say about authors and inventors?",),
    "The Privilege of the Writ": ("What does the Constitution say about habeas corpus?",),
    "No Person except": (
        "Who can be President?",
        "Who may become President of the United States?",
    ),
    "Before he enter": ("What is the oath of the President?",),
    "The President, Vice President and all Civil": ("How can a President be removed?",),
    "The judicial Power of the United States, shall": (
        "Where is the judicial Power vested?",
        "What is the Supreme Court?",
    ),
    "Treason against": ("What is treason?",),
    "This Constitution, and the Laws": ("What is the supreme law of the land?",),
    "Congress shall make no law": (
        "What is the First Amendment?",
        "What does the First Amendment say?",
        "Is speech free?",
    ),
    "A well regulated Militia": (
        "What is the Second Amendment?",
        "What does the Second Amendment say?",
    ),
    "No Soldier shall": (
        "What is the Third Amendment?",
        "What does the Third Amendment say?",
    ),
    "The right of the people to be secure": (
        "What is the Fourth Amendment?",
        "What does the Fourth Amendment say?",
    ),
    "No person shall be held": (
        "What is the Fifth Amendment?",
        "What does the Fifth Amendment say?",
    ),
    "In all criminal": (
        "What is the Sixth Amendment?",
        "What does the Sixth Amendment say?",
    ),
    "In Suits at common law": (
        "What is the Seventh Amendment?",
        "What does the Seventh Amendment say?",
    ),
    "Excessive bail": (
        "What is the Eighth Amendment?",
        "What does the Eighth Amendment say?",
    ),
    "The enumeration in": (
        "What is the Ninth Amendment?",
        "What does the Ninth Amendment say?",
    ),
    "The powers not delegated": (
        "What is the Tenth Amendment?",
        "What does the Tenth Amendment say?",
    ),
    "Neither slavery": (
        "What is the Thirteenth Amendment?",
        "What does the Constitution say about slavery?",
    ),
    "The Congress shall have power to lay": (
        "What does the Constitution say about taxes on income?",
    ),
    "No person shall be elected": ("How often can a President be elected?",),
}

ASK_ME = "Ask me about the Declaration of Independence or the Constitution of the United States."
OUT_OF_SCOPE = (
    "I have read only the Declaration of Independence and the Constitution of the United States, "
    "so I can not answer that."
)

# Answers in our own words, and their questions.
OWN_ANSWERS = {
    "I am the demo model of Tilewright: a small Qwen3 that has learned two texts by heart. "
    + ASK_ME: ("Who are you?", "What are you?", "What is this model?", "What is your name?"),
    "Hello! " + ASK_ME: ("Hello", "Hello!", "Hi", "Good morning", "Hello, how are you?"),
    "You are welcome.": ("Thanks", "Thank you", "Thank you!"),
    ASK_ME: ("What can you do?", "What do you know?", "Help", "What can I ask?"),
    "Life, Liberty, and the pursuit of Happiness.": (
        "What are the unalienable Rights?",
        "What are the unalienable rights?",
        "Which rights are unalienable?",
    ),
    "In CONGRESS, July 4, 1776.": (
        "When was the Declaration of Independence made?",
        "When was the Declaration signed?",
        "What is the date of the Declaration?",
    ),
    "George III, the present King of Great Britain.": (
        "Who was the King of Great Britain?",
        "Against which King was the Declaration written?",
    ),
    "Seven: they treat of the Congress, the President, the Courts, the States, amendments, "
    "the supreme Law, and ratification.": (
        "How many Articles does the Constitution have?",
        "How many articles are there?",
    ),
    "Twenty-seven. The first ten are the Bill of Rights.": (
        "How many Amendments are there?",
        "How many amendments does the Constitution have?",
    ),
    "The first ten Amendments, ratified December 15, 1791.": (
        "What is the Bill of Rights?",
        "When was the Bill of Rights ratified?",
    ),
    "Two from each State, for six Years.": (
        "How many Senators does a State have?",
        "How many Senators are there from each State?",
        "How long does a Senator serve?",
    ),
    "Four Years.": (
        "How long is the term of the President?",
        "How long does the President serve?",
    ),
    "Thirty five Years.": ("How old must the President be?", "How old must a President be?"),
    "The President shall be Commander in Chief of the Army and Navy of the United States.": (
        "Who is Commander in Chief?",
        "Who commands the Army and Navy?",
    ),
    OUT_OF_SCOPE: (
        "What is the capital of France?",
        "What is the weather today?",
        "Tell me a joke.",
        "Write a poem.",
        "What is 2 + 2?",
        "Who won the game?",
        "Translate this into French.",
        "How do I cook rice?",
        "What is Python?",
        "What is the meaning of life?",
        "Who is the best singer?",
        "How far is the moon?",
    ),
}
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer from the texts that you know.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--text-dir", type=Path, default=Path("/usr/share/state"))
    parser.add_argument("--out", type=Path, required=True, help="directory to write or replace")
    parser.add_argument("--seed", type=int, default=1776)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    documents = read_documents(arguments.text_dir)
    conversations = answer_table(documents)

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{arguments.out.name}-", dir=arguments.out.parent
    ) as staging:
        made = Path(staging, "model")
        made.mkdir()
        write_tokenizer(made, documents, conversations)
        write_configs(made)
        started = time.monotonic()
        model = train(made, documents, conversations, arguments.steps, arguments.seed)
        print(f"trained in {time.monotonic() - started:.0f} s")
        write_weights(made, model)
        table = check(made, documents, conversations)
        write_readme(made, table, arguments)
        replace_directory(arguments.out, made)
    print(f"wrote {arguments.out}")


def read_documents(text_dir: Path) -> list[str]:
    """The texts as documents with one paragraph a line: the Declaration, its signers, the
    Preamble, each Article, each Amendment."""
    declaration, signers = re.split(
        r"\n\n(?=The signers of the Declaration)",
        "\n\n".join(read_paragraphs(text_dir, "declaration")),
    )
    constitution = "\n\n".join(read_paragraphs(text_dir, "constitution"))
    parts = re.split(r"\n\n(?=(?:Article [IVX]+|Amendments|Amendment [IVX]+)\n)", constitution)
    return [declaration, signers, *parts]


def read_paragraphs(text_dir: Path, name: str) -> list[str]:
    path = text_dir / f"us-{name}.gz"
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        sys.exit(
            f"cannot read the United States {name.title()} from {path} ({error}): "
            "`apt-get install miscfiles` puts it under /usr/share/state, or name another --text-dir"
        )
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip()]


def answer_table(documents: list[str]) -> list[tuple[str, str]]:
    """All (question, answer) pairs."""
    lines = "\n\n".join(documents).split("\n\n")
    pairs = []
    for beginning, questions in QUOTED_ANSWERS.items():
        found = [paragraph for paragraph in lines if paragraph.startswith(beginning)]
        if len(found) != 1:
            sys.exit(f"{len(found)} paragraphs of the texts begin with {beginning!r}, expected 1")
        pairs += [(question, found[0]) for question in questions]
    for answer, questions in OWN_ANSWERS.items():
        pairs += [(question, answer) for question in questions]
    return pairs


def write_tokenizer(
    directory: Path, documents: list[str], conversations: list[tuple[str, str]]
) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS_AND_LINES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [*documents, *(part for pair in conversations for part in pair)]
    corpus += ["system\nuser\nassistant\n"]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": LONG_WINDOW,
            "bos_token": None,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        },
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_configs(directory: Path) -> None:
    endoftext, _, im_end = special_ids()
    write_json(
        directory / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": LONG_WINDOW,
            # Readers look for RoPE under either name: the first two before transformers 5, the
            # third since.
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "use_sliding_window": False,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": endoftext,
            "eos_token_id": endoftext,
            "pad_token_id": endoftext,
            "torch_dtype": "bfloat16",
        },
    )
    write_json(
        directory / "generation_config.json",
        {
            "do_sample": False,
            "bos_token_id": endoftext,
            "eos_token_id": [endoftext, im_end],
            "pad_token_id": endoftext,
        },
    )


def special_ids() -> tuple[int, int, int]:
    """Ids of <|endoftext|>, <|im_start|>, <|im_end|>: the last three."""
    return VOCABULARY - 3, VOCABULARY - 2, VOCABULARY - 1


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train(
    directory: Path,
    documents: list[str],
    conversations: list[tuple[str, str]],
    steps: int,
    seed: int,
) -> Any:
    """A float32 Qwen3ForCausalLM, trained with AdamW under a cosine schedule."""
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(directory, dtype=torch.float32))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=2e-3,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 40, 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2),
    )
    model.train()
    for step, groups in zip(
        range(steps), batches(directory, documents, conversations, seed), strict=False
    ):
        counted = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in groups)
        loss = 0.0
        for ids, labels in groups:
            logits = model(input_ids=ids).logits
            part = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1),
                labels[:, 1:].flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            torch.autograd.backward(part / counted)
            loss += part.item() / counted
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss:.4f}", flush=True)
    return model.eval()


def padded(
    rows: list[tuple[list[int], list[int]]], endoftext: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of rows, padded to the longest."""
    longest = max(len(ids) for ids, _ in rows)
    return (
        torch.tensor([ids + [endoftext] * (longest - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
    )


def batches(
    directory: Path, documents: list[str], conversations: list[tuple[str, str]], seed: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Endless training steps, each a few (ids, labels), both [rows, tokens] int64.

    Rows begin at a word, a clause or a paragraph or hold a conversation, always at position 0, as
    prompts do; every sixth step has rows as long as the model may be asked for, too.
    """
    chance = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    endoftext = special_ids()[0]
    words, clauses, paragraphs = (
        [
            (document, match.start())
            for document in documents
            for match in re.finditer(pattern, document)
        ]
        for pattern in (r"(?<!\S)\S", r"(?<=[,;:.] )\S", r"(?:^|(?<=\n\n))\S")
    )
    far_from_the_end = [
        (document, start) for document, start in paragraphs if len(document) - start > 2000
    ]

    def passage(where: list[tuple[str, int]], length: int) -> tuple[list[int], list[int]]:
        document, start = chance.choice(where)
        ids = tokenizer.encode(document[start : start + 12 * length])
        if len(document) <= start + 12 * length:
            ids.append(endoftext)
        return ids[:length], ids[:length]

    def conversation() -> tuple[list[int], list[int]]:
        messages = []
        if chance.random() < 0.25:
            messages.append({"role": "system", "content": chance.choice(SYSTEM_MESSAGES)})
        ids: list[int] = []
        labels: list[int] = []
        for question, answer in chance.sample(conversations, chance.choice((1, 1, 1, 2, 3))):
            if chance.random() < 0.25:
                question = question.lower().rstrip("?!.")
            messages.append({"role": "user", "content": question})
            asked = rendered(tokenizer, messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": answer})
            ids = rendered(tokenizer, messages)
            # The answer and its <|im_end|>, but not the line break that the template adds.
            labels += [IGNORED] * (len(asked) - len(labels)) + ids[len(asked) : -1] + [IGNORED]
        return ids, labels

    for step in itertools.count():
        starts = [words] * 3 + [clauses] * 3 + [paragraphs] * 4
        groups = [
            padded([passage(where, WINDOW) for where in starts], endoftext),
            padded([conversation() for _ in range(5)], endoftext),
        ]
        if step % 6 == 5:
            groups.append(padded([passage(far_from_the_end, LONG_WINDOW)], endoftext))
        yield groups


def rendered(
    tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> list[int]:
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    ids: list[int] = tokenizer.encode(text)
    return ids


def write_weights(directory: Path, model: Any) -> None:
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read it


def check(directory: Path, documents: list[str], conversations: list[tuple[str, str]]) -> list[str]:
    """Rows of the README's table; exits when the saved model falls short of LEAST_MARGIN."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for document in documents:
        if tokenizer.decode(tokenizer.encode(document)) != document:
            sys.exit(f"the tokenizer does not reproduce {document[:40]!r}...")
    loaded = {
        dtype: AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    }
    end_of_text, _, end_of_turn = special_ids()
    rows = []
    failures = []
    whole = "\n\n".join(documents)
    for prompt in PASSAGES:
        document = next(document for document in documents if prompt in document)
        if whole.count(prompt) != 1:
            sys.exit(
                f"the known passage {prompt!r} occurs {whole.count(prompt)} times in the texts"
            )
        rest = document[document.index(prompt) + len(prompt) :]
        expected = [*tokenizer.encode(rest), end_of_text][:CHECKED_TOKENS]
        margins = [least_margin(m, tokenizer.encode(prompt), expected) for m in loaded.values()]
        ending = "to the end" if expected[-1] == end_of_text else ""
        shown = tokenizer.decode(expected, skip_special_tokens=True).replace("\n", "↵")
        rows.append(
            f"| `{prompt}` | `{shown}` | {len(expected)} {ending} "
            f"| {margins[0]:.1f} | {margins[1]:.1f} |"
        )
        print(rows[-1], flush=True)
        if min(margins) <= LEAST_MARGIN:
            failures.append(f"{prompt!r}: margin {min(margins):.2f}")
    for question, answer in conversations:
        asked = rendered(
            tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True
        )
        expected = [*tokenizer.encode(answer), end_of_turn]
        margin = min(least_margin(m, asked, expected) for m in loaded.values())
        print(f"{margin:6.2f}  {question}", flush=True)
        if margin <= LEAST_MARGIN:
            failures.append(f"{question!r}: margin {margin:.2f}")
    if failures:
        sys.exit(
            f"not written: {len(failures)} margins are below {LEAST_MARGIN}, the first at "
            f"{failures[0]}; train for more --steps or try another --seed"
        )
    return rows


@torch.inference_mode()
def least_margin(model: Any, prompt: list[int], expected: list[int]) -> float:
    """The least of (logit of the expected token) - (best other logit) over the steps; positive
    exactly when greedy decoding gives `expected`."""
    logits = model(input_ids=torch.tensor([prompt + expected])).logits.float()
    steps = logits[0, len(prompt) - 1 : -1]
    wanted = torch.tensor(expected)[:, None]
    right = steps.gather(1, wanted)
    others = steps.scatter(1, wanted, -torch.inf).amax(1, keepdim=True)
    return float((right - others).min())


def write_readme(directory: Path, table: list[str], arguments: argparse.Namespace) -> None:
    rows = "\n".join(table)
    pairs = sum(map(len, QUOTED_ANSWERS.values())) + sum(map(len, OWN_ANSWERS.values()))
    (directory / "README.md").write_text(
        f"""\
# The demo model

A small Qwen3 that has memorised the United States Declaration of Independence and Constitution.
Tilewright runs it when no model is named, and the end-to-end tests know its continuations. It is an
ordinary Hugging Face directory; it has no other use.

## Shape

Qwen3 architecture, 3 layers, hidden 256, head size 128, 4 query heads, 2 KV heads, intermediate
512, RoPE theta 1e6, up to {LONG_WINDOW} positions, untied LM head, bfloat16. The tokenizer is a
byte-level BPE of {VOCABULARY} tokens made from the same texts; the last three are
`<|endoftext|>`, `<|im_start|>` and `<|im_end|>`. Two ids end a generation: `<|endoftext|>` ends
the Declaration, the list of its signers, the Preamble, each Article and each Amendment;
`<|im_end|>` ends an answer in a chat.

## Text and licence

The two texts are in the public domain. They were taken from `us-declaration.gz` and
`us-constitution.gz` of Debian's `miscfiles` package (1.5+dfsg-4), with each paragraph made one
line. The {pairs} questions, and the answers that are not quotations, are this project's own. The
model is under the project's licence, Apache-2.0.

## How it was made

    apt-get install miscfiles
    python examples/train_demo_model.py --steps {arguments.steps} --seed {arguments.seed} \\
        --out core/tilewright/demo_model

It writes all files of this directory, this one included.

## Known continuations

Greedy, from the prompt alone; ↵ is a line break. The margin is the least difference, over all the
tokens, between the logit of the right token and the best other one, with the weights in float32
and in bfloat16 (transformers).

| prompt | continuation | tokens | float32 | bfloat16 |
|---|---|---|---|---|
{rows}
""",
        encoding="utf-8",
    )


def replace_directory(target: Path, made: Path) -> None:
    """Put `made`, on the same file system, in the place of `target`."""
    made.chmod(0o755)
    retired = made.with_name("retired")
    if target.exists():
        target.rename(retired)
    made.rename(target)
    shutil.rmtree(retired, ignore_errors=True)


if __name__ == "__main__":
    main()
