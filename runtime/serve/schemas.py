"""The requests, as FastAPI checks and documents them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from bonnx.errors import near_miss

from ..artifact.manifest import Aggregation
from ..generate.options import option_help

__all__ = ["BestOfN", "Message", "Rerank", "Score", "explain"]

# No request has more of anything: what is longer is refused before it is looked through.
_MOST = 2**16
_MOST_STOPS = 1024


class _FailFast(FailFast):
    """A list is refused at its first bad item; hashable, as a member of a union must be before Python 3.12."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


_FIRST = _FailFast()


def _text(value: Any) -> str:
    """Any text, even one that is no Unicode: what cannot be encoded is told of its own, and ends no request."""
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "expected a text")
    return value


class _Request(BaseModel):
    """A field that is null counts as not given; every field that is not known is refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    elsewhere: ClassVar[dict[str, str]] = {}
    """Fields of other servers with the same endpoints, and what to do instead."""

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, advice in cls.elsewhere.items():
            if data.get(name) is not None:
                raise PydanticCustomError("elsewhere", "{name}: {advice}", {"name": name, "advice": advice})
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()} | {*cls.elsewhere}
        return {name: value for name, value in data.items() if value is not None or name not in optional}


class Message(BaseModel):
    """One message of a conversation; whatever else it has is handed to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: Any = Field(None, description="a text or a list of text parts; may be left out beside tool_calls")


Text: TypeAlias = Annotated[str, PlainValidator(_text, json_schema_input_type=str)]
Messages: TypeAlias = Annotated[list[Message], _FIRST]
Texts: TypeAlias = Annotated[list[Text], _FIRST]
Tokens: TypeAlias = Annotated[list[Annotated[int, Field(strict=True)]], _FIRST]
Embeddings: TypeAlias = Annotated[list[Annotated[list[float], _FIRST]], _FIRST]
Prompt: TypeAlias = Text | Messages | Tokens | Embeddings
Candidate: TypeAlias = Text | Texts | Messages | Tokens | Embeddings
Answer: TypeAlias = str | Annotated[int, Field(ge=-(2**63), lt=2**63)] | None


class Document(BaseModel):
    """A text to rank; whatever else it has comes back with `return_documents`."""

    model_config = ConfigDict(extra="allow")
    text: Text


_TEXTS = "expected a text, or a list of at least one"
_NOT_CUT = "documents are never cut here; leave it out, and send documents that fit"
_TRUNCATE = 'send "truncate": true to leave out the beginning of {} that is too long'
_RAW = "scores are always as the model gives them; leave it out"


class Rerank(_Request):
    """As Cohere and vLLM take it."""

    elsewhere = {
        "max_tokens_per_doc": _NOT_CUT,
        "max_chunks_per_doc": _NOT_CUT,
        "truncate_prompt_tokens": _TRUNCATE.format("a query"),
        "truncation_direction": _TRUNCATE.format("a query"),
        "rank_fields": "a document is ranked by its 'text' alone; leave it out",
        "relevant_spans": "none are looked for here; leave it out",
        "priority": "requests run in the order in which they come; leave it out",
        "texts": "send them as 'documents'; the answer is in the form of Cohere, not of Text Embeddings Inference",
        "return_text": 'send "return_documents": true',
        "raw_scores": _RAW,
        "activation": _RAW,
        "use_activation": _RAW,
    }
    query: Text | Messages = Field(description="expected text, or messages")
    documents: Annotated[list[Text | Document], _FIRST] = Field(
        min_length=1, max_length=_MOST, description="expected a list of at least one text, or objects with a text"
    )
    top_n: int | None = Field(None, ge=1, description="how many of the best to return; all if not given")
    return_documents: bool = False
    model: str | None = Field(None, description="this server's model, if it is given")
    aggregation: Aggregation | None = None
    truncate: bool = Field(False, description="leave out the beginning of a query that is too long")


class Score(_Request):
    """As vLLM takes it: one text against many, or as many pairs."""

    elsewhere = {
        "truncate_prompt_tokens": _TRUNCATE.format("a text_1"),
        "queries": "send them as 'text_1'",
        "documents": "send them as 'text_2'",
        "items": "send them as 'text_2'",
        "data_1": "send it as 'text_1'",
        "data_2": "send it as 'text_2'",
        "activation": _RAW,
        "use_activation": _RAW,
    }
    text_1: Text | Annotated[Texts, Field(min_length=1, max_length=_MOST)] = Field(description=_TEXTS)
    text_2: Text | Annotated[Texts, Field(min_length=1, max_length=_MOST)] = Field(description=_TEXTS)
    model: str | None = None
    aggregation: Aggregation | None = None
    truncate: bool = Field(False, description="leave out the beginning of a text_1 that is too long")


class BestOfN(_Request):
    """Candidates to choose from, or how many to make."""

    elsewhere = {
        "messages": "send them as 'prompt'",
        "max_tokens": "send it as 'max_new_tokens'",
        "truncate_prompt_tokens": _TRUNCATE.format("a prompt"),
    }
    prompt: Prompt = Field(
        description="expected text, messages, token ids, or embeddings as a list of lists of numbers"
    )
    candidates: Annotated[list[Candidate], _FIRST, Field(min_length=1, max_length=_MOST)] | None = Field(
        None,
        description="expected a list of at least one: text, messages, a list of steps, token ids or embeddings each",
    )
    n: int | None = Field(None, ge=1, strict=True, description="completions to generate, if there are no candidates")
    model: str | None = None
    aggregation: Aggregation | None = None
    vote: Literal["score", "weighted", "majority"] = "score"
    answers: Literal["boxed", "number"] | Annotated[list[Answer], _FIRST] | None = Field(
        None, description="expected what each candidate votes for, or 'boxed' or 'number' to find it in their texts"
    )
    partial: bool = Field(False, description="candidates are not finished: no end token is appended")
    truncate: bool = Field(False, description="leave out the beginning of a prompt that is too long")
    token_scores: bool = Field(False, description="also return the score of every token")
    max_new_tokens: int | None = Field(None, ge=1, strict=True, description=option_help("max_new_tokens"))
    temperature: float | None = Field(None, ge=0, description=option_help("temperature"))
    top_k: int | None = Field(None, ge=0, strict=True, description=option_help("top_k"))
    top_p: float | None = Field(None, gt=0, le=1, description=option_help("top_p"))
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, strict=True, description=option_help("seed"))
    stop: Text | Annotated[list[Text | int], _FIRST, Field(max_length=_MOST_STOPS)] | None = Field(
        None, description=f"expected a text of one token, or a list of at most {_MOST_STOPS} of them or of token ids"
    )
    stream: bool = Field(False, description="server-sent events while it generates")
    deadline: float | None = Field(None, gt=0, description="seconds after which what still grows is cut")


def explain(errors: list[dict[str, Any]], request: type[BaseModel] | None) -> str:
    """What a validation found, in a sentence or two.

    Args:
        errors: as pydantic lists them.
        request: what the body should have been.
    """
    said = []
    fields = request.model_fields if request else {}
    for error in errors:
        place = [str(part) for part in error["loc"] if part != "body"]
        described = fields[place[0]].description if place and place[0] in fields else None
        if error["type"] == "elsewhere":
            said.append(error["msg"])
        elif error["type"] == "extra_forbidden" and len(place) == 1:
            said.append(f"unknown field '{place[0]:.60}'; {near_miss(place[0], fields, 'known fields')}")
        elif not place and error["type"] == "string_unicode":
            said.append("a name in the body is no Unicode text")
        elif not place:
            said.append("expected a JSON object as the body")
        elif (error["type"] != "missing" or place[1:]) and described is not None and described.startswith("expected "):
            # A field of several kinds has an error for each of them.
            inside = [part for part in error["loc"] if part != "body"][1:2]
            which = f"; {place[0]}[{inside[0]}] is not one of these" if inside and isinstance(inside[0], int) else ""
            said.append(f"{place[0]}: {described}{which}")
        else:
            said.append(f"{'.'.join(place)[:120]}: {error['msg'][:1].lower()}{error['msg'][1:200]}")
    return "; ".join([*dict.fromkeys(said)][:3])
