"""The README's examples run, and do what they say."""

import re

import pytest
from compilers import HERE, SRC, compile_with

README = (HERE.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def example(words):
    """The one Python block with these words, for arrays on the CPU."""
    [block] = [text for language, text in BLOCKS if language == "python" and words in text]
    return block.replace('device="cuda"', 'device="cpu"')


def executed(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize(("words", "result", "shape"), [
    ("print(out.shape, out.dtype)", "out", (2, 512, 16, 64)),
    ("quantize_fp8", "out", (2, 512, 4, 128)),
    ("dropout_seed", "dq", (2, 512, 8, 64)),
])
def test_numpy_examples(words, result, shape):
    names = executed(example(words))
    assert names[result].shape == shape


@pytest.mark.gpu
def test_cupy_example():
    pytest.importorskip("cupy")
    names = executed(example("import cupy"))
    assert names["out"].shape == (2, 512, 16, 64) and names["out_bits"].dtype == "uint16"


def test_pytorch_example(torch):
    names = executed(example("flash_attn_varlen_func"))
    assert names["out"].shape == (1024, 16, 128) and names["out"].dtype == torch.bfloat16


def test_jax_example():
    jax = pytest.importorskip("jax")
    names = executed(example("import jax"))
    assert names["out"].shape == (2, 512, 16, 128) and isinstance(names["out"], jax.Array)


def test_autograd_example(torch):
    """The block runs as it is; its class has the gradients of PyTorch's own attention in float32."""
    attention = executed(example("autograd"))["Attention"]
    generator = torch.Generator().manual_seed(0)
    dout, *inputs = (torch.randn((2, 33, 4, 16), generator=generator) for _ in range(4))
    inputs = [x.requires_grad_() for x in inputs]
    out = attention.apply(*inputs, {"causal": True})
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), is_causal=True)
    expected = expected.transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout),
                           strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_c_example(tmp_path):
    [block] = [text for language, text in BLOCKS if language == "c"]
    (tmp_path / "attend.c").write_text(block)
    compile_with("gcc", tmp_path / "attend.o", [tmp_path / "attend.c"], "-std=c11", "-pedantic", "-c", f"-I{SRC}")
