"""Optimizers of LoRA's two factors."""
