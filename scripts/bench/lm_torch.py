"""The side of Hugging Face transformers, on PyTorch, in the benchmark of language models."""

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait(out):
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _open(folder, tokens, run):
    # Without dropout; parameters stay float32, as they do in the other library.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    narrow = torch.autocast(DEVICE, torch.bfloat16, enabled=run["dtype"] == "bfloat16")
    return model, torch.as_tensor(tokens, dtype=torch.long, device=DEVICE), narrow


def forward(folder, tokens, run):
    model, tokens, narrow = _open(folder, tokens, run)

    def call():
        with torch.inference_mode(), narrow:
            return model(tokens[:, :-1], use_cache=False).logits

    return call


def training(folder, tokens, run):
    model, tokens, narrow = _open(folder, tokens, run)
    options = {"lr": run["learning_rate"], "weight_decay": run["weight_decay"]}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **options)

    def call():
        with narrow:
            logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def generation(folder, tokens, run):
    model, tokens, narrow = _open(folder, tokens, run)
    model.generation_config.eos_token_id = None
    prompts = tokens[:, : run["prompt"]]
    options = {"max_new_tokens": run["new"], "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def call():
        with torch.inference_mode(), narrow:
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return out[:, prompts.shape[1] :]

    return call


def to_numpy(out):
    return out.detach().float().cpu().numpy()


def device_peak():
    """Most bytes that were in use on a GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
