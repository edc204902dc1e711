"""Causal language models: GPT-2, Llama, Mistral, Qwen2."""
