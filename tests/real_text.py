"""Text of an artifact beside transformers', on prompts that people write: for the slow test and the benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bonnx
from bonnx.export.verify.draws import expected_token, uniform
from bonnx.runtime.generate.options import CheckedOptions

PROMPTS = (
    "What is the capital of France?",
    "Explain photosynthesis in two sentences.",
    "Write a short poem about the sea.",
    "What is 17+25?",
    "Give three tips for sleeping better.",
    "Translate 'good morning' to Spanish.",
    "Who wrote Romeo and Juliet?",
    "How do I boil an egg?",
    "Name five animals that live in Africa.",
    "What is the difference between a list and a tuple in Python?",
    "Write a SQL query that counts the users of each country.",
    "Summarize the plot of Cinderella.",
    "What causes rain?",
    "How many days are there in a leap year?",
    "Write an email that asks for a day off.",
    "Suggest a name for a bakery.",
    "What is the boiling point of water in Fahrenheit?",
    "Explain gravity to a child.",
    "List the planets of the solar system in order.",
    "What is 12*7?",
    "Write a function in Python that reverses a string.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is the largest ocean?",
    "How do vaccines work?",
    "Write a haiku about autumn.",
    "What does HTTP stand for?",
    "Describe the water cycle.",
    "Who was Marie Curie?",
    "What is a noun?",
    "How can I save money on groceries?",
    "What is 100-37?",
    "Write a slogan for a bicycle shop.",
    "What is machine learning?",
    "Name three primary colors.",
    "How far is the moon from the earth?",
    "Give an example of a metaphor.",
    "What should I pack for a trip to the mountains?",
    "Explain what a prime number is.",
    "What is the currency of Japan?",
    "Write two sentences about your favorite season.",
    "How do I change a flat tire?",
    "What is DNA?",
    "Convert 5 kilometers to miles.",
    "What are the benefits of walking?",
    "Who painted the Mona Lisa?",
    "Write a riddle about time.",
    "What is the square root of 144?",
    "How does a refrigerator work?",
    "Say thank you in French, German and Italian.",
)
NEW_TOKENS = 32


class Same(NamedTuple):
    """How many prompts got transformers' text, and how many part from it only where rounding decides the token."""

    equal: int
    rounding: int
    different: list[str]


def pretrained(model: Path) -> dict[str, str]:
    """Arguments of `from_pretrained` of transformers for a folder or a GGUF file."""
    if model.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(model.parent), "gguf_file": model.name}
    return {"pretrained_model_name_or_path": str(model)}


def compare_log_probs(model: Path, artifact: Path, prompts: Sequence[str] = PROMPTS[:10]) -> float:
    """Return the largest difference of a greedy token's log-probability from the one that transformers gives it."""
    network = AutoModelForCausalLM.from_pretrained(**pretrained(model), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**pretrained(model))
    loaded, worst = bonnx.load(artifact, provider="cpu"), 0.0
    for text in prompts:
        prompt = tokenizer(text)["input_ids"]
        candidate = loaded.generate(np.array(prompt), max_new_tokens=16, temperature=0.0).best
        with torch.no_grad():
            logits = network(torch.tensor([[*prompt, *candidate.tokens]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(candidate.tokens)), candidate.tokens].numpy()
        worst = max(worst, float(np.abs(np.asarray(candidate.log_probs) - expected).max()))
    return worst


def compare_text(source: Path, artifact: Path, prompts: Sequence[str] = PROMPTS) -> dict[str, Same]:
    """Greedy and sampled completions of each prompt, `NEW_TOKENS` tokens long.

    transformers knows nothing of our random numbers, so the reference draws from its logits by the documented rule.
    """
    network = AutoModelForCausalLM.from_pretrained(**pretrained(source), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**pretrained(source))
    model = bonnx.load(artifact, provider="cpu")
    results = {}
    for kind, temperature in (("greedy", 0.0), ("sampled", 0.8)):
        equal, rounding, different = 0, 0, []
        for seed, text in enumerate(prompts):
            prompt: Any = text
            if tokenizer.chat_template is not None:
                prompt = [{"role": "user", "content": text}]
                ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
            else:
                ids = tokenizer(text)["input_ids"]
            given = {"max_new_tokens": NEW_TOKENS, "temperature": temperature, "seed": seed}
            candidate = model.generate(prompt, **given).best
            stops = tuple(model.manifest.scoring.stop_tokens)
            request = CheckedOptions(1, NEW_TOKENS, temperature, 0, 1.0, seed, stops, "last", 0, 0.5)
            verdict = "equal"
            for step, (token, margin) in enumerate(_reference(network, np.array(ids), candidate.tokens, request)):
                if token != candidate.tokens[step]:
                    verdict = "rounding" if margin < 1e-3 else f"{text}: token {step}, margin {margin:.2g}"
                    break
            expected = tokenizer.decode(candidate.tokens, skip_special_tokens=True)
            if verdict == "equal" and candidate.text != expected:
                verdict = f"{text}: text {candidate.text!r}, expected {expected!r}"
            equal, rounding = equal + (verdict == "equal"), rounding + (verdict == "rounding")
            different += [verdict] if verdict not in ("equal", "rounding") else []
        results[kind] = Same(equal, rounding, different)
    return results


@torch.no_grad()
def _reference(network: Any, prompt: Any, tokens: Any, request: CheckedOptions) -> Iterator[tuple[int, float]]:
    """transformers' token at each step, behind the artifact's own tokens, and how far the draw is from an edge."""
    row, cache = torch.from_numpy(prompt)[None], None
    for step in range(len(tokens)):
        out = network(row, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[0, -1].double().numpy()
        yield expected_token(logits, uniform(request.seed, prompt, step, 0), request)
        row = torch.from_numpy(tokens[step : step + 1])[None]
