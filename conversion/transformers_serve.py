"""`lmtp serve`: Transformers' own OpenAI-compatible server, for a checkpoint with leap heads.

`transformers serve` looks for a checkpoint's class among the names of the `transformers` module, where the
classes of other packages are not. Here it is, and drafts unless a request says otherwise.
"""

from dataclasses import dataclass, field
from typing import Any

import transformers

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .command_line import console
from .loading import adapter_config, lmtp_config
from .options import Dtype, Options


@dataclass
class ServeOptions(Options):
    """What to serve, and where."""

    checkpoint: str = field(metadata={"help": "Folder or Hub id of a checkpoint with leap heads."})
    host: str = field(default="localhost", metadata={"help": "Listen at this address."})
    port: int = field(default=8000, metadata={"help": "Listen at this port."})
    device: str = field(default="auto", metadata={"help": "Such as cpu or cuda:0."})
    dtype: Dtype = field(default="auto", metadata={"help": "Load in this dtype."})


class ServedModel(LMTPForCausalLM):
    """A checkpoint whose `generate` drafts by default."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, see `LMTPForCausalLM.from_pretrained`, and switch drafting on."""
        kwargs.pop("tqdm_class", None)  # the server's bar; a heads-only checkpoint loads two models
        model = super().from_pretrained(*args, **kwargs)
        model.generation_config.use_lmtp = True
        return model


def serve(options: ServeOptions) -> None:
    """Serve a checkpoint with Transformers' OpenAI-compatible server, drafting with its leap heads.

    Requests are answered one after another; for many at a time, serve the heads with vLLM.

    Examples:
      lmtp serve CHECKPOINT --port 8000
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "CHECKPOINT", "messages": [{"role": "user", "content": "Hi"}], "stream": true}'
    """
    console.print(f"Serving {options.checkpoint} at http://{options.host}:{options.port}/v1")
    new_server(options)


def new_server(options: ServeOptions, **settings: Any) -> Any:
    """Start the server, and return when it is stopped.

    Args:
        options: what to serve.
        settings: more of Transformers' own, see `transformers serve --help`.

    Raises:
        ValueError: the checkpoint has no leap heads, or is an adapter.
        ImportError: what the server needs is not installed.
    """
    from transformers.cli.serve import Serve

    if adapter_config(options.checkpoint) is not None:
        raise ValueError(
            f"{options.checkpoint!r} is an adapter, which Transformers' server does not load. Merge it "
            f"with `lmtp export {options.checkpoint} OUT --to full`, and serve OUT."
        )
    if lmtp_config(options.checkpoint) is None:
        raise ValueError(
            f"{options.checkpoint!r} has no leap heads. Serve it with `transformers serve`."
        )
    transformers.LMTPForCausalLM = ServedModel  # the name in config.json's architectures
    return Serve(
        force_model=options.checkpoint,
        host=options.host,
        port=options.port,
        device=options.device,
        dtype=options.dtype,
        **settings,
    )
