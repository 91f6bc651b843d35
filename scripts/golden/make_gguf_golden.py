"""Writes tests/golden/gguf_*: what the Python package `gguf` makes of GGUF files.

  gguf_tiny.gguf              a Llama of a few weights, one tensor for each type we read
  gguf_tiny.safetensors       its tensors, dequantised by `gguf`, in HuggingFace names and row order
  gguf_smollm2.safetensors    rows of SmolLM2-135M-Instruct.Q4_1.gguf, dequantised, the file's order

Needs gguf, safetensors and numpy. Run from the root of the project; the third file is made only
where models/ holds the GGUF.
"""

import pathlib

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

GOLDEN = pathlib.Path("tests/golden")
SMOLLM2 = pathlib.Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")
D, H, HEADS, KV_HEADS, V = 32, 64, 2, 1, 11
Q = gguf.GGMLQuantizationType


def interleave(matrix: np.ndarray, heads: int) -> np.ndarray:
    """HuggingFace's half-split rows of each head to GGUF's alternating ones."""
    rows, cols = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def tiny_tensors(rng: np.random.Generator):
    """(GGUF name, HuggingFace name, shape, type, heads whose rows are interleaved)."""
    head_dim = D // HEADS
    layer = "model.layers.0."
    listed = [
        ("token_embd", "model.embed_tokens", (V, D), Q.Q8_0, 0),
        ("output", "lm_head", (V, D), Q.BF16, 0),
        ("output_norm", "model.norm", (D,), Q.F32, 0),
        ("blk.0.attn_norm", layer + "input_layernorm", (D,), Q.F32, 0),
        ("blk.0.ffn_norm", layer + "post_attention_layernorm", (D,), Q.F32, 0),
        ("blk.0.attn_q", layer + "self_attn.q_proj", (D, D), Q.Q4_0, HEADS),
        ("blk.0.attn_k", layer + "self_attn.k_proj", (KV_HEADS * head_dim, D), Q.Q4_1, KV_HEADS),
        ("blk.0.attn_v", layer + "self_attn.v_proj", (KV_HEADS * head_dim, D), Q.F16, 0),
        ("blk.0.attn_output", layer + "self_attn.o_proj", (D, D), Q.Q4_1, 0),
        ("blk.0.ffn_gate", layer + "mlp.gate_proj", (H, D), Q.Q4_0, 0),
        ("blk.0.ffn_up", layer + "mlp.up_proj", (H, D), Q.Q8_0, 0),
        ("blk.0.ffn_down", layer + "mlp.down_proj", (D, H), Q.F32, 0),
    ]
    for theirs, ours, shape, kind, heads in listed:
        yield theirs, ours, rng.normal(0, 0.5, shape).astype(np.float32), kind, heads


def make_tiny() -> None:
    writer = gguf.GGUFWriter(str(GOLDEN / "gguf_tiny.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(H)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_uint64("test.large", 2**63 + 1)
    writer.add_array("test.floats", [0.5, -1.25])
    expected = {}
    for theirs, ours, values, kind, heads in tiny_tensors(np.random.default_rng(0)):
        data = quantize(values, kind)
        dequantised = dequantize(data, kind).reshape(values.shape).astype(np.float32)
        expected[ours + ".weight"] = dequantised
        if heads:  # quantised row by row, so that rows can be moved after it
            data = interleave(data, heads)
        writer.add_tensor(theirs + ".weight", np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file({name: np.ascontiguousarray(v) for name, v in expected.items()},
              GOLDEN / "gguf_tiny.safetensors")


def make_smollm2() -> None:
    reader = gguf.GGUFReader(SMOLLM2)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    wanted = {  # HuggingFace name -> GGUF name, first and last row
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.17.mlp.gate_proj.weight": "blk.17.ffn_gate.weight",
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
    }
    golden = {}
    for ours, theirs in wanted.items():
        tensor = tensors[theirs]
        values = np.atleast_2d(dequantize(tensor.data, tensor.tensor_type))
        golden[ours] = np.ascontiguousarray(values[[0, -1]].astype(np.float32))
    save_file(golden, GOLDEN / "gguf_smollm2.safetensors")


if __name__ == "__main__":
    make_tiny()
    if SMOLLM2.exists():
        make_smollm2()
