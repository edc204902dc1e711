"""BERT: bidirectional text encoders."""
