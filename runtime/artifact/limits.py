"""Limits on sizes, checked before anything is allocated."""

from __future__ import annotations

from bonnx.errors import InputError

from ..checks import ARGUMENTS, ArgumentNames
from .manifest import Manifest

__all__ = ["CANDIDATES_BLOCK", "CANDIDATE_BLOCK", "ROWS_BLOCK", "TooLargeError", "check_size", "estimate_memory"]

# Attention is computed in blocks of so many positions of a row. Larger blocks leave the processor's caches, smaller
# ones make its products slower.
ROWS_BLOCK = 128
# The same for candidates after a prompt: positions of all candidates together, and at least of each.
CANDIDATES_BLOCK, CANDIDATE_BLOCK = 512, 16


class TooLargeError(InputError):
    """More than is computed at once; fewer or other candidates may fit."""


def check_size(
    manifest: Manifest,
    rows: int,
    prompt: int,
    length: int,
    memory_limit: int | None,
    names: ArgumentNames = ARGUMENTS,
) -> None:
    """Refuse work beyond the artifact's limits or the caller's.

    Args:
        manifest: holds the limits.
        rows: number of candidates.
        prompt: tokens of the prompt.
        length: tokens of the longest candidate.
        memory_limit: bytes, or None.
        names: of the arguments, in errors.

    Raises:
        TooLargeError: says which limit, and the size.
        InputError: the same, where the prompt alone is too long.
    """
    limits, (prompt_noun, candidate_noun, candidates_noun) = manifest.limits, names.nouns
    if rows > limits.max_candidates:
        raise TooLargeError(
            f"{rows} {candidates_noun}: this artifact takes at most {limits.max_candidates} at once; split them"
        )
    if prompt + length > limits.max_tokens:
        raise (TooLargeError if prompt < limits.max_tokens else InputError)(
            f"a {prompt_noun} of {prompt} tokens and a {candidate_noun} of {length}: this artifact takes at most "
            f"{limits.max_tokens} together; shorten them, or export again with --max-tokens"
        )
    if memory_limit is not None:
        needed = estimate_memory(manifest, rows, prompt, length)
        if needed > memory_limit:
            raise TooLargeError(
                f"{rows} {candidates_noun} of {length} tokens after a {prompt_noun} of {prompt} need about {needed} "
                f"bytes, more than memory_limit={memory_limit}; rank fewer at once, or raise the limit"
            )


def estimate_memory(manifest: Manifest, rows: int, prompt: int, length: int) -> int:
    """Bytes of activations that one call needs at its widest, without the weights: an upper estimate."""
    heads, hidden, width = map(manifest.size, ("num_heads", "hidden_size", "embed_dim"))
    inner = manifest.size("ffn_inner") if manifest.network.get("ffn_inner") else 4 * hidden
    tokens = prompt + rows * length
    # Logits and weights of the attention of a block, and of a candidate's block with its own tokens, in float32.
    of_prompt = 2 * min(ROWS_BLOCK, prompt) * prompt
    if prompt:
        block = rows * min(length, max(CANDIDATES_BLOCK // rows, CANDIDATE_BLOCK))
        of_candidates = block * (2 * (prompt + 1) + 4 * length)
    else:
        # Whole rows.
        of_candidates = 2 * rows * min(ROWS_BLOCK, length) * length
    attention = heads * max(of_prompt, of_candidates)
    # What a token takes in the linear layers, as it was measured, with what ONNX Runtime keeps between them
    # (`python -m benchmarks.long`).
    return 4 * (attention + tokens * (7 * inner + 14 * hidden + width))
