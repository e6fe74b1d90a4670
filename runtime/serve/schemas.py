"""The requests, as FastAPI checks and documents them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, FailFast, Field

from ..errors import near_miss

__all__ = ["BestOfN", "Message", "Rerank", "Score", "explain"]


class _FailFast(FailFast):
    """A list is refused at its first bad item; hashable, as a member of a union must be before Python 3.12."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


_FIRST = _FailFast()


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: Any


Texts: TypeAlias = Annotated[list[str], _FIRST]
Tokens: TypeAlias = Annotated[list[Annotated[int, Field(strict=True)]], _FIRST]
Embeddings: TypeAlias = Annotated[list[Annotated[list[float], _FIRST]], _FIRST]
Prompt: TypeAlias = str | Annotated[list[Message], _FIRST] | Tokens | Embeddings
Candidate: TypeAlias = str | Texts | Tokens | Embeddings
Aggregation: TypeAlias = Literal[
    "last", "mean", "min", "max", "prod", "step_last", "step_mean", "step_min", "step_max", "step_prod"
]


class Document(BaseModel):
    """A text to rank."""

    model_config = ConfigDict(extra="ignore")
    text: str


_TEXTS = "expected a text, or a list of at least one"


class Rerank(_Request):
    """As Cohere and vLLM take it."""

    query: str | Annotated[list[Message], _FIRST] = Field(description="expected text, or messages")
    documents: Annotated[list[str | Document], _FIRST] = Field(
        min_length=1, description="expected a list of at least one text, or objects with a text"
    )
    top_n: int | None = Field(None, ge=1, description="how many of the best to return; all if not given")
    return_documents: bool = False
    model: str | None = Field(None, description="this server's model, if it is given")
    aggregation: Aggregation | None = None
    truncate: bool = Field(False, description="leave out the beginning of a query that is too long")


class Score(_Request):
    """As vLLM takes it: one text against many, or as many pairs."""

    text_1: str | Annotated[list[str], _FIRST, Field(min_length=1)] = Field(description=_TEXTS)
    text_2: str | Annotated[list[str], _FIRST, Field(min_length=1)] = Field(description=_TEXTS)
    model: str | None = None
    aggregation: Aggregation | None = None
    truncate: bool = False


class BestOfN(_Request):
    """Candidates to choose from, or how many to make."""

    prompt: Prompt = Field(
        description="expected text, messages, token ids, or embeddings as a list of lists of numbers"
    )
    candidates: Annotated[list[Candidate], _FIRST, Field(min_length=1)] | None = Field(
        None, description="expected a list of at least one: text, a list of steps, token ids or embeddings each"
    )
    n: int | None = Field(None, ge=1, strict=True, description="completions to generate, if there are no candidates")
    model: str | None = None
    aggregation: Aggregation | None = None
    vote: Literal["score", "weighted", "majority"] = "score"
    answers: Literal["boxed", "number"] | Annotated[list[str | int | None], _FIRST] | None = Field(
        None, description="expected what each candidate votes for, or 'boxed' or 'number' to find it in their texts"
    )
    partial: bool = Field(False, description="candidates are not finished: no end token is appended")
    truncate: bool = Field(False, description="leave out the beginning of a prompt that is too long")
    token_scores: bool = Field(False, description="also return the score of every token")
    max_new_tokens: int | None = Field(None, ge=1, strict=True)
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=0, strict=True)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, strict=True)
    stop: Annotated[list[str | int], _FIRST] | None = Field(
        None, description="expected a list of texts of one token each, or of token ids"
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
        if error["type"] == "extra_forbidden" and len(place) == 1:
            said.append(f"unknown field '{place[0]:.60}'; {near_miss(place[0], fields, 'known fields')}")
        elif error["type"] == "json_invalid":
            said.append(f"the body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}")
        elif not place:
            said.append("expected a JSON object as the body, with Content-Type: application/json")
        elif error["type"] != "missing" and described is not None and described.startswith("expected "):
            # A field of several kinds has an error for each of them.
            said.append(f"{place[0]}: {described}")
        else:
            said.append(f"{'.'.join(place)[:120]}: {error['msg'][:1].lower()}{error['msg'][1:200]}")
    return "; ".join([*dict.fromkeys(said)][:3])
