"""What the host hands to libfa3 for arrays on a GPU, on a stand-in for it: run by test_host_path.py in a process of
its own, because the stand-in must be there before fa3."""

import contextlib
import gc
import json
import resource
import sys
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is part of the checkout; last: fa3 is installed

from bench.stand_in import StandIn

FP16, BF16, FP8, FP32 = 1, 2, 3, 4  # fa3_dtype


def arrays(gpu, **shapes):
    """Arrays on the stand-in's GPU by name; a dtype may come before the sizes."""
    import torch

    made = {}
    for name, shape in shapes.items():
        dtype = torch.float16 if isinstance(shape[0], int) else shape[0]
        made[name] = gpu.tensor(torch.zeros([size for size in shape if isinstance(size, int)], dtype=dtype))
    return made


def dense(gpu):
    return arrays(gpu, q=(2, 5, 4, 64), k=(2, 7, 2, 64), v=(2, 7, 2, 64))


def said(gpu, **expected):
    """The last call's struct has these fields; a dot in a name is written as two underscores."""
    params = gpu.params()
    for name, value in expected.items():
        field = name.replace("__", ".")
        wanted = value if isinstance(value, list) else [value]
        assert params[field] == wanted, f"{field}: {params[field]}, not {wanted}"


def check_defaults(gpu):
    import fa3

    call = dense(gpu)
    out = fa3.flash_attn_func(**call)
    q, k, v = (x.data_ptr() for x in call.values())
    said(gpu, device=0, dtype=FP16, out_dtype=FP16, batch=2, num_heads=4, num_heads_kv=2, head_dim=64, head_dim_v=64,
         q=[q, 1280, 256, 64, 1], k=[k, 896, 128, 64, 1], v=[v, 896, 128, 64, 1],
         out=[out.data_ptr(), 1280, 256, 64, 1], lse=[0, 0, 0, 0, 0], queries__rows=5, queries__max_seqlen=5,
         keys__rows=7, keys__max_seqlen=7, mask__causal=0, mask__window_left=-1, mask__window_right=-1,
         mask__attention_chunk=0, softmax_scale=0.125, softcap=0, num_splits=0, batch_invariant=0, pack_gqa=-1,
         sm_margin=0)
    given = {name for name, value in gpu.params().items() if len(value) > 1 and value[0]}
    assert given == {"q", "k", "v", "out"}
    pointers = ("queries.cu_seqlens", "queries.seqused", "keys.cu_seqlens", "keys.seqused", "sinks")
    assert not any(gpu.params()[name][0] for name in pointers)


def check_result(gpu):
    import torch

    import fa3

    call = dense(gpu)
    out, lse = fa3.flash_attn_func(**call, return_lse=True)
    assert type(out) is torch.Tensor and (out.shape, out.dtype) == ((2, 5, 4, 64), torch.float16)
    assert type(lse) is torch.Tensor and (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)
    said(gpu, out=[out.data_ptr(), 1280, 256, 64, 1], lse=[lse.data_ptr(), 20, 5, 1, 0])
    mine = gpu.tensor(torch.zeros(2, 5, 4, 128, dtype=torch.float16)[..., :64])
    assert fa3.flash_attn_func(**call, out=mine) is mine
    said(gpu, out=[mine.data_ptr(), 2560, 512, 128, 1], lse=[0, 0, 0, 0, 0])


def check_numbers(gpu):
    import fa3

    fa3.flash_attn_func(**dense(gpu), softmax_scale=0.5, causal=True, window_size=(3, 4), attention_chunk=9,
                        softcap=2.5, num_splits=6, batch_invariant=True, pack_gqa=False, sm_margin=8)
    said(gpu, softmax_scale=0.5, mask__causal=1, mask__window_left=3, mask__window_right=0, mask__attention_chunk=9,
         softcap=2.5, num_splits=6, batch_invariant=1, pack_gqa=0, sm_margin=8)
    fa3.flash_attn_func(**dense(gpu), window_size=(3, 4), num_splits=99, pack_gqa=True)
    said(gpu, mask__causal=0, mask__window_left=3, mask__window_right=4, num_splits=7, pack_gqa=1)


def check_further_arrays(gpu):
    import torch

    import fa3

    ints = {"seqused_q": (torch.int32, 2), "seqused_k": (torch.int32, 2)}
    more = arrays(gpu, sinks=(torch.float32, 4), qv=(2, 5, 4, 64), **ints)
    fa3.flash_attn_func(**dense(gpu), **more)
    address = {name: array.data_ptr() for name, array in more.items()}
    said(gpu, sinks=address["sinks"], queries__seqused=address["seqused_q"], keys__seqused=address["seqused_k"],
         qv=[address["qv"], 1280, 256, 64, 1])
    assert abs(gpu.params()["softmax_scale"][0] - 128 ** -0.5) < 1e-7
    eight = {name: gpu.tensor(x.to(torch.float8_e4m3fn)) for name, x in dense(gpu).items()}
    more = arrays(gpu, q_descale=(torch.float32, 2, 4), k_descale=(torch.float32, 2), v_descale=(torch.float32,))
    assert fa3.flash_attn_func(**eight, **more).dtype == torch.bfloat16
    address = {name: array.data_ptr() for name, array in more.items()}
    said(gpu, dtype=FP8, out_dtype=BF16, q_descale=[address["q_descale"], 4, 1, 1],
         k_descale=[address["k_descale"], 0, 1, 1], v_descale=[address["v_descale"], 0, 0, 0])
    fa3.flash_attn_func(**eight, q_descale=more["k_descale"])
    said(gpu, q_descale=[address["k_descale"], 0, 1, 2])  # one for each KV head


def check_varlen(gpu):
    import torch

    import fa3

    call = arrays(gpu, q=(10, 4, 64), k=(14, 2, 64), v=(14, 2, 32), cu_seqlens_q=(torch.int32, 3),
                  cu_seqlens_k=(torch.int32, 3))
    out, lse = fa3.flash_attn_varlen_func(**call, max_seqlen_q=6, return_lse=True)
    assert out.shape == (10, 4, 32) and lse.shape == (4, 10)
    address = {name: array.data_ptr() for name, array in call.items()}
    said(gpu, batch=2, head_dim=64, head_dim_v=32, q=[address["q"], 0, 256, 64, 1], k=[address["k"], 0, 128, 64, 1],
         v=[address["v"], 0, 64, 32, 1], out=[out.data_ptr(), 0, 128, 32, 1], lse=[lse.data_ptr(), 0, 10, 1, 0],
         queries__rows=10, queries__max_seqlen=6, queries__cu_seqlens=address["cu_seqlens_q"],
         keys__rows=14, keys__max_seqlen=14, keys__cu_seqlens=address["cu_seqlens_k"])


def check_cache(gpu):
    import torch

    import fa3

    call = dict(zip(("q", "k_cache", "v_cache"), dense(gpu).values(), strict=True))
    fa3.flash_attn_with_kvcache(**call, cache_seqlens=3)
    said(gpu, keys__rows=3, keys__max_seqlen=3, keys__seqused=0)
    more = arrays(gpu, k=(2, 3, 2, 64), v=(2, 3, 2, 64), cache_seqlens=(torch.int32, 2), rotary_cos=(20, 16),
                  rotary_sin=(20, 16), rotary_seqlens=(torch.int32, 2), cache_batch_idx=(torch.int32, 2),
                  cache_leftpad=(torch.int32, 2))
    fa3.flash_attn_with_kvcache(**call, **more, rotary_interleaved=False)
    address = {name: array.data_ptr() for name, array in more.items()}
    said(gpu, keys__seqused=address["cache_seqlens"], cache__k_new=[address["k"], 384, 128, 64, 1],
         cache__v_new=[address["v"], 384, 128, 64, 1], cache__rows_new=3,
         cache__cache_batch_idx=address["cache_batch_idx"], cache__cache_leftpad=address["cache_leftpad"],
         cache__rotary_cos=address["rotary_cos"], cache__rotary_sin=address["rotary_sin"],
         cache__rotary_seqlens=address["rotary_seqlens"], cache__rotary_rows=20, cache__rotary_dim=32,
         cache__rotary_dtype=FP16, cache__rotary_interleaved=0)
    more["cache_seqlens"] = 4
    fa3.flash_attn_with_kvcache(**call, **more)
    said(gpu, keys__rows=7, keys__max_seqlen=7, keys__seqused=0, cache__seqlen=4, cache__batch_entries=2)
    more |= arrays(gpu, k=(2, 0, 2, 64), v=(2, 0, 2, 64))
    fa3.flash_attn_with_kvcache(**call, **more)
    said(gpu, keys__rows=4, keys__max_seqlen=4, keys__seqused=0)
    pages = arrays(gpu, k_cache=(6, 4, 2, 64), v_cache=(6, 4, 2, 64), page_table=(torch.int32, 2, 3))
    fa3.flash_attn_with_kvcache(call["q"], **pages)
    said(gpu, cache__page_table=pages["page_table"].data_ptr(), cache__page_table_stride=3, cache__max_pages=3,
         cache__page_size=4, cache__num_pages=6, keys__max_seqlen=12)


def check_stream_workspace_and_gil(gpu):
    import fa3

    with gpu.given(current_stream=4096, workspace_bytes=1 << 20):
        fa3.flash_attn_func(**dense(gpu))
    assert gpu.state.stream == 4096 and gpu.state.workspace
    assert not gpu.state.with_gil, "other Python threads were held up"
    fa3.flash_attn_func(**dense(gpu))
    assert gpu.state.stream is None and gpu.state.workspace is None


def check_crossings(gpu):
    """Into C once; a call that turns out to need a workspace asks how much, and comes a second time with it."""
    import fa3

    for workspace_bytes, expected in ((0, 1), (4096, 3)):
        with gpu.given(workspace_bytes=workspace_bytes):
            crossings, calls = gpu.state.crossings, gpu.state.calls
            fa3.flash_attn_func(**dense(gpu), num_splits=3)
            assert gpu.state.crossings - crossings == expected
            assert gpu.state.calls - calls == 1, "enqueued twice"


def check_failure_with_a_workspace(gpu):
    """What fails with a workspace is not tried a third time."""
    import fa3

    with gpu.given(status=-100, workspace_bytes=4096):
        calls = gpu.state.calls
        try:
            fa3.flash_attn_func(**dense(gpu))
        except fa3.CudaError:
            assert gpu.state.calls - calls == 1
        else:
            raise AssertionError("no CudaError")


def check_nothing_to_do(gpu):
    import fa3

    calls = gpu.state.calls
    empty = arrays(gpu, q=(2, 0, 4, 64), k=(2, 7, 2, 64), v=(2, 7, 2, 64))
    assert fa3.flash_attn_func(**empty).shape == (2, 0, 4, 64)
    assert gpu.state.calls == calls


def check_dropout(gpu):
    """A seed in an array is not read, but handed on; without dropout neither is."""
    import torch

    import fa3

    call = dense(gpu)
    for dtype, kind in ((torch.int64, 0), (torch.int32, 1)):
        seed = arrays(gpu, seed=(dtype, 1))["seed"]
        fa3.flash_attn_func(**call, dropout_p=0.5, dropout_seed=seed)
        said(gpu, dropout__p=0.5, dropout__seed=0, dropout__seed_data=seed.data_ptr(), dropout__seed_type=kind)
        fa3.flash_attn_func(**call, dropout_seed=seed)
        said(gpu, dropout__p=0, dropout__seed_data=0)
    fa3.flash_attn_func(**call, dropout_p=0.5, dropout_seed=2**63 - 1)
    said(gpu, dropout__seed=2**63 - 1, dropout__seed_data=0)


def check_the_backward_looks_at_lse(gpu):
    import torch

    import fa3

    more = arrays(gpu, dout=(2, 5, 4, 64), out=(2, 5, 4, 64), lse=(torch.float32, 2, 4, 5))
    try:
        fa3.flash_attn_backward(**dense(gpu), **{**more, "lse": more["out"]})
    except TypeError as error:
        assert str(error) == "lse: dtype float16, needs float32", error
    else:
        raise AssertionError("no TypeError")


def check_descales_that_are_numbers(gpu):
    import torch

    import fa3

    eight = {name: gpu.tensor(x.to(torch.float8_e4m3fn)) for name, x in dense(gpu).items()}
    try:
        fa3.flash_attn_func(**eight, q_descale=1.0)
    except TypeError as error:
        assert str(error) == "q_descale: got float, needs an array on the GPU", error
    else:
        raise AssertionError("no TypeError")


def check_failure(gpu):
    import fa3

    with gpu.given(status=-100):
        try:
            fa3.flash_attn_func(**dense(gpu))
        except fa3.CudaError as error:
            assert error.code == 999 and "the stand-in was told to fail" in str(error)
        else:
            raise AssertionError("no CudaError")


def check_nothing_leaks(gpu):
    """Ten thousand calls, failing ones among them, leave references, objects and memory as they were."""
    import torch

    import fa3

    call = dense(gpu)
    out = arrays(gpu, out=(2, 5, 4, 64))["out"]
    wrong = {**call, "k": arrays(gpu, k=(2, 7, 2, 32))["k"]}

    def some_calls(count):
        for _ in range(count):
            fa3.flash_attn_func(**call, causal=True)
            fa3.flash_attn_func(**call, return_lse=True)
            fa3.flash_attn_func(**call, out=out)
            with contextlib.suppress(ValueError):
                fa3.flash_attn_func(**wrong)
            with gpu.given(status=-5), contextlib.suppress(ValueError):
                fa3.flash_attn_func(**call)

    def standing():
        gc.collect()
        watched = [*call.values(), out, wrong["k"], torch.Tensor, "float16", None, True]
        return len(gc.get_objects()), [sys.getrefcount(thing) for thing in watched]

    with gpu.given(workspace_bytes=4096):
        some_calls(200)
        objects, references = standing()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        some_calls(2000)
        objects_after, references_after = standing()
    assert abs(objects_after - objects) < 20, (objects, objects_after)
    drift = [abs(after - before) for after, before in zip(references_after, references, strict=True)]
    assert max(drift) < 20, drift
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 1024, f"{grown} KiB more"


def main(library):
    """Print the outcome of each check: its name, and what went wrong or ""."""
    gpu = StandIn(library)
    outcomes = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check(gpu)
                outcomes[name] = ""
            except BaseException:
                outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
