"""What the bodies of the endpoints share: their base class, types of fields, sampling options, and errors in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from bonnx.errors import near_miss

from ..checks import number_words, shown
from ..generate.options import DEFAULTS, option_bounds, option_definition, option_help

__all__ = [
    "FAIL_FAST",
    "INSTRUCTION",
    "MOST_ITEMS",
    "RAW_SCORES",
    "TRUNCATE",
    "Candidate",
    "Message",
    "Messages",
    "Prompt",
    "RequestBody",
    "Text",
    "Texts",
    "Tokens",
    "explain",
    "option_field",
    "with_options",
]

# No request has more of anything: what is longer is refused before it is looked through.
MOST_ITEMS = 2**16
# What to do instead of fields that several endpoints of other servers have.
INSTRUCTION = "what makes a document relevant, for a reranker; by default the model's own"
TRUNCATE = 'send "truncate": true to leave out the beginning of {} that is too long'
RAW_SCORES = "scores are always as the model gives them; leave it out"
_Model = TypeVar("_Model", bound=BaseModel)


class _FailFast(FailFast):
    """A list is refused at its first bad item; hashable, as a member of a union must be before Python 3.12."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


FAIL_FAST = _FailFast()


def _text(value: object) -> str:
    """Any text, even one that is not Unicode: the reader names what cannot be encoded."""
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "expected a text")
    return value


class RequestBody(BaseModel):
    """The body of a request. A field that is null counts as not given; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    elsewhere: ClassVar[dict[str, str]] = {}
    """Fields that other servers have at the same endpoint, and what to do instead."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        for name, advice in cls.elsewhere.items():
            if data.get(name) is not None:
                raise PydanticCustomError("elsewhere", "{name}: {advice}", {"name": name, "advice": advice})
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()} | {*cls.elsewhere}
        return {name: value for name, value in data.items() if value is not None or name not in optional}


class Message(BaseModel):
    """One message of a conversation; the chat template gets all of its fields, those that are not listed here, too."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: Any = Field(None, description="a text or a list of text parts; may be left out beside tool_calls")


Text: TypeAlias = Annotated[str, PlainValidator(_text, json_schema_input_type=str)]
Messages: TypeAlias = Annotated[list[Message], FAIL_FAST]
Texts: TypeAlias = Annotated[list[Text], FAIL_FAST]
Tokens: TypeAlias = Annotated[list[Annotated[int, Field(strict=True)]], FAIL_FAST]
Embeddings: TypeAlias = Annotated[list[Annotated[list[float], FAIL_FAST]], FAIL_FAST]
Prompt: TypeAlias = Text | Messages | Tokens | Embeddings
Candidate: TypeAlias = Text | Texts | Messages | Tokens | Embeddings


def option_field(name: str, **changes: object) -> Any:
    """The field of a sampling option, with the bounds, the default and the description of its definition."""
    kinds = get_args(option_definition(name)[0]) or (option_definition(name)[0],)
    # A number with a fraction is not whole, though it may be 2.0.
    settings = {"default": DEFAULTS[name], "description": option_help(name), "strict": int in kinds or None}
    return Field(**{**settings, **option_bounds(name), **changes})


def with_options(*names: str) -> Callable[[type[_Model]], type[_Model]]:
    """For a body: it gets these sampling options as fields, with the types and bounds of their definition."""

    def add(model: type[_Model]) -> type[_Model]:
        fields: dict[str, Any] = {name: (option_definition(name)[0], option_field(name)) for name in names}
        return create_model(
            model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **fields
        )

    return add


def explain(errors: Sequence[ErrorDetails], body: type[BaseModel] | None) -> str:
    """What is wrong with a request, in a sentence or two.

    Args:
        errors: as pydantic lists them.
        body: what the body should have been.
    """
    fields = body.model_fields if body else {}
    places = [[part for part in error["loc"] if part != "body"] for error in errors]
    said = [_explain_one(error, place, fields) for error, place in zip(errors, places, strict=True)]
    return "; ".join([*dict.fromkeys(said)][:3])


def _explain_one(
    error: ErrorDetails, place: Sequence[int | str], fields: Mapping[str, FieldInfo], prefix: str = ""
) -> str:
    inner = _body_of(fields[str(place[0])]) if len(place) > 1 and place[0] in fields else None
    if inner is not None:
        # A field of an object within the body.
        return _explain_one(error, place[1:], inner.model_fields, f"{prefix}{place[0]}.")
    if error["type"] == "elsewhere":
        return error["msg"]
    if not place:
        unicode = error["type"] == "string_unicode"
        return "a name in the body is no Unicode text" if unicode else "expected a JSON object as the body"
    name = str(place[0])
    called = prefix + name
    if error["type"] == "extra_forbidden" and len(place) == 1:
        return f"unknown field '{called:.60}'; {near_miss(name, fields, 'known fields')}"
    if name in fields and (error["type"] != "missing" or place[1:]):
        described, expected = fields[name].description, _expected_number(fields[name]) or _expected_word(error)
        if expected is not None and len(place) == 1:
            return f"{called}: expected {expected}; got {shown(error['input'])}"
        if described is not None and described.startswith("expected "):
            # A field of several kinds has an error for each of them.
            item = place[1] if len(place) > 1 else None
            return f"{called}: {described}" + (
                f"; {called}[{item}] is not one of these" if isinstance(item, int) else ""
            )
        if _takes_sqrt(fields[name]):
            return f"{called}: expected a whole number of at least 1, or 'sqrt'; got {shown(error['input'])}"
    whole = prefix + ".".join(map(str, place))
    return f"{whole[:120]}: {error['msg'][:1].lower()}{error['msg'][1:200]}"


def _body_of(field: FieldInfo) -> type[RequestBody] | None:
    """The class of a field that is an object with fields of its own."""
    kinds = get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, RequestBody)), None)


def _takes_sqrt(field: FieldInfo) -> bool:
    """Whether a field is a `Count`."""
    return Literal["sqrt"] in get_args(field.annotation)


def _expected_word(error: ErrorDetails) -> str | None:
    """What a field takes that has a few values, is true or false, or is an object; None for another field."""
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"])
    if error["type"] in ("model_type", "model_attributes_type"):
        return "a JSON object"
    return "true or false" if error["type"] in ("bool_type", "bool_parsing") else None


def _expected_number(field: FieldInfo) -> str | None:
    """What a field with a number takes; None for a field with something else."""
    kinds = {*(get_args(field.annotation) or [field.annotation])} - {NoneType}
    if kinds not in ({int}, {float}):
        return None
    keys = ("ge", "gt", "le", "lt")
    bounds: dict[str, float] = {
        key: getattr(bound, key) for bound in field.metadata for key in keys if hasattr(bound, key)
    }
    return number_words("a whole number" if kinds == {int} else "a number", **bounds)
