"""Checkpoints as transformers writes them: the same numbers, and refusals that name what is wrong."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bonnx.models import ConfigError, families, load_checkpoint
from bonnx.models.head import LabelTokens
from tests.checkpoints import HEADS, make
from tests.tolerance import RUNTIME, within

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 3.0},
    LLAMA3 | {"original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False, "beta_fast": 8.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "attention_factor": 1.3},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 0.4},
]


@st.composite
def options(draw):
    """A family and what its configs may say."""
    entry = draw(st.sampled_from(list(families.FAMILIES.values())))
    rope = draw(st.sampled_from(ROPES)) | {"rope_theta": draw(st.sampled_from([100.0, 10000.0, 1e6]))}
    options = {"max_position_embeddings": 48}
    if entry.sliding_theta is not None:
        rope = {"full_attention": rope, "sliding_attention": {"rope_theta": draw(st.sampled_from([100.0, 5e5]))}}
    elif entry.partial_rotary is not None:
        rope["partial_rotary_factor"] = draw(st.sampled_from([0.5, 1.0]))
    if entry.name == "Phi3":
        longrope = {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.3, 4.0]}
        kind = draw(st.sampled_from([{"rope_type": "default"}, longrope]))
        rope = kind | {"rope_theta": rope["rope_theta"], "partial_rotary_factor": 0.5}
        options["original_max_position_embeddings"] = 32
    options["rope_parameters"] = rope
    if entry.sliding_window == "always":
        options["sliding_window"] = draw(st.sampled_from([None, 3, 11]))
    if entry.sliding_window == "optional" and draw(st.booleans()):
        options |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": draw(st.integers(0, 2))}
    if entry.bias_field is not None:
        # InternLM2 is built as the Llama that it is.
        options["attention_bias" if entry.bias_field == "bias" else entry.bias_field] = draw(st.booleans())
    if entry.reads_mlp_bias:
        options["mlp_bias"] = draw(st.booleans())
    return entry.name, options


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=options(),
    head=st.sampled_from(HEADS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_config_gives_what_transformers_gives(chosen, head, dtype, seed, tmp_path_factory):
    (family, options), rng, folder = chosen, np.random.default_rng(seed), tmp_path_factory.mktemp("checkpoint")
    case = make(folder, family, head, rng, dtype, **options)
    tokens = None
    if head == "step tag":
        tokens = LabelTokens(tuple(case.tokenizer.convert_tokens_to_ids(t) for t in case.overrides.label_tokens))
    model, metadata = load_checkpoint(folder, label_tokens=tokens)
    rope = options["rope_parameters"]
    rope = rope.get("full_attention", rope)["rope_type"]
    # Lengths within the window, beyond it, and beyond the original context.
    lengths = [70, 70, 70] if rope in ("dynamic", "longrope") else [int(n) for n in rng.integers(1, 80, 3)]
    rows = [torch.from_numpy(rng.integers(0, 700, n)) for n in lengths]
    for left in (False, True):
        ids, mask = torch.full((3, max(lengths)), 4), torch.zeros(3, max(lengths), dtype=torch.int64)
        for i, row in enumerate(rows):
            place = slice(max(lengths) - len(row), None) if left else slice(len(row))
            ids[i, place], mask[i, place] = row, 1
        with torch.no_grad():
            backbone, scores, *logits = model(ids, mask)
            for i, row in enumerate(rows):
                hidden = case.model.model(input_ids=row[None]).last_hidden_state[0]
                real = mask[i] > 0
                assert within(backbone[i, real], hidden, RUNTIME)
                expected, own = case.read(hidden[None])[0], scores[i, real]
                activation, label = metadata["scoring"].get("activation"), metadata["scoring"].get("label", 0)
                activation = case.overrides.activation or activation
                label = 2 if head == "labels" else label
                own = own.softmax(-1) if activation == "softmax" else own.sigmoid() if activation else own
                assert within(own[:, label], expected, RUNTIME)
                if logits:
                    assert within(logits[0][i, real], case.model(input_ids=row[None]).logits[0], RUNTIME)
    assert bool(logits) == (head == "value")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "checkpoint"
    make(folder, "Llama", "reward", np.random.default_rng(3))
    # One file, whatever was drawn.
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    return folder


def edit(folder, tmp_path, change):
    """A copy whose config is changed."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


REFUSED = {
    "family": (lambda c: c.update(model_type="bloom"), "'model_type': 'bloom' is not supported; supported are llama"),
    "multimodal": (
        lambda c: c.update(model_type="gemma3", text_config={"model_type": "gemma3_text"}),
        "'gemma3' is not supported.*is of the type gemma3_text: save that with its head",
    ),
    "activation": (lambda c: c.update(hidden_act="gelu"), "'hidden_act': expected 'silu' or .*; found 'gelu'"),
    "rope": (lambda c: c.update(rope_parameters={"rope_type": "proportional"}), "'proportional' is not supported"),
    "longrope": (
        lambda c: c.update(rope_parameters={"rope_type": "longrope", "factor": 2.0}),
        "'short_factor': expected a list of numbers; found None",
    ),
    "partial": (lambda c: c.update(partial_rotary_factor=0.5), "'partial_rotary_factor'"),
    "quantized": (
        lambda c: c.update(quantization_config={"bits": 4}),
        "'quantization_config': .*the weights are quantized",
    ),
    "layers": (lambda c: c.update(num_hidden_layers=1), "tensors that a model with this config does not use"),
    "more layers": (lambda c: c.update(num_hidden_layers=3), r"missing: model\.layers\.2"),
    "width": (
        lambda c: c.update(intermediate_size=7),
        r"tensor 'model\.layers\.\d\.mlp\.\w+\.weight': expected shape",
    ),
    "labels": (
        lambda c: c.update(id2label={"0": "a", "1": "b"}),
        "'id2label': it names 2 labels, but the weights .* have 1",
    ),
    "vocabulary": (lambda c: c.update(vocab_size="many"), "'vocab_size': expected a whole number from 1"),
    "scaling": (
        lambda c: c.update(rope_parameters={"rope_type": "yarn", "factor": "2"}),
        "'rope_parameters', 'factor': expected a number; found '2'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_is_not_supported_or_contradicts_its_weights(name, folder, tmp_path):
    change, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(edit(folder, tmp_path, change))


def test_weights_that_cannot_be_right(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    state = safetensors.torch.load_file(copy / "model.safetensors")
    spoiled = {**state, "model.norm.weight": state["model.norm.weight"] * torch.nan}
    safetensors.torch.save_file(spoiled, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tensor 'model\.norm\.weight' contains NaN"):
        load_checkpoint(copy)
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("score")}
    safetensors.torch.save_file(headless, copy / "model.safetensors")
    with pytest.raises(ConfigError, match="has no scorer"):
        load_checkpoint(copy)
    integers = {**state, "score.weight": torch.ones(1, 8, dtype=torch.int8)}
    safetensors.torch.save_file(integers, copy / "model.safetensors")
    with pytest.raises(ConfigError, match="is I8; expected float32"):
        load_checkpoint(copy)
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle, which can run any code"):
        load_checkpoint(copy)


def test_shards_that_are_missing_cut_or_point_elsewhere(tmp_path, rng):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path, max_shard_size="3KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_checkpoint(tmp_path)
    chosen = shards[int(rng.integers(len(shards)))]
    whole = chosen.read_bytes()
    chosen.unlink()
    with pytest.raises(ConfigError, match=f"1 of the {len(shards)} shards listed in .* missing, such as {chosen.name}"):
        load_checkpoint(tmp_path)
    chosen.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=f"cannot read the weights .*{chosen.name}"):
        load_checkpoint(tmp_path)
    chosen.write_bytes(whole)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace('"model.norm.weight": "', '"model.norm.weight": "../'))
    with pytest.raises(ConfigError, match="expected the names of files in the checkpoint's folder"):
        load_checkpoint(tmp_path)
    index.write_text(text.replace('"model.norm.weight"', '"model.norm.weighty"'))
    with pytest.raises(ConfigError, match=r"the index lists tensor 'model\.norm\.weighty'"):
        load_checkpoint(tmp_path)
    index.write_text("[]")
    with pytest.raises(ConfigError, match="is not a shard index"):
        load_checkpoint(tmp_path)


def test_a_language_model_without_a_scorer_gets_one_to_train(tmp_path, rng):
    make(tmp_path / "c", "Qwen2", "step tag", rng)
    with pytest.raises(ConfigError, match="--label-tokens"):
        load_checkpoint(tmp_path / "c")
    model, _ = load_checkpoint(tmp_path / "c", new_scorer=True)
    with torch.no_grad():
        backbone, scores, logits = model(torch.from_numpy(rng.integers(0, 700, (2, 9))))
    assert scores.shape == (2, 9, 1)
    assert logits.shape == (2, 9, 720)
    assert scores.std() > 0
    assert backbone.isfinite().all()
