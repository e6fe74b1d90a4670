"""Serve one peer in one mode: `python peer_server.py LIBRARY FOLDER MODE --threads 2`.

`benchmarks.peers` starts this file in the peer's environment, so it does not import bonnx. It loads the model and
prints `ready`. For each line `N` on its standard input, it samples N completions of a new random prompt and prints the
seconds taken as JSON; for `rank N`, it scores N given candidates, if the peer supports that.

Every completion has exactly --new tokens (the end token is suppressed or ignored), drawn at temperature 1 from the
whole vocabulary. Every line uses a new prompt, so that nothing of it is cached.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL, RANK_VOCABULARY = 3, 32


def library(name: str) -> Any:
    return importlib.import_module(name)


def sample(logits: Any, rng: np.random.Generator, block: int = 128) -> Any:
    """Draw a token of each row: logits (N, V) float32 -> (N,); first the block is found, then the token within it."""
    rows = np.arange(len(logits))
    shares = np.exp(logits - logits.max(1, keepdims=True)).reshape(len(logits), -1, block)
    sums = shares.sum(2)
    edges = np.cumsum(sums, 1)
    draws = rng.random((len(logits), 1), np.float32) * edges[:, -1:]
    chosen = (edges[:, :-1] < draws).sum(1)
    draws -= (edges - sums)[rows, chosen, None]
    within = np.cumsum(shares[rows, chosen], 1)
    return (chosen * block + (within[:, :-1] < draws).sum(1)).astype(np.int32)


class Transformers:
    """`generate(num_return_sequences=N)`, which repeats the prompt; without top-k.

    Modes: float32 and bfloat16; with `-once`, the prompt's cache is computed first and repeated, as in the library's
    documentation of caches. Rank: the rows through the model without its vocabulary head.
    """

    def __init__(self, folder: Path, mode: str, threads: int, new: int) -> None:
        self.torch, self.transformers = library("torch"), library("transformers")
        self.torch.set_num_threads(threads)
        self.torch.set_grad_enabled(False)
        kind, _, once = mode.partition("-")
        self.once, self.new = bool(once), new
        dtype = getattr(self.torch, kind)
        self.model = self.transformers.LlamaForCausalLM.from_pretrained(folder / "checkpoint", dtype=dtype).eval()
        self.scorer = self.torch.randn(self.model.config.hidden_size, dtype=dtype)

    def generate(self, prompt: Any, count: int) -> Any:
        ids = self.torch.from_numpy(prompt).long()[None].to(self.model.device)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        options |= {"max_new_tokens": self.new, "min_new_tokens": self.new}
        if self.once:
            cache = self._read(ids[:, :-1], count)
            ids = ids.repeat(count, 1)
            options["cache"] = cache
        else:
            options["num_return_sequences"] = count
        rows = self.model.generate(ids, attention_mask=self.torch.ones_like(ids), **options)
        return rows[:, len(prompt) :].cpu().numpy()

    def _read(self, ids: Any, count: int) -> Any:
        """The cache of a prompt (1, P), repeated."""
        cache = self.transformers.DynamicCache()
        self.model.model(ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(count)
        return cache

    def rank(self, prompt: Any, candidates: Any) -> Any:
        ids, rows = (self.torch.from_numpy(x).long().to(self.model.device) for x in (prompt[None], candidates))
        if self.once:
            cache = self._read(ids, len(rows))
            hidden = self.model.model(rows, past_key_values=cache, use_cache=True).last_hidden_state
        else:
            whole = self.torch.cat([ids.expand(len(rows), -1), rows], 1)
            hidden = self.model.model(whole, use_cache=False).last_hidden_state[:, len(prompt) :]
        return (hidden @ self.scorer).float().cpu().numpy()


class OpenVINO:
    """openvino-genai's continuous batching, which computes the prompt once for all sequences.

    Modes: f32 (float32 weights, arithmetic and cache); default (float32 weights in the file, everything else as the
    library chooses: bfloat16 arithmetic if the processor supports it, 8-bit cache); int8 and int4 (weights compressed
    with optimum-intel's defaults, the rest as in default). The whole prompt is processed in one batch.
    """

    def __init__(self, folder: Path, mode: str, threads: int, new: int) -> None:
        self.genai, self.openvino, self.new = library("openvino_genai"), library("openvino"), new
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if mode == "f32":
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
            properties |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        scheduler = self.genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 1024
        scheduler.enable_prefix_caching = False
        name = "fp32" if mode in ("f32", "default") else mode
        self.pipeline = self.genai.ContinuousBatchingPipeline(folder / f"openvino-{name}", scheduler, "CPU", properties)

    def generate(self, prompt: Any, count: int) -> Any:
        config = self.genai.GenerationConfig()
        config.do_sample, config.temperature, config.top_p = True, 1.0, 1.0
        config.ignore_eos, config.max_new_tokens, config.num_return_sequences = True, self.new, count
        config.rng_seed = int(prompt[0])
        ids = self.openvino.Tensor(prompt[None].astype(np.int64))
        return np.array(self.pipeline.generate([ids], [config])[0].m_generation_ids)


class Llama:
    """llama.cpp: the prompt is decoded once, its cache copied to N sequences; then batches of N tokens are decoded.

    Modes: f32 (weights and cache), q8_0 and q4_0 (cache in float16, the library's default). NumPy draws the tokens of
    all rows at once. Flash attention is off, because at N = 16 it was slower for f32 and no faster for q8_0. Rank: the
    candidates as one batch; its files have a vocabulary of 32, and the logit of token 0 is the score of a position.
    """

    def __init__(self, folder: Path, mode: str, threads: int, new: int) -> None:
        self.lib, self.new, self.threads, self.folder = library("llama_cpp"), new, threads, folder
        self.log = self.lib.llama_log_callback(lambda level, text, data: None)
        self.lib.llama_log_set(self.log, None)
        self.lib.llama_backend_init()
        self.mode = mode
        self.models: dict[str, Any] = {}
        self.context: tuple[Any, Any] = (None, None)
        self.rng = np.random.default_rng(0)

    def prepare(self, purpose: str, count: int, prompt: int) -> Any:
        """Return an empty context for this many sequences, newly created only if the sizes change."""
        lib, key = self.lib, (purpose, count, prompt)
        if self.context[0] != key:
            if self.context[1] is not None:
                lib.llama_free(self.context[1])
            if purpose not in self.models:
                options = lib.llama_model_default_params()
                options.n_gpu_layers = 0
                path = self.folder / f"llama-{purpose}-{self.mode}.gguf"
                self.models[purpose] = lib.llama_model_load_from_file(str(path).encode(), options)
            options = lib.llama_context_default_params()
            options.kv_unified, options.flash_attn_type = True, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            options.n_seq_max, options.n_ctx = count, -(-(prompt + count * self.new) // 256) * 256
            options.n_batch = max(prompt, count * self.new)
            options.n_threads = options.n_threads_batch = self.threads
            if self.mode == "f32":
                options.type_k = options.type_v = lib.GGML_TYPE_F32
            self.context = (key, lib.llama_init_from_model(self.models[purpose], options))
        lib.llama_memory_clear(lib.llama_get_memory(self.context[1]), False)
        return self.context[1]

    def decode(self, context: Any, tokens: Any, positions: Any, sequences: Any, outputs: Any) -> None:
        """Decode a batch, given int32 arrays of equal length; `outputs` marks the tokens whose logits are needed."""
        count = len(tokens)
        batch = self.lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for field, values in ((batch.token, tokens), (batch.pos, positions), (batch.logits, outputs)):
            np.ctypeslib.as_array(field, (count,))[:] = values
        for i, sequence in enumerate(sequences):
            batch.seq_id[i][0] = int(sequence)
            batch.n_seq_id[i] = 1
        failed = self.lib.llama_decode(context, batch)
        self.lib.llama_batch_free(batch)
        assert not failed, failed

    def share(self, context: Any, prompt: Any, count: int, output: bool) -> None:
        """Decode the prompt as sequence 0 and copy its cache to the others."""
        size = len(prompt)
        wanted = np.zeros(size, np.int8)
        wanted[-1] = output
        self.decode(context, prompt, np.arange(size), np.zeros(size, np.int32), wanted)
        memory = self.lib.llama_get_memory(context)
        for sequence in range(1, count):
            self.lib.llama_memory_seq_cp(memory, 0, sequence, -1, -1)

    def logits(self, context: Any, rows: int, vocabulary: int) -> Any:
        pointer = self.lib.llama_get_logits(context)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (rows, vocabulary))

    def start(self, count: int, prompt: int, rank: bool) -> None:
        self.prepare("rank" if rank else "generate", count, prompt)

    def generate(self, prompt: Any, count: int) -> Any:
        context = self.prepare("generate", count, len(prompt))
        vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.models["generate"]))
        sequences, ones = np.arange(count), np.ones(count, np.int8)
        self.share(context, prompt, count, True)
        tokens = [sample(np.repeat(self.logits(context, 1, vocabulary), count, 0), self.rng)]
        for step in range(self.new - 1):
            self.decode(context, tokens[-1], np.full(count, len(prompt) + step), sequences, ones)
            tokens.append(sample(self.logits(context, count, vocabulary), self.rng))
        return np.stack(tokens, 1)

    def rank(self, prompt: Any, candidates: Any) -> Any:
        count, length = candidates.shape
        context = self.prepare("rank", count, len(prompt))
        self.share(context, prompt % RANK_VOCABULARY, count, False)
        positions = np.tile(np.arange(length) + len(prompt), count)
        tokens = candidates.ravel() % RANK_VOCABULARY
        self.decode(context, tokens, positions, np.repeat(np.arange(count), length), np.ones(count * length, np.int8))
        return self.logits(context, count * length, RANK_VOCABULARY)[:, 0].reshape(count, length).copy()


class CTranslate2:
    """CTranslate2 with `num_hypotheses=N`, which computes the prompt once, sampling from the whole vocabulary.

    Modes: float32 and int8 (weights and products; the library converts the float32 file at loading).
    """

    def __init__(self, folder: Path, mode: str, threads: int, new: int) -> None:
        self.new = new
        self.model = library("ctranslate2").Generator(
            str(folder / "ctranslate2"), device="cpu", compute_type=mode, inter_threads=1, intra_threads=threads
        )

    def generate(self, prompt: Any, count: int) -> Any:
        results = self.model.generate_batch(
            [[f"t{i}" for i in prompt]],
            num_hypotheses=count,
            max_length=self.new,
            min_length=self.new,
            sampling_topk=0,
            sampling_temperature=1,
            include_prompt_in_result=False,
        )
        return np.array(results[0].sequences_ids)


class OnnxRuntime:
    """onnxruntime-genai with files of its own builder; the prompt is repeated N times.

    Modes: fp32, int8 and int4 (weights in blocks of 32, 8-bit activations: the builder's defaults for the CPU). NumPy
    draws the tokens, which are passed on as logits, because the library's sampling without top-k is slower.
    """

    def __init__(self, folder: Path, mode: str, threads: int, new: int) -> None:
        self.lib, self.new, self.rng = library("onnxruntime_genai"), new, np.random.default_rng(0)
        config = self.lib.Config(str(folder / f"onnxruntime-{mode}"))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = self.lib.Model(config)

    def generate(self, prompt: Any, count: int) -> Any:
        options, total = self.lib.GeneratorParams(self.model), len(prompt) + self.new
        options.set_search_options(do_sample=False, batch_size=count, max_length=total, min_length=total)
        generator = self.lib.Generator(self.model, options)
        generator.append_tokens(np.repeat(prompt[None], count, 0))
        for _ in range(self.new):
            logits = generator.get_logits()
            tokens = sample(logits.reshape(count, -1), self.rng)
            chosen = np.zeros_like(logits)
            chosen[np.arange(count), :, tokens] = 1
            generator.set_logits(chosen)
            generator.generate_next_token()
        return np.stack([generator.get_sequence(i)[len(prompt) :] for i in range(count)])


LIBRARIES = {
    "transformers": Transformers,
    "openvino": OpenVINO,
    "llama": Llama,
    "ctranslate2": CTranslate2,
    "onnxruntime": OnnxRuntime,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("mode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32000)
    arguments = parser.parse_args()
    peer: Any = LIBRARIES[arguments.library](arguments.folder, arguments.mode, arguments.threads, arguments.new)
    rng = np.random.default_rng(0)
    print("ready", flush=True)
    for line in sys.stdin:
        task, count = line.split()[:-1], int(line.split()[-1])
        prompt = rng.integers(SPECIAL, arguments.vocabulary, arguments.prompt, np.int32)
        candidates = rng.integers(SPECIAL, arguments.vocabulary, (count, arguments.new), np.int32)
        if hasattr(peer, "start"):  # setup that a program does once, before its first prompt
            peer.start(count, arguments.prompt, bool(task))
        start = time.perf_counter()
        outputs = peer.rank(prompt, candidates) if task else peer.generate(prompt, count)
        seconds = time.perf_counter() - start
        assert outputs.shape == (count, arguments.new), outputs.shape
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
