"""TRL's SFTTrainer on a model with leap heads; runs where TRL is installed.

The heads learn if the trainer uses the model's own loss. TRL to 1.4 does, and to 1.14 with
`loss_type="nll"`; from 1.15 on it computes a loss of its own, and one line gives it the model's back.
"""

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from tiny import tiny_llama, tiny_tokenizer
from transformers import Trainer

from modeling_lmtp import LMTPForCausalLM

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    # PEFT and TRL use names that Transformers has changed
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
HAS_OWN_LOSS = Version(trl.__version__) >= Version("1.15")
PROMPT = torch.tensor([[5, 17, 80, 33, 41, 9]])


class SFTTrainer(trl.SFTTrainer):
    if HAS_OWN_LOSS:
        compute_loss = Trainer.compute_loss


def new_model(**options):
    model = LMTPForCausalLM.from_backbone(
        tiny_llama(), leap_offsets=(2, 3), train_backbone=True, leap_loss_weight=0.5, **options
    )
    generator = torch.Generator().manual_seed(8)
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def new_trainer(trainer_class, model, folder, **options):
    rows = [{"prompt": f"Question {i}?", "completion": " The sea and the wind."} for i in range(8)]
    config = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        loss_type="nll",
        max_length=64,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    return trainer_class(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        **options,
    )


@pytest.mark.parametrize("whole_heads", [False, True], ids=["LoRA heads", "whole heads"])
def test_backbone_and_heads_learn_from_the_loss_of_the_model(tmp_path, whole_heads):
    model = new_model()
    adapters = LoraConfig(
        target_modules="all-linear",
        exclude_modules=r"leap_heads\..*" if whole_heads else None,
        modules_to_save=["leap_heads"] if whole_heads else None,
        task_type="CAUSAL_LM",
    )
    trainer = new_trainer(SFTTrainer, model, tmp_path, peft_config=adapters)
    [batch] = [dict(batch) for batch in trainer.get_train_dataloader()]
    with torch.no_grad():
        expected = new_model()(**batch)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected.loss.item(), rel=1e-3)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert (trainer.model(**batch).leap_losses < expected.leap_losses).all()

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(new_model(), tmp_path / "adapter")
    trained = trainer.model.eval()
    for ours, theirs in zip(
        loaded(input_ids=PROMPT, output_leap_logits=True).leap_logits,
        trained(input_ids=PROMPT, output_leap_logits=True).leap_logits,
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    merged = loaded.merge_and_unload()
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
    plain = merged.generate(PROMPT, **options)
    assert torch.equal(merged.generate(PROMPT, use_lmtp=True, **options), plain)


@pytest.mark.skipif(not HAS_OWN_LOSS, reason="this TRL uses the model's own loss")
def test_a_trainer_whose_loss_omits_the_heads_raises(tmp_path):
    trainer = new_trainer(trl.SFTTrainer, new_model(), tmp_path)
    with pytest.raises(AttributeError, match="last_hidden_state"):
        trainer.train()
