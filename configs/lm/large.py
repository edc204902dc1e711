r"""Llama 3, Mistral and Qwen2, all parameters fine-tuned on a file of prompts and completions, sharded.

    subspace-jax finetune --config lm/large:llama3-8b --model DIR --workdir work/llama \
        --config.data.source=train.jsonl --config.data.evaluation=test.jsonl

Variants: ``llama3-8b``, ``mistral-7b``, ``qwen2-7b`` (for v5e:4x4, fsdp 8 x tensor 2) and ``llama3-70b`` (for
v5p:4x4x8, fsdp 32 x tensor 4).

DIR is a Hugging Face folder with its tokenizer.  Each line of a file has "prompt" and "completion"; only completions
are in the loss.  Activations are bfloat16, parameters and AdamW's moments float32; layers are rematerialized in the
backward pass, and logits are computed for 256 positions at a time.  Another slice takes --config.mesh.fsdp and
--config.mesh.tensor.
"""

from subspace_jax.language import finetune

MESHES = {
    "llama3-8b": {"fsdp": 8, "tensor": 2},
    "mistral-7b": {"fsdp": 8, "tensor": 2},
    "qwen2-7b": {"fsdp": 8, "tensor": 2},
    "llama3-70b": {"fsdp": 32, "tensor": 4},
}


def get_config(variant="llama3-8b"):
    if variant not in MESHES:
        raise ValueError(f"variant: expected one of {sorted(MESHES)}, got {variant!r}")
    config = finetune.default_config()
    config.model.size = variant
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.loss_chunk = 256
    config.mesh.data = 1
    config.mesh.fsdp = MESHES[variant]["fsdp"]
    config.mesh.tensor = MESHES[variant]["tensor"]
    config.data.source = "train.jsonl"
    config.data.evaluation = "test.jsonl"
    config.data.prompt = "prompt"
    config.data.completion = "completion"
    config.data.length = 2048
    config.data.batch_size = config.data.eval_batch_size = MESHES[variant]["fsdp"]
    config.train.epochs = 3.0
    config.optim.learning_rate = 1e-5
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 1.0
    return config
