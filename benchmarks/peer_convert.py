"""Make the random checkpoint, and convert it for each peer: `python peer_convert.py WHAT FOLDER`.

`benchmarks.peers prepare` runs this file in each peer's environment, so it does not import bonnx.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

VOCABULARY, WIDTH, HEADS, KV_HEADS, INNER = 32000, 768, 12, 4, 2048
RANK_VOCABULARY = 32


def library(name: str) -> Any:
    return importlib.import_module(name)


def make_checkpoint(folder: Path, layers: int) -> None:
    """Make a Llama with random weights, and a tokenizer with tokens t0, t1, ..., which some converters require."""
    torch, tokenizers, transformers = map(library, ("torch", "tokenizers", "transformers"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=INNER,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "checkpoint")
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2", "pad_token": "t0"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "checkpoint")


def make_openvino(folder: Path, layers: int) -> None:
    """Export with optimum-intel: float32 weights, and 8 and 4 bits with its default settings."""
    exporter = library("optimum.exporters.openvino").main_export
    quantization = library("optimum.intel").OVWeightQuantizationConfig
    settings = library("optimum.intel").OVConfig
    for name, bits in (("fp32", None), ("int8", 8), ("int4", 4)):
        config = settings(dtype="fp32") if bits is None else settings(quantization_config=quantization(bits=bits))
        exporter(
            str(folder / "checkpoint"),
            folder / f"openvino-{name}",
            task="text-generation-with-past",
            ov_config=config,
            convert_tokenizer=False,
        )


def make_ctranslate2(folder: Path, layers: int) -> None:
    """Convert with float32 weights; other modes convert them at loading."""
    converter = library("ctranslate2").converters.TransformersConverter(str(folder / "checkpoint"))
    converter.convert(str(folder / "ctranslate2"), quantization="float32", force=True)


def make_onnxruntime(folder: Path, layers: int) -> None:
    """Export with onnxruntime-genai's builder for the CPU; the vocabulary head reads only the prompt's last token."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-c", str(folder / "cache")]
    for precision in ("fp32", "int8", "int4"):
        options = ["-i", str(folder / "checkpoint"), "-o", str(folder / f"onnxruntime-{precision}"), "-p", precision]
        subprocess.run([*builder, *options, "--extra_options", "prune_lm_head=true"], check=True)


def make_llama(folder: Path, layers: int) -> None:
    """Write GGUF files in float32, q8_0 and q4_0 (llama.cpp's quantizer keeps the embeddings of q4_0 in q6_K).

    The files for rank have a vocabulary of 32, so that the scores of all positions (the logits of token 0) cost no more
    than a scorer would.
    """
    for purpose, vocabulary in (("generate", VOCABULARY), ("rank", RANK_VOCABULARY)):
        source = folder / f"llama-{purpose}-f32.gguf"
        write_gguf(folder / "checkpoint" / "model.safetensors", source, layers, vocabulary)
        llama = library("llama_cpp")
        for kind, code in (("q8_0", llama.LLAMA_FTYPE_MOSTLY_Q8_0), ("q4_0", llama.LLAMA_FTYPE_MOSTLY_Q4_0)):
            options = llama.llama_model_quantize_default_params()
            options.ftype = code
            target = folder / f"llama-{purpose}-{kind}.gguf"
            failed = llama.llama_model_quantize(str(source).encode(), str(target).encode(), options)
            assert not failed, target


def write_gguf(checkpoint: Path, path: Path, layers: int, vocabulary: int) -> None:
    gguf, weights = library("gguf"), library("safetensors.numpy").load_file(checkpoint)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(0)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, value in weights.items():
        new = names.get_name(name, try_suffixes=(".weight",))
        if name == "model.embed_tokens.weight":
            value = value[:vocabulary]
        for projection, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if projection in name:  # GGUF interleaves the two halves that are rotated together
                value = value.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(new, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


MAKERS = {
    "checkpoint": make_checkpoint,
    "openvino": make_openvino,
    "ctranslate2": make_ctranslate2,
    "onnxruntime": make_onnxruntime,
    "llama": make_llama,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=MAKERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    MAKERS[arguments.what](arguments.folder, arguments.layers)


if __name__ == "__main__":
    main()
