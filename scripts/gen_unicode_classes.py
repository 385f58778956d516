#!/usr/bin/env python3
"""Makes tools/unicode16_classes.json: the code points of every class the split patterns name (copied from
../shared/text/unicode16_classes.json, measured there on Oniguruma and fancy-regex) plus `\\w` of the Rust
regex crate, which Hugging Face uses for `single_word` added tokens. `\\w` is measured here, code point by
code point, on Python tokenizers 0.22.2. Usage: gen_unicode_classes.py SHARED_CLASSES_JSON OUT_JSON"""
import json, sys
from tokenizers import Tokenizer, AddedToken, models, __version__
assert __version__ == "0.22.2", __version__

t = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
t.add_tokens([AddedToken("@@", single_word=True, normalized=False)])
at = t.token_to_id("@@")
points = [c for c in range(1, 0x110000) if not 0xd800 <= c <= 0xdfff and c != ord("@")]
ranges = []
for i in range(0, len(points), 4096):
    chunk = points[i:i + 4096]
    for c, e in zip(chunk, t.encode_batch([chr(c) + "@@" for c in chunk])):
        if at not in e.ids:  # a word character before it: not a single word
            if ranges and ranges[-1][1] == c - 1: ranges[-1][1] = c
            else: ranges.append([c, c])
d = json.load(open(sys.argv[1]))
classes = {k.replace("White_Space(\\s)", "White_Space"): v["ranges"] for k, v in d["classes"].items()}
classes["word"] = ranges
out = {"what": d["what"] + " `word` is \\w of the Rust regex crate as tokenizers 0.22.2 runs it (measured).", "classes": classes}
with open(sys.argv[2], "w") as f: f.write(json.dumps(out, separators=(",", ":")) + "\n")
print(len(ranges), "ranges,", sum(b - a + 1 for a, b in ranges), "word characters")
