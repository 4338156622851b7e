"""Compare L-MTP's text with plain decoding's for every causal model that Transformers knows.

`matrix.py` writes what this finds into `benchmarks/architectures.md`. The configurations are the default
ones with their sizes reduced by `shrunk_config`, so that a new release's models are tried without being
listed here.

Shapes: `B` rows, `T` prompt and new tokens.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from drafters import CHAIN, TREE, Oracle, sometimes
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.support_lmtp import Tier, decoding_support, reason_too_long
from modeling_lmtp.tree_lmtp import DraftTree

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

PROMPT_LENGTHS = (19, 5, 11)
NEW_TOKENS = 300
NEW_TOKENS_PLAIN = 24  # where nothing is drafted
MAX_PARAMETERS = 20_000_000
SECONDS = 90  # for all of one model
SEEDS = (3, 4, 5, 6, 7, 8)
ENOUGH_TOKENS = 6
VOCABULARY = 96
PADDING = 0

# Reduced settings: names of settings as Transformers' configurations have them, and their value here
_SIZES: dict[int, str] = {
    32: (
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size attention_hidden_size "
        "backbone_hidden_size lru_width input_embedding_size output_embedding_size d_embed "
        "word_embed_proj_dim pronunciation_embed_dim shape_embed_dim shared_intermediate_size "
        "router_hidden_size"
    ),
    64: (
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner dff d_inner "
        "feed_forward_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size dim_ff "
        "mamba_d_ssm"
    ),
    16: (
        "kv_lora_rank q_lora_rank o_lora_rank moe_intermediate_size expert_ffn_hidden_size "
        "shared_expert_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size attention_chunk_size sliding_window "
        "sliding_window_size attention_window_size window_size chunk_size mamba_chunk_size "
        "block_size index_block_size dim_model_base rel_extent hc_lowrank ple_embed_dim "
        "prompt_length prompt_mid_dim local_attention local_attention_window_len "
        "block_multiple_of ngram_vocab_size_base make_ngram_vocab_size_divisible_by split_ngram_parts "
        "local_attn_chunk_length lsh_attn_chunk_length"
    ),
    8: (
        "head_dim swa_head_dim global_head_dim attention_head_dim qk_nope_head_dim v_head_dim "
        "swa_v_head_dim index_head_dim index_topk linear_key_head_dim linear_value_head_dim "
        "linear_head_dim mamba_head_dim mamba_d_head mamba_headdim mamba_n_heads mamba_num_heads "
        "n_mamba_heads ssm_state_size mamba_d_state hidden_size_per_layer_input laurel_rank "
        "loop_gate_rank gated_norm_rank adapter_rank d_head dim_head attention_head_size d_rel "
        "query_pre_attn_scalar"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "swa_num_attention_heads linear_num_value_heads linear_num_heads index_n_heads "
        "qk_rope_head_dim rotary_dim num_experts num_local_experts n_routed_experts moe_num_experts "
        "state_size num_query_groups zero_expert_num"
    ),
    2: (
        "linear_num_key_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
        "moe_topk moe_k num_layers n_layer n_layers num_hidden_layers encoder_layers decoder_layers "
        "num_encoder_layers num_decoder_layers num_blocks index_topk_blocks o_groups n_groups "
        "n_group num_expert_group time_step_rank mamba_dt_rank num_layers_per_stack"
    ),
    1: (
        "n_shared_experts num_shared_experts moe_num_shared_experts topk_group first_k_dense_replace "
        "num_nextn_predict_layers num_dense_layers moe_layer_start_index n_input_layers "
        "n_output_layers n_recurrent_layers"
    ),
    512: (
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length "
        "model_max_length"
    ),
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
}  # fmt: skip
_VALUES: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
_VALUES |= dict.fromkeys(("initializer_range", "init_std", "initializer_factor"), 0.3)
_LAYER_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"),
    *("decoder_layers", "num_blocks"),
)
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
# Settings that a configuration may leave open, and a model cannot
_NEEDED = {
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": PADDING}

# What the rules above get wrong, by configuration
_HYBRID_LAYERS = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            **{"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
        },
    },
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}
    },
    "dots3_note_text": {"head_dim": 12},
    "dory": {"num_hidden_layers": 3, "layer_types": None},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": _HYBRID_LAYERS,
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {
        **{"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
        "full_attn_idxs": None,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minimax": _HYBRID_LAYERS,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "qwen4_exp_text": {
        "eos_token_id": VOCABULARY - 1,  # ends n-grams
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 4, "ple_layer_ids": [1]},
    },
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        **{"w_init_variance_scale": 1.0, "final_w_init_variance_scale": 1.0},
    },
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16]},
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"layers_block_type": 2 * ["linear_attention", "hybrid"], "num_hidden_layers": 4},
        **{"n_mamba_heads": 2, "attention_head_dim": 16, "attention_hidden_size": 64},
    },
    "zamba2": {
        **{"attention_head_dim": 16, "attention_hidden_size": 64, "num_key_value_heads": 4},
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Models that cannot be tried, and why
_SKIPPED: dict[str, str] = {}


def shrunk_config(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a model type with its sizes reduced."""
    default = AutoConfig.for_model(model_type)
    settings = _shrunk_settings(default)
    return AutoConfig.for_model(model_type, **settings)


def _shrunk_settings(default: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings to give in place of a configuration's own."""
    found = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    settings = {
        name: _VALUES[name]
        for name, value in found.items()
        if name in _VALUES and type(value) in (int, float) and value > 0
    }
    settings |= _shrunk_key_value_heads(found)
    if "qk_head_dim" in found:
        settings["qk_head_dim"] = _VALUES["qk_nope_head_dim"] + _VALUES["qk_rope_head_dim"]
    settings |= {name: needed for name, needed in _NEEDED.items() if found.get(name, 0) is None}
    if "qk_rope_head_dim" in found and found.get("head_dim") == found["qk_rope_head_dim"]:
        settings["head_dim"] = _VALUES["qk_rope_head_dim"]
    if hasattr(default, "tie_word_embeddings"):  # tied, many would only repeat a token
        settings["tie_word_embeddings"] = False
    settings |= {name: token for name, token in _TOKENS.items() if hasattr(default, name)}
    for name in ("cls_token_id", "sep_token_id"):
        if type(found.get(name)) is int:
            settings[name] = 2
    if hasattr(default, "is_decoder"):
        settings["is_decoder"] = True
    settings |= _shrunk_layers(found)
    per_layer = default.to_dict().get("per_layer_config")
    if per_layer:
        settings["per_layer_config"] = {
            layer: {name: _VALUES.get(name, value) for name, value in changes.items()}
            | _shrunk_key_value_heads(changes)
            for layer, changes in per_layer.items()
            if int(layer) < settings["num_hidden_layers"]
        }
    for name, value in found.items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = {**_shrunk_settings(value), "model_type": value.model_type}
    return settings | _OVERRIDES.get(default.model_type, {})


def _shrunk_key_value_heads(found: dict[str, Any]) -> dict[str, Any]:
    """Return settings for as many key-value heads as query heads, for 2 or for 1."""
    return {
        name: 4 if found[name] == found.get("num_attention_heads") else min(found[name], 2)
        for name in _KEY_VALUE_HEADS
        if type(found.get(name)) is int
    }


def _shrunk_layers(found: dict[str, Any]) -> dict[str, Any]:
    """Return settings for the first layer of each kind, two layers at least."""
    counts = [name for name in _LAYER_COUNTS if type(found.get(name)) is int]
    if not counts:
        return {}
    count = found[counts[0]]
    lists = {
        name: value
        for name, value in found.items()
        if isinstance(value, list) and len(value) == count and count > 2
    }
    chosen: dict[Any, int] = {}
    for layer in range(count):
        chosen.setdefault(tuple(value[layer] for value in lists.values()), layer)
    layers = sorted(chosen.values())[:5]
    layers = layers if len(layers) > 1 else [0, 1]
    settings: dict[str, Any] = dict.fromkeys(counts, len(layers))
    for name, values in lists.items():
        picked = [values[layer] for layer in layers]
        is_heads = name.startswith("num_attention_heads")
        settings[name] = [4] * len(layers) if is_heads else picked
    return settings


@dataclass
class Trial:
    """What one model showed.

    Args:
        model_type: its name in Transformers.
        outcome: `equal` (all texts are plain decoding's), `plain` (decoded plainly, to the same
            text, by its tier or for the length of the text), `wrong` or `skipped`.
        tier, ragged: see `modeling_lmtp.support_lmtp.Support`; None if skipped.
        reason: why the tier is no higher, what is wrong, or why it was skipped.
        new_tokens: of each text.
        distinct_tokens: how many different ones the first prompt's text has.
        acceptance_length: tokens per pass, on average, of the first prompt.
    """

    model_type: str
    outcome: str
    tier: str | None = None
    ragged: bool | None = None
    reason: str = ""
    new_tokens: int = 0
    distinct_tokens: int = 0
    acceptance_length: float | None = None


class KnownPrompts(Oracle):
    """An oracle that tells rows by their beginnings, and says so when a text is not the one it knows."""

    def _place(self, known: list[int]) -> tuple[list[int], int]:
        known = _without_padding(known)
        for text in self.texts:
            own = _without_padding(text)
            if own[:2] == known[:2]:
                assert own[: len(known)] == known, f"other tokens by {len(known)}"
                return text, len(text) - len(own) + len(known)
        raise AssertionError("an unknown prompt")


def _without_padding(tokens: list[int]) -> list[int]:
    first = next(index for index, token in enumerate(tokens) if token != PADDING)
    return tokens[first:]


def build(model_type: str) -> PreTrainedModel:
    """Return a tiny random float32 model, in eval mode, whose text does not only repeat a token.

    Raises:
        MemoryError: the shrunk model is still too large.
    """
    config = shrunk_config(model_type)
    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if num_parameters > MAX_PARAMETERS:
        raise MemoryError(f"{num_parameters} parameters are left")
    best, most = None, 0
    for seed in SEEDS:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            config = shrunk_config(model_type)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name in ("eos_token_id", "forced_eos_token_id"):
            setattr(model.generation_config, name, None)
        model.generation_config.pad_token_id = PADDING
        text = generate(model, prompts()["single"], NEW_TOKENS_PLAIN).sequences
        distinct = len(set(text[0, -NEW_TOKENS_PLAIN:].tolist()))
        if distinct > most:
            best, most = model, distinct
        if distinct >= ENOUGH_TOKENS:
            break
    assert best is not None
    return best


def prompts() -> dict[str, dict[str, torch.Tensor]]:
    """Return one prompt, and three of different lengths as a left-padded batch."""
    rows = [(torch.arange(n)[None] * 7 + 5 * row) % 95 + 1 for row, n in enumerate(PROMPT_LENGTHS)]
    width = max(PROMPT_LENGTHS)
    batch = torch.cat([pad(row, (width - row.shape[1], 0), value=PADDING) for row in rows])
    return {
        name: {"input_ids": input_ids, "attention_mask": (input_ids != PADDING).long()}
        for name, input_ids in (("single", rows[0]), ("batch", batch))
    }


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], length: int, **options: Any):
    """Generate greedily, from a seed of its own: some models hash with random numbers."""
    torch.manual_seed(SEEDS[0])
    options = {"max_new_tokens": length, "do_sample": False, **options}
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def try_model(model_type: str, new_tokens: int = NEW_TOKENS) -> Trial:
    """Compare texts of one model, whatever it does."""
    if model_type in _SKIPPED:
        return Trial(model_type, "skipped", reason=_SKIPPED[model_type])
    try:
        backbone = build(model_type)
        inputs = prompts()
    except Exception as error:
        return Trial(model_type, "skipped", reason=f"cannot be built or generate: {_line(error)}")
    try:
        model = LMTPForCausalLM.from_backbone(backbone)
    except Exception as error:
        return Trial(model_type, "skipped", reason=f"no heads: {_line(error)}")
    support = decoding_support(backbone)
    trial = Trial(model_type, "equal", support.tier.value, support.ragged, support.reason)
    plain_tier = support.tier is Tier.PLAIN
    too_long = reason_too_long(backbone.config, max(PROMPT_LENGTHS))
    short = plain_tier or too_long is not None
    trial.new_tokens = min(new_tokens, NEW_TOKENS_PLAIN) if short else new_tokens
    too_long = reason_too_long(backbone.config, max(PROMPT_LENGTHS) + trial.new_tokens)
    _compare(trial, model, inputs)
    if too_long:
        trial.reason += f"; {too_long}"
    if trial.outcome == "equal" and (plain_tier or too_long):
        trial.outcome = "plain"
    return trial


def _compare(trial: Trial, model: LMTPForCausalLM, all_inputs: dict[str, Any]) -> None:
    """Compare texts over all shapes that the model verifies."""
    largest = {"tree": TREE, "chain": CHAIN}.get(str(trial.tier))
    wrong = []
    for name, inputs in all_inputs.items():
        try:
            plain = generate(model.backbone, inputs, trial.new_tokens).sequences
        except Exception as error:  # some cannot be given a padded batch
            trial.reason += f"; plain decoding of a {name} fails: {_line(error)}"
            continue
        wrong += [_difference(trial, model, inputs, plain, largest)]
        if name == "single":
            trial.distinct_tokens = len(set(plain[0, -trial.new_tokens :].tolist()))
            if largest is TREE:
                short = plain[:, : plain.shape[1] - trial.new_tokens + min(100, trial.new_tokens)]
                wrong += [_difference(trial, model, inputs, short, CHAIN)]
    differences = [difference for difference in wrong if difference]
    if differences:
        trial.outcome, trial.reason = "wrong", "; ".join([trial.reason, *differences])


def _difference(
    trial: Trial,
    model: LMTPForCausalLM,
    inputs: dict[str, torch.Tensor],
    plain: torch.Tensor,
    tree: DraftTree | None,
) -> str | None:
    """Return how the texts over a tree differ from plain decoding's, `(B, T)`, or None if they do not."""
    num_rows, width = inputs["input_ids"].shape
    name = f"{num_rows} rows, {'plain' if tree is None else 'tree' if tree is TREE else 'chain'}"
    drafter = None if tree is None else KnownPrompts(plain, tree, sometimes)
    try:
        output = generate(model, inputs, plain.shape[1] - width, use_lmtp=True, drafter=drafter)
    except Exception as error:
        return f"{name}: {_line(error)}"
    if num_rows == 1 and trial.acceptance_length is None and output.acceptance_lengths:
        lengths = output.acceptance_lengths[0]
        trial.acceptance_length = round(sum(lengths) / max(len(lengths), 1), 2)
    return None if torch.equal(output.sequences, plain) else f"{name}: other tokens"


def _line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line}"[:200]


def _trial_in_child(model_type: str, new_tokens: int, connection: Any) -> None:
    signal.alarm(SECONDS + 5)  # ends the child even if its parent is gone
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    connection.send(asdict(try_model(model_type, new_tokens)))


def try_all(
    model_types: tuple[str, ...] = MODEL_TYPES, new_tokens: int = NEW_TOKENS
) -> Iterator[Trial]:
    """Yield a trial per model, each in a fork of this process with a limit of `SECONDS`."""
    context = multiprocessing.get_context("fork")
    for model_type in model_types:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_trial_in_child, args=(model_type, new_tokens, sender))
        with _ended(child):
            child.start()
            sender.close()
            try:
                found = receiver.recv() if receiver.poll(SECONDS) else None
            except EOFError:
                yield Trial(model_type, "skipped", reason="its process ended early")
                continue
            late = Trial(model_type, "skipped", reason=f"takes more than {SECONDS} seconds")
            yield late if found is None else Trial(**found)


@contextmanager
def _ended(child: Any) -> Iterator[None]:
    try:
        yield
    finally:
        if child.is_alive():
            child.kill()
        child.join()
