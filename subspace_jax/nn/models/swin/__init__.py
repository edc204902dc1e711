"""Swin transformers."""
