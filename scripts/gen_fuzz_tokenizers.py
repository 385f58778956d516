#!/usr/bin/env python3
"""Writes the seeds of fuzz/corpus/tokenizer_json: small tokenizer.json files, each with a line of text before it.
Usage: gen_fuzz_tokenizers.py   (from the repository root)"""
import copy, json
b2u, n = {}, 0
for b in range(256):
    if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255: b2u[b] = chr(b)
    else: b2u[b] = chr(256 + n); n += 1
merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "a"), ("aa", "aa"), ("i", "n"), ("Ġ", "a")]
vocab = {"<s>": 0, "</s>": 1, "[INST]": 2, "[/INST]": 3}
for b in range(256): vocab[b2u[b]] = len(vocab)
for a, b in merges: vocab[a + b] = len(vocab)
nano = json.load(open("models/nano/tokenizer.json", encoding="utf-8"))
base = {k: copy.deepcopy(nano[k]) for k in ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")}
base["added_tokens"] = [{"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                        for s, i in list(vocab.items())[:4]]
base["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                          "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}
base["model"] = {"type": "BPE", "dropout": None, "unk_token": None, "ignore_merges": False, "vocab": vocab, "merges": [list(m) for m in merges]}
def write(name, text, change=lambda d: None):
    d = copy.deepcopy(base); change(d)
    with open(f"fuzz/corpus/tokenizer_json/{name}", "w", encoding="utf-8") as f:
        f.write(text + "\n" + json.dumps(d, ensure_ascii=False, separators=(",", ":")))
def strings(d): d["model"].update(merges=[" ".join(m) for m in merges], ignore_merges=True)
def llama3(d): d["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json.load(open("tests/data/text/golden_variants.json"))["variants"][1]["change"]["pattern"]
def gpt2(d): d["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
def flags(d): d["added_tokens"] += [{"id": 300 + i, "content": c, "lstrip": i & 1 > 0, "rstrip": i & 2 > 0, "single_word": i & 4 > 0, "normalized": i & 8 > 0, "special": i % 3 == 0}
                                    for i, c in enumerate(["<L>", " x", "word", "<", "[INST]]", "é", "字", "ab", "abc"])]
def sequences(d):
    d["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, d["post_processor"]]}
    d["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}
    d["normalizer"] = {"type": "Sequence", "normalizers": []}
def pcre(d): d["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"(?=b)|\p{L}+|^x$|\s+(?!\S)"
write("plain", "the in aaaa [INST] don't\t é字😀 12345")
write("strings", " the the", strings); write("llama3", "it's 12345 नमस्ते", llama3); write("gpt2", "we'll see  x\t", gpt2)
write("flags", " <L> x word  abc é字 [INST]] wordabc", flags); write("sequences", "<s> a </s>", sequences); write("pcre", "xab b\tx", pcre)
