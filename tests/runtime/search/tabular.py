"""A language model and scorer that are a table: what follows a prefix, and its score, is a function of it alone.

It stands behind the sessions `prefill` and `decode`, and keeps the tokens themselves in its cache: a cache that is
dropped, forked or joined wrongly shows.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from bonnx.runtime.artifact.manifest import Limits, Scoring, Value
from bonnx.runtime.engine.engine import Engine
from bonnx.runtime.text.stops import Stops

VOCABULARY, STEP, END = 6, 4, 5
PROMPT = [1, 2]


class Held:
    """An array that a session holds."""

    def __init__(self, array):
        self.array = np.asarray(array)

    def numpy(self):
        return self.array


class Table:
    """The model; `longest` is the most tokens of a completion."""

    def __init__(self, seed, longest=9, stops=(END,)):
        self.seed, self.longest, self.stops = seed, longest, stops
        self.computed = 0
        self.manifest = SimpleNamespace(
            scoring=Scoring(step_token=STEP, end_token=END, activation="sigmoid"),
            limits=Limits(max_tokens=len(PROMPT) + longest), seal="0" * 64, name="table", has_scorer=True,
        )  # fmt: skip
        reader = SimpleNamespace(tokenizer=None, prompt=np.array, stops=lambda given, scoring: Stops(tokens=self.stops))
        self.engine = Engine(self.manifest, reader, self.session)

    def _rng(self, *what):
        return np.random.default_rng([self.seed, *(int(w) + 1 for w in what)])

    def logits(self, prefix):
        logits = 1.5 * self._rng(7, *prefix).standard_normal(VOCABULARY)
        # A step has a few tokens, and a completion a few steps.
        logits[STEP] += 0.7 * (len(prefix) % 3 == 2) - 1
        logits[END] += 0.5 * len(prefix) - 3
        return logits.astype(np.float32)

    def score(self, prefix):
        return float(np.float32(self._rng(8, *prefix).uniform()))

    def log_prob(self, prefix, token):
        logits = self.logits(prefix).astype(float)
        return float(logits[token] - np.log(np.exp(logits).sum()))

    def draw(self, prefix, number, temperature=1.0):
        if temperature == 0:
            return int(self.logits(prefix).argmax())
        shares = np.exp(self.logits(prefix) / temperature)
        point = self._rng(9, number, len(prefix)).uniform() * shares.sum()
        return int(min(np.searchsorted(np.cumsum(shares), point, side="right"), VOCABULARY - 1))

    def session(self, name):
        inputs = [Value(name=part, dtype="int64", shape=["rows"]) for part in ("tokens", "sources")]
        cache = ("key.0", "value.0")
        inputs += [Value(name=part, dtype="float32", shape=["rows", 1, "t", 1]) for part in cache]
        run = {"prefill": self._prefill, "decode": self._decode}[name]
        hold = lambda arrays: {key: Held(array) for key, array in arrays.items()}  # noqa: E731
        return SimpleNamespace(graph=SimpleNamespace(inputs=inputs), hold=hold, values=run)

    def _prefill(self, feeds, logits=False, stop=None):
        count, temperature = int(feeds["num_candidates"][0]), float(feeds["temperature"][0])
        assert feeds["input_ids"].tolist() == [PROMPT]
        tokens = [[self.draw((), number, temperature)] for number in range(count)]
        found = {"tokens": tokens, "log_probs": [[self.log_prob((), t[0])] for t in tokens], "stream": [0]}
        return {name: Held(value) for name, value in {**found, "logits": [self.logits(())]}.items()}

    def _decode(self, feeds, logits=False, stop=None):
        arrays = {name: value.numpy() if isinstance(value, Held) else value for name, value in feeds.items()}
        tokens, lengths = arrays["tokens"], arrays["lengths"]
        start = arrays["key.0"].shape[2] - lengths.max()
        key, value = (arrays[name][arrays["sources"], :, start:] for name in ("key.0", "value.0"))
        assert np.array_equal(2 * key, value)
        assert arrays["prompts"].tolist() == [0] * len(tokens)
        self.computed += len(tokens)
        prefixes = [
            (*(int(t) for t in row[0, lengths.max() - length :, 0]), int(token))
            for row, length, token in zip(key, lengths, tokens, strict=True)
        ]
        drawn = [
            self.draw(prefix, int(number), float(arrays["temperature"][0]))
            for prefix, number in zip(prefixes, arrays["numbers"], strict=True)
        ]
        new = tokens[:, None, None, None].astype(np.float32)
        found = {
            "scores": np.array([self.score(prefix) for prefix in prefixes], np.float32),
            "next_tokens": np.array(drawn),
            "log_probs": np.array([self.log_prob(p, t) for p, t in zip(prefixes, drawn, strict=True)], np.float32),
            "logits": np.array([self.logits(prefix) for prefix in prefixes]),
            "grown_key.0": np.concatenate([key, new], 2),
            "grown_value.0": np.concatenate([value, 2 * new], 2),
        }
        return {name: Held(array) for name, array in found.items()}
