"""One reward model of each family, with a classifier's head."""

from __future__ import annotations

from .classifiers import row

# Both kinds of layers in the order of the real models, and caps that are reached.
GEMMA2 = {"sliding_window": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
GEMMA3 = {"sliding_window": 16, "num_hidden_layers": 7, "layer_types": None}
OLMO3 = {"sliding_window": 16, "num_hidden_layers": 5, "layer_types": None}
SMOLLM3 = {"num_hidden_layers": 5, "no_rope_layers": None}
PHI4 = {
    # The texts are longer, so the long factors apply.
    "original_max_position_embeddings": 8,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2],
        "long_factor": [1.1, 2.0, 5.0],
    },
}

ROWS = [
    row("RM-Gemma-2B", "Gemma", "reward", "1 label"),
    row("Skywork-Reward-Gemma-2-27B, GRM-Gemma2-2B", "Gemma2", "reward", "1 label", **GEMMA2),
    row("Gemma 2, generates", "Gemma2", "value", "`v_head.summary` at steps", **GEMMA2),
    row("Gemma 3 (text)", "Gemma3Text", "reward", "1 label", **GEMMA3),
    row("Gemma 3 (text), generates", "Gemma3Text", "value", "`v_head.summary` at steps", **GEMMA3),
    row("Phi-3", "Phi3", "reward", "1 label"),
    row("Phi-4-mini", "Phi3", "reward", "1 label, longrope", **PHI4),
    row("OLMo 2", "Olmo2", "reward", "1 label"),
    row("OLMo 3", "Olmo3", "reward", "1 label", **OLMO3),
    row("SmolLM3", "SmolLM3", "reward", "1 label", **SMOLLM3),
    row("Granite", "Granite", "reward", "1 label"),
    row("InternLM2", "InternLM2", "reward", "1 label"),
    row("StableLM", "StableLm", "reward", "1 label"),
    row("GLM", "Glm", "reward", "1 label"),
    row("GLM-4", "Glm4", "reward", "1 label"),
    row("Mixtral", "Mixtral", "reward", "1 label, experts"),
    row("Qwen3-MoE", "Qwen3Moe", "reward", "1 label, experts"),
]
