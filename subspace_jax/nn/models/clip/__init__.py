"""Dual towers: CLIP and SigLIP."""
