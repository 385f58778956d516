"""A second reader of the portable checkpoint, written from docs/formats.md alone: Python and numpy, nothing
of nibble. The C++ test beside it (interchange_test.cpp) makes the files and runs

  interchange.py slices TP1_DIR TP2_DIR TP4_DIR     every rank file is a slice of the whole, byte for byte
  interchange.py logits CHECKPOINT IDS LOGITS       weights of the checkpoint give nibble's logits
  interchange.py dense HF_DIR GOLDEN_DIR            the same few lines of model give Hugging Face's logits
"""
# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import struct
import sys

import numpy as np


def read_safetensors(path):
    """name -> array; BF16 becomes float32, F16 float32, the others stay."""
    raw = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I8": "i1", "U8": "u1"}[entry["dtype"]]
        array = np.frombuffer(raw[begin:end], kind).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        tensors[name] = array.astype(np.float32) if entry["dtype"] == "F16" else array
    return tensors


def dequantize(tensors, prefix):
    """[out, in] floats that act on the plain activation: q * scale * prequant."""
    packed = tensors[prefix + ".weight"].view(np.uint8)
    nibbles = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1]).astype(np.int32)
    q = np.where(nibbles >= 8, nibbles - 16, nibbles).astype(np.float32)
    scales = tensors[prefix + ".weights_scaling_factor"].astype(np.float32)
    weight = q * np.repeat(scales, q.shape[1] // scales.shape[1], axis=1)
    prequant = tensors.get(prefix + ".prequant_scaling_factor")
    return weight if prequant is None else weight * prequant.astype(np.float32)


def lm_head(tensors, quantization):
    """[vocab, hidden] floats, by what config.json says of it."""
    weight = tensors["lm_head.weight"]
    if quantization.get("lm_head_quant_algo") == "W8A16_GROUP":
        scales = tensors["lm_head.weights_scaling_factor"]
        return weight.astype(np.float32) * np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1)
    return dequantize(tensors, "lm_head") if "lm_head" not in quantization["exclude_modules"] else weight


def checkpoint_weights(directory):
    directory = pathlib.Path(directory)
    config = json.loads((directory / "config.json").read_text())
    t = read_safetensors(directory / "rank0.safetensors")
    layers = []
    for n in range(config["num_hidden_layers"]):
        at = f"transformer.layers.{n}."
        linear = {ours: dequantize(t, at + theirs) for ours, theirs in
                  [("qkv", "attention.qkv"), ("o", "attention.dense"), ("gate", "mlp.fc"), ("up", "mlp.gate"), ("down", "mlp.proj")]}
        layers.append(linear | {"attn_norm": t[at + "input_layernorm.weight"], "mlp_norm": t[at + "post_layernorm.weight"]})
    shape = dict(heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"], head=config["head_size"],
                 eps=config["norm_epsilon"], theta=config["rotary_base"], vocab=config["nibble"]["vocab_size"])
    embedding = t["transformer.vocab_embedding.weight"]
    head = lm_head(t, config["quantization"]) if "lm_head.weight" in t else embedding
    return shape, embedding, layers, t["transformer.ln_f.weight"], head


def hf_weights(directory):
    directory = pathlib.Path(directory)
    config = json.loads((directory / "config.json").read_text())
    t = {}
    for shard in sorted(directory.glob("*.safetensors")):
        t |= read_safetensors(shard)
    layers = []
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        qkv = np.concatenate([t[f"{at}self_attn.{x}_proj.weight"] for x in "qkv"])
        layers.append({"qkv": qkv, "o": t[at + "self_attn.o_proj.weight"], "gate": t[at + "mlp.gate_proj.weight"],
                       "up": t[at + "mlp.up_proj.weight"], "down": t[at + "mlp.down_proj.weight"],
                       "attn_norm": t[at + "input_layernorm.weight"], "mlp_norm": t[at + "post_attention_layernorm.weight"]})
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    shape = dict(heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"],
                 head=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                 eps=config["rms_norm_eps"], theta=theta, vocab=config["vocab_size"])
    embedding = t["model.embed_tokens.weight"]
    return shape, embedding, layers, t["model.norm.weight"], t.get("lm_head.weight", embedding)


def last_logits(model, ids):
    shape, embedding, layers, final_norm, head = model
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + shape["eps"]) * w
    d, tokens = shape["head"], len(ids)
    angle = np.arange(tokens)[:, None] * shape["theta"] ** (-np.arange(0, d, 2) / d)[None, :]
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]

    def rotate(x):  # [tokens, heads, d]: the two halves of a head are the pairs
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = embedding[ids].astype(np.float64)
    future = np.triu(np.ones((tokens, tokens), bool), 1)
    for layer in layers:
        rows = (norm(x, layer["attn_norm"]) @ layer["qkv"].T.astype(np.float64)).reshape(tokens, -1, d)
        q, k, v = np.split(rows, [shape["heads"], shape["heads"] + shape["kv_heads"]], axis=1)
        repeat = shape["heads"] // shape["kv_heads"]
        q, k, v = rotate(q), np.repeat(rotate(k), repeat, axis=1), np.repeat(v, repeat, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(d)
        scores[:, future] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v).reshape(tokens, -1)
        x = x + mixed @ layer["o"].T
        y = norm(x, layer["mlp_norm"])
        gate = y @ layer["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["up"].T)) @ layer["down"].T
    return (norm(x[-1], final_norm) @ head.T)[: shape["vocab"]]


def check_close(name, have, want, tolerance):
    error = np.linalg.norm(have - want) / np.linalg.norm(want)
    print(f"{name}: relative error {error:.2e}, largest difference {np.abs(have - want).max():.2e}")
    if not error < tolerance or have.argmax() != want.argmax():
        sys.exit(f"{name}: the logits differ (relative error {error}, wanted below {tolerance})")


def slices(directories):
    whole = read_safetensors(pathlib.Path(directories[0]) / "rank0.safetensors")
    config = json.loads((pathlib.Path(directories[0]) / "config.json").read_text())
    heads, kv_heads, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_size"]
    checked = 0
    for directory in directories[1:]:
        tp = json.loads((pathlib.Path(directory) / "config.json").read_text())["mapping"]["tp_size"]
        for rank in range(tp):
            part = read_safetensors(pathlib.Path(directory) / f"rank{rank}.safetensors")
            if part.keys() != whole.keys():
                sys.exit(f"{directory} rank {rank}: other tensors: {sorted(part.keys() ^ whole.keys())}")
            for name, have in part.items():
                full = whole[name]
                cut = lambda a, axis: np.split(a, tp, axis=axis)[rank]
                if "attention.qkv" in name and not name.endswith("prequant_scaling_factor"):
                    unit = head // 2 if name.endswith(".weight") else head  # two rows share a byte
                    q, k, v = np.split(full, [heads * unit, (heads + kv_heads) * unit])
                    if tp <= kv_heads:
                        k, v = cut(k, 0), cut(v, 0)
                    else:  # KV heads are duplicated
                        first = rank * kv_heads // tp * unit
                        k, v = k[first : first + unit], v[first : first + unit]
                    want = np.concatenate([cut(q, 0), k, v])
                elif "attention.dense" in name or "mlp.proj" in name:
                    want = cut(full, full.ndim - 1)
                elif ("mlp.fc" in name or "mlp.gate" in name) and not name.endswith("prequant_scaling_factor"):
                    want = cut(full, 0)
                elif "vocab_embedding" in name or name.startswith("lm_head") and not name.endswith("prequant_scaling_factor"):
                    want = cut(full, 0)
                else:  # norms, prequant vectors of row-cut linears, KV scales
                    want = full
                if have.shape != want.shape or have.tobytes() != np.ascontiguousarray(want).tobytes():
                    sys.exit(f"{directory} rank {rank}: {name} is not the slice of the whole")
                checked += 1
    print(f"{checked} tensors are byte-equal slices")


def main():
    what, *rest = sys.argv[1:]
    if what == "slices":
        slices(rest)
    elif what == "logits":
        ids = np.fromfile(rest[1], "<i4")
        check_close("checkpoint", last_logits(checkpoint_weights(rest[0]), ids), np.fromfile(rest[2], "<f4"), 2e-5)
    else:
        golden = pathlib.Path(rest[1])
        logits = read_safetensors(golden / "full_logits.safetensors")
        model = hf_weights(rest[0])
        for prompt in json.loads((golden / "golden.json").read_text())["prompts"]:
            if prompt["name"] in logits and len(prompt["ids"]) < 512:
                check_close(prompt["name"], last_logits(model, np.array(prompt["ids"])), logits[prompt["name"]], 1e-4)


main()
