"""The only file that uses names of Transformers outside its public interface.

Names are looked up when this file is imported, not derived from a version number. A release that has
renamed one of them still loads every checkpoint. `reason_unavailable` then says what is missing, and
`generate(use_lmtp=True)` decodes plainly. The attributes of cache layers are the exception: they are in
`cache_lmtp` and `static_lmtp`.

Shapes: `B` rows, `L` known tokens, `Q` tokens of one pass.
"""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import __version__ as VERSION
from transformers.utils import ModelOutput

LOWEST = "5.15"  # the first release whose caches can roll back sliding windows
NEWEST = "5.24"
TESTED = f"{LOWEST} to {NEWEST}"  # the range that the package's tests run on
REMEDY = (
    "Run `pip install -U modeling-lmtp`, which also serves checkpoints that bring their own code, or "
    f"install a tested release of Transformers ({TESTED})."
)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def check_release(version: str = VERSION) -> None:
    """Raise an ImportError that names the supported range if Transformers is too old.

    Args:
        version: of Transformers.
    """
    if _numbers(version) < _numbers(LOWEST):
        raise ImportError(
            f"Leap heads need Transformers {LOWEST} or newer, and {version} is installed. Run "
            f"`pip install -U 'transformers>={LOWEST},<6'`."
        )


check_release()
RELEASE = f"Transformers {VERSION}"


def remedy_for(reason: str) -> str:
    """Return a sentence on what to do about a reason for decoding plainly; empty if nothing helps.

    Args:
        reason: contains `RELEASE` if this release is the cause.
    """
    return REMEDY if RELEASE in reason or _numbers(VERSION) > _numbers(NEWEST) else ""


# Names that this release lacks, in words
_missing: list[str] = []


def _look_up(module: str, name: str) -> Any:
    """Return an object of one of Transformers' modules, or None if it has no such name."""
    try:
        return getattr(import_module(f"transformers.{module}"), name, None)
    except ImportError:
        return None


def _require(module: str, name: str) -> Any:
    """Return an object that decoding needs, or None; a name that is lacking is added to `_missing`."""
    value = _look_up(module, name)
    if value is None:
        _missing.append(f"transformers.{module}.{name}")
    return value


def _class(module: str, name: str) -> Any:
    """Return a class of Transformers, or a placeholder without instances if it has no such name."""
    return _require(module, name) or type(name, (), {})


def public_classes(*names: str) -> tuple[type, ...]:
    """Return classes that Transformers exports, without those that this release lacks."""
    classes = (getattr(import_module("transformers"), name, None) for name in names)
    return tuple(kind for kind in classes if kind is not None)


# The kinds of cache layer that `cache_lmtp` and `static_lmtp` know
DynamicLayer = _class("cache_utils", "DynamicLayer")
DynamicSlidingWindowLayer = _class("cache_utils", "DynamicSlidingWindowLayer")
LinearAttentionCacheLayerMixin = _class("cache_utils", "LinearAttentionCacheLayerMixin")
StaticLayer = _class("cache_utils", "StaticLayer")

_missing += [
    f"Cache.{name}"
    for name in ("crop", "get_seq_length", "reorder_cache")
    if not hasattr(Cache, name)
]

_create_masks = _require("masking_utils", "create_masks_for_generate")


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    """Return the names of a function's parameters, seen through decorators that rename old ones."""
    return inspect.signature(function).parameters


# --- The cache of a call

CACHE_NAMES = ("cache", "past_key_values")  # newest first; the second until Transformers 5.23
USERS_CACHE_NAMES = (*CACHE_NAMES, "cache_params")  # what callers of `generate` may write
_prepared = _parameters(GenerationMixin.prepare_inputs_for_generation)
_CACHE = next((name for name in CACHE_NAMES if name in _prepared), None)
if _CACHE is None:
    _missing.append(f"a parameter {' or '.join(CACHE_NAMES)} of prepare_inputs_for_generation")
if "next_sequence_length" not in _prepared:
    _missing.append("a parameter next_sequence_length of prepare_inputs_for_generation")


def cache_of(model_kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the model_kwargs, or in the output, of `generate`, or None."""
    return model_kwargs.get(str(_CACHE))


def with_cache(model_kwargs: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """Return model_kwargs of `generate` with another cache."""
    return {**model_kwargs, str(_CACHE): cache}


def passed_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Return the cache that a caller of `generate` passes, under any of its names, or None."""
    return next((kwargs[n] for n in USERS_CACHE_NAMES if kwargs.get(n) is not None), None)


def output_with_cache(output_class: type[ModelOutput], cache: Cache, **fields: Any) -> Any:
    """Return an output of `generate`, with the cache in the field that this release names."""
    return output_class(**fields, **{str(_CACHE): cache})


# --- What a backbone takes


def forward_parameters(backbone: PreTrainedModel) -> Collection[str]:
    """Return the names of the parameters of a backbone's forward."""
    # torch.compile(model) wraps the model in a module whose forward takes anything
    return _parameters(getattr(backbone, "_orig_mod", backbone).forward)


def _cache_name(backbone: PreTrainedModel) -> str | None:
    """Return the name of the cache in the backbone's forward; remote code may be of another release."""
    names = forward_parameters(backbone)
    return next((name for name in (_CACHE, *CACHE_NAMES) if name in names), None)


def takes_cache(backbone: PreTrainedModel) -> bool:
    """Return whether a backbone's forward takes a key-value cache."""
    return _cache_name(backbone) is not None


def takes_positions(backbone: PreTrainedModel) -> bool:
    """Return whether a backbone's forward takes a position for each token."""
    return "position_ids" in forward_parameters(backbone)


def forward_with_cache(backbone: PreTrainedModel, cache: Cache, **inputs: Any) -> Any:
    """Run a backbone on tokens that follow those in a cache.

    Args:
        backbone: takes a cache, or is a wrapper that passes it on.
        cache: the tokens are appended to it.
        inputs: the other arguments of its forward.
    """
    name = _cache_name(backbone) or _CACHE
    return backbone(**inputs, **{str(name): cache}, use_cache=True)


def reason_unavailable(backbone: PreTrainedModel) -> str | None:
    """Return what this release, or this backbone, lacks that L-MTP decoding needs, or None."""
    if _missing:
        return f"{RELEASE} has no {', '.join(_missing)}"
    if "custom_generate" not in _parameters(backbone.generate):
        return f"generate takes no custom_generate in {RELEASE}"
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "_prefill": ((None, None, {}), {}),
        "prepare_inputs_for_generation": ((None,), {"next_sequence_length": 1, str(_CACHE): None}),
    }
    for name, (args, kwargs) in calls.items():
        try:
            inspect.signature(getattr(backbone, name)).bind(*args, **kwargs)
        except (AttributeError, TypeError) as error:
            return f"{type(backbone).__name__}.{name} is not what it was before {RELEASE} ({error})"
    return None


# --- Passes


def prefill(
    backbone: PreTrainedModel,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> ModelOutput:
    """Run the prompts `(B, L)`, or the tokens that the cache lacks, as plain decoding does."""
    return backbone._prefill(input_ids, generation_config, model_kwargs)


def extend(model_kwargs: dict[str, Any], num_new_tokens: int) -> dict[str, Any]:
    """Return model_kwargs of `generate` for more tokens.

    Positions continue from the last one, new tokens are attended to, and have the last one's type.

    Args:
        model_kwargs: for `L` tokens; not modified.
        num_new_tokens: how many to add.
    """
    extended = dict(model_kwargs)
    for name, value in model_kwargs.items():
        if value is None or num_new_tokens == 0:
            continue
        if name == "position_ids":
            steps = torch.arange(1, 1 + num_new_tokens, dtype=value.dtype, device=value.device)
            new = value[..., -1:] + steps
        elif name == "attention_mask":
            new = value.new_ones((value.shape[0], num_new_tokens))
        elif name.endswith("token_type_ids"):
            new = value[..., -1:].expand(*value.shape[:-1], num_new_tokens)
        else:
            continue
        extended[name] = torch.cat([value, new], dim=-1)
    return extended


def next_inputs(
    backbone: PreTrainedModel,
    input_ids: torch.Tensor,
    num_tokens: int,
    model_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the backbone's inputs for the last tokens of a text, with logits for all of them.

    Args:
        backbone: prepares them.
        input_ids: `(B, L)`, all known tokens.
        num_tokens: `Q`, how many of them the pass is for.
        model_kwargs: what `generate` keeps between steps, for all `L` tokens, with the cache.
    """
    inputs = backbone.prepare_inputs_for_generation(
        input_ids, next_sequence_length=num_tokens, **model_kwargs
    )
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = 0  # those of every token
    return inputs


def decode_context(backbone: PreTrainedModel) -> AbstractContextManager[None]:
    """Return the context in which Transformers decodes: it may select faster kernels for few tokens."""
    optimize = getattr(backbone, "_optimize_model_for_decode", None)
    return nullcontext() if optimize is None else optimize()


def would_compile(
    backbone: PreTrainedModel, model_kwargs: dict[str, Any], generation_config: GenerationConfig
) -> bool:
    """Return whether Transformers would decode with a compiled pass; False if it cannot be asked."""
    criteria = getattr(backbone, "_valid_auto_compile_criteria", None)
    return criteria is not None and bool(criteria(model_kwargs, generation_config))


# --- Attention


def attention_implementation(config: Any) -> str | None:
    """Return the attention implementation in a configuration, such as `"sdpa"`."""
    return getattr(config, "_attn_implementation", None)


_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def implementations(config: Any) -> dict[str, Any]:
    """Return the implementations of attention and experts in a configuration."""
    return {name: getattr(config, name, None) for name in _IMPLEMENTATIONS}


def set_implementations(config: Any, values: dict[str, Any]) -> None:
    """Set the implementations that `implementations` has returned."""
    for name, value in values.items():
        setattr(config, name, value)


def mask_kinds(backbone: PreTrainedModel, cache: Cache, num_rows: int) -> list[str]:
    """Return the keys of a backbone's dict of masks by kind of layer; empty if it takes a single mask."""
    create = getattr(backbone, "create_masks_for_generate", _create_masks)
    masks = create(
        config=backbone.config,
        inputs_embeds=torch.empty((num_rows, 2, 0), dtype=backbone.dtype),
        attention_mask=None,
        position_ids=torch.arange(2).expand(num_rows, -1),
        **{str(_CACHE): cache},
    )
    return list(masks) if isinstance(masks, dict) else []


# --- Generation settings, loading, devices, provenance

# Arguments that AutoModel adds to those of `from_pretrained`
AUTO_OPTIONS = ("adapter_kwargs", "_from_auto")


def remove_local_path(config_dict: dict[str, Any]) -> None:
    """Remove from a configuration's dict the path that it was loaded from."""
    config_dict.pop("_name_or_path", None)


def pad_token_id(generation_config: GenerationConfig) -> int:
    """Return the token that pads finished rows, as `generate` chooses it; 0 if none is set."""
    token, end = generation_config.pad_token_id, generation_config.eos_token_id
    if token is None and end is not None:
        token = end[0] if isinstance(end, list | tuple) else end
    return 0 if token is None else int(token)


def keep_custom_settings(generation_config: GenerationConfig) -> None:
    """Let a reload keep settings that Transformers does not know.

    It drops them from a generation config that was derived from the model's config.
    """
    generation_config._from_model_config = False


def is_sharded(model: Any) -> bool:
    """Return whether a model's weights are sharded over processes (ZeRO-3, FSDP), which run in step."""
    is_zero3 = _look_up("integrations.deepspeed", "is_deepspeed_zero3_enabled")
    is_fsdp = _look_up("integrations.fsdp", "is_fsdp_managed_module")
    return bool((is_zero3 and is_zero3()) or (is_fsdp and is_fsdp(model)))


def start_at_zero(parameter: torch.Tensor) -> None:
    """Set a parameter to zero, unless `from_pretrained` has already loaded it."""
    zeros = _look_up("initialization", "zeros_") or torch.nn.init.zeros_
    zeros(parameter)


def execution_device(module: torch.nn.Module) -> torch.device | None:
    """Return the device on which Accelerate runs an offloaded module, or None if it is not offloaded."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


def is_stateful(backbone: PreTrainedModel) -> bool:
    """Return whether a model says that it keeps states which cannot be cropped."""
    return bool(getattr(backbone, "_is_stateful", False))


def block_classes(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of a model's block classes, which must not be split over devices."""
    return frozenset(getattr(model, "_no_split_modules", None) or ())


class ForwardHooks(NamedTuple):
    """The forward hooks of a module, for which torch has no public name.

    Args:
        before, after: the forward, by key.
        with_arguments: the keys of those before it that get the arguments that are passed by name.
    """

    before: Mapping[int, Any]
    after: Mapping[int, Any]
    with_arguments: Collection[int]


def hooks_of(module: nn.Module) -> ForwardHooks:
    """Return the forward hooks of a module itself."""
    return ForwardHooks(
        module._forward_pre_hooks,
        module._forward_hooks,
        module._forward_pre_hooks_with_kwargs.keys(),
    )


def commit_of(config: Any, revision: str | None = None) -> str | None:
    """Return the commit on the Hub that a configuration was loaded from, or None.

    Until 5.19, Transformers stored it in the configuration. Since then it is read from the local Hub cache,
    which keeps files in a folder named after their commit.

    Args:
        config: names the repository, or a snapshot in the cache.
        revision: that it was loaded from. Unless the name is of a snapshot, None gives None, because a
            guess might pin another commit.
    """
    stored = getattr(config, "_commit_hash", None)
    name = getattr(config, "name_or_path", None)
    if stored or not name:
        return stored
    snapshot = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]?$", name)
    if snapshot:
        return snapshot[1]
    try:
        path = revision and try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # a folder
        return None
    return path.replace("\\", "/").split("/")[-2] if isinstance(path, str) else None


def keep_commit(config: Any, revision: str | None = None) -> None:
    """Store in a configuration the commit that it was loaded from, as Transformers did until 5.19.

    Args:
        config, revision: see `commit_of`. Call it right after loading: a branch may move on.
    """
    config._commit_hash = commit_of(config, revision)
