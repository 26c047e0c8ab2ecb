"""Writes `smollm2.json`: the output of transformers in f32 for the default model.

    python make_reference.py MODEL.gguf OUT.json

Needs torch 2.11, transformers 5.23, gguf, tokenizers. The `gguf` package dequantises the weights of the file
for a LlamaForCausalLM in f32. The tokenizer is built here, because transformers' GGUF loader omits the digit
split. For each prompt, the file has its ids, 32 greedy tokens without stopping at the end token, the margin
between the two most likely tokens at each position, and of the first step's logits the top 20, every
1,000th, their sum and their norm.
"""

import json
import sys

import gguf
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

RAW = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Café – naïve 東京 😀 12345 costs $3.50;",
    "Once upon a time",
    "price:  \n\n  7",
    "1, 1, 2, 3, 5, 8,",
    "SELECT name, COUNT(*) FROM users",
    "The mitochondria is",
    "x",
    "In 1969, humans first",
    "Dear Sir or Madam,\n\nI am writing",
    "{\"name\": \"Ada\", \"age\":",
    "To be, or not to be",
    "La capitale de l'Italie est",
    "for (int i = 0; i < n; i++) {",
]
CHAT = [
    "What is gravity? Answer in one sentence.",
    "Write a haiku about load balancers.",
    "List three colours.",
    "Translate 'good morning' to Spanish.",
    "How do I sort a list in Python?",
    "What is 17 + 25?",
    "Who wrote Hamlet?",
    "Explain TCP to a child.",
    "Give me a synonym for happy.",
]
LONG = "The quick brown fox jumps over the lazy dog while the seven wise owls watch from the old oak tree. " * 12


def build(path):
    reader = gguf.GGUFReader(path)

    def field(name):
        return reader.fields[name].contents()

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds) if k == 3])
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    config = LlamaConfig(
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=len(tokens),
        max_position_embeddings=field("llama.context_length"),
        rope_theta=field("llama.rope.freq_base"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
    )
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }
    state = {}
    for t in reader.tensors:
        w = torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type), dtype=torch.float32)
        parts = t.name.split(".")
        if parts[0] == "token_embd":
            state["model.embed_tokens.weight"] = state["lm_head.weight"] = w
        elif parts[0] == "output_norm":
            state["model.norm.weight"] = w
        else:
            n = {"attn_q": heads, "attn_k": kv_heads}.get(parts[2])
            if n:  # llama.cpp interleaves the rotated halves
                w = w.view(n, w.shape[0] // n // 2, 2, -1).transpose(1, 2).reshape(w.shape)
            state[f"model.layers.{parts[1]}.{names[parts[2]]}.weight"] = w
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state, strict=True)
    return tok, model, field("tokenizer.chat_template")


def case(tok, model, kind, prompt, text, steps=32):
    ids = tok.encode(text, add_special_tokens=False).ids
    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=True)
        first, greedy, margins = out.logits[0, -1], [], []
        logits = first
        for _ in range(steps):
            top = logits.topk(2)
            greedy.append(int(top.indices[0]))
            margins.append(round(float(top.values[0] - top.values[1]), 5))
            out = model(torch.tensor([[greedy[-1]]]), past_key_values=out.past_key_values, use_cache=True)
            logits = out.logits[0, -1]
    top = first.topk(20)
    return {
        "kind": kind, "prompt": prompt, "text": text, "prompt_ids": ids, "greedy_ids": greedy, "margins": margins,
        "top": [[int(i), float(v)] for i, v in zip(top.indices, top.values)],
        "every_1000th": [float(v) for v in first[::1000]],
        "logits_sum": float(first.double().sum()), "logits_l2": float(first.double().norm()),
    }


def main():
    path, out = sys.argv[1:]
    tok, model, template = build(path)
    import jinja2

    render = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render
    cases = [case(tok, model, "raw", p, p) for p in RAW + [LONG]]
    for p in CHAT:
        text = render(messages=[{"role": "user", "content": p}], add_generation_prompt=True)
        cases.append(case(tok, model, "chat", p, text))
    about = f"transformers {transformers.__version__}, torch {torch.__version__}, CPU f32, dequantised weights"
    with open(out, "w") as f:
        f.write('{"reference": %s, "cases": [\n' % json.dumps(about))
        f.write(",\n".join(json.dumps(c) for c in cases))
        f.write("\n]}\n")


if __name__ == "__main__":
    main()
