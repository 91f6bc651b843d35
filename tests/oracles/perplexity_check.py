#!/usr/bin/env python3
"""Compares `cleave eval` on a GGUF file with Transformers on the same weights.

    python tests/oracles/perplexity_check.py MODEL.gguf TEXT [--context 1024] [--limit-tokens 16384]

The GGUF is read by the `gguf` package (not by cleave, nor by Transformers' own reader), dequantised to
float32 and put into a LlamaForCausalLM; its tokenizer is rebuilt with `tokenizers`. Exit code 1 when
the perplexities differ by more than --tolerance, or the token counts differ.
"""

import argparse
import pathlib
import sys

import gguf
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import oracle

LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}
MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def value(reader, key, default=None):
    field = reader.get_field(key)
    if field is None:
        if default is None:
            sys.exit(f"{key} is missing")
        return default
    return field.contents()


def make_config(reader):
    if value(reader, "general.architecture") != "llama":
        sys.exit("only GGUF files of the Llama family")
    heads = value(reader, "llama.attention.head_count")
    names = {tensor.name for tensor in reader.tensors}
    return transformers.LlamaConfig(
        vocab_size=len(value(reader, "tokenizer.ggml.tokens")),
        hidden_size=value(reader, "llama.embedding_length"),
        intermediate_size=value(reader, "llama.feed_forward_length"),
        num_hidden_layers=value(reader, "llama.block_count"), num_attention_heads=heads,
        num_key_value_heads=value(reader, "llama.attention.head_count_kv", heads),
        max_position_embeddings=value(reader, "llama.context_length"),
        rms_norm_eps=value(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default",
                         "rope_theta": value(reader, "llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in names)


def interleaved_to_halves(weight, heads):
    """GGUF stores the rows of q and k for rotations of neighbours; Transformers rotates halves."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def make_state(reader, config):
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        name = tensor.name.removesuffix(".weight")
        if name in MODEL_NAMES:
            state[MODEL_NAMES[name] + ".weight"] = weight
            continue
        if name == "rope_freqs":
            sys.exit("rope_freqs: scaled rotary embeddings are not handled by this check")
        _, layer, part = name.split(".")
        if part in ("attn_q", "attn_k"):
            weight = interleaved_to_halves(weight, config.num_attention_heads if part == "attn_q"
                                           else config.num_key_value_heads)
        state[f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"] = weight
    return state


def make_model(reader):
    config = make_config(reader)
    model = transformers.LlamaForCausalLM(config).float()
    missing, unexpected = model.load_state_dict(make_state(reader, config), strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        sys.exit(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def make_tokenizer(reader):
    if value(reader, "tokenizer.ggml.model") != "gpt2":
        sys.exit("only byte-level BPE tokenizers")
    tokens = value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    single_digits = value(reader, "tokenizer.ggml.pre", "default") in ("smollm", "starcoder", "refact")
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if single_digits else byte_level)
    control = gguf.TokenType.CONTROL
    types = value(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, type_ in zip(tokens, types) if type_ == control])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=pathlib.Path, help="GGUF file of the Llama family")
    parser.add_argument("text", type=pathlib.Path, help="UTF-8 text")
    parser.add_argument("--context", type=int, default=1024, help="tokens a window (default %(default)s)")
    parser.add_argument("--limit-tokens", type=int, default=16384, help="(default %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative (default %(default)s)")
    parser.add_argument("--cleave", type=pathlib.Path, default=oracle.DEFAULT_CLEAVE,
                        help="the command line (default build/bin/cleave)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="of both programs (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    ours = oracle.run_cleave(options.cleave, "eval", options.model, "--text", options.text,
                             "--context", options.context, "--limit-tokens", options.limit_tokens,
                             "--threads", options.threads)
    reader = gguf.GGUFReader(options.model)
    ids = make_tokenizer(reader).encode(options.text.read_text(encoding="utf-8")).ids
    theirs = oracle.perplexity(make_model(reader), ids, options.context, options.limit_tokens, True)
    tokens = min(len(ids), options.limit_tokens) // options.context * options.context
    difference = abs(ours["perplexity"] / theirs - 1)
    print(f"cleave       {ours['perplexity']:.5f}  ({ours['tokens']} tokens, "
          f"{ours['tokens_per_s']:.0f} tokens/s)")
    print(f"Transformers {theirs:.5f}  ({tokens} tokens)")
    print(f"relative difference {difference:.3g}, allowed {options.tolerance:g}")
    if ours["tokens"] != tokens:
        sys.exit("the token counts differ")
    sys.exit(0 if difference <= options.tolerance else 1)


if __name__ == "__main__":
    main()
