"""A checkpoint's folder: adapters, wrapped names, pickles, pointers and links are read right or refused by name."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.models import ConfigError, load_checkpoint
from bonnx.models.adapters import check_adapter_names
from bonnx.models.head import LabelTokens
from tests.checkpoints import make
from tests.tolerance import RUNTIME, within

IDS = torch.arange(8, 28)[None]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward model of one label in one file, with its tokenizer."""
    folder = tmp_path_factory.mktemp("reward") / "checkpoint"
    case = make(folder, "Llama", "reward", np.random.default_rng(11), tie_word_embeddings=False)
    state = {name: tensor.contiguous() for name, tensor in case.model.state_dict().items()}
    for path in folder.glob("model*"):
        path.unlink()
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def copy(reward, tmp_path):
    return shutil.copytree(reward, tmp_path / "checkpoint")


def last(folder):
    with torch.no_grad():
        return load_checkpoint(folder)[0](IDS)[1][0, -1].numpy()


def theirs(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits[0].numpy()


def rename(folder, change):
    """Save the weights under other names."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    changed = {change(name): tensor for name, tensor in state.items()}
    assert len(changed) == len(state)
    safetensors.torch.save_file(changed, folder / "model.safetensors")


def run_advice(error, folder):
    """Run the command that a refusal prints, as a user would."""
    command = re.search(r'python (-c ".*?[^\\]")', str(error.value))[1]
    subprocess.run([sys.executable, *shlex.split(command)], cwd=folder, check=True, capture_output=True)


def adapt(reward, tmp_path, **options):
    """A LoRA adapter of the reward model, its head trained too, as TRL's RewardTrainer leaves it."""
    torch.manual_seed(3)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], **options)
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return model, model(IDS).logits[0].numpy()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_of_another_method_is_refused_and_the_advice_merges_it(reward, copy, tmp_path):
    _, expected = adapt(reward, tmp_path, use_dora=True)
    assert not within(expected, theirs(reward), RUNTIME)
    with pytest.raises(ConfigError, match=r"adapter_config\.json: 'use_dora' \(DoRA\) .*Merge it once") as e:
        load_checkpoint(tmp_path / "adapter")
    run_advice(e, tmp_path)
    assert within(last(tmp_path / "MERGED"), expected, RUNTIME)
    # Beside the weights of its model it is passed over just as little.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, copy)
        with pytest.raises(ConfigError, match=rf"adapter_\w+\.\w+: .*move .*{name} out of the folder"):
            read_checkpoint(copy, Overrides())
        if name == "adapter_config.json":
            (copy / name).unlink()
    (copy / "adapter_model.safetensors").unlink()
    assert within(last(copy), theirs(reward), RUNTIME)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_inside_the_weights_are_refused(reward, copy, tmp_path):
    model, _ = adapt(reward, tmp_path)
    inside = {name.removeprefix("base_model.model."): tensor for name, tensor in model.state_dict().items()}
    for state in (model.state_dict(), inside):
        safetensors.torch.save_file({n: t.contiguous() for n, t in state.items()}, copy / "model.safetensors")
        with pytest.raises(ConfigError, match=r"belongs to a model with an unmerged peft adapter.*merge_and_unlo"):
            load_checkpoint(copy)


def test_every_method_of_peft_is_known():
    for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        with pytest.raises(ConfigError, match="peft adapter"):
            check_adapter_names([f"model.layers.0.self_attn.q_proj.{prefix}A.default.weight"])


def test_names_of_wrappers_are_taken_off(reward, copy):
    expected = theirs(reward)
    wrapped = (
        lambda name: f"base_model.model.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"_forward_module._orig_mod.module.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    )
    for change in wrapped:
        shutil.copy(reward / "model.safetensors", copy)
        rename(copy, change)
        assert within(last(copy), expected, RUNTIME)
    # As torch itself names them.
    compiled = torch.compile(transformers.AutoModelForSequenceClassification.from_pretrained(reward), backend="eager")
    assert set(compiled.state_dict()) == {
        f"_orig_mod.{name}" for name in safetensors.torch.load_file(reward / "model.safetensors")
    }
    state = safetensors.torch.load_file(reward / "model.safetensors")
    twice = {**state, "module.model.norm.weight": state["model.norm.weight"].clone()}
    safetensors.torch.save_file(twice, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tensor 'model\.norm\.weight' twice"):
        load_checkpoint(copy)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_advice_about_pickles_keeps_the_head(copy, shards):
    """A head that transformers' classes lack, which `from_pretrained` and `save_pretrained` would replace by chance."""
    rename(copy, lambda name: name.replace("score.", "v_head."))
    expected = last(copy)
    state = list(safetensors.torch.load_file(copy / "model.safetensors").items())
    (copy / "model.safetensors").unlink()
    for i in range(shards):
        torch.save(dict(state[i::shards]), copy / f"pytorch_model-{i + 1:05}-of-{shards:05}.bin")
    torch.save({"step": 1}, copy / "optimizer.bin")
    with pytest.raises(ConfigError, match=r"is a pickle, which can run any code.*weights_only=True") as error:
        load_checkpoint(copy)
    run_advice(error, copy)
    assert within(last(copy), expected, RUNTIME)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0a" * 32 + "\nsize 4943162336\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_pointers_of_git_lfs_and_links_to_nothing_are_named(name, copy):
    """A chat template that is a pointer would even be a template."""
    (copy / name).write_text(POINTER)
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} is a Git LFS pointer.*git lfs pull"):
        read_checkpoint(copy, Overrides())
    (copy / name).unlink()
    (copy / name).symlink_to("../../blobs/0a0a")
    with pytest.raises(
        ConfigError, match=rf"{re.escape(name)} is a link to \.\./\.\./blobs/0a0a, which does not exist"
    ):
        read_checkpoint(copy, Overrides())


def test_a_cache_of_links_is_read_and_its_root_names_the_snapshot(reward, tmp_path):
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "0a0a", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(p for p in reward.iterdir() if p.is_file()):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert within(last(snapshot), theirs(reward), RUNTIME)
    assert read_checkpoint(snapshot, Overrides()).tokenizer is not None
    with pytest.raises(ConfigError, match=r"is the hub's cache of a repository: .*pass .*models--o--n/snapshots/0a0a"):
        load_checkpoint(tmp_path / "models--o--n")
    shutil.copytree(reward, tmp_path / "run" / "checkpoint-500")
    with pytest.raises(ConfigError, match=r"not a checkpoint itself: .*pass .*run/checkpoint-500"):
        read_checkpoint(tmp_path / "run", Overrides())


def test_an_adapter_that_cannot_be_merged_gets_no_advice_to_merge_it(copy):
    (copy / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS"}')
    with pytest.raises(
        ConfigError, match=r"\(PROMPT_TUNING\).*cannot be merged.*move adapter_config.json out of the folder"
    ):
        load_checkpoint(copy)


def test_label_tokens_are_refused_beside_a_scorer(copy):
    with pytest.raises(
        ConfigError, match=r"label tokens were given, but the weights have a scorer too.*: score\.weight"
    ):
        load_checkpoint(copy, label_tokens=LabelTokens((1, 2)))


def test_a_head_in_a_file_of_its_own_is_named(copy):
    safetensors.torch.save_file({"v_head.summary.weight": torch.ones(1, 8)}, copy / "reward_head.safetensors")
    with pytest.raises(ConfigError, match=r"reward_head\.safetensors would not be read; expected all weights in model"):
        load_checkpoint(copy)
    (copy / "reward_head.safetensors").rename(copy / "consolidated.safetensors")
    load_checkpoint(copy)


def test_a_head_that_is_not_supported_is_named_by_its_tensors(copy):
    rename(copy, lambda name: name.replace("score.", "judge."))
    with pytest.raises(ConfigError, match=r"besides the backbone it has judge\.weight \(1, \d+\)\. .*pass --head"):
        load_checkpoint(copy)
    state = safetensors.torch.load_file(copy / "model.safetensors")
    state["score.weight"] = state["judge.weight"].clone()
    safetensors.torch.save_file(state, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"does not use: judge\.weight \(1, \d+\)"):
        load_checkpoint(copy)


def test_the_family_is_refused_before_anything_else(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "deberta-v2"}))
    (copy / "tokenizer.json").unlink()
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"'deberta-v2' is not supported; supported are llama.* is an encoder"):
        read_checkpoint(copy, Overrides())
    with pytest.raises(ConfigError, match="'model_type'"):
        load_checkpoint(copy)


MEAN_AND_STD = {"mean": -1.75, "std": 2.5}


@pytest.mark.parametrize(
    ("change", "normalized", "remarks"),
    [
        ({**MEAN_AND_STD, "normalize_reward": True}, True, 0),
        ({**MEAN_AND_STD, "normalize_reward": False}, False, 1),
        (MEAN_AND_STD, False, 1),
        ({"normalize_reward": True}, False, 0),
    ],
    ids=["asked for", "declined", "not asked for", "without numbers"],
)
def test_rewards_are_normalized_where_the_config_says_so(change, normalized, remarks, copy):
    raw = theirs(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    assert within(last(copy), (raw + 1.75) / 2.5 if normalized else raw, RUNTIME)
    texts = load_checkpoint(copy)[1]["remarks"]
    assert len(texts) == remarks
    assert all("'mean' and 'std' of rewards are not applied" in text for text in texts)


@pytest.mark.parametrize("wrong", [{"std": 0}, {"std": None}, {"mean": "1"}, {"std": float("nan")}], ids=str)
def test_rewards_are_not_normalized_by_what_is_no_number(wrong, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | MEAN_AND_STD | wrong | {"normalize_reward": True}))
    with pytest.raises(ConfigError, match="'normalize_reward': expected numbers 'mean' and 'std' above 0"):
        load_checkpoint(copy)


def test_what_is_not_followed_is_said(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(
            config
            | {"auto_map": {"AutoModel": "modeling_own.Own"}}
            | {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}
        )
    )
    code, activation = read_checkpoint(copy, Overrides()).remarks
    assert "own Python code (modeling_own) is not run" in code
    assert "Sigmoid is not applied" in activation
