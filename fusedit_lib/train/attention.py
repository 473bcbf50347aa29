"""Attention for XLA, which keeps little for the backward pass. Plain PyTorch.

XLA has no fused attention kernel. PyTorch then writes scaled_dot_product_attention out in float32:
it keeps float32 copies of q, k and v and the softmax in float32, and looks for rows that see no
key. Here the backward pass computes the softmax again, as a GPU's fused kernel does.
"""
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class SmallAttention(torch.autograd.Function):
    """softmax(scale q k^T + bias) v, with scores and sums in float32, or float64 for float64.

    q [B,K,R,h]; k, v [B,K,S,h]; bias: additive mask that expands to [B,K,R,S], or None. Every row
    must see a key. Kept are the inputs, the output and the log of each row's sum of exp(scores).
    """
    @staticmethod
    def forward(ctx, q, k, v, bias, scale):
        scores = widen(q) @ widen(k).mT * scale                                # [B,K,R,S]
        if bias is not None:
            scores = scores + bias
        highest = scores.amax(-1, keepdim=True)
        weights = (scores - highest).exp()
        sums = weights.sum(-1, keepdim=True)                                   # [B,K,R,1]
        out = (widen(weights.to(v.dtype)) @ widen(v) / sums).to(v.dtype)
        ctx.save_for_backward(q, k, v, bias, out, highest + sums.log())
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        # All [S,R], the transpose of forward's scores: otherwise AOTAutograd takes the scores here
        # for the same values as forward's, and keeps them.
        q, k, v, bias, out, log_sums = ctx.saved_tensors
        scores = widen(k) @ widen(q).mT * ctx.scale                            # [B,K,S,R]
        if bias is not None:
            scores = scores + bias.mT
        weights = (scores - log_sums.mT).exp()                                 # the softmax
        grad_v = weights.to(v.dtype) @ grad

        # each row's sum of weights * grad_weights is that of out * grad
        total = (widen(out) * grad).sum(-1, keepdim=True)                      # [B,K,R,1]
        grad_weights = widen(v) @ widen(grad).mT
        grad_scores = (weights * (grad_weights - total.mT) * ctx.scale).to(q.dtype)
        return grad_scores.mT @ k, grad_scores @ q, grad_v, None, None


def widen(tensor):
    """The tensor in float32, in which XLA's products of bf16 values are exact; float64 remains."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def small_attention(q, k, v, attn_mask=None, scale=None):
    """The same as F.scaled_dot_product_attention with these arguments, if every row sees a key."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf)
    return SmallAttention.apply(q, k, v, attn_mask, scale)


class UseSmallAttention(TorchFunctionMode):
    """A context in which F.scaled_dot_product_attention is small_attention."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            function = small_attention
        return function(*args, **(kwargs or {}))
