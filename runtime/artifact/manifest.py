"""`manifest.json`: everything that a program needs to know about an artifact.

`manifest.schema.json` is its JSON Schema, which schema.py makes of these types.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal, TypeAlias, get_args

import msgspec

from bonnx.errors import ArtifactError

__all__ = [
    "AGGREGATIONS",
    "MANIFEST",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "VERIFICATIONS",
    "VOTES",
    "Aggregation",
    "Agreement",
    "File",
    "Graph",
    "Limits",
    "Manifest",
    "PairRules",
    "Parity",
    "Precision",
    "Scoring",
    "TextRules",
    "Value",
    "Verification",
    "seal",
    "seal_is_intact",
]

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
AGGREGATIONS = ("last", "mean", "min", "max", "prod")
"""How the scores of a candidate's tokens become one; `step_` in front of a name reads only the ends of steps.

The input `aggregation` of a graph is an index into this.
"""
Aggregation: TypeAlias = Literal[
    "last", "mean", "min", "max", "prod", "step_last", "step_mean", "step_min", "step_max", "step_prod"
]
# And `vote` into this; `score` is no vote.
VOTES = ("score", "weighted", "majority")
Precision: TypeAlias = Literal["fp32", "fp16", "bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Verification: TypeAlias = Literal["full", "quick"]
VERIFICATIONS: tuple[Verification, ...] = get_args(Verification)
Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_SEAL = re.compile(rb'"seal": "([0-9a-f]{64})"')
_BLANK = b"0" * 64


class _Frozen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Value(_Frozen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A graph's input or output: symbolic axes are strings."""

    name: str
    dtype: str
    shape: list[int | str]


class Graph(_Frozen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ONNX graph; `file` is relative to the artifact."""

    file: str
    opset: int
    inputs: list[Value]
    outputs: list[Value]
    per_prompt: list[str] = []
    """Inputs declared as scalars that also take one value for each prompt, (batch). Older artifacts have none."""


class File(_Frozen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hex sha256 and size in bytes."""

    sha256: Digest
    size: Annotated[int, msgspec.Meta(ge=0)]


class Scoring(_Frozen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a candidate's positions become one number."""

    aggregation: Aggregation = "last"
    """Used when a program does not choose."""
    token_score: Literal["scorer", "self_certainty"] = "scorer"
    """What scores a token: the scorer, or, in an artifact without one, the self-certainty of the distribution that the
    token was drawn from, in nats (Kang et al., 2025)."""
    activation: Literal["none", "sigmoid", "softmax"] = "none"
    """Applied to every position inside the graph; `sigmoid`, and `softmax` over the labels, give probabilities."""
    vote_weight: Literal["score", "softmax"] = "score"
    """What a candidate adds to its answer in a weighted vote, inside the graph: its score, or, of raw scores, which may
    be below 0, its share in the softmax of the scores of those that vote. Export sets it by the activation."""
    label: int = 0
    """Which of the scorer's labels is the score."""
    labels: list[str] = []
    """Names of the scorer's labels, in order, if they have any."""
    step_token: int | None = None
    """Ends a step; the step forms of the aggregations read only these positions."""
    steps_from: str | None = None
    """The source of where steps end: an option of the export, the checkpoint's config, or its architecture."""
    end_token: int | None = None
    """Appended to a text candidate that does not end with it, unless the caller says that it is partial."""
    reward_token: int | None = None
    """Appended to every text candidate, finished or not: the scorer was trained to be read there."""
    gate_tokens: list[int] = []
    """Of a gated scorer: the header of an assistant's turn. The gate reads the first token of the last one in the
    prompt, and weighs the labels, which are objectives, by what it finds."""
    stop_tokens: list[int] = []
    """End a completion while generating, as the end token does, but are not appended to a candidate."""
    pad_token: int = 0
    passes_pad: bool = False
    """Whether `last` passes over pad tokens that end a candidate, as transformers' sequence classifiers do."""


class PairRules(_Frozen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a reranker's query and document become one text."""

    template: str
    """File of the Jinja template. It gets the messages `query` and `document`, before them the instruction as `system`,
    and a text `border`, which no token reaches across."""
    content: Literal["flat", "structured"] = "flat"
    """Whether the content of a message is a text, or a list of parts `{"type": "text", "text": ...}`."""
    options: dict[str, object] = {}
    """Further variables of the template."""
    instruction: str | None = None
    """Used when a program gives none; without it, the template's own default."""


class TextRules(_Frozen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How text becomes tokens."""

    special_tokens: bool = False
    """Whether plain text gets the tokenizer's own special tokens, such as the one that begins a sequence."""
    unknown: Literal["refuse", "replace"] = "refuse"
    """What becomes of a piece of text that has no token: an error, or the tokenizer's unknown token."""
    chat_template: str | None = None
    """File of the Jinja template that makes one text of messages."""
    template_tokens: dict[str, str] = {}
    """Special tokens by the names that the template uses, such as `bos_token`."""
    pair: PairRules | None = None
    """Of a reranker; the prompt is then a query, and each candidate a document."""
    checked_against: str | None = None
    """The transformers with whose tokens and rendered messages these were compared at export."""
    step_text: str | None = None
    """Ends each step of a text candidate; the step forms of the aggregations read the token of its last character."""
    step_split: str | None = None
    """Where a text candidate without `step_text` is split into steps, each of which then gets it."""


class Limits(_Frozen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Maximum prompt + candidate tokens, and candidates per prompt; checked before anything is allocated."""

    max_tokens: int = 8192
    max_candidates: int = 4096


class Parity(_Frozen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One check made at export, its maximum absolute errors; docs/precision.md has the rule."""

    check: str
    cases: int
    max_difference: float
    """Of ONNX Runtime from PyTorch in float64."""
    pytorch_error: float
    """Of PyTorch in the arithmetic of the graphs from PyTorch in float64, on the same rows."""
    allowed: float | None
    """None for selections, which are compared with NumPy's from the same scores."""


class Agreement(_Frozen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an artifact of fewer bits selects, beside the float32 model, measured at export."""

    prompts: int
    share: float
    """0 to 1: the same candidate, or one that float32 rates lower by at most 1% of the candidates' spread."""
    same: float
    """0 to 1: the same candidate."""
    mean_error: float
    """Of a candidate's score, absolute, on the same prompts."""
    max_error: float
    least: float
    """The share below which export refuses."""
    source: str
    """Where the prompts came from."""

    def __str__(self) -> str:
        return (
            f"A candidate as good as float32's choice is selected for {100 * self.share:.1f}% of {self.prompts} "
            f"prompts ({self.source}), the same one for {100 * self.same:.1f}%; {100 * self.least:g}% were required. "
            f"Scores are off by {self.mean_error:.2g} on average, {self.max_error:.2g} at most."
        )


class Manifest(_Frozen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a program needs to know about an artifact."""

    schema_version: int
    seal: Digest
    """The sha256 of the file itself, taken with 64 zeros in this place."""
    name: str
    source: str | None = None
    """Id and commit of the checkpoint, if it came from a hub."""
    kind: Literal["language_model", "network"]
    model: dict[str, object]
    precision: Precision
    """Of the products of the backbone; norms, attention and scorer are float32 in all."""
    scoring: Scoring
    limits: Limits
    graphs: dict[str, Graph]
    tokenizer: str | None
    text: TextRules = TextRules()
    files: dict[str, File]
    """Every other file of the artifact, except the model card, by its path in it."""
    parity: list[Parity]
    """Against PyTorch with the weights of the same precision."""
    verification: Verification = "full"
    """`quick`: every kind of check, with fewer cases."""
    agreement: Agreement | None = None
    """None at fp32."""
    tools: dict[str, str]

    @property
    def has_scorer(self) -> bool:
        """Whether it scores what it is given; otherwise it only generates."""
        return self.scoring.token_score == "scorer"

    @property
    def is_single_file(self) -> bool:
        """Whether it is one graph with the weights inside."""
        return len(self.graphs) == 1

    @property
    def slug(self) -> str:
        """The name as a folder's and as part of an address: the name itself is for people and may hold anything."""
        return re.sub(r"[^A-Za-z0-9._-]+", "_", self.name).lstrip(".") or "model"

    @property
    def network(self) -> dict[str, object]:
        """The options of the network, without those of the model around it."""
        network = self.model.get("network", self.model)
        if not isinstance(network, dict):
            raise ArtifactError(f"{MANIFEST}, 'model': expected an object 'network'; export the artifact again")
        return network

    def size(self, option: str) -> int:
        """A whole number among the options of the network, or else of the model around it.

        Raises:
            ArtifactError: it is missing, or something else.
        """
        value = self.network.get(option, self.model.get(option))
        if not isinstance(value, int):
            raise ArtifactError(
                f"{MANIFEST}, 'model': expected a whole number '{option}'; got {value!r:.60}; export the artifact again"
            )
        return value


def seal(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: `seal` is their own sha256, taken with its 64 digits as zeros."""
    blank = msgspec.structs.replace(manifest, seal=_BLANK.decode())
    text = msgspec.json.format(msgspec.json.encode(blank), indent=2) + b"\n"
    digest = hashlib.sha256(text).hexdigest().encode()
    return text.replace(b'"seal": "' + _BLANK, b'"seal": "' + digest, 1)


def seal_is_intact(text: bytes) -> bool:
    """Whether the bytes of a manifest.json are as `seal` made them."""
    match = _SEAL.search(text)
    if match is None:
        return False
    blanked = text[: match.start(1)] + _BLANK + text[match.end(1) :]
    return hashlib.sha256(blanked).hexdigest().encode() == match[1]
