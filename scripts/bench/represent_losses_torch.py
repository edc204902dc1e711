"""The side of plain PyTorch in the benchmark of losses over pairs of a batch: the definitions, with dense masks."""

import numpy as np
import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait(out):
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def infonce(z, k, labels, run):
    logits = F.normalize(z) @ F.normalize(k).T / run["temperature"]
    positive = labels[:, None] == labels[None]
    against = logits.masked_fill(positive, -torch.inf).logsumexp(1, keepdim=True)
    each = (F.softplus(against - logits) * positive).sum(1) / positive.sum(1)
    return each.mean()


def contrastive(z, k, labels, run):
    logits = F.normalize(z) @ F.normalize(k).T / run["temperature"]
    positive = labels[:, None] == labels[None]
    return (logits.logsumexp(1) - (logits * positive).sum(1) / positive.sum(1)).mean()


def margin(z, k, labels, run):
    """The sampler and the loss of ``losses.margin_loss``; the gradient of the unused keys is zero."""
    count = run["per_class"] - 1
    with torch.no_grad():
        distances = (torch.cdist(z, z) ** 2).clamp(min=1e-4).sqrt()
        same = labels[:, None] == labels[None]
        barred = same | (distances < run["cutoff"])
        negatives = (distances + 1e6 * barred).topk(count, largest=False).indices.sort(1).values
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positives = (same & ~itself).nonzero()[:, 1].reshape(len(z), count)
    apart = [torch.sqrt((z[:, None] - z[other]).square().sum(-1) + 1e-8) for other in (positives, negatives)]
    pull, push = F.relu(apart[0] - run["beta"] + run["margin"]), F.relu(run["beta"] + run["margin"] - apart[1])
    active = ((pull > 0) | (push > 0)).sum().clamp(min=1)
    return (pull + push).sum() / active + 0 * k.sum()


LOSSES = {"infonce": infonce, "contrastive": contrastive, "margin": margin}


def step(name, arrays, run):
    z, k, labels = (torch.as_tensor(x, device=DEVICE) for x in arrays)
    labels = labels.long()
    leaves = z.requires_grad_(), k.requires_grad_()

    def call():
        loss = LOSSES[name](*leaves, labels, run)
        return loss.detach(), torch.autograd.grad(loss, leaves)

    return call


def to_numpy(out):
    value, grads = out
    return float(value), np.concatenate([x.cpu().numpy() for x in grads])


def device_peak():
    """Most bytes that were in use on a GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
