"""generation_config.json -> a model's recommended settings and its end-of-text tokens."""

from attrs import evolve, frozen

from tilewright.types import GenerateConfig
from tilewright_hf.files import MAX_INT, JsonObject

_UNSUPPORTED = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
}
"""Unsupported settings that would change the text, with the values that have no effect."""


@frozen(kw_only=True)
class Recommended:
    """The contents of a generation_config.json.

    eos_token_ids: None if the file does not set them.
    """

    defaults: GenerateConfig
    eos_token_ids: tuple[int, ...] | None = None
    warnings: tuple[str, ...] = ()


def recommended(config: JsonObject, vocab_size: int) -> Recommended:
    """Read a generation_config.json; raises ModelError for a value of a wrong type or range.

    Settings have the same meaning as in transformers' generate: temperature, top_k, top_p and min_p
    apply only if do_sample is true, with defaults of temperature 1 and top_k 50; otherwise the
    likeliest token is taken, and they are not read. A negative top_k means all tokens, as in
    llama.cpp and vLLM, and top_p 0 the likeliest token, as in transformers and llama.cpp.
    """
    given = config.without_nulls()
    always = GenerateConfig(
        max_new_tokens=given.integer("max_new_tokens", None),
        repetition_penalty=given.number("repetition_penalty", None, over=0.0),
    )
    if given.boolean("do_sample", False):
        temperature = given.number("temperature", 1.0, least=0.0)
        top_k = given.integer("top_k", 50, minimum=-MAX_INT)
        top_p = given.number("top_p", 1.0, least=0.0, most=1.0)
        min_p = given.number("min_p", 0.0, least=0.0, most=1.0)
        if top_k < 0:
            given.note("top_k", "0 is used, all tokens")
        if top_p == 0.0:
            given.note("top_p", "top_k 1 is used, the likeliest token")
            top_p = 1.0
            top_k = 1
        defaults = evolve(
            always, temperature=temperature, top_k=max(top_k, 0), top_p=top_p, min_p=min_p
        )
    else:
        defaults = evolve(always, temperature=0.0)
    eos_token_ids = given.token_ids("eos_token_id", vocab_size)
    unsupported = [
        f"{config.where}: {key!r} is not supported and has no effect"
        for key, neutral in _UNSUPPORTED.items()
        if given.values.get(key, neutral) not in (neutral, [], {})
    ]
    return Recommended(
        defaults=defaults, eos_token_ids=eos_token_ids, warnings=(*config.notes, *unsupported)
    )
