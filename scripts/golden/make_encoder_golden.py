#!/usr/bin/env python3
"""Golden values of an encoder's forward pass, by Transformers (float32, CPU).

    python scripts/golden/make_encoder_golden.py

Writes tests/golden/encoder/bert/: a tiny random BertModel (config.json, model.safetensors) and
expected.safetensors with, for some windows of different lengths:
  ids_N        token ids [T]
  hidden_N     final hidden states [T, D]
  ffn_input_N  what each layer's FFN reads [L, T, D]
"""

import pathlib

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "encoder" / "bert"
WINDOWS = (1, 5, 19, 40)  # tokens; the last is as many as there are positions


def tiny_bert():
    torch.manual_seed(0)
    # An epsilon that no class has by default, so that a reader that leaves it out shows.
    config = BertConfig(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
                        num_attention_heads=3, max_position_embeddings=40, type_vocab_size=2,
                        layer_norm_eps=1e-3, hidden_act="gelu", pad_token_id=0)
    model = BertModel(config, add_pooling_layer=False)
    for name, parameter in model.named_parameters():  # larger than the usual 0.02
        parameter.data.normal_(0.0, 0.25)
        if name.endswith("LayerNorm.weight"):
            parameter.data.add_(1.0)
    return model.eval()


def main():
    model = tiny_bert()
    inputs = []
    for layer in model.encoder.layer:
        layer.intermediate.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    expected = {}
    for n, length in enumerate(WINDOWS):
        ids = torch.randint(0, 64, (1, length))
        inputs.clear()
        with torch.no_grad():
            hidden = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        expected[f"ids_{n}"] = ids[0].to(torch.int32)
        expected[f"hidden_{n}"] = hidden.contiguous()
        expected[f"ffn_input_{n}"] = torch.stack(inputs).contiguous()
    OUT.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(OUT)
    save_file(expected, str(OUT / "expected.safetensors"))


if __name__ == "__main__":
    main()
