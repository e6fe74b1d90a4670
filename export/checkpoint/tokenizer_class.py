"""Build the tokenizer that transformers 5 makes of a tokenizer.json; its class may replace parts of the file.

For `TokenizersBackend` (formerly `PreTrainedTokenizerFast`), `AutoTokenizer` uses the file as it is. The classes of
model families keep only the vocabulary, merges and post-processor, and rebuild the normalizer, pre-tokenizer and
decoder from tokenizer_config.json. The class is the one that the checkpoint declares, unless the model's family
prescribes another. All classes then add the special tokens that the vocabulary lacks. `add_bos_token` and
`add_eos_token` in tokenizer_config.json have no effect if there is a tokenizer.json: its post-processor determines
which special tokens are added to plain text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bonnx.models.config import ConfigError
from bonnx.models.families import FAMILIES

__all__ = ["build_tokenizer"]

GENERAL = "TokenizersBackend"
# The tokenizer class that a model family prescribes, including families whose models are not supported.
_CLASSES = {name: family.tokenizer_class for name, family in FAMILIES.items()}
_CLASSES |= dict.fromkeys(("qwen2_moe", "qwen3_moe"), "Qwen2Tokenizer")
# Words with the preceding character, single digits, punctuation with line ends, spaces: as Qwen2's merges expect.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"
# A class's default special tokens, used unless tokenizer_config.json sets them.
DEFAULTS: dict[str, dict[str, str]] = {
    GENERAL: {},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": {"unk_token": END, "eos_token": END, "pad_token": END},
    "GPT2Tokenizer": {"unk_token": END, "bos_token": END, "eos_token": END},
}
SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def build_tokenizer(
    path: Path, data: dict[str, Any], settings: dict[str, Any], special: dict[str, Any], config: dict[str, Any]
) -> tuple[Tokenizer, dict[str, str]]:
    """Return the tokenizer that transformers would run, and the texts of its special tokens by name.

    Args:
        path: path of tokenizer.json.
        data: its content.
        settings: content of tokenizer_config.json, or empty.
        special: content of special_tokens_map.json, or empty.
        config: `model_type` and `tokenizer_class` from config.json, where present.

    Raises:
        ConfigError: if the file is not a tokenizer, or its class is not supported.
    """
    folder = path.parent
    kind = _tokenizer_class(folder, path.read_text(encoding="utf-8"), settings, config)
    if settings.get("split_special_tokens"):
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: split_special_tokens is not supported; expected false")
    try:
        stored = Tokenizer.from_file(str(path))
        tokenizer = stored if kind == GENERAL else _rebuild(kind, data, settings)
        if kind != GENERAL and stored.post_processor is not None:
            tokenizer.post_processor = stored.post_processor
        named, extra, added = _special_tokens(data, settings, special)
        named = {**DEFAULTS[kind], **named}
        if stored.padding is not None:
            named.setdefault("pad_token", stored.padding["pad_token"])
        named = {name: named[name] for name in sorted(named, key=_order) if named[name] is not None}
        _add_tokens(tokenizer, named, extra, added)
        if kind == "Qwen2Tokenizer":
            tokenizer.add_tokens([AddedToken(str(token), special=True) for token in (*named.values(), *extra)])
    except ConfigError:
        raise
    except Exception as e:  # the library raises bare Exception, and settings of a wrong type may raise anything
        raise ConfigError(f"{folder}: cannot be read as a tokenizer: {type(e).__name__}: {e}") from e
    return tokenizer, {name: str(token) for name, token in named.items()}


def _tokenizer_class(folder: Path, text: str, settings: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the name of the class that AutoTokenizer would use."""
    if settings.get("auto_map"):
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: auto_map is not supported: a checkpoint's Python code is never run"
        )
    declared = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or "").removesuffix("Fast")
    declared = GENERAL if declared == "PreTrainedTokenizer" else declared
    model_type = str(config.get("model_type"))
    family = _CLASSES.get(model_type)
    if declared == "LlamaTokenizer" and model_type != "qwen2" and '"ByteLevel"' in text:
        return GENERAL  # Llama 3 declares the class of Llama 2
    if declared and family and (family == GENERAL or model_type == "qwen2"):
        return family  # overrides the declared class
    kind = declared or family or GENERAL
    if kind not in DEFAULTS:
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class '{kind}' is not supported; expected one of "
            f"{', '.join(DEFAULTS)}. Run AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), which writes "
            f"everything that the class does to tokenizer.json, and set tokenizer_class to '{GENERAL}'"
        )
    return kind


def _rebuild(kind: str, data: dict[str, Any], settings: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer of a family's class from the vocabulary and merges; all else is defined by the class."""
    model = data["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"tokenizer.json: model.type: expected BPE for {kind}; got {model.get('type')!r}")
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(left, right) for left, right in pairs]
    prefix = settings.get("add_prefix_space")
    if kind == "LlamaTokenizer":
        tokenizer = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, fuse_unk=True, byte_fallback=True))
        prefix = prefix is None or bool(prefix)
        scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if prefix else steps)
        return tokenizer
    tokenizer = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "GPT2Tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
        return tokenizer
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def _special_tokens(
    data: dict[str, Any], settings: dict[str, Any], special: dict[str, Any]
) -> tuple[dict[str, Any], list[Any], dict[int, AddedToken]]:
    """Collect the named special tokens, further ones, and every added token by id from the checkpoint's files.

    If tokenizer_config.json has added tokens, only those count. Otherwise those of tokenizer.json do, and
    special_tokens_map.json takes precedence over tokenizer_config.json.
    """
    values = dict(settings)
    if "added_tokens_decoder" in settings:
        listed = {int(i): token for i, token in settings["added_tokens_decoder"].items()}
    else:
        values |= special
        listed = {token["id"]: token for token in data.get("added_tokens", ())}
    added = {i: _token(token) for i, token in listed.items()}
    values = {key: _token(value) for key, value in values.items()}
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    further = extra if isinstance(extra, dict) else {}
    by_text = {str(token): token for token in added.values()}
    named = {
        key: by_text.get(str(value), value) if key in SPECIAL else value
        for key, value in values.items()
        if key in SPECIAL or (key.endswith("_token") and isinstance(value, (str, AddedToken)))
    }
    return {**named, **further}, [] if further else [_token(token) for token in extra], added


def _token(value: Any) -> Any:
    """Return an added token if the value describes one, else the value itself."""
    if isinstance(value, dict) and "content" in value:
        return AddedToken(**{"special": True, **{k: v for k, v in value.items() if k not in ("__type", "id")}})
    return value


def _order(name: str) -> int:
    return SPECIAL.index(name) if name in SPECIAL else len(SPECIAL)


def _add_tokens(tokenizer: Tokenizer, named: dict[str, Any], extra: list[Any], added: dict[int, AddedToken]) -> None:
    """Add to the tokenizer the added tokens that it lacks, in the order of their ids, then the special ones."""
    present = tokenizer.get_added_tokens_decoder().values()
    same = {repr(token) for token in present}
    missing: list[Any] = [token for _, token in sorted(added.items()) if repr(token) not in same]
    known = {token.content for token in present} | {str(token) for token in missing}
    for token in (*named.values(), *extra):
        if str(token) not in known:
            known.add(str(token))
            missing.append(token)
    names = {str(token) for token in named.values()}
    for i, token in enumerate(missing):
        if isinstance(token, str):
            missing[i] = AddedToken(token, special=True)
        elif str(token) in names:
            token.special = True
    if missing:
        tokenizer.add_tokens(missing)
