"""Trainer subclasses: distillation and fine-tuning."""
