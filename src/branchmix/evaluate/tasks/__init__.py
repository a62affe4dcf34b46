"""Downstream tasks through lm-eval: its tasks, prompts and metrics on the live model."""
