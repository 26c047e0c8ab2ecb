"""Measures transformers in f32 on the same model file: `python measure_transformers.py MODEL.gguf`.

Measures decode with the model's forward pass and its KV cache, without generate(), and prefill of 512 tokens.
Takes the best of three runs, and prints one JSON object in tokens/s.
"""

import json
import os
import sys
import time

import torch
from make_reference import build

path = sys.argv[1]
TOKENS = 24
# LB_MEASURE=cpu measures tokens per second of CPU time with one thread, for busy machines.
by_cpu = os.environ.get("LB_MEASURE") == "cpu"
now = time.process_time if by_cpu else time.perf_counter
torch.set_num_threads(1 if by_cpu else len(os.sched_getaffinity(0)))
_, model, _ = build(path)
figures = {}
prompt = torch.tensor([[1000 + i * 37 % 20000 for i in range(512)]])
with torch.inference_mode():
    for batch in (1, 4, 8, 16):
        best = 0.0
        for _ in range(3):
            past = model(prompt[:, :64].expand(batch, -1), use_cache=True).past_key_values
            last = torch.full((batch, 1), 7)
            began = now()
            for _ in range(TOKENS):
                out = model(last, past_key_values=past, use_cache=True)
                past, last = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            best = max(best, batch * TOKENS / (now() - began))
        figures[f"decode_{batch}"] = best
    best = 0.0
    for _ in range(3):
        began = now()
        model(prompt, use_cache=True, logits_to_keep=1)
        best = max(best, 512 / (now() - began))
    figures["prefill_512"] = best
print(json.dumps(figures))
