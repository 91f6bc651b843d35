#!/usr/bin/env python3
"""Trains the bundled demonstration model: a Llama of about one million weights.

    .venv/bin/pip install torch==2.13.0 transformers==5.23.0     (brings tokenizers and safetensors)
    .venv/bin/python scripts/demo_model.py --out examples/models/demo-llama

Everything is made here, from nothing but scripts/demo_data.py: the text, a byte-level BPE tokenizer
with the pre-tokenizer of SmolLM2 (digits one by one), and the weights. The same machine, versions and
options give the same files. The held-out sample comes from another seed than the training text.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import platform
import time

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import demo_data

VOCABULARY = 1024
CONTEXT = 512
SAMPLE_SEED, SAMPLE_BYTES = 20001, 300_000


def train_tokenizer(text):
    """Byte-level BPE, no normaliser, no BOS: every byte string encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[demo_data.END_OF_DOCUMENT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text.split(demo_data.END_OF_DOCUMENT), trainer)
    return tokenizer


def make_model():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.04,
        bos_token_id=0, eos_token_id=0)  # no pad id: it would freeze its embedding
    return transformers.LlamaForCausalLM(config)


class Batches:
    """Random windows. Half of them begin where a document begins, so that a prompt without anything
    before it is no surprise; the others begin anywhere, as evaluation windows do."""

    def __init__(self, ids, options):
        self.ids = torch.tensor(ids)
        last = len(ids) - options.context - 1
        # The marker is followed by a newline; a document starts after both.
        starts = (self.ids == 0).nonzero().flatten() + 2
        self.starts = starts[starts < last]
        self.last = last
        self.options = options
        self.random = torch.Generator().manual_seed(options.seed)

    def next(self):
        half = self.options.batch // 2
        document = self.starts[torch.randint(len(self.starts), (half,), generator=self.random)]
        anywhere = torch.randint(self.last, (self.options.batch - half,), generator=self.random)
        window = torch.arange(self.options.context)
        return self.ids[torch.cat([document, anywhere])[:, None] + window]


def learning_rate(step, options):
    """Linear warm-up over 40 steps, then a cosine down to a fiftieth."""
    warm_up = 40
    if step < warm_up:
        return options.lr * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, options.steps - warm_up)
    return options.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model, batches, options):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr, betas=(0.9, 0.97), eps=1e-8)
    model.train()
    start, recent = time.monotonic(), None
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        window = batches.next()
        loss = model(input_ids=window, labels=window).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = loss.item() if recent is None else 0.95 * recent + 0.05 * loss.item()
        if (step + 1) % 25 == 0 or step + 1 == options.steps:
            elapsed = time.monotonic() - start
            speed = (step + 1) * window.numel() / elapsed
            print(f"step {step + 1}/{options.steps}  loss {recent:.4f}  {speed:.0f} tokens/s  "
                  f"{elapsed * (options.steps / (step + 1) - 1):.0f} s left", flush=True)
    return recent


@torch.no_grad()
def held_out_loss(model, ids, limit_tokens=32768):
    """Mean of -log p over disjoint windows, each token after the first of its window."""
    model.eval()
    count = min(len(ids), limit_tokens) // CONTEXT
    windows = torch.tensor(ids[: count * CONTEXT]).view(count, CONTEXT)
    return sum(model(input_ids=w[None], labels=w[None]).loss.item() for w in windows) / count


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_model(model, tokenizer, out):
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    tokenizer.save(str(out / "tokenizer.json"))
    end = demo_data.END_OF_DOCUMENT
    write_json(out / "special_tokens_map.json",
               {"bos_token": end, "eos_token": end, "pad_token": end})
    write_json(out / "tokenizer_config.json", {
        "add_prefix_space": False, "bos_token": end, "clean_up_tokenization_spaces": False,
        "eos_token": end, "model_max_length": CONTEXT, "pad_token": end,
        "tokenizer_class": "PreTrainedTokenizerFast"})


MODEL_CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# demo-llama

A Llama of {parameters} weights that writes little stories, sums in words, calendar answers, recipes
and sentences for slot-value records. It exists so that `cleave` has a real, trained model to convert in
its quick tests and in `scripts/demo.sh --offline`; it is of no other use.

| | |
|---|---|
| shape | D 128, H 512, 4 layers, 4 heads, 2 key-value heads, vocabulary {vocabulary}, tied embeddings, context {context} |
| text | `scripts/demo_data.py --seed {seed} --bytes {train_bytes}`: {train_tokens} tokens |
| training | {steps} steps of {batch} x {window} tokens, AdamW, learning rate {lr}, seed {seed}; about six minutes on two cores |
| training loss | {train_loss:.4f} (mean over the last steps) |
| held-out loss | {held_out:.4f} nats a token = perplexity {perplexity:.3f}, on the first 32768 tokens of `sample.txt` in windows of {context} (weights in bfloat16, arithmetic in float32) |
| made with | torch {torch}, transformers {transformers}, tokenizers {tokenizers}, Python {python} |

Made by

    python scripts/demo_model.py --out examples/models/demo-llama

which generates the text, trains the tokenizer and the weights, and writes every file of this folder.
`sample.txt` is the output of `scripts/demo_data.py --seed {sample_seed} --bytes {sample_bytes}`; its SHA-256 is
`{sample_hash}`. The model has never seen that seed's text, only text from the same templates.

A prompt to try: `{prompt}`

> {continuation}
"""
PROMPT = "Once upon a time there was a brave fox named"


@torch.no_grad()
def continuation(model, tokenizer):
    ids = tokenizer.encode(PROMPT).ids
    output = model.generate(torch.tensor([ids]), max_new_tokens=120, do_sample=False)[0].tolist()
    return tokenizer.decode(output, skip_special_tokens=True).strip().replace("\n", "\n> ")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1200, help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="windows a step (default %(default)s)")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens a window (default %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of text, weights and order (default %(default)s)")
    parser.add_argument("--train-bytes", type=int, default=10_000_000, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default %(default)s)")
    options = parser.parse_args()
    if options.seed == SAMPLE_SEED:
        parser.error(f"--seed {SAMPLE_SEED} is the seed of the held-out sample")
    return options


def main():
    options = parse_options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    text = demo_data.generate(options.seed, options.train_bytes)
    sample = demo_data.generate(SAMPLE_SEED, SAMPLE_BYTES)
    tokenizer = train_tokenizer(text)
    ids = tokenizer.encode(text).ids
    print(f"{len(text)} bytes of text, {len(ids)} tokens", flush=True)

    model = make_model()
    train_loss = train(model, Batches(ids, options), options)

    options.out.mkdir(parents=True, exist_ok=True)
    write_model(model.to(torch.bfloat16), tokenizer, options.out)
    (options.out / "sample.txt").write_text(sample, encoding="utf-8", newline="\n")
    model = model.float()  # the rounded weights, as a reader of the file sees them
    held_out = held_out_loss(model, tokenizer.encode(sample).ids)
    card = MODEL_CARD.format(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}", vocabulary=VOCABULARY,
        context=CONTEXT, window=options.context, seed=options.seed, train_bytes=options.train_bytes,
        train_tokens=f"{len(ids):,}", steps=options.steps, batch=options.batch, lr=options.lr,
        train_loss=train_loss, held_out=held_out,
        perplexity=math.exp(held_out), torch=torch.__version__, transformers=transformers.__version__,
        tokenizers=tokenizers.__version__, python=platform.python_version(),
        sample_seed=SAMPLE_SEED, sample_bytes=SAMPLE_BYTES,
        sample_hash=hashlib.sha256(sample.encode()).hexdigest(), prompt=PROMPT,
        continuation=continuation(model, tokenizer))
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(f"held-out perplexity {math.exp(held_out):.3f}; written to {options.out}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
