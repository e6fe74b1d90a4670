"""Configurations: validated when made, JSON both ways."""

import json

import pytest

from bonnx.models import ConfigError, LanguageModelConfig, NetworkConfig, RopeScaling, build


def test_json_both_ways():
    scaling = RopeScaling(kind="llama3", factor=8.0)
    network = NetworkConfig(embed_dim=64, hidden_size=64, head_dim=24, rope_scaling=scaling)
    config = LanguageModelConfig(network=network, vocab_size=100)
    assert LanguageModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads; got 4 and 3"),
        ({"hidden_size": 12, "num_heads": 4}, "must be even.*hidden_size 12 over num_heads 4 gives 3"),
        ({"head_dim": 7}, "head_dim must be even for rotary positions; got 7"),
        ({"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ({"embed_dim": -1}, "embed_dim must be at least 1; got -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be above 0"),
        ({"num_layer": 3}, "unknown option 'num_layer' in NetworkConfig; did you mean 'num_layers'"),
        ({"hidden_size": "256"}, "Expected `int`, got `str`"),
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "factor must be at least 1"),
    ],
)
def test_what_no_network_can_have(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**{"embed_dim": 8, **options})


def test_the_embedding_size_is_required():
    with pytest.raises(ConfigError, match="embed_dim"):
        build(hidden_size=32)


def test_a_hidden_size_that_the_heads_do_not_divide_works_as_in_the_original():
    network = build(embed_dim=8, hidden_size=18, num_heads=4, num_kv_heads=2)
    assert network.config.size_of_head == 4
    assert network.state_dict()["blocks.0.attention.out_proj.weight"].shape == (18, 16)


def test_tied_embeddings_need_equal_sizes():
    with pytest.raises(ConfigError, match="tied embeddings need embed_dim equal to hidden_size; got 8 and 256"):
        LanguageModelConfig(network=NetworkConfig(embed_dim=8), vocab_size=10)
