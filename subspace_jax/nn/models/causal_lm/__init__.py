"""Causal language models: GPT-2, Llama, Mistral, Qwen2 and 3, Gemma 2 and 3."""
