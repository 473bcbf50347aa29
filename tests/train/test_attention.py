"""The attention of the XLA engine against PyTorch's, in plain PyTorch."""
import pytest
import torch

from fusedit import attention
from fusedit_lib.train.attention import UseSmallAttention, small_attention

B, H, K, N, S, h = 2, 4, 2, 5, 7, 8


def no_mask(dtype):
    return None


def padding(dtype):
    """The last keys of the second sample are padding."""
    mask = torch.zeros(B, 1, 1, S, dtype=dtype)
    mask[1, ..., -3:] = -torch.inf
    return mask


def causal(dtype):
    """Query i sees keys 0 .. i + 2."""
    return torch.ones(N, S).tril(2) > 0


def inputs(dtype):
    """q, k and v, and a gradient of the output."""
    torch.manual_seed(0)
    made = []
    for rows in ((H, N), (K, S), (K, S), (H, N)):
        tensor = torch.randn(B, *rows, h, dtype=torch.float64)
        made.append(tensor.to(dtype).requires_grad_())
    *qkv, grad = made
    return qkv, grad.detach()


def output_and_gradients(qkv, mask, scale, grad):
    out = attention(*qkv, mask, scale)
    return [out, *torch.autograd.grad(out, qkv, grad)]


@pytest.mark.parametrize("make_mask", [no_mask, padding, causal])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-9),
    (torch.float32, 1e-6),
    (torch.bfloat16, 0.01)])
def test_outputs_and_gradients_are_those_of_pytorch(make_mask, scale, dtype, tolerance):
    """They are compared with those of the same values in float64, to the rounding of the dtype."""
    qkv, grad = inputs(dtype)
    with UseSmallAttention():
        got = output_and_gradients(qkv, make_mask(dtype), scale, grad)

    exact = [tensor.detach().double().requires_grad_() for tensor in qkv]
    mask = make_mask(torch.float64)
    want = output_and_gradients(exact, mask, scale, grad.double())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert a.shape == b.shape
        assert (a - b).abs().max() < tolerance * b.abs().max()


def test_no_scores_are_kept():
    """Kept are q, k, v, the mask and the output in the dtype of the run, and a number a query."""
    (q, k, v), _ = inputs(torch.bfloat16)
    rows = q.reshape(B, K, -1, h)
    mask = padding(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        out = small_attention(rows, k, v, mask)
    log_sums = kept.pop()
    assert log_sums.dtype == torch.float32
    assert log_sums.numel() == B * H * N
    sizes = [tensor.nbytes for tensor in kept]
    assert sizes == [tensor.nbytes for tensor in (rows, k, v, mask, out)]


def test_large_scores_do_not_overflow():
    qkv, grad = inputs(torch.float32)
    want = output_and_gradients(qkv, None, 1000.0, grad)
    with UseSmallAttention():
        got = output_and_gradients(qkv, None, 1000.0, grad)
    for a, b in zip(got, want, strict=True):
        # Every softmax is all 0 and 1, so q and k have gradients of rounding, multiplied by scale.
        assert (a - b).abs().max() <= 1e-5 * 1000.0
