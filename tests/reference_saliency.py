"""Saliency-guided training step as one would write it from the paper: slow, sample by sample, sharing nothing. The tests' oracle.

Ismail et al. 2021 (arXiv 2111.14338), Algorithm 1. Differences to the library, on purpose:
the saliency has a forward pass of its own (replayed from the same random state instead of shared), masks come from numpy's stable
sort one image at a time, fills are written pixel by pixel, the KL divergence is spelled out as a sum, and batch-norm buffers
are copied aside and put back instead of being switched off.
"""
import math
from fractions import Fraction
import numpy as np
import torch


def bottom_positions(values, frac):
    "Flat positions of the floor(frac x size) smallest of a 2-D array, ties by position; `frac` is read as the decimal it is printed as."
    flat = np.asarray(values, dtype=np.float64).ravel()
    k = math.floor(Fraction(str(frac)) * flat.size)
    return sorted(range(flat.size), key=lambda i: (flat[i], i))[:k]


def channel_mean(grad, signed):
    "One image's gradient, C x H x W, to H x W."
    s = grad.float().mean(0)
    return (s if signed else s.abs()).numpy()


def masked_copy(xb, grad, frac, fill, signed):
    "The batch with the bottom `frac` of each image filled, one pixel at a time; random fills take one uniform number a pixel from torch."
    out = xb.detach().clone()
    u = torch.rand(xb.shape) if fill == 'random' else None
    for i, img in enumerate(xb.detach()):
        for p in bottom_positions(channel_mean(grad[i], signed), frac):
            r, c = divmod(p, img.shape[2])
            for ch in range(img.shape[0]):
                if fill == 'random': v = img.min() + u[i, ch, r, c] * (img.max() - img.min())
                elif fill == 'mean': v = img[ch].mean()
                elif fill == 'corner': v = img[ch, 0, 0]
                else: v = fill
                out[i, ch, r, c] = v
    return out


def buffers(model): return {k: v.clone() for k, v in model.named_buffers()}


def restore(model, saved):
    with torch.no_grad():
        for k, v in model.named_buffers(): v.copy_(saved[k])


def input_gradient(model, xb, yb, score, evaluate):
    "Gradient of the true-class score by a forward and backward pass of its own; buffers, modes and random state are as before."
    state, saved, modes = torch.get_rng_state(), buffers(model), [m.training for m in model.modules()]
    if evaluate: model.eval()
    x = xb.detach().clone().requires_grad_()
    out = model(x).float()
    if score == 'log_prob': out = out.log_softmax(1)
    total = sum(out[i, int(yb[i])] for i in range(len(yb)))
    grad, = torch.autograd.grad(total, x)
    for m, mode in zip(model.modules(), modes): m.training = mode
    if not evaluate: restore(model, saved)  # evaluation mode leaves them alone
    torch.set_rng_state(state)
    return grad


def kl_divergence(pred, masked_pred, detached):
    "Mean over the images of sum p (log p - log q)."
    total = 0.
    for a, b in zip(pred.float(), masked_pred.float()):
        p = torch.softmax(a.detach() if detached else a, 0)
        q = torch.softmax(b, 0)
        total = total + (p * (p.log() - q.log())).sum()
    return total / len(pred)


def step(model, xb, yb, loss_func, *, frac=.5, fill='random', lam=1., signed=True, kl_target='both', saliency_pass='shared',
         score='logit', update_bn=False):
    "Loss parts and all parameter gradients of one guided training step, from the current random state. The model is left with its gradients."
    model.zero_grad()
    grad = input_gradient(model, xb, yb, score, evaluate=saliency_pass == 'eval')  # before the clean pass moves batch norm's statistics
    pred = model(xb)
    masked = masked_copy(xb, grad, frac, fill, signed)
    saved = buffers(model)
    masked_pred = model(masked)
    ce, kl = loss_func(pred, yb), kl_divergence(pred, masked_pred, kl_target == 'detached')
    loss = ce + lam * kl
    loss.backward()
    if not update_bn: restore(model, saved)
    return dict(loss=loss.item(), ce=ce.item(), kl=kl.item(), masked=masked, grads={k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None},
                buffers=buffers(model))

