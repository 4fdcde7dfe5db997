"""How a server is run: the table ``[serve]`` of a run file, and flags of ``tilewright serve``."""

from attrs import frozen, validators

from tilewright.types.fields import checked, described, if_set


@frozen(field_transformer=checked)
class ServeSettings:
    """How models are served."""

    host: str = described("address to listen at; 0.0.0.0: all of this machine's", "127.0.0.1")
    port: int = described(
        "port to listen at; 0: a free one", 8000, validator=[validators.ge(0), validators.le(65535)]
    )
    api_key: str | None = described(
        "key that clients must send (Authorization: Bearer KEY); default: none is needed",
        validator=if_set(validators.min_len(1)),
    )
    models: tuple[str, ...] = described(
        "further models to serve, each as NAME=MODEL or MODEL, as --model has them", ()
    )
    max_queue: int = described(
        "texts of a model that may wait for their turn; further requests are answered with 503",
        256,
        validator=validators.ge(0),
    )
    max_choices: int = described(
        "limit of texts in one HTTP request: prompts times n", 128, validator=validators.ge(1)
    )
    max_body_bytes: int = described(
        "size limit of a request's body", 2 * 2**20, validator=validators.ge(1)
    )
    request_timeout: float | None = described(
        "seconds after which a request is ended with an error; default: none",
        validator=if_set(validators.gt(0.0)),
    )
    shutdown_timeout: float = described(
        "seconds that running requests have to finish after SIGTERM or Ctrl-C",
        30.0,
        validator=validators.ge(0.0),
    )
    restarts: int = described(
        "how often a model whose executor has failed is loaded again", 0, validator=validators.ge(0)
    )
    batch_dir: str | None = described(
        "folder for the files of /v1/files and /v1/batches; default: these are not served",
        validator=if_set(validators.min_len(1)),
    )
    reasoning: bool = described(
        "put what a model thinks into reasoning_content, unless a request says otherwise", False
    )
