"""LoRA adapters, as peft writes them, compute what peft computes with them."""

import json
import shutil

import peft
import pytest
import safetensors.torch
import torch
import transformers

from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.models import ConfigError, load_checkpoint
from bonnx.models.opened import open_checkpoint
from tests import command_line, gguf_files
from tests.checkpoints import make_tokenizer
from tests.lora_adapters import VOCABULARY, compute, draw_config, ids, logits, save_base, scores, train
from tests.tolerance import RUNTIME, within

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi3"])
def test_a_reward_model_of_random_options_is_the_one_of_peft(family, folders, rng):
    """The head is in the adapter only: the base is a language model."""
    base, adapter = folders
    save_base(base, family, "CausalLM", rng, rng.choice([torch.float32, torch.bfloat16]))
    model, tokens = train(base, adapter, draw_config(rng, "SEQ_CLS"), num_labels=1), ids(rng)
    opened = open_checkpoint(adapter)
    assert opened.config["architectures"] == [f"{family}ForSequenceClassification"]
    assert opened.source == "adapter on base"
    expected = compute(model, tokens)
    assert within(scores(opened, tokens), expected, RUNTIME)
    merged = model.merge_and_unload()
    assert within(scores(opened, tokens), compute(merged, tokens), RUNTIME)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 40]},
        {"target_modules": ["lm_head"], "trainable_token_indices": [7, 3, 40]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7, 3]}},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5, 40]}},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_vocabulary_heads_compute_what_was_trained(options, tied, folders, rng):
    """A tied head stays the base's if only the embedding was trained, and the other way round."""
    base, adapter = folders
    save_base(base, "Llama", "CausalLM", rng, tie_word_embeddings=tied)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=9, **options)
    model, tokens = train(base, adapter, config, "CausalLM"), ids(rng)
    assert within(logits(adapter, tokens), compute(model, tokens), RUNTIME)


@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_vocabulary_comes_with_the_adapter_s_tokenizer(tied, folders, rng):
    base, adapter = folders
    save_base(base, "Llama", "CausalLM", rng, tie_word_embeddings=tied)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj"])
    model = train(base, adapter, config, "CausalLM", resize=VOCABULARY + 6)
    tokens = torch.cat([ids(rng), torch.tensor([[VOCABULARY + 5], [VOCABULARY]])], 1)
    opened = open_checkpoint(adapter)
    assert opened.config["vocab_size"] == VOCABULARY + 6
    assert bool(opened.config["tie_word_embeddings"]) == tied
    assert within(logits(opened, tokens), compute(model, tokens), RUNTIME)


def test_the_tokenizer_is_the_adapter_s_if_it_has_one(folders, rng):
    base, adapter = folders
    tokenizer = make_tokenizer("bytes")
    save_base(base, "Llama", "CausalLM", rng)
    tokenizer.save_pretrained(base)
    train(base, adapter, draw_config(rng, "SEQ_CLS"), num_labels=1)
    assert open_checkpoint(adapter).tokenizer == base
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(adapter)
    assert open_checkpoint(adapter).tokenizer == adapter
    with pytest.raises(ConfigError, match="'<added>' has the id"):
        read_checkpoint(adapter, Overrides())


def test_the_pad_token_is_the_adapter_s_if_the_base_has_none(folders, rng):
    """TRL sets it in memory while it trains; it may end a text too, and then the token before it is read."""
    base, adapter = folders
    save_base(base, "Llama", "CausalLM", rng, pad_token_id=None, vocab_size=720)
    train(base, adapter, draw_config(rng, "SEQ_CLS"), num_labels=1)
    assert not load_checkpoint(adapter)[1]["scoring"]["passes_pad"]
    tokenizer = make_tokenizer("bytes")
    tokenizer.save_pretrained(adapter)
    metadata = load_checkpoint(adapter)[1]
    assert metadata["scoring"]["pad_token"] == tokenizer.pad_token_id
    assert metadata["scoring"]["passes_pad"]
    assert "has no pad token; that of the adapter's tokenizer" in metadata["remarks"][0]


def test_the_command_names_adapter_and_base(folders, rng, tmp_path):
    base, adapter = folders
    save_base(base, "Llama", "CausalLM", rng)
    train(base, adapter / "mine", draw_config(rng, "SEQ_CLS"), num_labels=1)
    options = ["--checkpoint", "adapter", "--adapter", "mine", "--base", "base", "-o", "out", "--dry-run"]
    done = command_line.run(tmp_path, "export", *options)
    assert done.returncode == 0, done.stderr
    assert "mine on base: " in done.stderr
    done = command_line.run(tmp_path, "export", "--base", "base", "-o", "out")
    assert done.returncode == 2
    assert "--base and --adapter: expected --checkpoint too, the adapter" in done.stderr


def test_a_value_head_beside_the_adapter_is_read(folders, rng):
    """As LLaMA-Factory saves a reward model that it trained with LoRA."""
    base, adapter = folders
    save_base(base, "Llama", "CausalLM", rng, tie_word_embeddings=False)
    trained = train(base, adapter, draw_config(rng, "CAUSAL_LM"), "CausalLM")
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    safetensors.torch.save_file(head, adapter / "value_head.safetensors")
    tokens = ids(rng)
    with torch.no_grad():
        hidden = trained.base_model.model.model(tokens).last_hidden_state[:, -1]
    expected = hidden @ head["v_head.summary.weight"].T + head["v_head.summary.bias"]
    assert within(scores(adapter, tokens), expected, RUNTIME)
    (adapter / "value_head.safetensors").rename(adapter / "value_head.bin")
    with pytest.raises(ConfigError, match=r"value_head\.bin is a pickle.*save_file\(.*, 'value_head\.safetensors'"):
        open_checkpoint(adapter)


def test_a_base_of_quantized_weights_computes_what_peft_computes_on_them(folders, rng, tmp_path):
    base, adapter = folders
    model = save_base(base, "Llama", "CausalLM", rng, tie_word_embeddings=True)
    gguf_files.write(tmp_path / "base.gguf", model)
    trained, tokens = train(base, adapter, draw_config(rng, "SEQ_CLS"), num_labels=1), ids(rng)
    found = scores(open_checkpoint(adapter, base=str(tmp_path / "base.gguf")), tokens)
    assert within(found, compute(trained, tokens), RUNTIME)


def test_several_adapters_are_chosen_by_name(folders, rng):
    base, folder = folders
    save_base(base, "Qwen3", "SequenceClassification", rng)
    # Trained biases are those of the base model in memory, which both adapters would share.
    config = draw_config(rng, "SEQ_CLS")
    config.bias = "none"
    first = train(base, folder, config, num_labels=1)
    first.add_adapter("other", peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["up_proj"]))
    first.set_adapter("other")
    for name, parameter in first.named_parameters():
        if "other" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    first.save_pretrained(folder)
    tokens = ids(rng)
    for name in ("other", "default"):
        first.set_adapter(name)
        assert within(scores(open_checkpoint(folder, adapter=name), tokens), compute(first, tokens), RUNTIME)
    with pytest.raises(ConfigError, match="expected an adapter named 'third'; found other, default"):
        open_checkpoint(folder, adapter="third")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=r"contains 1 adapter in subfolders; choose one with --adapter NAME: other"):
        open_checkpoint(folder)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], r"model\.layers\.\d\.self_attn\.(q|v)_proj"])
def test_an_adapter_that_lacks_a_layer_is_refused(targets, folders, rng):
    """As ZeRO-3 saves it where its shards were not gathered."""
    base, adapter = folders
    save_base(base, "Llama", "SequenceClassification", rng)
    train(base, adapter, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets), num_labels=1)
    weights = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    for present in ({n: t for n, t in weights.items() if "layers.1.self_attn.q_proj" not in n}, {}):
        safetensors.torch.save_file(present, adapter / "adapter_model.safetensors")
        missing = "1" if present else "0"
        with pytest.raises(ConfigError, match=rf"adapter of 'model\.layers\.{missing}\.\S+' is missing, which 'target"):
            open_checkpoint(adapter)


def edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_base_is_found_beside_the_adapter_or_as_the_caller_says(folders, rng, tmp_path):
    base, adapter = folders
    save_base(base, "Llama", "SequenceClassification", rng)
    model, tokens = train(base, adapter, draw_config(rng, "SEQ_CLS"), num_labels=1), ids(rng)
    expected = compute(model, tokens)
    edit(adapter, base_model_name_or_path="../base")
    assert within(scores(adapter, tokens), expected, RUNTIME)
    edit(adapter, base_model_name_or_path="../nowhere")
    with pytest.raises(ConfigError, match=r"the base model '\.\./nowhere' cannot be read.*with --base"):
        load_checkpoint(adapter)
    assert within(scores(open_checkpoint(adapter, base=str(base)), tokens), expected, RUNTIME)
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(ConfigError, match=r"'base_model_name_or_path' is missing; pass the model .* with --base"):
        load_checkpoint(adapter)
    shutil.copytree(base, adapter, dirs_exist_ok=True)
    opened = open_checkpoint(adapter)
    assert within(scores(opened, tokens), expected, RUNTIME)
    assert "was merged into the weights in" in load_checkpoint(opened)[1]["remarks"][0]
    with pytest.raises(ConfigError, match="is not an adapter, so it has no base model; omit --base and --adapter"):
        open_checkpoint(base, base=str(adapter))


def test_a_snapshot_of_another_revision_is_refused(folders, rng, tmp_path):
    base, adapter = folders
    snapshot = tmp_path / "models--org--base" / "snapshots" / ("0a" * 20)
    save_base(base, "Llama", "SequenceClassification", rng)
    train(base, adapter, draw_config(rng, "SEQ_CLS"), num_labels=1)
    shutil.copytree(base, snapshot)
    edit(adapter, base_model_name_or_path=str(snapshot), revision="0a" * 20)
    load_checkpoint(adapter)
    edit(adapter, revision="0b" * 20)
    with pytest.raises(ConfigError, match=r"trained on revision 0b0b.* of its base model, but .* is 0a0a"):
        load_checkpoint(adapter)


def test_a_base_of_another_size_is_refused_by_tensor_and_shape(folders, rng):
    base, adapter = folders
    save_base(base, "Llama", "SequenceClassification", rng)
    train(base, adapter, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["down_proj"]), num_labels=1)
    smaller = base.with_name("smaller")
    save_base(smaller, "Llama", "SequenceClassification", rng)
    for change, expected in (
        (
            {"intermediate_size": 36},
            r"'.*down_proj\.weight' has shape \(32, 40\); the base model's has \(32, 36\)",
        ),
        ({"num_hidden_layers": 1}, r"changes '.*layers\.1\..*', which the base model lacks \(it has 1 layers\)"),
    ):
        config = transformers.LlamaConfig.from_pretrained(base, **change)
        shutil.rmtree(smaller)
        transformers.LlamaForSequenceClassification(config).save_pretrained(smaller)
        with pytest.raises(ConfigError, match=expected):
            open_checkpoint(adapter, base=str(smaller))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_dora": True}, r"'use_dora' \(DoRA\) is not supported.*Merge it once with peft"),
        ({"peft_type": "IA3"}, r"an adapter \(IA3 of .*\) of a method that bonnx does not merge.*Merge it once"),
        ({"peft_type": "LOHA"}, r"an adapter \(LOHA of .*AutoPeftModelForSequenceClassification"),
        ({"peft_type": "PROMPT_TUNING"}, r"\(PROMPT_TUNING.*cannot be merged.*move adapter_config\.json"),
        ({"init_lora_weights": "pissa"}, r"'pissa' changed the weights of the base model.*Merge it once"),
        ({"a_field_of_tomorrow": 3}, r"'a_field_of_tomorrow' \(3\) is not supported"),
        ({"r": 5}, r"expected the rank 5 of "),
        ({"lora_alpha": "8"}, r"'lora_alpha': expected a number above 0; got '8'"),
        ({"rank_pattern": {"(": 2}}, r"a pattern is not a regular expression"),
        ({"trainable_token_indices": "7"}, r"expected lists of token ids; got '7'"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused_by_name(changes, expected, folders, rng):
    base, adapter = folders
    save_base(base, "Llama", "SequenceClassification", rng)
    train(base, adapter, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]), num_labels=1)
    edit(adapter, **changes)
    with pytest.raises(ConfigError, match=expected):
        load_checkpoint(adapter)


def test_incomplete_and_pickled_adapters_are_refused(folders, rng):
    base, adapter = folders
    save_base(base, "Llama", "SequenceClassification", rng)
    train(base, adapter, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]), num_labels=1)
    path = adapter / "adapter_model.safetensors"
    state = safetensors.torch.load_file(path)
    halves = {name: tensor for name, tensor in state.items() if "lora_A" not in name}
    for wrong, expected in (
        (halves, r"expected two matrices A and B for '.*q_proj\.weight'; found '.*lora_B\.weight' \(32, 2\); the file"),
        ({**state, "base_model.model.model.layers.0.ia3_l": torch.ones(2)}, r"expected an adapter of LoRA; found tens"),
    ):
        safetensors.torch.save_file(wrong, path)
        with pytest.raises(ConfigError, match=expected):
            load_checkpoint(adapter)
    path.unlink()
    torch.save(state, adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"is a pickle, .*; expected adapter_model\.safetensors.*weights_only"):
        load_checkpoint(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"the adapter's weights, adapter_model\.safetensors, are missing"):
        load_checkpoint(adapter)
