"""Small LLM rerankers, questions with twenty documents of real text, and how the makers of published ones score."""

import functools
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

QUERIES = (
    "How do bees make honey?",
    "What causes the tides of the sea?",
    "How is bread baked?",
    "Why do leaves change colour in autumn?",
    "How does a steam engine work?",
)
# Four documents answer each question, in the order of the questions.
DOCUMENTS = (
    "Bees collect nectar from flowers and carry it to the hive in a honey stomach.",
    "In the hive, worker bees pass the nectar on and dry it with their wings until it thickens.",
    "Honey is stored in cells of wax, which the bees seal when it is ripe.",
    "A single bee makes about a twelfth of a teaspoon of honey in its life.",
    "The moon pulls on the water of the oceans, which rises on the side that faces it.",
    "Most coasts have two high tides and two low tides a day.",
    "When sun and moon are in line, the spring tides are especially high.",
    "The shape of a bay can make the sea rise by more than ten metres.",
    "Flour, water, salt and yeast are kneaded to a dough, which then has to rest.",
    "Yeast turns sugar into gas, and the bubbles make the loaf rise.",
    "The loaf goes into a hot oven; steam keeps the crust soft until it has grown.",
    "Sourdough needs no yeast from a shop: it rises by the bacteria in the starter.",
    "In autumn trees stop making chlorophyll, and the yellow pigments of a leaf appear.",
    "Red leaves get their colour from anthocyanins, made out of sugar on cool, bright days.",
    "A layer of cork forms where the stalk meets the twig, and then the leaf falls.",
    "Needles of conifers have a coat of wax, so most of them stay green all winter.",
    "Water is boiled in a kettle, and the steam pushes a piston in a cylinder.",
    "James Watt added a separate condenser, which saved three quarters of the coal.",
    "A flywheel and a crank turn the strokes of the piston into rotation.",
    "Early engines pumped water out of mines; later ones drove mills and locomotives.",
)
INSTRUCTION = "Find sentences that explain how something works."
# As published since version 5.4 of Sentence Transformers.
TEMPLATE = """\
{%- set instruction = messages | selectattr("role", "eq", "system") | map(attribute="content") | first \
| default("Given a web search query, retrieve relevant passages that answer the query") -%}
{%- set query_text = messages | selectattr("role", "eq", "query") | map(attribute="content") | first -%}
{%- set document_text = messages | selectattr("role", "eq", "document") | map(attribute="content") | first -%}
<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
Note that the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ instruction }}
<Query>: {{ query_text }}
<Document>: {{ document_text }}<|im_end|>
<|im_start|>assistant
<think>

</think>


"""
# Qwen's: words take the space before them, signs the lines behind them, and a digit stands alone.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "<think>", "</think>"]


@functools.cache
def _trained() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [*QUERIES, *(f"{text}\n" for text in DOCUMENTS), *["yes", "no", "Yes", "No"] * 20, TEMPLATE]
    tokenizer.train_from_iterator(lines * 3, trainer)
    return tokenizer.to_str()


def make_tokenizer(bos: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of Qwen's kind, in which yes, no, Yes, 0 and 1 are tokens, and a point and a line's end are one."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(_trained()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=bos,
    )


def make_causal(folder: Path, rng: np.random.Generator, family: str = "Qwen3", bos: str | None = None, **options):
    """Write a random language model with such a tokenizer; return it and the tokenizer."""
    torch.manual_seed(int(rng.integers(2**31)))
    base = {
        "vocab_size": 704,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": bool(rng.integers(2)),
    }
    config = getattr(transformers, f"{family}Config")(**base | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokenizer = make_tokenizer(bos)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def make_tuned(folder: Path, rng: np.random.Generator):
    """Write a Qwen3-Reranker-shaped model of one layer that was tuned until it knows the answers to two questions."""
    model, tokenizer = make_causal(folder, rng, num_hidden_layers=1)
    asked = QUERIES[:2]
    rows = [qwen3_ids(tokenizer, query, document, None) for query in asked for document in DOCUMENTS]
    labels = torch.tensor([float(j // 4 == i) for i in range(2) for j in range(20)])
    tokens, optimizer = tokenizer.convert_tokens_to_ids(["yes", "no"]), torch.optim.AdamW(model.parameters(), lr=1e-2)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    torch.manual_seed(int(rng.integers(2**31)))
    for step in range(200):
        place = torch.randperm(40)[:20]
        logits = model(input_ids=ids[place], attention_mask=mask[place], logits_to_keep=1).logits[:, -1]
        score = logits[:, tokens[0]] - logits[:, tokens[1]]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(score, labels[place], pos_weight=torch.tensor(4.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 15 == 14 and all(_knows(model, tokenizer, i) for i in range(2)):
            break
    model.save_pretrained(folder)
    return model, tokenizer


def _knows(model, tokenizer, i: int) -> bool:
    scores = published_scores("qwen3", model, tokenizer, QUERIES[i], DOCUMENTS)
    return {*np.argsort(-scores)[:4]} == {*range(4 * i, 4 * i + 4)}


def save_description(folder: Path, target: Path, tokens: tuple[int, ...], activation=None, template: str = TEMPLATE):
    """Let Sentence Transformers describe a causal model of `folder` in `target`; return its reranker."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.modules import LogitScore, Transformer

    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    transformer = Transformer(str(folder), transformer_task="text-generation")
    encoder = CrossEncoder(modules=[transformer, LogitScore(*tokens)], activation_fn=activation, device="cpu")
    encoder.save_pretrained(str(target))
    return encoder


def predict(encoder, query: str, documents, instruction: str | None = None) -> np.ndarray:
    """What Sentence Transformers gives, one document at a time, so that none is padded."""
    pairs = [(query, document) for document in documents]
    return encoder.predict(pairs, prompt=instruction, batch_size=1, show_progress_bar=False)


def _ids(tokenizer, *pieces: str) -> list[int]:
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def qwen3_ids(tokenizer, query: str, document: str, instruction: str | None) -> list[int]:
    """As the model card of Qwen3-Reranker says: what surrounds the pair is tokenized by itself."""
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    instruction = instruction or "Given a web search query, retrieve relevant passages that answer the query"
    pair = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    return _ids(tokenizer, before, pair, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def mxbai_ids(tokenizer, query: str, document: str, instruction: str | None) -> list[int]:
    """As the package mxbai-rerank does: every part is tokenized by itself."""
    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    )
    system = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    asked = f"query: {query}" if instruction is None else f"instruction: {instruction}\nquery: {query}"
    parts = (f"{system}<|im_start|>user\n", asked, "\n", f"document: {document}", "\n", task)
    return _ids(tokenizer, *parts, "<|im_end|>\n<|im_start|>assistant\n")


def zerank_ids(tokenizer, query: str, document: str, instruction: str | None) -> list[int]:
    """As modeling_zeranker.py does: the query is the system message, the document the user's."""
    assert instruction is None
    turns = f"<|im_start|>system\n{query.strip()}<|im_end|>\n<|im_start|>user\n{document.strip()}<|im_end|>\n"
    return _ids(tokenizer, f"{turns}<|im_start|>assistant\n")


def ctxl_ids(tokenizer, query: str, document: str, instruction: str | None) -> list[int]:
    """As the model card of ctxl-rerank-v2 says: the document comes first."""
    asked = query if instruction is None else f"{query} {instruction}"
    text = "Check whether a given document contains information helpful to answer the query.\n"
    return tokenizer(f"{text}<Document> {document}\n<Query> {asked} ??")["input_ids"]


def bge_ids(tokenizer, query: str, document: str, instruction: str | None) -> list[int]:
    """As the package FlagEmbedding does: `<bos>`, and every part tokenized by itself."""
    prompt = instruction or (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'."
    )
    return [tokenizer.bos_token_id, *_ids(tokenizer, f"A: {query}", "\n", f"B: {document}", "\n", prompt)]


def _logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


def _score(kind: str, tokenizer, logits: torch.Tensor) -> torch.Tensor:
    yes, no, capital, one, zero = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no", "Yes", "1", "0"))
    if kind == "qwen3":
        return logits[[no, yes]].log_softmax(-1)[1].exp()
    if kind == "mxbai":
        return logits[one] - logits[zero]
    if kind == "zerank":
        return (logits[capital] / 5).sigmoid()
    return logits[0 if kind == "ctxl" else capital]


MAKERS = {"qwen3": qwen3_ids, "mxbai": mxbai_ids, "zerank": zerank_ids, "ctxl": ctxl_ids, "bge-gemma": bge_ids}


def published_scores(kind: str, model, tokenizer, query: str, documents, instruction: str | None = None) -> np.ndarray:
    """The scores of a published reranker, as its makers compute them."""
    rows = [MAKERS[kind](tokenizer, query, document, instruction) for document in documents]
    return np.array([float(_score(kind, tokenizer, _logits(model, row))) for row in rows])
