"""Small ArmoRM and QRM checkpoints, and their scores in plain PyTorch, as their makers compute them."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoints import _config, make_tokenizer

HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
_OPENING = "<|start_header_id|>assistant<|end_header_id|>\n\n"
TEMPLATE = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '" + _OPENING + "' }}{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "Think in steps."},
]


class Gate(nn.Module):
    """Three inner layers with ReLU; QRM's have no bias, and a batch norm behind."""

    def __init__(self, width, count, *, norms):
        super().__init__()
        layers, sizes = [], [width, 6, 7, 8]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, bias=not norms)]
            layers += [nn.ReLU(), nn.BatchNorm1d(outputs)] if norms else []
        self.layers = nn.ModuleList([*layers, nn.Linear(sizes[-1], count)])
        self.logit_scale = nn.Parameter(torch.tensor([1.7]))
        self.norms = norms

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x) if self.norms or i == len(self.layers) - 1 else F.relu(layer(x))
        return (x / 10).softmax(-1) * self.logit_scale[0]


@dataclass
class GatedCase:
    """What a gated model gives for a whole text: its score and its objectives."""

    backbone: nn.Module
    tokenizer: transformers.PreTrainedTokenizerFast
    regression: nn.Linear
    transform: torch.Tensor
    gate: Gate
    quantiles: int

    @torch.no_grad()
    def reward(self, text):
        """Return the score (), and the objectives (count,), of a text that contains its special tokens."""
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        pattern = self.tokenizer(HEADER, add_special_tokens=False)["input_ids"]
        row = ids[0].tolist()
        place = max(i for i in range(len(row)) if row[i : i + len(pattern)] == pattern)
        hidden = self.backbone(input_ids=ids).last_hidden_state
        gate = self.gate(hidden[:, place])[0]
        rewards = self.regression(hidden[0, -1])
        if self.quantiles == 1:
            return (gate * (rewards @ self.transform)).sum().item(), rewards.numpy()
        mean = rewards.reshape(-1, self.quantiles).mean(1) @ self.transform
        return (gate * mean).sum().item(), mean.numpy()

    def text(self, messages, answer=None):
        """A conversation up to an answer, as the template writes it."""
        turn = [] if answer is None else [{"role": "assistant", "content": answer}]
        return self.tokenizer.apply_chat_template([*messages, *turn], tokenize=False, add_generation_prompt=not turn)


def make_gated(folder: Path, kind: str, rng, **options) -> GatedCase:
    """Write a checkpoint of `ArmoRM` (19 objectives) or `QRM` (5, of 3 quantiles each)."""
    torch.manual_seed(int(rng.integers(2**31)))
    tokenizer = make_tokenizer("bytes")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]}
    )
    tokenizer.chat_template = TEMPLATE
    config = _config("Llama", rng, tie_word_embeddings=False, **options)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    count, quantiles = (19, 1) if kind == "ArmoRM" else (5, 3)
    regression = nn.Linear(config.hidden_size, count * quantiles, bias=False)
    gate = Gate(config.hidden_size, count, norms=kind == "QRM").eval()
    for parameter in gate.parameters():
        parameter.data = 2 * torch.randn_like(parameter)
    for norm in gate.layers:
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    transform = torch.eye(count) + 0.3 * torch.randn(count, count)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors |= {"regression_layer.weight": regression.weight.detach(), "reward_transform_matrix": transform}
    tensors |= {f"gating.{name}": tensor.clone() for name, tensor in gate.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"architectures": ["LlamaForRewardModelWithGating"], "gating_temperature": 10, "num_objectives": count}
    fields |= {} if kind == "ArmoRM" else {"num_quantiles": quantiles}
    (folder / "config.json").write_text(json.dumps(fields))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return GatedCase(model.model, tokenizer, regression, transform, gate, quantiles)
