r"""Llama 3, Mistral and Qwen2, all parameters tuned on a file of prompts and answers, sharded.

    subspace-jax finetune --config configs/lm/large.py:llama3-8b --model DIR --workdir work/llama \
        --config.data.source=train.jsonl --config.data.evaluation=test.jsonl

Variants and the slices that they are laid out for (any other by --config.mesh.fsdp and --config.mesh.tensor):

    llama3-8b     v5e:4x4     fsdp 8 x tensor 2
    mistral-7b    v5e:4x4     fsdp 8 x tensor 2
    qwen2-7b      v5e:4x4     fsdp 8 x tensor 2
    llama3-70b    v5p:4x4x8   fsdp 32 x tensor 4

DIR is a Hugging Face folder with its tokenizer.  Each line of a file has "prompt" and "completion"; only completions
are learnt.  Activations are bfloat16, parameters and AdamW's moments float32; every layer is computed again in the
backward pass, and scores of the vocabulary are there for 256 places at a time.
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
