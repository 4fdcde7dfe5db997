"""The OpenAPI document, generated from the fields of bodies and of answers."""

from typing import Any

from attrs import fields
from pydantic import BaseModel, TypeAdapter, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from tilewright import __version__
from tilewright.types import ModelStats
from tilewright_serve import answer_types
from tilewright_serve.batch import URLS
from tilewright_serve.errors import KINDS
from tilewright_serve.fields import ChatCompletion, Completion, Detokenize, Tokenize

PLACE = "#/components/schemas/{model}"

ModelFigures: type[BaseModel] = create_model(
    "ModelFigures",
    **{a.name: int for a in fields(ModelStats) if a.name != "model_id"},  # type: ignore[call-overload]
    executor=str,
    device=str,
    max_model_len=int,
)


class Figures(BaseModel):
    """What the engine is doing, and has done since it was loaded, by model."""

    models: dict[str, ModelFigures]  # type: ignore[valid-type]


BODIES = (Completion, ChatCompletion, Tokenize, Detokenize)
ANSWERS = (
    answer_types.CompletionAnswer,
    answer_types.CompletionChunk,
    answer_types.ChatCompletionAnswer,
    answer_types.ChatCompletionChunk,
    answer_types.ModelList,
    answer_types.ModelObject,
    answer_types.Tokens,
    answer_types.Prompt,
    answer_types.Health,
    answer_types.Version,
    answer_types.Error,
    answer_types.File,
    answer_types.Batch,
    answer_types.BatchList,
    Figures,
)

WHY = {
    400: "a field is missing or wrong, is not served, or is too large for the model",
    401: "the key is missing or wrong",
    404: "no such model",
    413: "the body is too large",
    500: "the model failed",
    503: "there is too much to do, or the model is not loaded: try again later",
}
"""What an error's status says."""

MESSAGES = [{"role": "user", "content": "Who are you?"}]


def document(keyed: bool = False, batches: bool = False) -> dict[str, Any]:
    """The OpenAPI 3.1 document.

    keyed: whether the server wants a key; batches: whether it takes batches of requests.
    """
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Tilewright",
            "version": __version__,
            "description": "OpenAI's API for the models that this server has loaded.",
        },
        "paths": _paths(keyed) | (_batch_paths(keyed) if batches else {}),
        "components": {"schemas": _schemas()},
    }
    if keyed:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return made


def _schemas() -> dict[str, Any]:
    def generated(kinds: tuple[Any, ...], mode: JsonSchemaMode) -> dict[str, Any]:
        inputs = [(kind, mode, TypeAdapter(kind).core_schema) for kind in kinds]
        found = GenerateJsonSchema(ref_template=PLACE).generate_definitions(inputs)[1]
        return {str(name): schema for name, schema in found.items()}

    bodies = generated(BODIES, "validation")
    made = generated(ANSWERS, "serialization")
    for schema in made.values():
        schema["additionalProperties"] = False
    return bodies | made


def _paths(keyed: bool) -> dict[str, Any]:
    model = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
        "description": "its id in the list of models",
    }
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "/v1/completions": {
            "post": _posting(
                keyed,
                "complete",
                "Continue prompts",
                Completion,
                answer_types.CompletionAnswer,
                {"prompt": "When in the Course of", "max_tokens": 8, "temperature": 0},
                answer_types.CompletionChunk,
            )
        },
        "/v1/chat/completions": {
            "post": _posting(
                keyed,
                "chat",
                "Answer a conversation",
                ChatCompletion,
                answer_types.ChatCompletionAnswer,
                {"messages": MESSAGES, "max_tokens": 8, "temperature": 0},
                answer_types.ChatCompletionChunk,
            )
        },
        "/v1/models": {
            "get": _operation(keyed, "listModels", "The served models", _is(answer_types.ModelList))
        },
        "/v1/models/{name}": {
            "get": _operation(
                keyed, "getModel", "A served model", _is(answer_types.ModelObject), 404, 503
            )
            | {"parameters": [model]}
        },
        "/tokenize": {
            "post": _posting(
                keyed,
                "tokenize",
                "The token ids of a prompt or a conversation",
                Tokenize,
                answer_types.Tokens,
                {"prompt": "When in the Course of"},
            )
        },
        "/detokenize": {
            "post": _posting(
                keyed,
                "detokenize",
                "The text of token ids",
                Detokenize,
                answer_types.Prompt,
                {"tokens": [1, 2, 3]},
            )
        },
        "/health": {"get": _health()},
        "/version": {"get": _operation(False, "version", "The version", _is(answer_types.Version))},
        "/metrics": {
            "get": _operation(
                False,
                "metrics",
                "Metrics for Prometheus",
                text | {"application/openmetrics-text": {"schema": {"type": "string"}}},
            )
        },
        "/stats": {"get": _operation(keyed, "stats", "What the models are doing", _is(Figures))},
    }


def _batch_paths(keyed: bool) -> dict[str, Any]:
    def identified(name: str, summary: str, content: dict[str, Any], *more: int) -> dict[str, Any]:
        place = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        return _operation(keyed, name, summary, content, 404, *more) | {"parameters": [place]}

    def sent(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}

    upload = {
        "type": "object",
        "properties": {
            "file": {"type": "string", "contentMediaType": "application/octet-stream"},
            "purpose": {"const": "batch"},
        },
        "required": ["file", "purpose"],
    }
    begin = {
        "type": "object",
        "properties": {
            "input_file_id": {"type": "string"},
            "endpoint": {"enum": list(URLS)},
            "completion_window": {"type": ["string", "null"]},
            "metadata": {"description": "kept with the batch"},
        },
        "required": ["input_file_id", "endpoint"],
    }
    asked = [
        {"name": "limit", "in": "query", "schema": {"type": "integer"}},
        {"name": "after", "in": "query", "schema": {"type": "string"}},
    ]
    file, batch, lines = (
        _is(answer_types.File),
        _is(answer_types.Batch),
        {"schema": {"type": "string"}},
    )
    created = _operation(keyed, "createBatch", "Begin a batch", batch, 400, 404, 413)
    listed = _operation(keyed, "listBatches", "The batches", _is(answer_types.BatchList), 400)
    return {
        "/v1/files": {
            "post": _operation(keyed, "uploadFile", "Upload batch lines", file, 400, 413)
            | sent("multipart/form-data", upload)
        },
        "/v1/files/{id}": {"get": identified("getFile", "A file", file)},
        "/v1/files/{id}/content": {
            "get": identified("getContent", "What a file holds", {"application/jsonl": lines})
        },
        "/v1/batches": {
            "get": listed | {"parameters": asked},
            "post": created | sent("application/json", begin),
        },
        "/v1/batches/{id}": {"get": identified("getBatch", "A batch", batch)},
        "/v1/batches/{id}/cancel": {
            "post": identified("cancelBatch", "Cancel a batch", batch, 400)
        },
    }


def _operation(
    keyed: bool, name: str, summary: str, content: dict[str, Any], *statuses: int
) -> dict[str, Any]:
    """statuses: of its errors."""
    wanted = sorted((*statuses, *([401] if keyed else ())))
    refused = {str(status): _refused(status) for status in wanted}
    made = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": "the answer", "content": content}, **refused},
    }
    return made | ({"security": [{"key": []}]} if keyed else {})


def _posting(
    keyed: bool,
    name: str,
    summary: str,
    body: Any,
    answer: Any,
    example: dict[str, Any],
    chunk: Any = None,
) -> dict[str, Any]:
    """chunk: what a stream's events hold, if it can be streamed."""
    content = _is(answer)
    if chunk is not None:
        content["text/event-stream"] = {"schema": _event(chunk)}
    made = _operation(keyed, name, summary, content, 400, 404, 413, 500, 503)
    if chunk is not None:
        made["responses"]["200"]["headers"] = {"x-request-id": _header("the answer's id")}
    media = {"schema": _reference(body), "example": example}
    return made | {"requestBody": {"required": True, "content": {"application/json": media}}}


def _event(chunk: Any) -> dict[str, Any]:
    """One of the server-sent events of a stream; OpenAPI 3.1 has no schema of all of them."""
    told = {
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(chunk), _reference(answer_types.Error)]},
    }
    return {
        "type": "object",
        "description": "An event. If generation fails, an Error is the last event before [DONE].",
        "properties": {"data": {"type": "string", "anyOf": [{"const": "[DONE]"}, told]}},
        "required": ["data"],
    }


def _health() -> dict[str, Any]:
    made = _operation(False, "health", "Whether all models work", _is(answer_types.Health))
    failed = {"description": "a model does not work", "content": _is(answer_types.Health)}
    return made | {"responses": made["responses"] | {"503": failed}}


def _refused(status: int) -> dict[str, Any]:
    made = {"description": f"{WHY[status]} ({KINDS[status]})", "content": _is(answer_types.Error)}
    if status == 503:
        made["headers"] = {"Retry-After": _header("seconds to wait", "integer")}
    if status == 401:
        made["headers"] = {"WWW-Authenticate": _header("Bearer")}
    return made


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


def _is(kind: Any) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(kind)}}


def _reference(kind: Any) -> dict[str, Any]:
    return {"$ref": PLACE.format(model=kind.__name__)}
