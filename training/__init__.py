"""From prompts to leap heads: self-distillation, warm-up, joint tuning."""
