"""One server for the tests of a file: a file that defines `engine` itself gets the server of that engine."""

import json

import httpx
import msgspec
import pytest
import tokenizers

import bonnx
from bonnx.runtime.artifact.manifest import Limits, Scoring, TextRules
from bonnx.runtime.engine.engine import Engine, open_engine
from bonnx.runtime.text.chat import ChatTemplate
from bonnx.runtime.text.compose import Composer
from bonnx.runtime.text.reader import Reader
from bonnx.runtime.text.tokenizer import Tokenizer
from tests.runtime.serve.servers import served
from tests.runtime.serve.texts import LETTERS, TEMPLATE


@pytest.fixture(scope="module")
def engine(countdown):
    """The model that ships."""
    return open_engine(countdown)


@pytest.fixture(scope="module")
def model(engine):
    """The same model without a server."""
    return bonnx.Model(engine)


@pytest.fixture(scope="module")
def url(engine):
    """The address of a server."""
    with served(engine) as url:
        yield url


@pytest.fixture
def client(url):
    """A client of that server."""
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def post(client):
    """Posts a body that `json=` could not send, such as half of a surrogate pair."""
    headers = {"Content-Type": "application/json"}
    return lambda path, body: client.post(path, content=json.dumps(body), headers=headers)


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of letters, and pairs of them: "ab" is one token even where a prompt ends with "a"."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    merges = [("a", "b"), ("t", "h"), ("e", "r")]
    vocabulary |= {a + b: len(LETTERS) + i for i, (a, b) in enumerate(merges)}
    vocabulary["?"] = len(vocabulary)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="?"))
    made.add_special_tokens([tokenizers.AddedToken("[end]")])
    return made


@pytest.fixture(scope="module")
def letters_engine(tiny, letters, tmp_path_factory):
    """An engine of the small language model, which reads text and messages; at most 60 tokens."""
    opened = open_engine(tiny)
    place = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    letters.save(str(place))
    scoring = Scoring(end_token=letters.token_to_id("[end]"))
    manifest = msgspec.structs.replace(opened.manifest, scoring=scoring, limits=Limits(max_tokens=60))
    text = Tokenizer(place, scoring, TextRules())
    reader = Reader(manifest, text, Composer(TextRules(), ChatTemplate(TEMPLATE, {})))
    return Engine(manifest, reader, opened.session)
