"""The side of Hugging Face transformers, on PyTorch, in the benchmark of vision models."""

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # of counters of batches that nothing reads
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait(out):
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _open(folder, images, labels, run):
    # Parameters stay float32, as they do in the other library.
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    pixels = torch.as_tensor(images, device=DEVICE).permute(0, 3, 1, 2).contiguous()
    if model.config.model_type == "resnet":  # the layout that is the faster one for convolutions
        model, pixels = model.to(memory_format=torch.channels_last), pixels.to(memory_format=torch.channels_last)
    narrow = torch.autocast(DEVICE, torch.bfloat16, enabled=run["dtype"] == "bfloat16")
    return model, pixels, torch.as_tensor(labels, dtype=torch.long, device=DEVICE), narrow


def forward(folder, images, labels, run):
    model, pixels, _, narrow = _open(folder, images, labels, run)

    def call():
        with torch.inference_mode(), narrow:
            return model(pixels).logits

    return call


def training(folder, images, labels, run):
    model, pixels, labels, narrow = _open(folder, images, labels, run)
    model.train()  # neither model drops anything by default; the ResNet takes the statistics of the batch
    optimizer = torch.optim.SGD(model.parameters(), lr=run["learning_rate"], momentum=run["momentum"])

    def call():
        with narrow:
            logits = model(pixels).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
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
