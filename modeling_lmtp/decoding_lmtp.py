"""The decoding loop: prefill, then draft, verify, walk, commit, until a criterion stops it.

The text is plain decoding's: at each node the walk takes the token that plain decoding would take
there, and goes on for as long as a candidate carries that token (see *Exactness* in the README).

Shapes: `L` known tokens, `N` candidates, `H` hidden size, `V` vocabulary size; batch size is 1.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .backbone_lmtp import unembedding_inputs
from .cache_lmtp import keep_path, start_rollback, stop_rollback
from .drafting_lmtp import Drafter
from .tree_lmtp import DraftTree
from .verification_lmtp import Verifier


@dataclass
class LMTPGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(use_lmtp=True, return_dict_in_generate=True)` returns.

    Args:
        acceptance_lengths: tokens emitted by each backbone pass after the prefill, the bonus token
            included; their mean is the tokens per step τ, 1 for plain decoding.
    """

    acceptance_lengths: list[int] | None = None


@dataclass
class Walk:
    """What one walk down a verified tree gave.

    Args:
        path: the nodes stood on, root first; the cache keeps them.
        tokens: the tokens emitted, one per node of the path.
        finished: whether generation ends here.
    """

    path: list[int] = field(default_factory=lambda: [0])
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


@dataclass
class TokenChooser:
    """Takes tokens, and judges them, exactly as plain decoding does.

    Args:
        logits_processor, stopping_criteria: as `generate` prepared them.
        do_sample: sample, one draw per emitted token, or take the most likely.
        scores, logits: if not None, each emitted token's processed and raw scores `(1, V)` are
            appended.
    """

    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    do_sample: bool
    scores: list[torch.Tensor] | None = None
    logits: list[torch.Tensor] | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether tokens are bare argmaxes and only length and end-of-sequence ids stop them."""
        simple_stops = all(
            isinstance(criterion, MaxLengthCriteria | EosTokenCriteria)
            for criterion in self.stopping_criteria
        )
        recorded = self.scores is not None or self.logits is not None
        return not (self.do_sample or self.logits_processor or recorded) and simple_stops

    @cached_property
    def max_length(self) -> int:
        """The length at which `MaxLengthCriteria` stops."""
        return min(
            criterion.max_length
            for criterion in self.stopping_criteria
            if isinstance(criterion, MaxLengthCriteria)
        )

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens at which `EosTokenCriteria` stops."""
        return frozenset(
            token
            for criterion in self.stopping_criteria
            if isinstance(criterion, EosTokenCriteria)
            for token in criterion.eos_token_id.tolist()
        )

    def choose(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the token `(1,)` that follows `input_ids` `(1, L)`, given raw logits `(1, V)`."""
        logits = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores = self.logits_processor(input_ids, logits)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        if self.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)

    def stops(self, input_ids: torch.Tensor) -> bool:
        """Whether generation ends with the last of `input_ids` `(1, L)`."""
        scores = None if self.scores is None else tuple(self.scores)
        return bool(self.stopping_criteria(input_ids, scores).all())


def decode(
    verifier: Verifier,
    input_ids: torch.Tensor,
    drafter: Drafter,
    chooser: TokenChooser,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> LMTPGenerateOutput:
    """Generate from a prompt `(1, L)`.

    Args:
        verifier: holds the backbone.
        input_ids: the prompt.
        drafter: proposes candidates; whatever it proposes, the text stays the same.
        chooser: takes tokens as plain decoding would.
        generation_config: as `generate` prepared it; `max_length` bounds the drafts.
        streamer: receives each emitted token once, in order.
        model_kwargs: as `generate` prepared them, the cache among them.
    """
    walk = walk_greedily if chooser.is_plain_greedy else walk_stepwise
    backbone = verifier.backbone
    cache = model_kwargs["past_key_values"]
    tree, candidate_ids = DraftTree(), input_ids[:, :0]
    tokens_per_pass = []
    with unembedding_inputs(backbone) as new_states:
        logits = _prefill(backbone, input_ids, drafter, generation_config, model_kwargs)
        prompt_states = torch.cat(new_states, dim=1)
        hidden_states, new_states[:] = prompt_states[:, :-1], [prompt_states[:, -1:]]
        start_rollback(cache)
        while True:
            walked = walk(tree, candidate_ids, logits, input_ids, chooser)
            input_ids = _emit(input_ids, walked.tokens, streamer)
            keep_path(cache, walked.path, num_slots=1 + tree.num_nodes)
            tokens_per_pass.append(len(walked.tokens))
            if walked.finished:
                break
            # The first: a logits processor may have run the backbone since
            accepted_states = new_states[0][:, walked.path]
            hidden_states = _latest(hidden_states, accepted_states, drafter)
            model_kwargs = _extend(backbone, model_kwargs, len(walked.tokens))
            room = generation_config.max_length - input_ids.shape[1] - 1
            tree, candidate_ids = drafter.draft(input_ids, hidden_states, room)
            new_states.clear()  # the drafter may have called the unembedding
            logits = verifier.verify(input_ids, tree, candidate_ids, model_kwargs).logits
        stop_rollback(cache)
    if streamer is not None:
        streamer.end()
    return LMTPGenerateOutput(
        sequences=input_ids,
        scores=None if chooser.scores is None else tuple(chooser.scores),
        logits=None if chooser.logits is None else tuple(chooser.logits),
        past_key_values=cache,
        acceptance_lengths=tokens_per_pass[1:],
    )


def _prefill(
    backbone: PreTrainedModel,
    input_ids: torch.Tensor,
    drafter: Drafter,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> torch.Tensor:
    """Run the prompt; return the logits after its last token, `(1, 1, V)`.

    The drafter's states are those that the unembedding reads, so it must read as many.
    """
    takes_logits_to_keep = "logits_to_keep" in model_kwargs
    if takes_logits_to_keep:
        model_kwargs["logits_to_keep"] = drafter.num_states
    outputs = backbone._prefill(input_ids, generation_config, model_kwargs)
    if takes_logits_to_keep:
        model_kwargs["logits_to_keep"] = 0  # from now on, those of every node
    return outputs.logits[:, -1:]


def walk_stepwise(
    tree: DraftTree,
    candidate_ids: torch.Tensor,
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    chooser: TokenChooser,
) -> Walk:
    """Walk down the tree, choosing and judging token by token as plain decoding does.

    Args:
        tree: the verified tree.
        candidate_ids: `(1, N)`.
        logits: `(1, 1 + N, V)`.
        input_ids: `(1, L)`, the root its last.
        chooser: takes each token.
    """
    candidates = candidate_ids[0].tolist()
    walked = Walk()
    while True:
        token = chooser.choose(input_ids, logits[:, walked.path[-1]])
        input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
        walked.tokens.append(int(token))
        walked.finished = chooser.stops(input_ids)
        node = tree.child(walked.path[-1], walked.tokens[-1], candidates)
        if walked.finished or node is None:
            return walked
        walked.path.append(node)


def walk_greedily(
    tree: DraftTree,
    candidate_ids: torch.Tensor,
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    chooser: TokenChooser,
) -> Walk:
    """Do what `walk_stepwise` does for bare argmaxes, with one transfer to the host in all."""
    most_likely = logits[0].argmax(dim=-1)
    on_host = torch.cat([most_likely, candidate_ids[0].to(most_likely.device)]).tolist()
    tokens, candidates = on_host[: 1 + tree.num_nodes], on_host[1 + tree.num_nodes :]
    length = input_ids.shape[1]
    walked = Walk()
    while True:
        token = tokens[walked.path[-1]]
        walked.tokens.append(token)
        walked.finished = (
            token in chooser.eos_token_ids or length + len(walked.tokens) >= chooser.max_length
        )
        node = tree.child(walked.path[-1], token, candidates)
        if walked.finished or node is None:
            return walked
        walked.path.append(node)


def _emit(
    input_ids: torch.Tensor, tokens: list[int], streamer: BaseStreamer | None
) -> torch.Tensor:
    emitted = torch.tensor([tokens], dtype=input_ids.dtype)
    if streamer is not None:
        for token in emitted[0].split(1):
            streamer.put(token)
    return torch.cat([input_ids, emitted.to(input_ids.device)], dim=-1)


def _latest(
    hidden_states: torch.Tensor, accepted_states: torch.Tensor, drafter: Drafter
) -> torch.Tensor:
    """Append the accepted path's states and keep the last that the drafter reads, `(1, S, H)`."""
    return torch.cat([hidden_states, accepted_states], dim=1)[:, -drafter.num_states :]


def _extend(
    backbone: PreTrainedModel, model_kwargs: dict[str, Any], num_new_tokens: int
) -> dict[str, Any]:
    return backbone._update_model_kwargs_for_generation(
        ModelOutput(), model_kwargs, num_new_tokens=num_new_tokens
    )
