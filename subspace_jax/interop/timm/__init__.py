"""Checkpoint folders of timm."""
