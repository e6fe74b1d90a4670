"""The model card: an artifact's README.md, written from its manifest."""

from __future__ import annotations

from bonnx.runtime.artifact.describe import describe_scoring, describe_text
from bonnx.runtime.artifact.manifest import Manifest

__all__ = ["model_card"]


def model_card(manifest: Manifest) -> str:
    """Return the model card as Markdown."""
    network = manifest.network
    rows = [
        ("kind", manifest.kind.replace("_", " ")),
        ("layers, hidden size", f"{network['num_layers']}, {network['hidden_size']}"),
        ("heads, kv heads", f"{network['num_heads']}, {network['num_kv_heads']}"),
        ("precision", manifest.precision),
        ("score", describe_scoring(manifest.scoring)),
        ("text", describe_text(manifest)),
        ("source", manifest.source),
        ("maximum tokens, maximum candidates", f"{manifest.limits.max_tokens}, {manifest.limits.max_candidates}"),
    ]
    text = '"a prompt", ["one candidate", "another"]' if manifest.tokenizer else "prompt, candidates"
    kind, does = "two-headed transformer", "rank completions and select the best one"
    example = [f"ranking = model.rank({text})", "ranking.best, ranking.candidate_scores"]
    if not manifest.has_scorer:
        kind, does = "language model", "generate completions, and choose by its own certainty or by votes"
    if "rank" not in manifest.graphs:
        prompt = '"a prompt"' if manifest.tokenizer else "prompt"
        example = [f"model.generate({prompt}, n=16).best"]
    lines = [
        f"# {manifest.name}",
        "",
        f"A {kind} as ONNX graphs that {does}, exported by bonnx.",
        "",
        "```python",
        "import bonnx",
        "",
        'model = bonnx.load("this folder")',
        *example,
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows if value is not None),
        "",
        "## Graphs",
        "",
    ]
    for name, graph in manifest.graphs.items():
        lines += [f"`{graph.file}` ({name}, opset {graph.opset})", ""]
        for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
            lines += [f"- {kind} `{v.name}` ({', '.join(map(str, v.shape))}) {v.dtype}" for v in values]
        lines.append("")
    if manifest.agreement is not None:
        lines += ["## Agreement with float32, measured at export", "", str(manifest.agreement), ""]
    lines += [
        "## Error against PyTorch in float64 with the same weights, measured at export",
        "",
        *(["Every kind of check with fewer cases: `--verify quick`.", ""] if manifest.verification == "quick" else []),
        "| check | cases | ONNX Runtime's error | PyTorch's error | allowed |",
    ]
    lines += ["|---|---|---|---|---|"]
    lines += [
        f"| {p.check} | {p.cases} | {p.max_difference:.1e} | {p.pytorch_error:.1e} | "
        + ("as NumPy |" if p.allowed is None else f"{p.allowed:.1e} |")
        for p in manifest.parity
    ]
    return "\n".join(lines) + "\n"
