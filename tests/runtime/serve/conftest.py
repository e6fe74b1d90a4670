"""One server for the tests of a file: a file that defines `engine` itself gets the server of that engine."""

import contextlib
import json

import httpx
import msgspec
import openai
import pytest
import tokenizers

import bonnx
from bonnx.runtime.artifact.manifest import Limits, Scoring, TextRules
from bonnx.runtime.engine.engine import Engine, open_engine
from bonnx.runtime.serve import Settings
from bonnx.runtime.text.chat import ChatTemplate
from bonnx.runtime.text.compose import Composer
from bonnx.runtime.text.reader import Reader
from bonnx.runtime.text.tokenizer import Tokenizer
from bonnx.runtime.upstream.settings import UpstreamSettings
from tests.runtime.serve.servers import served
from tests.runtime.serve.texts import LETTERS, TEMPLATE
from tests.runtime.upstream.fake import FakeUpstream


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
def chat_engine(countdown):
    """Countdown, which reads messages, too: their contents one after the other."""
    opened = open_engine(countdown, provider="cpu")
    template = ChatTemplate("{% for m in messages %}{{ m.content or '24-3=21;' }}{% endfor %}", {})
    composer = Composer(opened.manifest.text, template)
    return Engine(opened.manifest, Reader(opened.manifest, opened.reader.tokenizer, composer), opened.session)


@pytest.fixture
def behind(chat_engine):
    """A client of a server whose upstream behaves as it is told, and the upstream."""
    with contextlib.ExitStack() as stack:

        def connect(*behaviours, retries=0, **settings):
            upstream = stack.enter_context(FakeUpstream(*behaviours))
            settings = {"best_of": 3, "upstream": UpstreamSettings(upstream.url, "llm", retries=retries), **settings}
            url = stack.enter_context(served(chat_engine, Settings(**settings)))
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            return stack.enter_context(client), upstream

        yield connect


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
