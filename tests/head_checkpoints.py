"""Small checkpoints with heads of others' classes, and the score in plain PyTorch from transformers' backbone."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from bonnx.export.checkpoint.source import Overrides
from tests.checkpoints import HeadCase, _as_internlm2, _config, class_of, make_tokenizer

REWARD_TOKEN = "<extra_0>"


@dataclass(frozen=True)
class OtherHead:
    """A head by its tensors.

    Attributes:
        layers: names of its linear layers.
        architecture: the class in config.json.
        bias: whether its layers have biases.
        inner: size of the inner layers.
        activation: between the layers.
        config: further fields of config.json; `{token}` stands for the id of the reward token.
        finish: what happens to the last layer's output.
        appended: whether every text ends with the reward token.
        causal: whether the checkpoint keeps its vocabulary head.
        file: the safetensors file of the head, if it is not that of the model.
        declared: contents of head.json, for a head that is not recognized.
        more: further tensors of the checkpoint.
    """

    layers: tuple[str, ...]
    architecture: str
    bias: bool = True
    inner: int = 12
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu
    config: dict = field(default_factory=dict)
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda x: x[..., 0]
    appended: bool = False
    causal: bool = False
    file: str = "model.safetensors"
    declared: dict | None = None
    more: dict = field(default_factory=dict)


_NORMAL = {"mean": 0.7, "std": 2.5, "normalize_reward": True}
_COUNTED = {"normalizer.count": torch.tensor([3]), "normalizer.mean": torch.ones(1), "normalizer.var": torch.ones(1)}
_CHAIN = ("reward.first", "reward.middle", "reward.last")
OTHER_HEADS = {
    "value_head, normalized (OpenRLHF)": OtherHead(
        ("value_head",), "LlamaModel", bias=False, config=_NORMAL, finish=lambda x: (x[..., 0] - 0.7) / 2.5
    ),
    "own name (OpenRLHF)": OtherHead(("critic",), "LlamaModel", bias=False, config={"value_head_prefix": "critic"}),
    "regression_head (Eurus, UltraRM)": OtherHead(("regression_head",), "EurusRewardModel", bias=False),
    "reward_head": OtherHead(("reward_head",), "LlamaForRewardModel"),
    "score_head, raw (Beaver)": OtherHead(
        ("score_head",), "LlamaForScore", config={"do_normalize": False, "mean": [0.5], "var": [4.0]}, more=_COUNTED
    ),
    "score_head, normalized (Beaver)": OtherHead(
        ("score_head",),
        "LlamaForScore",
        config={"do_normalize": True, "score_type": "cost", "mean": [0.5], "var": [4.0]},
        finish=lambda x: x[..., 0] / 2.0,
        more=_COUNTED,
    ),
    "v_head.summary.0, .2 (GRM)": OtherHead(("v_head.summary.0", "v_head.summary.2"), "LlamaForCausalLM", causal=True),
    "v_head.summary.0, .2, .4": OtherHead(
        ("v_head.summary.0", "v_head.summary.2", "v_head.summary.4"), "LlamaForCausalLM"
    ),
    "value_head.safetensors (LLaMA-Factory)": OtherHead(
        ("v_head.summary",), "LlamaForCausalLM", causal=True, file="value_head.safetensors"
    ),
    "v_head at the cls token (Athene)": OtherHead(
        ("v_head",), "CustomAutoModelForSequenceClassification", bias=False, appended=True
    ),
    "v_head at the reward token (InternLM2-Reward)": OtherHead(
        ("v_head",),
        "InternLM2ForRewardModel",
        bias=False,
        config={"reward_token_id": "{token}"},
        appended=True,
        causal=True,
    ),
    "declared MLP": OtherHead(
        _CHAIN,
        "LlamaForSomething",
        activation=torch.tanh,
        finish=lambda x: ((x[..., 0] - 0.2) / (0.5 * 4.0)).sigmoid(),
        declared={
            "layers": [*_CHAIN],
            "activation": "tanh",
            "score": "sigmoid",
            "mean": 0.2,
            "std": 0.5,
            "temperature": 4.0,
            "unused": ["extra"],
        },
        more={"extra.a": torch.ones(2), "extra.b": torch.ones(3)},
    ),
    "the guide's declaration": OtherHead(
        ("reward.0", "reward.2"),
        "LlamaModel",
        activation=torch.nn.functional.silu,
        finish=lambda x: (x[..., 0] - 1.5) / 2.0,
        declared={
            "layers": ["reward.0", "reward.2"],
            "activation": "silu",
            "read_at": "last",
            "mean": 1.5,
            "std": 2.0,
            "unused": ["reward.running_mean"],
        },
        more={"reward.running_mean": torch.ones(1)},
    ),
    "declared linear head at an appended token": OtherHead(
        ("critic.out",), "LlamaModel", appended=True, declared={"layers": ["critic.out"], "append": REWARD_TOKEN}
    ),
}


def make_other(folder: Path, name: str, rng, family: str = "Llama") -> HeadCase:
    """Write a checkpoint with a head of `OTHER_HEADS`, and the declaration that it needs beside it."""
    head = OTHER_HEADS[name]
    torch.manual_seed(int(rng.integers(2**31)))
    tokenizer = make_tokenizer("bytes")
    config = _config(family, rng, tie_word_embeddings=False)
    model = class_of(family, "ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if family == "InternLM2":
        _as_internlm2(folder, model)
    token = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    tokenizer.cls_token = REWARD_TOKEN
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if not head.causal:
        tensors = {n: t for n, t in tensors.items() if n not in ("lm_head.weight", "output.weight")}
    sizes = [config.hidden_size, *[head.inner] * (len(head.layers) - 1), 1]
    weights = {}
    for layer, inputs, outputs in zip(head.layers, sizes, sizes[1:], strict=False):
        weights[f"{layer}.weight"] = torch.randn(outputs, inputs)
        # A declared head may have biases in some layers.
        if head.bias and not (head.declared and layer == head.layers[0]):
            weights[f"{layer}.bias"] = torch.randn(outputs)
    tensors |= head.more
    if head.file == "model.safetensors":
        tensors |= weights
    else:
        save_file(weights, folder / head.file, {"format": "pt"})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields |= {key: token if value == "{token}" else value for key, value in head.config.items()}
    (folder / "config.json").write_text(json.dumps(fields | {"architectures": [head.architecture]}))
    overrides = Overrides()
    if head.declared is not None:
        (folder.parent / "head.json").write_text(json.dumps(head.declared))
        overrides = Overrides(head=folder.parent / "head.json")

    def read(hidden):
        for i, layer in enumerate(head.layers):
            hidden = head.activation(hidden) if i else hidden
            hidden = torch.nn.functional.linear(hidden, weights[f"{layer}.weight"], weights.get(f"{layer}.bias"))
        return head.finish(hidden)

    return HeadCase(model, transformers.AutoTokenizer.from_pretrained(folder), overrides, None, read)


def whole(name: str, text: str) -> str:
    """A text as the model's makers end it."""
    return text + REWARD_TOKEN * OTHER_HEADS[name].appended
