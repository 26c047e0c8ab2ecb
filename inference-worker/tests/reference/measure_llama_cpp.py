"""Measures llama.cpp on the same model file: `python measure_llama_cpp.py MODEL.gguf`.

llama.cpp is part of PyPI's xllamacpp, whose library exports llama.cpp's C API. This script calls the API
directly, to spend little time in Python. It measures decode at several batch sizes and prefill of 512 tokens
as measure_transformers.py does, takes the best of three runs, and prints a line with the version and the
instruction sets of the build, and one JSON object in tokens/s.
"""

import ctypes as c
import importlib.metadata
import importlib.util
import json
import os
import sys
import time

path = sys.argv[1]
TOKENS = 24
# LB_MEASURE=cpu measures tokens per second of CPU time with one thread, for busy machines.
by_cpu = os.environ.get("LB_MEASURE") == "cpu"
now = time.process_time if by_cpu else time.perf_counter
threads = 1 if by_cpu else len(os.sched_getaffinity(0))


class Params(c.Structure):
    """llama_context_params: the fields that are set here, and space for the others, which keep their defaults."""

    _fields_ = [(n, c.c_uint32) for n in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")] + [("rest", c.c_uint8 * 1008)]


class ModelParams(c.Structure):
    _fields_ = [("rest", c.c_uint8 * 1024)]


class Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


folder = importlib.util.find_spec("xllamacpp").submodule_search_locations[0]
llama = c.CDLL(os.path.join(folder, "xllamacpp.abi3.so"))
LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
silent = LOG(lambda *_: None)
llama.llama_log_set(silent, None)
for name, result, arguments in (
    ("llama_context_default_params", Params, []),
    ("llama_model_default_params", ModelParams, []),
    ("llama_model_load_from_file", c.c_void_p, [c.c_char_p, ModelParams]),
    ("llama_init_from_model", c.c_void_p, [c.c_void_p, Params]),
    ("llama_set_n_threads", None, [c.c_void_p, c.c_int32, c.c_int32]),
    ("llama_batch_init", Batch, [c.c_int32, c.c_int32, c.c_int32]),
    ("llama_decode", c.c_int32, [c.c_void_p, Batch]),
    ("llama_get_logits_ith", c.POINTER(c.c_float), [c.c_void_p, c.c_int32]),
    ("llama_get_memory", c.c_void_p, [c.c_void_p]),
    ("llama_memory_clear", None, [c.c_void_p, c.c_bool]),
    ("llama_memory_seq_rm", c.c_bool, [c.c_void_p, c.c_int32, c.c_int32, c.c_int32]),
    ("llama_model_get_vocab", c.c_void_p, [c.c_void_p]),
    ("llama_vocab_n_tokens", c.c_int32, [c.c_void_p]),
    ("llama_n_ctx", c.c_uint32, [c.c_void_p]),
    ("llama_n_seq_max", c.c_uint32, [c.c_void_p]),
):
    function = getattr(llama, name)
    function.restype, function.argtypes = result, arguments

llama.llama_backend_init()
model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
assert model, f"llama.cpp cannot load {path}"
SEQUENCES, CONTEXT = 16, 16 * 768
params = llama.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, 1024, 512, SEQUENCES
context = llama.llama_init_from_model(model, params)
assert context, "llama.cpp cannot make a context"
assert (llama.llama_n_ctx(context), llama.llama_n_seq_max(context)) == (CONTEXT, SEQUENCES), "another API"
llama.llama_set_n_threads(context, threads, threads)
memory = llama.llama_get_memory(context)
vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
batch = llama.llama_batch_init(1024, 0, 1)


def step(tokens):
    """Computes one step of tokens (id, position, sequence, needs logits)."""
    for i, (token, position, sequence, wants) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = sequence, wants
    batch.n_tokens = len(tokens)
    status = llama.llama_decode(context, batch)
    assert status == 0, f"llama_decode gave {status}"


def finish(row):
    """Reads a logit of a row, which waits for the end of the step."""
    return llama.llama_get_logits_ith(context, row)[vocab - 1]


prompt = [1000 + i * 37 % 20000 for i in range(512)]
figures = {}
for size in (1, 4, 8, 16):
    best = 0.0
    llama.llama_memory_clear(memory, True)
    for s in range(size):
        step([(id, i, s, i == 63) for i, id in enumerate(prompt[:64])])
    finish(63)
    for _ in range(3):
        began = now()
        for t in range(TOKENS):
            # Always the same id: the ids do not affect the speed, but sampling in Python would.
            step([(prompt[t], 64 + t, s, True) for s in range(size)])
            finish(size - 1)
        best = max(best, size * TOKENS / (now() - began))
        for s in range(size):
            llama.llama_memory_seq_rm(memory, s, 64, -1)
    figures[f"decode_{size}"] = best
best = 0.0
for _ in range(3):
    llama.llama_memory_clear(memory, True)
    began = now()
    step([(id, i, 0, i == 511) for i, id in enumerate(prompt)])
    finish(511)
    best = max(best, 512 / (now() - began))
figures["prefill_512"] = best
has = [n for n in ("avx2", "avx512", "avx512_vnni") if getattr(llama, f"ggml_cpu_has_{n}")()]
print(f"# llama.cpp of xllamacpp {importlib.metadata.version('xllamacpp')}, built for {' '.join(has)}")
print(json.dumps(figures))
