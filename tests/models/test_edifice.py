"""The network against outputs recorded from the original implementation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bonnx.models import (
    ConfigError,
    NetworkConfig,
    build,
    ffn_inner_size,
    from_edifice,
    output_size,
    recommended_defaults,
    select_best_of_n,
)
from bonnx.models.block import Block
from bonnx.models.edifice import edifice_names
from bonnx.models.rotary import inverse_frequencies, rotate
from tests.tolerance import GOLDEN, within

DATA = Path(__file__).parent.parent / "data"
CASES = ["edifice_case1_gqa_libtest", "edifice_case3_mqa_seq1"]


def recorded(case):
    arrays = np.load(DATA / f"{case}.npz")
    params = {name: arrays[name] for name in arrays.files if name.startswith("param:")}
    return arrays, json.loads(str(arrays["config"])), params


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_equal_the_original(case, masked):
    arrays, config, params = recorded(case)
    network = from_edifice(config, params)
    inputs = torch.from_numpy(arrays["input"])
    mask = torch.ones(inputs.shape[:2], dtype=torch.int64) if masked else None
    with torch.no_grad():
        backbone, scores = network(inputs, mask)
    assert within(backbone, arrays["backbone"], GOLDEN)
    assert within(scores, arrays["scores"], GOLDEN)


def test_default_parameters_have_the_original_names_shapes_and_total():
    expected = json.loads((DATA / "edifice_case6_default_params.json").read_text())
    network = build(embed_dim=256)
    names = edifice_names(network.config)
    names = {
        names[name]: list(p.T.shape if names[name].endswith(".kernel") else p.shape)
        for name, p in network.state_dict().items()
    }
    wanted = {entry["name"]: entry["shape"] for entry in expected["params"]}
    assert names == wanted
    assert sum(p.numel() for p in network.parameters()) == 2_945_153


def test_ffn_inner_size_equals_the_original():
    arrays = np.load(DATA / "edifice_ffn_inner_size.npz")
    assert [ffn_inner_size(int(size)) for size in arrays["hidden_size"]] == arrays["inner_size"].tolist()
    assert len(arrays["hidden_size"]) == 8192


def test_primitives_equal_the_original():
    arrays = np.load(DATA / "edifice_primitives.npz")
    config = NetworkConfig(embed_dim=16, hidden_size=16, num_heads=1, num_kv_heads=1)
    angles = torch.arange(60, dtype=torch.float32)[:, None] * inverse_frequencies(config)
    for name in ("rope_q", "rope_k"):
        rotated = rotate(torch.from_numpy(arrays[name]), angles.cos(), angles.sin())
        assert within(rotated, arrays[f"{name}_out"], GOLDEN)
    norm = Block(config).attention_norm
    norm.load_state_dict({"weight": torch.from_numpy(arrays["norm_gamma"])})
    with torch.no_grad():
        assert within(norm(torch.from_numpy(arrays["rms_norm_x"])), arrays["rms_norm_out"], GOLDEN)


def test_select_best_of_n_equals_the_original():
    cases = json.loads((DATA / "edifice_case5_select_best_of_n.json").read_text())["cases"]
    compared = 0
    for case in cases:
        values = [float(value) for value in case.get("scores", [])]
        if "index" not in case or any(math.isnan(value) for value in values):
            continue
        scores = torch.tensor(values).reshape(case["scores_shape"])
        assert select_best_of_n(scores).flatten().tolist() == np.ravel(case["index"]).tolist(), case["name"]
        compared += 1
    assert compared == 19


def test_nan_never_wins_a_selection():
    scores = torch.tensor([[float("nan"), float("nan")], [-float("inf"), float("nan")], [float("nan"), float("nan")]])
    assert select_best_of_n(scores).tolist() == [1, -1]


def test_helpers_say_what_the_original_says():
    assert recommended_defaults() == {
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "scorer_hidden": 128,
        "dropout": 0.1,
    }
    assert (output_size(), output_size(hidden_size=64)) == (256, 64)
    assert build(embed_dim=8, **recommended_defaults()).config == NetworkConfig(embed_dim=8)


def test_wrong_parameters_are_refused_by_name():
    _, config, params = recorded(CASES[0])
    name = "param:ttc_block_1_attn_q_proj.kernel"
    with pytest.raises(ConfigError, match=r"ttc_block_1_attn_q_proj\.kernel.*\(32, 32\).*\(32, 31\)"):
        from_edifice(config, {**params, name: params[name][:, :31]})
    with pytest.raises(ConfigError, match=r"missing.*ttc_block_1_attn_q_proj"):
        from_edifice(config, {k: v for k, v in params.items() if k != name})
