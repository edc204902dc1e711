"""Static embeddings of tokens: a text encoder without layers."""
