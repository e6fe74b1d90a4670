"""Small random checkpoints made with transformers' own classes, and what transformers gives for them."""

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import modeling_layers

from bonnx.export.checkpoint.source import Overrides
from bonnx.models import families

FAMILIES = tuple(family.name for family in families.FAMILIES.values())
MODEL_TYPES = {family.name: model_type for model_type, family in families.FAMILIES.items()}
# Their configs have no field for the size of a head.
_NO_HEAD_SIZE = ("Qwen2", "Phi3", "Olmo2", "Olmo3", "SmolLM3", "Granite", "StableLm")
_INTERNLM2 = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "self_attn": "attention",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
QUESTION = "What is 2+2? Think in steps.\n"
ANSWERS = [
    "First, take 2.\nThen add 2.\nIt is 4.\n",
    "I guess 5.\n",
    "2+2 is two and two.\nThat makes 4.\nSure.\nYes.\n",
]
_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def _trained(kind):
    """A tokenizer of the family's kind, trained on a few lines: its merges cross the border of prompt and candidate."""
    lines = [QUESTION, *ANSWERS, QUESTION + ANSWERS[0], "Step 1: 12.5 + 3. steps\n\n It is  not.\n", "user assistant"]
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<extra_0>", "+", "-"]
    if kind == "spaces":
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
        spaces = decoders.Replace("\u2581", " ")
        tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        special += alphabet
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700 if kind == "spaces" else 460,
        initial_alphabet=[] if kind == "spaces" else pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines * 20, trainer)
    if kind == "spaces":
        start = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return tokenizer


def make_tokenizer(kind):
    """`bytes` (Llama 3, Qwen) or `spaces` (Llama 2, Mistral), which begins every text with `<s>`."""
    backend = tokenizers.Tokenizer.from_str(_trained(kind).to_str())
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<unk>"
    )
    made.chat_template = _TEMPLATE
    return made


def _config(family, rng, **options):
    """The config of a family's own class; that of Llama for InternLM2, which transformers lacks."""
    heads, kv_heads = [(4, 2), (4, 4), (6, 2)][rng.integers(3)]
    size = {"head_dim": 8} if family not in _NO_HEAD_SIZE and rng.integers(2) else {}
    if (family.startswith("G") and family != "Granite") or family == "Mixtral":
        # Their classes have a size of their own by default, or need one for rope scaling.
        size = {"head_dim": 8}
    base = {
        "vocab_size": 720,
        "hidden_size": heads * 8,
        "intermediate_size": int(rng.integers(20, 60)),
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "layer_norm_eps" if family == "StableLm" else "rms_norm_eps": 1e-5,
        "pad_token_id": 4,
        "eos_token_id": 4,
        "tie_word_embeddings": bool(rng.integers(2)),
    }
    return class_of(family, "Config")(**base | size | _of_family(family, rng) | options)


def _of_family(family, rng):
    """Options that only some families have."""
    entry, options = families.FAMILIES[MODEL_TYPES[family]], {}
    if entry.full_every:
        options |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": int(rng.integers(3, 90))}
    if entry.reads_attention_scale:
        options["query_pre_attn_scalar"] = int(rng.integers(4, 30))
    if "final_logit_softcapping" in entry.caps:
        options["final_logit_softcapping"] = [None, 1.5][rng.integers(2)]
    if "attn_logit_softcapping" in entry.caps:
        options["attn_logit_softcapping"] = [None, 2.0][rng.integers(2)]
    if entry.unrotated_every:
        options["no_rope_layers"] = rng.integers(0, 2, 2).tolist()
    if entry.num_experts:
        # Grouped products of PyTorch need whole multiples of 16 bytes.
        options |= {
            "intermediate_size": 8 * int(rng.integers(2, 6)),
            "num_local_experts": int(rng.integers(3, 7)),
            "num_experts_per_tok": int(rng.integers(1, 4)),
        }
    if family == "Qwen3Moe":
        options |= {"moe_intermediate_size": 8 * int(rng.integers(1, 4)), "norm_topk_prob": bool(rng.integers(2))}
        options |= {"mlp_only_layers": [[], [0], [1]][rng.integers(3)]}
    if entry.multipliers:
        names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        options |= {name: float(rng.uniform(0.2, 2)) for name in names}
    return options


def class_of(family, ending):
    """A class of transformers; classifiers that it lacks are made of its own parts for them."""
    family = {"InternLM2": "Llama"}.get(family, family)
    for name in (family, family.removesuffix("Text")):
        if hasattr(transformers, f"{name}{ending}"):
            return getattr(transformers, f"{name}{ending}")
    generic = getattr(modeling_layers, f"Generic{ending}")
    return type(f"{family}{ending}", (generic, class_of(family, "PreTrainedModel")), {})


def _as_internlm2(folder, model):
    """Rewrite a saved Llama as InternLM2's own code saves it: other names, and queries, keys and values in groups."""
    state, config = {}, model.config
    group = config.num_attention_heads // config.num_key_value_heads
    for name, tensor in model.state_dict().items():
        for theirs, ours in _INTERNLM2.items():
            name = name.replace(theirs, ours)
        state[name] = tensor.contiguous()
    for name in [name for name in state if ".q_proj." in name]:
        q, k, v = (state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv")
        size = len(k) // config.num_key_value_heads
        q, k, v = (t.unflatten(0, (config.num_key_value_heads, n, size)) for t, n in ((q, group), (k, 1), (v, 1)))
        state[name.replace("q_proj", "wqkv")] = torch.cat([q, k, v], 1).flatten(0, 2).contiguous()
    if config.tie_word_embeddings:
        state.pop("output.weight", None)
    for path in folder.glob("model*"):
        path.unlink()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    saved = json.loads((folder / "config.json").read_text())
    saved |= {"model_type": "internlm2", "bias": saved.pop("attention_bias")}
    name = saved["architectures"][0].replace("Llama", "InternLM2")
    (folder / "config.json").write_text(json.dumps(saved | {"architectures": [name]}))


class _Custom:
    """Classes that checkpoints bring with them: a backbone and a head of their own."""

    @staticmethod
    def make(family, config, labels):
        parent = class_of(family, "PreTrainedModel")
        name = f"{family}For{'Process' if labels == 2 else ''}RewardModel"

        def init(self, config):
            parent.__init__(self, config)
            self.model = class_of(family, "Model")(config)
            hidden = config.hidden_size
            self.score = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, labels))
            self.post_init()

        return type(name, (parent,), {"__init__": init})(config)


class _ValueHead(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.summary = nn.Linear(size, 1)


@dataclass
class HeadCase:
    """A checkpoint in a folder: transformers' model, the options of export, and how its positions are read."""

    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerFast
    overrides: Overrides
    step: str | None
    read: object

    @property
    def arguments(self):
        """The options of `bonnx export`."""
        arguments = []
        for name, value in self.overrides._asdict().items():
            if value is not None:
                values = value if isinstance(value, list) else [str(value)]
                arguments += [f"--{name.replace('_', '-')}", *values]
        return arguments

    def scores(self, text, special=True):
        """Of a whole text: one score for each position, and the tokens."""
        ids = self.tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            base = getattr(self.model, "model", None)
            hidden = base(input_ids=ids).last_hidden_state
            return self.read(hidden)[0].numpy(), ids[0].numpy()

    def reward(self, text, start=0, special=True, stop=None):
        """The score of a whole text whose candidate lies between two characters: at its last token or step's end."""
        scores, _ = self.scores(text, special)
        if self.step is None:
            return scores[-1]
        spans = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
        last = text.rindex(self.step, start, stop) + len(self.step) - 1
        return scores[max(i for i, (begin, end) in enumerate(spans) if begin <= last < end)]


HEADS = ("reward", "labels", "steps", "mlp", "mlp steps", "value", "step tag")


def make(folder: Path, family: str, head: str, rng, dtype=torch.float32, kind=None, **options) -> HeadCase:
    """Write a checkpoint with `save_pretrained`, its weights large enough that candidates differ."""
    torch.manual_seed(int(rng.integers(2**31)))
    kind = kind or ("spaces" if family in ("Llama", "Mistral", "Gemma", "InternLM2") else "bytes")
    tokenizer = make_tokenizer(kind)
    overrides, step, soft = Overrides(), None, lambda x: x[..., 0]
    if head == "reward":
        config = _config(family, rng, num_labels=1, **options)
        model = class_of(family, "ForSequenceClassification")(config)
    elif head == "labels":
        names = {0: "bad", 1: "fair", 2: "good"}
        config = _config(family, rng, id2label=names, label2id={v: k for k, v in names.items()}, **options)
        model = class_of(family, "ForSequenceClassification")(config)
        overrides, soft = Overrides(label="good", activation="softmax"), lambda x: x.softmax(-1)[..., 2]
    elif head == "steps":
        model = class_of(family, "ForTokenClassification")(_config(family, rng, num_labels=2, **options))
        step, soft = "\n", lambda x: x.softmax(-1)[..., 1]
    elif head == "mlp":
        model = _Custom.make(family, _config(family, rng, **options), 1)
    elif head == "mlp steps":
        model = _Custom.make(family, _config(family, rng, **options), 2)
        step, soft = "<extra_0>", lambda x: x.softmax(-1)[..., 1]
    else:
        if head == "step tag" and "final_logit_softcapping" in families.FAMILIES[MODEL_TYPES[family]].caps:
            options["final_logit_softcapping"] = None
        model = class_of(family, "ForCausalLM")(_config(family, rng, **options))
    if head == "value":
        model.v_head = _ValueHead(model.config.hidden_size)
        step, soft = "\n", lambda x: x[..., 0].sigmoid()
        overrides = Overrides(step_text="\n", activation="sigmoid")
    if head == "step tag":
        overrides, step = Overrides(label_tokens=["+", "-"], step_text="\n"), "\n"
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    # What is compared computes in float32, from the weights as they are stored.
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype).to(torch.float32)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB" if rng.integers(2) else "1GB")
    if family == "InternLM2":
        _as_internlm2(folder, model)
    tokenizer.save_pretrained(folder)
    # Some of transformers' classes bring a part of their own.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plus, minus = (tokenizer.convert_tokens_to_ids(t) for t in "+-")

    def read(hidden):
        if head == "value":
            return soft(twin.v_head.summary(hidden))
        if head == "step tag":
            scale = 1 / getattr(twin.config, "logits_scaling", 1.0)
            return (twin.lm_head(hidden)[..., [plus, minus]] * scale).softmax(-1)[..., 0]
        return soft(twin.score(hidden))

    return HeadCase(twin, tokenizer, overrides, step, read)


def whole(case, prompt, answer):
    """A prompt and an answer as one text, its steps ended as the model expects."""
    if case.step == "<extra_0>":
        answer = "".join(step + case.step for step in answer.split("\n\n") if step.strip())
    return prompt + answer


def rewards(case, prompt=QUESTION, answers=ANSWERS):
    """What transformers gives for each candidate."""
    texts = [whole(case, prompt, answer) for answer in answers]
    return np.array([case.reward(text, len(prompt)) for text in texts])
