"""Taking tokens, and judging them, exactly as plain decoding does.

Shapes: `R` rows, `L` known tokens, `V` vocabulary size.
"""

import copy
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

# These judge every row by itself, and by nothing but its tokens and scores; of a processor or a
# criterion that is not listed, that is not known.
ROW_WISE_PROCESSORS = public_classes(
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
)
ROW_WISE_CRITERIA = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)


class TokenChooser:
    """Takes the next tokens from logits, and says after which of them a row ends.

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
        # As in plain decoding: without one, finished rows go on until the last row has finished
        self.pads_finished_rows = any(hasattr(c, "eos_token_id") for c in stopping_criteria)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether tokens are bare argmaxes and only length and end-of-sequence ids stop them."""
        simple = (MaxLengthCriteria, EosTokenCriteria)
        simple_stops = all(type(criterion) in simple for criterion in self.stopping_criteria)
        return not self.do_sample and not self.logits_processor and simple_stops

    @property
    def is_row_wise(self) -> bool:
        """Whether a row may be judged without those beside it, one call after the other."""
        criteria = self.stopping_criteria
        allowed = ROW_WISE_CRITERIA if self.pads_finished_rows else (MaxLengthCriteria,)
        return all(
            type(processor) in ROW_WISE_PROCESSORS for processor in self.logits_processor
        ) and all(type(criterion) in allowed for criterion in criteria)

    def of_row(self, row: int) -> "TokenChooser":
        """Return a chooser for one row alone, where `is_row_wise`."""
        chooser = copy.copy(self)
        chooser.logits_processor = LogitsProcessorList(
            _of_row(processor, row) for processor in self.logits_processor
        )
        return chooser

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

    def scores(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Process the logits `(R, V)` that follow `input_ids` `(R, L)`; they may be overwritten."""
        return self.logits_processor(input_ids, logits)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Take tokens `(R,)` by their processed scores `(R, V)`."""
        if self.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)

    def stops(
        self, input_ids: torch.Tensor, scores: tuple[torch.Tensor, ...] | None
    ) -> torch.Tensor:
        """Return `(R,)` booleans: which rows end with the last of `input_ids` `(R, L)`."""
        return self.stopping_criteria(input_ids, scores)


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """A repetition penalty may know how much padding each row begins with."""
    if not torch.is_tensor(getattr(processor, "prompt_ignore_length", None)):
        return processor
    own = copy.copy(processor)
    own.prompt_ignore_length = processor.prompt_ignore_length[row : row + 1]
    return own
