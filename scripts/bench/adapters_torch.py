"""The side of Hugging Face PEFT, on PyTorch, in the benchmark of adapters."""

import peft
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait(out):
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _open(layers, x, run):
    dtype = getattr(torch, run["dtype"])
    parts = []
    for i, layer in enumerate(layers):
        linear = torch.nn.Linear(*layer["w"].shape, bias=False, dtype=dtype)
        linear.weight.data.copy_(torch.from_numpy(layer["w"].T))
        parts += [linear] if i == 0 else [torch.nn.Tanh(), linear]
    targets = [str(2 * i) for i in range(len(layers))]
    config = peft.LoraConfig(
        r=run["rank"], lora_alpha=2 * run["rank"], use_dora=run["method"] == "dora", target_modules=targets
    )
    model = peft.get_peft_model(torch.nn.Sequential(*parts).to(DEVICE), config)
    for target, layer in zip(targets, layers, strict=True):
        adapted = model.base_model.model[int(target)]
        for name, factor in (("lora_A", layer["a"]), ("lora_B", layer["b"])):
            getattr(adapted, name)["default"].weight.data.copy_(torch.from_numpy(factor.T))
    return model, torch.as_tensor(x, dtype=dtype, device=DEVICE)


def forward(layers, x, run):
    model, x = _open(layers, x, run)
    model.eval()

    def call():
        with torch.inference_mode():
            return model(x)

    return call


def training(layers, x, run):
    model, x = _open(layers, x, run)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run["learning_rate"], weight_decay=0.0, fused=True)

    def call():
        loss = torch.mean(torch.square(model(x).float()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def to_numpy(out):
    return out.detach().float().cpu().numpy()


def device_peak():
    """Most bytes that were in use on a GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
