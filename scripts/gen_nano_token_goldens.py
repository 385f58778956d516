#!/usr/bin/env python3
"""Makes tests/data/text/golden_nano_tokens.jsonl and golden_variants.json with Python tokenizers 0.22.2.
  golden_nano_tokens.jsonl  models/nano's own tokenizer.json: {text, ids, plain?, decoded?}; `ids` parse control
                            strings, `plain` (if different) are with encode_special_tokens, no BOS in either.
  golden_variants.json      the same for tokenizer.json files changed in one respect (other split pattern, added
                            tokens with every flag, merges ignored): the C++ test applies the same change.
Usage: gen_nano_token_goldens.py   (from the repository root; needs `pip install tokenizers==0.22.2`)"""
import copy, json, random
from tokenizers import Tokenizer, __version__
assert __version__ == "0.22.2", __version__
rng = random.Random(20240718)
base = json.load(open("models/nano/tokenizer.json", encoding="utf-8"))
golden = [json.loads(l)["text"] for l in open("tests/data/text/golden_tokens.jsonl", encoding="utf-8")]
special = [a["content"] for a in base["added_tokens"]]

POOLS = ["abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", " ", "\n\r\t \u00a0\u2003\u3000",
         ".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`", "éèüßñçøåæœ", "привет", "שלום", "العربية", "हिन्दी", "தமிழ்", "ไทย", "漢字仮名交じり文",
         "한국어", "ʰʲªº", "\u0301\u0308\u20dd", "ǅǈ", "½²³Ⅷ①", "😀👩‍💻🏳️‍🌈", "\x00\x01\x7f\u0085\u180e\u200b\u2028\ufeff\ufffd", "ſ'S'lL'rE"]
def random_text():
    out = []
    for _ in range(rng.randint(1, 14)):
        if rng.random() < 0.08: out.append(rng.choice(special)); continue
        pool = rng.choice(POOLS)
        out.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 6))))
        if rng.random() < 0.05: out.append(chr(rng.choice([rng.randint(1, 0xd7ff), rng.randint(0xe000, 0x10ffff)])))
    return "".join(out)

def rows(tok, texts):
    for text in texts:
        tok.encode_special_tokens = False
        ids = tok.encode(text, add_special_tokens=False).ids
        row = {"text": text, "ids": ids}
        keep, skip = tok.decode(ids, skip_special_tokens=False), tok.decode(ids, skip_special_tokens=True)
        if keep != text: row["decoded"] = keep
        if skip != keep: row["decoded_skip"] = skip
        tok.encode_special_tokens = True
        plain = tok.encode(text, add_special_tokens=False).ids
        if plain != ids: row["plain"] = plain
        yield row
def build(d): return Tokenizer.from_str(json.dumps(d))

texts = golden + [random_text() for _ in range(900)] + ["x" * 3000, "the " * 700, "\u00e9" * 900, "Aa" * 800, "\n" * 500]
with open("tests/data/text/golden_nano_tokens.jsonl", "w", encoding="utf-8") as f:
    for row in rows(build(base), texts): f.write(json.dumps(row, ensure_ascii=True, separators=(",", ":")) + "\n")

def added(i, content, **flags):
    return {"id": base["model"]["vocab"].get(content, 4096 + i), "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": False, **flags}
flagged = [added(0, "<L>", lstrip=True), added(1, "<R>", rstrip=True), added(2, "<LR>", lstrip=True, rstrip=True, special=True),
           added(3, "word", single_word=True), added(4, "norm", normalized=True), added(5, "normal", normalized=True, single_word=True),
           added(6, "<L><R>"), added(7, "  "), added(8, "<s> <s>", special=True), added(0, "or"), added(0, "é", lstrip=True),
           added(9, "<N>", normalized=True, lstrip=True, rstrip=True), added(10, "ord<", special=True)]
def flag_text():
    bits = [a["content"] for a in flagged] + ["<s>", " ", "  ", "\u00a0", "\n", "a", "_", "é", "3", "½", "ord", "words", "normalize", "<", "-", "\u0301", "字"]
    return "".join(rng.choice(bits) for _ in range(rng.randint(1, 9)))
PATTERNS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gaps": r"[aeiou]|\p{N}{2}|$|^x|(?=b)",
}
# PCRE2 10.42 knows Unicode 14 and counts U+180E as white space: keep those out of rows it runs.
def pcre_safe(s):
    import unicodedata
    return "\u180e" not in s and all(unicodedata.category(c) != "Cn" for c in s)
variants = []
def variant(name, change, texts):
    d = copy.deepcopy(base)
    if "pattern" in change: d["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = change["pattern"]
    if "pre_tokenizer" in change: d["pre_tokenizer"] = change["pre_tokenizer"]
    if "added_tokens" in change: d["added_tokens"] += change["added_tokens"]
    if "ignore_merges" in change: d["model"]["ignore_merges"] = change["ignore_merges"]
    if change.get("merges_as_strings"): d["model"]["merges"] = [" ".join(m) for m in d["model"]["merges"]]
    variants.append({"name": name, "change": change, "rows": list(rows(build(d), texts))})
sample = golden[::5] + [random_text() for _ in range(70)]
variant("added", {"added_tokens": flagged}, [flag_text() for _ in range(500)])
variant("llama3", {"pattern": PATTERNS["llama3"]}, sample)
variant("qwen", {"pattern": PATTERNS["qwen"]}, [t for t in sample if pcre_safe(t)])
variant("gaps", {"pattern": PATTERNS["gaps"]}, [t for t in sample if pcre_safe(t)])
variant("gpt2", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                 "merges_as_strings": True}, [t for t in sample if pcre_safe(t)])
variant("two_splits", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": r"\p{N}{1,2}"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": PATTERNS["llama3"]}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}}, [t for t in sample if pcre_safe(t)])
variant("ignore_merges", {"ignore_merges": True, "merges_as_strings": True}, sample)
json.dump({"variants": variants}, open("tests/data/text/golden_variants.json", "w"), separators=(",", ":"))
print(len(texts), "nano rows,", {v["name"]: len(v["rows"]) for v in variants})
