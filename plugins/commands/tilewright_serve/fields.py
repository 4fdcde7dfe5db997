"""The bodies of requests: which fields are served, and which are refused.

Fields are those of OpenAI's API reference for completions and chat completions, and of vLLM's
OpenAI-compatible server. A field that is null counts as absent. A field that is in neither list is
ignored, as is one that changes nothing about the text, such as ``user``.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    WithJsonSchema,
    model_validator,
)

from tilewright.errors import listed
from tilewright_serve.errors import ApiError

MOST_SETTINGS = 4096
"""Most entries of stop, stop_token_ids and logit_bias, whose cost in each step grows with them."""

MOST_TOOLS = 1024

MOST_MESSAGES = 2**15
"""A template has 3 seconds, enough for three times as many."""

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MOST_SETTINGS, json_schema_extra={"propertyNames": {"pattern": "^[0-9]+$"}}),
]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
"""The first wrong one ends the reading: a body of millions would have as many errors."""

Messages = Annotated[
    list[
        Annotated[
            dict[str, Any],
            WithJsonSchema(
                {
                    "type": "object",
                    "properties": {
                        "role": {"type": "string"},
                        "content": {"description": "text, or a list of parts of type text"},
                    },
                    "required": ["role"],
                }
            ),
        ]
    ],
    Field(
        min_length=1,
        max_length=MOST_MESSAGES,
        fail_fast=True,
        description="the conversation; which roles and other keys there are is up to the model's "
        "chat template",
    ),
]

StopString = Annotated[str, Field(min_length=1)]

MOST_LOGPROBS = 20
"""Most alternatives of a token that are reported: OpenAI's limit for chat completions."""

REFUSED = {
    "allowed_token_ids": "use structured_outputs or logit_bias",
    "audio": "models are served with text alone",
    "bad_words": "use logit_bias",
    "chat_template": "the model's own template is used",
    "documents": "put them into a message",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "guided_choice": "use structured_outputs",
    "guided_grammar": "use structured_outputs",
    "guided_json": "use structured_outputs",
    "guided_regex": "use structured_outputs",
    "logits_processors": "use structured_outputs or logit_bias",
    "length_penalty": "beam search is not served",
    "mm_processor_kwargs": "models are served with text alone",
    "prompt_embeds": "give the prompt as text or token ids",
    "prompt_logprobs": "use echo with logprobs, of completions",
    "suffix": "the served models do not fill in a middle",
    "truncate_prompt_tokens": "shorten the prompt",
    "use_beam_search": "beam search is not served",
    "web_search_options": "this server searches nothing",
}
"""Fields that would mislead if they were ignored, and what to do instead."""

HARMLESS: dict[str, tuple[Any, ...]] = {
    "function_call": ("none", "auto"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
"""Values of fields that are not served which ask for what is done anyway."""


def _exactly_one(*names: str) -> dict[str, Any]:
    """A schema of objects in which one of some keys is not null."""
    some: dict[str, Any] = {"not": {"type": "null"}}
    return {"oneOf": [{"required": [one], "properties": {one: some}} for one in names]}


def _with_refused(schema: dict[str, Any]) -> None:
    """Say in a body's schema which values the fields that are not served may have."""
    for name in sorted(REFUSED | HARMLESS):
        schema["properties"].setdefault(
            name,
            {
                "enum": list(_harmless(name)),
                "description": f"not served: {_cure(name)}",
            },
        )


def _harmless(name: str) -> tuple[Any, ...]:
    """The values that a field which is not served may have."""
    return (None, [], *HARMLESS.get(name, ()))


def _cure(name: str) -> str:
    return REFUSED.get(name) or "leave it out"


def _with_refused_and_one(schema: dict[str, Any]) -> None:
    _with_refused(schema)
    schema |= _exactly_one("prompt", "messages")


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, json_schema_extra=_with_refused
    )

    model: str | None = Field(None, description="the model; may be absent if one is served")

    def check_served(self) -> None:
        """Raise ApiError for a field that is not served and must not be ignored."""
        for name, value in (self.model_extra or {}).items():
            if any(value == one and type(value) is type(one) for one in _harmless(name)):
                continue
            if name in REFUSED or name in HARMLESS:
                raise ApiError(400, f"{name!r} is not served: {_cure(name)}", name)


class Part(BaseModel):
    """A mapping in a body."""

    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(Part):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Part):
    name: str | None = None
    json_schema: Any = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"type": {"enum": ["text", "json_object"]}}},
                {
                    "required": ["json_schema"],
                    "properties": {"json_schema": {"type": "object"} | _exactly_one("schema")},
                },
            ]
        }
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and (
            self.json_schema is None or self.json_schema.json_schema is None
        ):
            raise ApiError(
                400, "'response_format' must have a json_schema with a schema", "response_format"
            )
        return self


class StructuredOutputs(BaseModel):
    """Exactly one of these; see the logits processor ``structured-output``."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        json_schema_extra=_exactly_one("json", "json_object", "regex", "choice", "grammar"),
    )

    json_: Any = Field(None, alias="json", description="a JSON schema")
    json_object: StrictBool | None = Field(None, description="any JSON object")
    regex: StrictStr | None = Field(None, description="a regular expression for the whole text")
    choice: Annotated[list[StrictStr], Field(fail_fast=True)] | None = Field(
        None, description="the texts to choose from"
    )
    grammar: StrictStr | None = Field(None, description="a context-free grammar in Lark's form")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.asked) != 1:
            names = "json, json_object, regex, choice, grammar"
            raise ApiError(
                400, f"'structured_outputs' must have exactly one of {names}", "structured_outputs"
            )
        return self

    @property
    def asked(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=True)


class Generation(Body):
    """What completions and chat completions have in common."""

    frequency_penalty: Penalty | None = None
    ignore_eos: bool | None = Field(None, description="go on after an end-of-sequence token")
    include_stop_str_in_output: bool | None = None
    logit_bias: LogitBias | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_p: Probability | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = Field(None, description="token ids of prompt and text, too")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        StopString
        | Annotated[list[StopString], Field(max_length=MOST_SETTINGS, fail_fast=True)]
        | None
    ) = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MOST_SETTINGS, fail_fast=True)] | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    top_p: Probability | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' need stream = true: set it", "stream_options")
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and self.structured_outputs is not None:
            raise ApiError(
                400,
                "expected one of 'response_format' and 'structured_outputs', found both: give one",
                "response_format",
            )
        return self


class Completion(Generation):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    add_special_tokens: bool | None = Field(
        None, description="with the tokens that the tokenizer puts around a prompt (true)"
    )
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class FunctionDescription(Part):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Part):
    type: Literal["function"]
    function: FunctionDescription


class FunctionName(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: FunctionName


class ChatCompletion(Generation):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="variables of the model's chat template, such as enable_thinking"
    )
    continue_final_message: bool | None = None
    echo: bool | None = Field(
        None, description="begin the answer with the last message, if that is the assistant's"
    )
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    separate_reasoning: bool | None = Field(
        None, description="what the model thinks in reasoning_content, not in content"
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _agree_in_a_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "'top_logprobs' need logprobs = true: set it", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                400,
                "'continue_final_message' continues the last message, and 'add_generation_prompt' "
                "begins another: set one of them",
                "continue_final_message",
            )
        choice = self.tool_choice
        names = [tool.function.name for tool in self.tools or ()]
        if choice not in (None, "none", "auto") and not names:
            raise ApiError(400, "'tool_choice' needs tools: add them", "tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ApiError(
                400,
                f"'tool_choice' names {choice.function.name!r}, which is not one of the tools: "
                f"{listed(names)}",
                "tool_choice",
            )
        return self


class Tokenize(Body):
    """The body of POST /tokenize: a prompt, or messages as for a chat completion."""

    model_config = ConfigDict(json_schema_extra=_with_refused_and_one)

    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "expected one of 'prompt' and 'messages'", "prompt")
        return self


class Detokenize(Body):
    """The body of POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
