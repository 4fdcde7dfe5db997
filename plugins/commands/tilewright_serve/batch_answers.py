"""What a server answers to the requests of a batch."""

import json
from typing import Any

from tilewright.errors import ExecutorError
from tilewright.types import GenerateConfig
from tilewright_serve.answering import answer
from tilewright_serve.batch import Answer
from tilewright_serve.server import Server


def answering(server: Server) -> Answer:
    """Answers as POST does. Raises ExecutorError when a model generates nothing any more."""

    async def answered(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        status, value = await answer(server, path, body)
        if status == 500:
            model = server.model(json.loads(body).get("model"))
            try:  # whether it works for any request
                probe = GenerateConfig(max_new_tokens=1)
                await model.engine.generate_result(model.name, [0], probe)
            except Exception as error:
                raise ExecutorError(
                    f"model {model.name!r} has failed and generates nothing more; the same command "
                    f"continues with the requests that have no result: {error}"
                ) from error
        return status, value

    return answered
