"""Hugging Face checkpoint folders, a file for each family."""
