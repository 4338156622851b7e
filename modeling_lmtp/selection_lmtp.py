"""Selection: the tokens that plain decoding would select, and what it would accept instead.

Shapes: `R` rows of the call, `V` vocabulary size.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .transformers_lmtp import pad_token_id, public_classes

# These process each row independently of the others and keep no state between calls. Nothing is known about
# a processor or criterion that is not listed, so rows that use one are decoded in lockstep.
ROW_WISE_PROCESSORS = public_classes(
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"),
    *("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization"),
    *("RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor"),
    *("NoBadWordsLogitsProcessor", "SequenceBiasLogitsProcessor"),
    *("SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor"),
    *("ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor"),
    *("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"),
    *("ExponentialDecayLengthPenalty", "InfNanRemoveLogitsProcessor"),
)
ROW_WISE_CRITERIA = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)


class TokenSelector:
    """Selects the tokens that plain decoding would select, and knows what ends a row.

    Args:
        logits_processor, stopping_criteria, generation_config: as `generate` prepared them.
    """

    def __init__(
        self,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ) -> None:
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.do_sample = generation_config.do_sample
        self.pad_token_id = pad_token_id(generation_config)
        # As in plain decoding: without an EOS token, finished rows continue until the last row finishes
        self.pads_finished_rows = any(hasattr(c, "eos_token_id") for c in stopping_criteria)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether tokens are argmaxes of unprocessed logits, and only length and EOS stop a row."""
        simple = (MaxLengthCriteria, EosTokenCriteria)
        has_simple_stops = all(type(criterion) in simple for criterion in self.stopping_criteria)
        return not self.do_sample and not self.logits_processor and has_simple_stops

    @property
    def is_row_wise(self) -> bool:
        """Whether rows can be processed one at a time, without the rest of the batch."""
        allowed = ROW_WISE_CRITERIA if self.pads_finished_rows else (MaxLengthCriteria,)
        return all(
            type(processor) in ROW_WISE_PROCESSORS for processor in self.logits_processor
        ) and all(type(criterion) in allowed for criterion in self.stopping_criteria)

    def for_row(self, row: int) -> "TokenSelector":
        """Return a selector for a single row; requires `is_row_wise`."""
        selector = copy.copy(self)
        selector.logits_processor = LogitsProcessorList(
            _processor_for_row(processor, row) for processor in self.logits_processor
        )
        return selector

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

    def select(self, scores: torch.Tensor) -> torch.Tensor:
        """Select one token per row, `(R,)`, from processed scores `(R, V)`."""
        if self.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)


def _processor_for_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    # A repetition penalty may hold one prompt length per row
    if not torch.is_tensor(getattr(processor, "prompt_ignore_length", None)):
        return processor
    for_row = copy.copy(processor)
    for_row.prompt_ignore_length = processor.prompt_ignore_length[row : row + 1]
    return for_row


@dataclass(frozen=True)
class TypicalRule:
    """Typical acceptance (Medusa, arXiv 2401.10774): accept any candidate that is likely enough.

    A candidate `x` is accepted if `p(x) > min(ε, δ exp(-H(p)))`, where `H` is the entropy of the model's
    distribution `p`. The rule is lossy: the text differs from plain decoding's.

    Args:
        threshold: ε.
        alpha: δ.
    """

    threshold: float
    alpha: float

    def select(self, scores: torch.Tensor, candidate_ids: Sequence[int]) -> int | None:
        """Return the most likely candidate that the rule accepts given scores `(1, V)`, or None."""
        if not candidate_ids:
            return None
        distribution = torch.distributions.Categorical(logits=scores[0])
        bound = min(self.threshold, self.alpha * float(torch.exp(-distribution.entropy())))
        probabilities = distribution.probs[list(candidate_ids)]
        best = int(probabilities.argmax())
        return candidate_ids[best] if float(probabilities[best]) > bound else None
