#!/usr/bin/env python3
"""Writes tests/golden/tokenizer_*.json: what HuggingFace `tokenizers` makes of texts.

Run from the repository root:  python3 scripts/golden/make_tokenizer_golden.py
Needs tokenizers (0.23), transformers (5.23, for --check) and gguf. Tokenizers and texts that are
absent are left out; their golden files stay as they are.

  tests/golden/tokenizer_strings.json   the adversarial strings, as base64 of their bytes
  tests/golden/tokenizer_NAME.json      per tokenizer: ids and decoded text of each string; for each
                                        text file the number of ids, a hash of them, the first 64

The two WordPiece tokenizers of a few hundred tokens are made here; their files hold them as well
("tokenizer", a tokenizer.json) and strings of their own ("own"), the cased one only those. Of
all-MiniLM-L6-v2 only the texts are kept.

The reference for SmolLM2 is built here from the keys of the GGUF in the layout of the model's own
tokenizer.json (Digits one by one, then ByteLevel). It is not Transformers' reading of the GGUF
(`gguf_file=`), which has no entry for the pre-tokenizer "smollm" and leaves Digits out: the two
agree on texts without numbers of two digits or more, which --check verifies.
"""
import argparse
import base64
import json
import os
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = Path(os.environ.get("CLEAVE_SHARED_DIR", ROOT.parent / "shared"))
MODELS = Path(os.environ.get("CLEAVE_MODELS_DIR", ROOT / "models"))
DEMO = ROOT / "examples" / "models" / "demo-llama"
MINILM = MODELS / "all-MiniLM-L6-v2" / "tokenizer.json"
SMOLLM2 = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"

STRINGS = [
    "", " ", "  ", "   ", "a", " a", "a ", "  a  b   c    ", "Hello, world!", "\n", "\n\n\n", "\r\n",
    "mixed\nnew\r\nlines\rhere\n\n\r\n\tend", "\t\t\tx\t y", " \t \n ", "x" + " " * 200 + "y",
    " " * 1000, "\n" * 300, "\t" * 100 + " z", "a" * 3000, "ab" * 1500, "=" * 500 + ">", "1" * 200,
    "0123456789", "3.14159 and 1,000,000", "x1y22z333", "2024-05-17T12:34:56Z",
    "٠١٢٣ ०१२३ ០១២ 一二三 Ⅷ ⅷ ½ ¾ ² ₃ ① ㊿ 𝟘𝟙 𑁦𑁧 𒐀", "²³¹ x² H₂O", "\U00011de0\U00011de1 \U00016ff4",
    "\U00010d40\U00010d41\U000116d0 \U0001e5f1", "\U00031350\U0002ebf0 \U00010d4a\U000105c0",
    "don't can't we'll I'm you've they'd she's it're 's 'S DON'T WE'LL ’s", "''''s'll'' 'tis",
    "naïve café résumé", "cafe\u0301 nai\u0308ve", "e\u0301\u0302\u0303\u0304 \u0301x", "a\u200db\u200cc",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘", "👩‍👩‍👧‍👦 👨🏽‍💻 🏳️‍🌈 🇩🇪🇯🇵 ☺️ 1️⃣", "🙂🙂🙂 🙂", "😀a😀 b",
    "漢字かなカナ混じり文。", "我喜欢 机器学习,和数学!", "한국어 텍스트 가나다", "ｆｕｌｌ　ｗｉｄｔｈ　１２３",
    "שלום עולם", "مرحبا بالعالم ١٢٣", "\u202eright to left\u202c \u200fRLM\u200e", "नमस्ते दुनिया क्षत्रिय", "ไทยแลนด์ ๑๒๓",
    "Ελληνικά ΣΊΣΥΦΟΣ ς", "Привет, мир! Ёлки", "İıŞşĞğ ſ ẞß ﬁ ﬀ ǅ", "𝕳𝖊𝖑𝖑𝖔 𝓦𝓸𝓻𝓵𝓭", "ᚠᛇᚻ ᛫ 𐍈𐌰 𓀀𓀁",
    "\x00", "a\x00b\x00\x00c", "".join(map(chr, range(1, 32))), "\x7f\x80\x81\x85\x9f\xa0\xad",
    "nbsp\u00a0nel\u0085ogham\u1680mvs\u180eem\u2003ls\u2028ps\u2029nnbsp\u202fideo\u3000zwsp\u200bbom\ufeff",
    "\u180e\u180e x", "\u0085\u0085 \u0085", "\u2003\u2003x \u2003", "\u3000\u3000\u3000", "\ufeffBOM at the start",
    "\ufffd\ufffe\uffff\U0010ffff\U000e0001", "\ue000\uf8ff private", "Ġhello Ċ ĉ Ā Ń", "▁▁under▁score ▁", "<0x41><0x0A> <0xFF>",
    "<|endoftext|>", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>b <|im_end|> c  <|im_end|>  d",
    "<|im_start|><|im_start|>", "<|im_start", "|im_start|>", "<|im_start|><|im_", "<<|im_end|>>", "<reponame><repo_name><filename>",
    "<|Im_Start|>", "<|im_end|>\u00a0x", "<empty_output>1<empty_output>", "é<|endoftext|>é", "\u0301<|endoftext|>\u0301",
    "<unk>", "a<unk>b", "a <unk> b", "<unk><unk>", " <unk>", "<s>x</s>", "<|start_story|>Once", "x <|end_story|> y", "<|end_story|>",
    "<|start_story|><|end_story|>", "\n<|end_story|>\n", "▁<|start_story|> ▁<unk>", "<bos><eos><pad>", "<|begin|> <|end|>",
    "def f(x):\n    return x ** 2  # comment\n\n\nif __name__ == '__main__':\n\tprint(f(3))\n", "http://a.b/c?d=e&f=%20#g", "C:\\dir\\file.txt",
    "{\"k\": [1, 2.5, null], \"é\": \"\\u00e9\"}", "@-@ <unk> @,@ = = Heading = =", "!!!???...,,,;;;---___***", "$€£¥ ©®™ ±×÷ ∑∫√ ≤≥≠ →⇒",
    "Once upon a time, there was a little girl.", "The quick brown fox\u00adjumps", "a" + "\u0301" * 300, "é" * 500, "漢" * 400, "🙂" * 200,
    " 1 2  3   4", "1 a1 1a", "١a٢", "x\u0660y", "  \n  \n x", " \u00a0 \u00a0x", "end with space ", "end with newline\n", "end with two  ",
]  # fmt: skip

BYTES = [
    b"\xff", b"\xfe\xff", b"a\x80b", b"\xc3", b"\xc3(", b"\xe2\x82", b"\xe2\x82x", b"\xe2(\xa1", b"\xf0\x9f\x98", b"\xf0\x9f\x98z",
    b"\xf0\x9f", b"\xf0\x28\x8c\xbc", b"\xed\xa0\x80\xed\xb0\x80", b"\xc0\xaf", b"\xc1\xbf", b"\xe0\x80\xaf", b"\xe0\x9f\xbf", b"\xf0\x80\x80\xaf",
    b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80", b"\x80\x80\x80", b"ok \xe4\xbd\xa0\xe5 ok", b"\xf1\x80\x80\xc3\xa9",
    b"\xe4\xe4\xbd\xa0", b"\xef\xbf\xbd\xff", b"<|im_end\xff|>", b"\xff<|im_end|>\xff", b"\xed\x9f\xbf\xee\x80\x80\xed\xa0", bytes(range(256)),
]  # fmt: skip


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    "hello world Hello naive café cafe Café résumé resume once upon time there was little girl the The quick brown fox "
    "new lines mixed end with space newline two right left don can ll ve unbeliev able do not user Hi def return print "
    "Привет привет мир Мир ёлки елки σισυφος σίσυφος İ i̇ i ı ſ ß é ö É 我 喜 欢 机 器 学 习 漢 字 か カナ 한국 ᄒ ᄀ 🙂 😀 👩 \U00020000 １２３ سلم ไ नम "
    "٠ Ⅷ ⅷ ½ ² € £ © ™ ± → 。 、 ， \ufb01 \U00011de0 \u0301 \u093f \U0001e92a \U000104c0"
).split()
ENDINGS = (
    "able ly ing ed er s e é ö \u0301 \u0308 \u0302 ᅡ ᆫ 국 어 か な 字 σ ς 🙂 😀 \u200d \ufe0f ् ि ทย １ ＊ \U000104d8 ab abab"
).split()
WORD_PIECE_STRINGS = [
    "unbelievable unbelieving unbelieve unbelievably", "##ing a##b # #a ## ###", "[MASK]", "a [MASK] b", "a[MASK]b", "  [MASK]  ", "[mask]",
    "[ MASK ]", "[CLS] hello [SEP] world [SEP]", "[UNK][PAD]", "[CLS", "[MASK][MASK] [MASK]", "New York", "new york is not New York", "NEW YORKER",
    "Don't do not DO NOT he's we've they're I'm can't", "hello , world ! ? . ' hello ' n't", "HELLO WORLD", "hElLo", "CAFÉ Cafe\u0301 cafe\u0301 café",
    "É é E\u0301 e\u0301\u0327", "e\u0327\u0301 e\u0301\u0327", "\u0301", "\u0301 \u0301a", "a\u0301\u0301\u0301", "İ I\u0307 i\u0307", "ΣΊΣΥΦΟΣ σίσυφος", "ЁЛКИ Ёлки е\u0308лки",
    "我喜欢hello机器學习", "漢字カナか", "한국어 \u1112\u1161\u11ab", "hello\u200bworld\u00adhello", "hello\x00wor\x7fld\ufffd!", "hello\u3000world\u2028hello", "hello\x0bworld\x0chello\x85world",
    "\ue000hello\U000f0000", "\u0378hello\U000e0fff", "a" * 21, "a" * 100, "a" * 101, "é" * 100, "e\u0301" * 60, "🙂" * 100, "🙂🙂 a🙂 😀😀", "ab" * 40, "ab" * 9 + "#",
    "$100 a+b=c ^_^ `x` |y| ~z~ <t>", "«hello» “world” ‘hello’ — … ‐ 、。，", "\u2e52hello\u16fe2\u1b7d\U00011fff", "\u166dhello\U000111c9", "𞤈𞤪 𐓀𐓘", "𝐇ello ﬁ ﬀ Å",
    "\u0344\u0344x \u0958", "a\u07fd\u0301 a\u0301\u07fd b\u0898\u0327", "\U00011935\U00011930 \U00011938", "\u302a\u0301a\u302e", "नमि नम् ไทย", "\u1e9e ẞß ǅ ǈ", "", " ", "\x00", "\u0301\x00 ",
]  # fmt: skip


def fnv1a(ids):
    """FNV-1a, 64 bits, over the ids as little-endian int32."""
    value = 0xCBF29CE484222325
    for byte in b"".join(i.to_bytes(4, "little") for i in ids):
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def smollm2():
    """SmolLM2's tokenizer.json, rebuilt from the GGUF without this project's code."""
    from gguf import GGUFReader

    fields = GGUFReader(SMOLLM2).fields
    key = lambda name: fields["tokenizer.ggml." + name].contents()
    assert key("model") == "gpt2" and key("pre") == "smollm" and not key("add_bos_token")
    tokens, types = key("tokens"), key("token_type")
    merges = [tuple(merge.split(" ")) for merge in key("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    added = lambda kind, special: [
        AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types) if k == kind
    ]
    tokenizer.add_special_tokens(added(3, True))
    tokenizer.add_tokens(added(4, False))
    return tokenizer


def word_piece(cased):
    """A BERT's tokenizer of a few hundred tokens; the two differ in whatever a file can choose."""
    printable = [chr(c) for c in range(33, 127)]
    continued = [c for c in printable if c.isalnum()]
    tokens = SPECIAL + printable + WORDS + ["##" + part for part in continued + ENDINGS] + ["##", "###a"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model = models.WordPiece(
        vocab, unk_token="[UNK]", continuing_subword_prefix="##", max_input_chars_per_word=20 if cased else 100
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = ("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])
    tokenizer.post_processor = (
        processors.BertProcessing(sep, cls)
        if cased
        else processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [cls, sep])
    )
    tokenizer.decoder = decoders.WordPiece("##", cleanup=not cased)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, lstrip=t == "[MASK]") for t in SPECIAL])
    tokenizer.add_tokens([AddedToken("New York", normalized=True, single_word=True)])
    if not cased:  # as files come that shape batches; what is read here is the text
        tokenizer.enable_truncation(8)
        tokenizer.enable_padding(length=8)
    return tokenizer


def tokenizers():
    if SMOLLM2.exists():
        yield "smollm2", smollm2()
    for name, folder in [("tinystories", SHARED / "models" / "tinystories-656K"), ("demo", DEMO)]:
        if (folder / "tokenizer.json").exists():
            yield name, Tokenizer.from_file(str(folder / "tokenizer.json"))


def golden_of_string(tokenizer, text):
    with_special = tokenizer.encode(text, add_special_tokens=True).ids
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    # Special tokens are taken out here and not by skip_special_tokens: tokenizers 0.23 keeps a
    # special token in spite of it where normalisation changes the token's spelling.
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    kept = [i for i in with_special if i not in special]
    entry = {"ids": plain, "decoded": tokenizer.decode(with_special, skip_special_tokens=False)}
    if with_special != plain:
        entry["ids_with_special"] = with_special
    if len(kept) != len(with_special):
        entry["decoded_without_special"] = tokenizer.decode(kept, skip_special_tokens=False)
    return entry


def golden_of_text(tokenizer, file):
    ids = tokenizer.encode(file.read_bytes().decode("utf-8"), add_special_tokens=False).ids
    return {"file": file.name, "count": len(ids), "fnv1a": fnv1a(ids), "first": ids[:64]}


def write_word_piece(name, tokenizer, texts=()):
    description = json.loads(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    own = [{"text": text} | golden_of_string(tokenizer, text) for text in WORD_PIECE_STRINGS]
    strings = [golden_of_string(tokenizer, text) for text in texts]
    write(name, {"tokenizer": [description], "own": own} | ({"strings": strings} if strings else {}))


def write(name, value):
    rows = lambda items: ",\n".join(json.dumps(item, ensure_ascii=True) for item in items)
    parts = [f"{json.dumps(key)}: [\n{rows(items)}\n]" for key, items in value.items()]
    (GOLDEN / f"tokenizer_{name}.json").write_text("{" + ",\n".join(parts) + "}\n")


def check_transformers():
    """Transformers' own reading of the GGUF, where it should agree."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    ours = smollm2()
    texts = [text for text in STRINGS if not re.search(r"\d\d", text) and not any(c.isnumeric() for c in text)]
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).ids, repr(text)
    print(f"transformers agrees on the {len(texts)} strings without numbers")


def check_directory(name, folder):
    """A model directory opened by Transformers gives the golden ids of tokenizer NAME."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    strings = [base64.b64decode(text) for text in read("strings")["strings"]]
    golden = read(name)
    for data, want in zip(strings, golden["strings"], strict=True):
        text = data.decode("utf-8", errors="replace")
        assert tokenizer.encode(text, add_special_tokens=False) == want["ids"], repr(text)
        with_special = want.get("ids_with_special", want["ids"])
        assert tokenizer.encode(text, add_special_tokens=True) == with_special, repr(text)
    for want in golden["texts"]:
        text = (SHARED / "text" / want["file"]).read_bytes().decode("utf-8")
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert (len(ids), fnv1a(ids)) == (want["count"], want["fnv1a"]), want["file"]
    print(f"{folder}: {type(tokenizer).__name__} gives the golden ids of {name}")


def read(name):
    return json.loads((GOLDEN / f"tokenizer_{name}.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with transformers as well")
    parser.add_argument(
        "--check-directory", nargs=2, metavar=("NAME", "DIR"),
        help="write nothing; compare Transformers' tokenizer of DIR with the golden ids of NAME",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.check_directory:
        return check_directory(*arguments.check_directory)
    if arguments.check:
        check_transformers()
    raw = [text.encode("utf-8") for text in STRINGS] + BYTES
    write("strings", {"strings": [base64.b64encode(data).decode() for data in raw]})
    texts = [data.decode("utf-8", errors="replace") for data in raw]
    files = sorted((SHARED / "text").glob("*.txt"))
    write_word_piece("uncased", word_piece(cased=False), texts)
    write_word_piece("cased", word_piece(cased=True))
    if MINILM.exists() and files:
        minilm = Tokenizer.from_file(str(MINILM))
        minilm.no_truncation()
        minilm.no_padding()
        write("minilm", {"texts": [golden_of_text(minilm, file) for file in files]})
    for name, tokenizer in tokenizers():
        write(
            name,
            {
                "texts": [golden_of_text(tokenizer, file) for file in files],
                "strings": [golden_of_string(tokenizer, text) for text in texts],
            },
        )
        print(f"{name}: {len(files)} texts, {len(texts)} strings")


if __name__ == "__main__":
    main()
