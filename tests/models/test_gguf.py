"""GGUF files compute what transformers computes with them, and with the models that they were made of."""

import re

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.models import ConfigError, load_checkpoint
from bonnx.models.gguf import GGUFWeights, read_gguf
from bonnx.models.opened import open_checkpoint
from tests import gguf_files
from tests.checkpoints import make_tokenizer
from tests.test_packaging import run_without
from tests.tolerance import RUNTIME, within

pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY = 90
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0] * 4,
}
# Read by transformers too.
READ = ("Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3")
OTHERS = {
    "Granite": {
        "attention_multiplier": 0.1,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "SmolLM3": {"num_hidden_layers": 4, "use_sliding_window": False, "sliding_window": None},
    "Olmo2": {},
    "Gemma": {},
}


def make(family, task="CausalLM", **options):
    """A model of heads whose size is not hidden size / heads, with weights large enough to matter."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_labels": 1, "pad_token_id": 1}
    sizes |= {"max_position_embeddings": 256}
    if family in ("Qwen2", "Phi3", "Granite", "SmolLM3", "Olmo2"):
        sizes |= {"head_dim": 16}
    if family == "Qwen3" or family.startswith("Gemma"):
        # The file does not say the attention's scale, and transformers does not read the size of heads everywhere:
        # both take what the published models have.
        sizes |= {"head_dim": 128 if family == "Qwen3" else 256}
    if family.startswith("Gemma"):
        sizes |= {"query_pre_attn_scalar": 256, "sliding_window": 6}
    if family == "Gemma3Text":
        sizes |= {"num_hidden_layers": 7}
    config = getattr(transformers, f"{family}Config")(**sizes | {"rms_norm_eps": 1e-5} | options)
    prefix = family.removesuffix("Text") if task == "CausalLM" else family
    model = getattr(transformers, f"{prefix}For{task}")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def ids(rng):
    return torch.from_numpy(rng.integers(2, VOCABULARY, (2, 19)))


def logits(path, tokens):
    with torch.no_grad():
        return load_checkpoint(path, no_scorer=True)[0](tokens)[2]


def theirs(path, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(tokens).logits


def compute(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("family", READ)
def test_every_family_is_read_as_transformers_reads_it(family, tmp_path, rng):
    kind = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"][rng.integers(6)]
    # Gemma's heads are always tied, and transformers reads no other.
    options = {} if family in ("Phi3", "Gemma2", "Gemma3Text") else {"tie_word_embeddings": bool(rng.integers(2))}
    model, path, tokens = make(family, **options), tmp_path / "model.gguf", ids(rng)
    gguf_files.write(path, model, kind)
    assert within(logits(path, tokens), theirs(path, tokens), RUNTIME)
    if kind == "F32":
        assert within(logits(path, tokens), compute(model, tokens), RUNTIME)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_read_as_the_model_that_was_written(family, tmp_path, rng):
    model, path, tokens = make(family, **OTHERS[family]), tmp_path / "model.gguf", ids(rng)
    gguf_files.write(path, model)
    assert within(logits(path, tokens), compute(model, tokens), RUNTIME)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {"rope_parameters": YARN}),
        ("Phi3", {"hidden_size": 128, "head_dim": 32, "rope_parameters": LONG, "original_max_position_embeddings": 64}),
        ("Gemma3Text", {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }}),
    ],
    ids=["llama3", "linear", "biases", "yarn", "longrope", "gemma3 linear"],
)  # fmt: skip
def test_scaled_rotations_and_biases_are_those_of_the_model(family, options, tmp_path, rng):
    """Of these transformers does not read all."""
    model, path, tokens = make(family, **options), tmp_path / "model.gguf", ids(rng)
    gguf_files.write(path, model)
    rope = open_checkpoint(path).config["rope_parameters"]
    if family != "Gemma3Text" and "rope_parameters" in options:
        assert rope["rope_type"] == options["rope_parameters"]["rope_type"]
    assert within(logits(path, tokens), compute(model, tokens), RUNTIME)


@pytest.mark.parametrize("kind", [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits])
def test_every_quantization_that_the_package_knows_is_undone(kind, tmp_path, rng):
    """Of those that it cannot write, random bytes are read."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (3, 2 * size), dtype=np.uint8)
    if kind.name not in ("F16", "F32", "F64", "BF16"):
        with np.errstate(all="ignore"):
            data[~np.isfinite(gguf.dequantize(data, kind)).all(1)] = 0
    else:
        data[:] = 1
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = GGUFWeights(read_gguf(tmp_path / "model.gguf").tensors, {})
    expected = gguf.dequantize(data, kind)
    assert weights.shapes == {"w": (3, 2 * block)}
    assert np.array_equal(weights.read({"w": "w"})["w"].numpy(), expected)
    assert np.array_equal(weights.read_rows("w", [2, 0]).numpy(), expected[[2, 0]])


@pytest.mark.parametrize("labels", [1, 3])
def test_rank_heads_are_read(labels, tmp_path, rng):
    model, names = make("Qwen3", "SequenceClassification", num_labels=labels), ["bad", "fair", "good"]
    path, tokens = tmp_path / "rank.gguf", ids(rng)
    gguf_files.write(path, model, labels=names if labels > 1 else None)
    loaded, metadata = load_checkpoint(path)
    with torch.no_grad():
        assert within(loaded(tokens)[1][:, -1], model(tokens).logits, RUNTIME)
    assert metadata["scoring"]["labels"] == (names if labels > 1 else ["LABEL_0"])


def test_of_yes_and_no_the_score_is_the_probability_of_yes(tmp_path, rng):
    """As llama.cpp's converter writes Qwen3-Reranker."""
    model = make("Qwen3", "SequenceClassification", num_labels=2)
    path, tokens = tmp_path / "rank.gguf", ids(rng)
    text = "<Query>: {query}\n<Document>: {document}"
    gguf_files.write(path, model, labels=["yes", "no"], rerank=text)
    assert open_checkpoint(path).pair_template == text
    loaded, metadata = load_checkpoint(path)
    scoring = metadata["scoring"]
    with torch.no_grad():
        found = loaded(tokens)[1][:, -1].softmax(-1)[:, scoring["label"]]
        assert within(found, model(tokens).logits.softmax(-1)[:, 0], RUNTIME)
    assert scoring["labels"][scoring["label"]] == "yes"


def test_a_split_model_is_read_from_all_its_files(tmp_path, rng):
    model, tokens = make("Llama"), ids(rng)
    gguf_files.write(tmp_path / "model.gguf", model, split_max_tensors=8)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 1
    assert within(logits(files[0], tokens), compute(model, tokens), RUNTIME)
    files[-1].unlink()
    with pytest.raises(ConfigError, match=rf"1 of the {len(files)} files of this model are missing, such as"):
        open_checkpoint(files[0])


def test_what_is_incomplete_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    model = make("Llama")
    for skip, expected in (
        ("blk.1.attn_v.weight", r"missing: model\.layers\.1\.self_attn\.v_proj\.weight"),
        ("token_embd.weight", r"expected a matrix 'token_embd\.weight'; the file is incomplete"),
    ):
        gguf_files.write(path, model, skip={skip})
        with pytest.raises(ConfigError, match=expected):
            load_checkpoint(path, no_scorer=True)
    gguf_files.write(path, model)
    whole = path.read_bytes()
    for key, wrong in (
        *(("block_count", layers) for layers in (0, 1, 3, 2**31)),
        *((key, 8) for key in ("embedding_length", "attention.key_length", "rope.dimension_count")),
    ):
        place = whole.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
        path.write_bytes(whole[:place] + wrong.to_bytes(4, "little") + whole[place + 4 :])
        with pytest.raises(ConfigError, match=rf"'llama\.{key}': expected \d+, .* tensors.*; found {wrong}$"):
            load_checkpoint(path, no_scorer=True)
    path.write_bytes(whole[: len(whole) - 20_000])
    with pytest.raises(ConfigError, match=r"cannot be read as GGUF|ends within tensor '.*'; download"):
        load_checkpoint(path, no_scorer=True)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ConfigError, match=r"cannot be read as GGUF: GGUF magic invalid; download it again"):
        load_checkpoint(path)


def test_what_is_unknown_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    gguf_files.write(path, make("Llama"), "Q8_0")
    with monkeypatch.context() as patch:
        patch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
        with pytest.raises(ConfigError, match=r"is quantized as Q8_0, which the package `gguf` cannot dequantize; upd"):
            open_checkpoint(path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"lama2"))
    with pytest.raises(ConfigError, match=r"'general\.architecture' 'lama2' is not supported; supported are llama, qw"):
        open_checkpoint(path)
    with pytest.raises(ConfigError, match="omit --base and --adapter"):
        open_checkpoint(path, base="org/name")
    with pytest.raises(ConfigError, match=r"contains GGUF files; pass one of them, such as .*model\.gguf"):
        open_checkpoint(tmp_path)


def test_without_the_package_the_error_says_what_to_install(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    code = f"from bonnx.models.opened import open_checkpoint; open_checkpoint({str(tmp_path / 'model.gguf')!r})"
    done = run_without({"gguf"}, code)
    assert re.search(r"ConfigError: .*gguf is not installed; run `pip install bonnx\[gguf\]`", done.stderr)


def test_the_tokenizer_is_the_file_s_or_the_one_beside_it(tmp_path):
    """As transformers converts it, with its chat template and special tokens."""
    tokenizer = make_tokenizer("bytes")
    model = make("Qwen2", "SequenceClassification", vocab_size=720, pad_token_id=4)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, "Q8_0", tokenizer)
    source = read_checkpoint(open_checkpoint(path), Overrides())
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = tokenizers.Tokenizer.from_str(source.tokenizer.json.decode())
    for text in ("What is 2+2?", "a <|im_start|> b\n\n", "é 12"):
        assert ours.encode(text).ids == expected(text)["input_ids"]
    assert source.tokenizer.chat_template == tokenizer.chat_template
    assert source.tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert source.scoring.stop_tokens == [tokenizer.eos_token_id]
    assert source.text.checked_against == transformers.__version__
    tokenizer.save_pretrained(tmp_path)
    assert open_checkpoint(path).tokenizer == tmp_path
