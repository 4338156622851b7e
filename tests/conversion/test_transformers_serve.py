"""`lmtp serve`: Transformers' server decodes with drafts, streaming or not. Passes are counted."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request

import pytest
from commands import error_of
from tiny import tiny_llama, tiny_tokenizer
from transformers.utils.import_utils import is_serve_available

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.transformers_serve import ServeOptions, new_server

needs_server = pytest.mark.skipif(
    not is_serve_available(), reason="pip install 'transformers[serving]'"
)
NEW_TOKENS = 48
MESSAGES = [{"role": "user", "content": "What is the sea?"}]


def save(folder, heads_only):
    """Save a model whose new heads, which repeat what the model says next, are right now and then."""
    backbone = tiny_llama(seed=5, max_position_embeddings=256)
    backbone.save_pretrained(folder / "backbone")
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3, 4)).eval()
    model.config.base_model_name_or_path = str(folder / "backbone")
    model.generation_config.eos_token_id = None
    model.generation_config.draft_length = 3  # the same steps in every run
    model.save_pretrained(folder / "served", heads_only=heads_only)
    tiny_tokenizer().save_pretrained(folder / "served")
    return model


def num_passes(model):
    """Return how many backbone passes the answer takes with drafts, the prefill included."""
    inputs = tiny_tokenizer().apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    return 1 + len(model.generate(**inputs, **options, use_lmtp=True).acceptance_lengths[0])


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def ask(port, model, stream, **more):
    body = {
        "model": model,
        "messages": MESSAGES,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": stream,
        **more,
    }
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        if not stream:
            return json.load(response)["choices"][0]["message"]["content"]
        lines = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
    return "".join(
        choice["delta"].get("content") or "" for line in lines for choice in line["choices"]
    )


@needs_server
@pytest.mark.filterwarnings("ignore")  # the server's own
@pytest.mark.parametrize("heads_only", [False, True], ids=["full", "heads only"])
def test_the_server_drafts(tmp_path, heads_only):
    expected = num_passes(save(tmp_path, heads_only))
    folder, port = str(tmp_path / "served"), free_port()
    server = new_server(
        ServeOptions(folder, port=port, device="cpu", dtype="float32"), non_blocking=True
    )
    try:
        wait_for(port)
        ask(port, folder, stream=False, max_tokens=2)
        (loaded,) = server._model_manager.loaded_models.values()
        passes = []
        loaded.model.backbone.register_forward_hook(lambda *_: passes.append(1))
        ask(port, folder, stream=False, max_tokens=2)  # with a hook, the backbone is tried again
        passes.clear()
        streamed, in_one = ask(port, folder, stream=True), ask(port, folder, stream=False)
        with_drafts = len(passes) / 2
        settings = loaded.model.generation_config
        loaded.model.generation_config = type(settings)(**settings.to_dict() | {"use_lmtp": False})
        passes.clear()
        plain = ask(port, folder, stream=True)
    finally:
        server.kill_server()
    assert streamed == plain
    assert in_one.startswith(streamed)  # the stream leaves out half a character at the end
    assert len(passes) == NEW_TOKENS
    assert with_drafts == expected < NEW_TOKENS


def wait_for(port):
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)


def test_a_checkpoint_without_heads_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    assert "has no leap heads. Serve it with `transformers serve`" in error_of("serve", tmp_path)


def test_an_adapter_is_refused(tmp_path):
    settings = {"peft_type": "LORA", "base_model_name_or_path": "me/full"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    message = f"is an adapter, .* `lmtp export {tmp_path} OUT --to full`"
    assert re.search(message, error_of("serve", tmp_path))
