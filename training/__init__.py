"""Training of leap heads: self-distillation and head warm-up."""
