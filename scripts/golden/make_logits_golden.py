#!/usr/bin/env python3
"""Golden values of both forward passes, by Transformers (float32, CPU).

    python scripts/golden/make_logits_golden.py [--tinystories DIR] [--smollm2 FILE.gguf] [--text FILE]

Writes below tests/golden/:
  logits/<name>/          a tiny random model (config.json, model.safetensors, expected.safetensors):
                          llama (GQA, tied), llama_long (untied, llama3 rope, biases), mixtral
                          (GQA, untied, sliding window) and granitemoeshared (GQA, tied, attention
                          biases, fused and shared experts)
  logits_tinystories.json some logits of TinyStories-656K
  logits_smollm2.json     some logits of SmolLM2-135M-Instruct, and the perplexity of 4 x 256 tokens
Without the optional models their files are left alone.
"""

import argparse
import json
import math
import pathlib

import torch
from safetensors.torch import save_file
from transformers import (GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM, LlamaConfig,
                          LlamaForCausalLM, MixtralConfig, MixtralForCausalLM)

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
TOKENS = 24


def tiny_models():
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                 rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
    llama3 = dict(rope_type="llama3", rope_theta=1000.0, factor=4.0, low_freq_factor=1.0,
                  high_freq_factor=4.0, original_max_position_embeddings=16)
    yield "llama", LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    yield "llama_long", LlamaForCausalLM(LlamaConfig(
        **shape, tie_word_embeddings=False, rope_parameters=llama3, attention_bias=True,
        mlp_bias=True))
    yield "mixtral", MixtralForCausalLM(MixtralConfig(
        **{**shape, "intermediate_size": 24}, tie_word_embeddings=False, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=7, attn_implementation="eager"))
    yield "granitemoeshared", GraniteMoeSharedForCausalLM(GraniteMoeSharedConfig(
        **{**shape, "intermediate_size": 12}, tie_word_embeddings=True, num_local_experts=4,
        num_experts_per_tok=2, shared_intermediate_size=20, attention_bias=True,
        attention_multiplier=8 ** -0.5))


def write_tiny():
    for seed, (name, model) in enumerate(tiny_models()):
        torch.manual_seed(seed)
        for parameter in model.parameters():  # larger than the usual 0.02: logits worth comparing
            parameter.data.normal_(0.0, 0.25)
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                parameter.data.add_(1.0)
        model.eval()
        ids = torch.randint(0, 96, (1, TOKENS))
        with torch.no_grad():
            logits = model(ids).logits[0]
        folder = GOLDEN / "logits" / name
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file({"ids": ids[0].to(torch.int32), "logits": logits.contiguous()},
                  str(folder / "expected.safetensors"))


def subset(logits, positions, columns):
    return [[float(logits[p, c]) for c in columns] for p in positions]


def write_subset(file, model, ids, extra=None):
    """Logits at 8 positions x 64 columns."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    positions = [round(i * (len(ids) - 1) / 7) for i in range(8)]
    columns = [i * model.config.vocab_size // 64 for i in range(64)]
    content = {"ids": ids, "positions": positions, "columns": columns,
               "logits": subset(logits, positions, columns), **(extra or {})}
    (GOLDEN / file).write_text(json.dumps(content))


def smollm2(file):
    """The GGUF's weights, dequantised by the gguf package, in a LlamaForCausalLM."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    reader = GGUFReader(file)
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                         max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
                         rope_parameters=dict(rope_type="default", rope_theta=100000.0))
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
             "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    state = {}
    for tensor in reader.tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).float()
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):  # rows are stored in pairs (2j, 2j + 1)
                heads = 9 if parts[2] == "attn_q" else 3
                rows, columns = values.shape
                values = (values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2)
                          .reshape(rows, columns))
            state[f"model.layers.{parts[1]}.{names[parts[2]]}.weight"] = values
        elif tensor.name in top:
            state[top[tensor.name]] = values
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def perplexity(model, ids, context):
    total, count = 0.0, 0
    for begin in range(0, len(ids) - context + 1, context):
        window = torch.tensor([ids[begin:begin + context]])
        with torch.no_grad():
            log_p = torch.log_softmax(model(window).logits[0, :-1].double(), dim=-1)
        total -= log_p.gather(1, window[0, 1:, None]).sum().item()
        count += context - 1
    return math.exp(total / count)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tinystories", type=pathlib.Path)
    parser.add_argument("--smollm2", type=pathlib.Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    write_tiny()
    generator = torch.Generator().manual_seed(7)
    if arguments.tinystories:
        model = LlamaForCausalLM.from_pretrained(arguments.tinystories, dtype=torch.float32).eval()
        ids = torch.randint(3, model.config.vocab_size, (48,), generator=generator).tolist()
        write_subset("logits_tinystories.json", model, ids)
    if arguments.smollm2:
        model = smollm2(arguments.smollm2)
        # A text of its own making needs no tokenizer: ids drawn from the model itself, greedily
        # continued from random starts, so that the perplexity is that of likely text.
        starts = torch.randint(100, 40000, (16, 1), generator=generator)
        ids = model.generate(starts, attention_mask=torch.ones_like(starts), do_sample=False,
                             max_new_tokens=63, min_new_tokens=63, pad_token_id=0)
        ids = ids.flatten().tolist()
        assert len(ids) == 1024
        write_subset("logits_smollm2.json", model, ids[:300],
                     {"text": ids, "context": 256, "perplexity": perplexity(model, ids, 256)})


if __name__ == "__main__":
    main()
