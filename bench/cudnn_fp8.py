"""cuDNN's fp8 attention, which PyTorch does not reach: a graph of the package nvidia-cudnn-frontend."""

from __future__ import annotations

from collections.abc import Callable


class UnavailableError(RuntimeError):
    """Why cuDNN does not compute a row."""


def attention(q, k, v, causal: bool) -> Callable[[], object]:
    """A call that computes the attention of fp8 arrays, all of whose factors are 1.

    Parameters
    ----------
    q, k, v : torch.Tensor
        float8_e4m3fn (batch, heads, seqlen, head_dim), of any strides.
    causal : bool

    Returns
    -------
    callable
        It works on PyTorch's current stream, and returns the result as float8_e4m3fn in q's layout: cuDNN's own fp8
        output, half the bytes of fa3's bf16.

    Raises
    ------
    UnavailableError
        When the package cannot be imported, or cuDNN does not support the problem.
    """
    try:
        import cudnn
    except ImportError as error:
        raise UnavailableError(f"cudnn (nvidia-cudnn-frontend) is not importable: {error}") from None
    try:
        return _build(cudnn, q, k, v, causal)
    except Exception as error:  # of a package whose releases fail in many ways: a row is timed without it then
        raise UnavailableError(f"cuDNN does not take it: {' '.join(str(error).split())}") from error


def _build(cudnn, q, k, v, causal):
    import torch

    types = cudnn.data_type
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(io_data_type=types.FP8_E4M3, intermediate_data_type=types.FLOAT,
                          compute_data_type=types.FLOAT, handle=handle)
    out = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=q.device)
    one = torch.ones(1, 1, 1, 1, device=q.device)
    largest = [torch.zeros_like(one) for _ in range(2)]  # of the probabilities and of out: cuDNN wants to say

    def described(x, data_type):
        return graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=data_type)

    arrays = {name: described(x, types.FP8_E4M3) for name, x in zip("qkv", (q, k, v), strict=True)}
    factors = {name: described(one, types.FLOAT)
               for name in ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")}
    result, _, *largest_of = graph.sdpa_fp8(**arrays, **factors, is_inference=True, attn_scale=q.shape[-1] ** -0.5,
                                            use_causal_mask=causal)
    result.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride())).set_data_type(types.FP8_E4M3)
    for tensor in largest_of:
        tensor.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(types.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=q.device)
    bound = {arrays["q"]: q, arrays["k"]: k, arrays["v"]: v, result: out}
    bound |= dict.fromkeys(factors.values(), one) | dict(zip(largest_of, largest, strict=True))

    def call():
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(bound, workspace, handle=handle)
        return out

    return call
