"""config.json in both forms against what transformers makes of it, and what is refused."""

import copy

import pytest
from transformers import Qwen2VLConfig as HFConfig

from umer1.errors import ConfigError
from umer1.models.qwen2_vl.config import Qwen2VLConfig

# The published 2B file's settings.
FLAT = dict(
    model_type="qwen2_vl",
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    vocab_size=151936,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    tie_word_embeddings=True,
    use_sliding_window=False,
    sliding_window=32768,
    max_window_layers=28,
    vision_config=dict(
        depth=32, embed_dim=1280, mlp_ratio=4, num_heads=16, in_chans=3, hidden_size=1536, patch_size=14
    ),
)


def assert_same(ours: Qwen2VLConfig, theirs: HFConfig) -> None:
    text, vision = theirs.text_config, theirs.vision_config
    assert ours.hidden_size == text.hidden_size
    assert ours.num_layers == text.num_hidden_layers
    assert ours.num_attention_heads == text.num_attention_heads
    assert ours.num_query_groups == text.num_key_value_heads
    assert ours.ffn_hidden_size == text.intermediate_size
    assert ours.vocab_size == text.vocab_size
    assert ours.rms_norm_eps == text.rms_norm_eps
    assert ours.rope_theta == text.rope_parameters["rope_theta"]
    assert list(ours.mrope_section) == text.rope_parameters.get("mrope_section", [16, 24, 24])
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.image_token_id, ours.video_token_id) == (theirs.image_token_id, theirs.video_token_id)
    names = ("depth", "embed_dim", "num_heads", "mlp_ratio", "patch_size", "temporal_patch_size", "spatial_merge_size")
    for name in (*names, "in_channels", "hidden_size", "hidden_act"):
        assert getattr(ours.vision, name) == getattr(vision, name), name


def changed(**changes) -> dict:
    config = copy.deepcopy(FLAT)
    for name, value in changes.items():
        (config["vision_config"] if name.startswith("vision_") else config)[name.removeprefix("vision_")] = value
    return config


VARIANTS = {
    "published": {},
    "untied": dict(tie_word_embeddings=False),
    "all_heads": dict(num_key_value_heads=None),
    "other_rope": dict(rope_theta=12345.0, rope_scaling={"type": "mrope", "mrope_section": [32, 16, 16]}),
    "default_rope": dict(rope_scaling=None),
    "patch_as_list": dict(vision_patch_size=8, vision_temporal_patch_size=4),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_flat_and_nested_files_are_read_as_transformers_reads_them(variant):
    config = changed(**VARIANTS[variant])
    theirs = HFConfig(**copy.deepcopy(config))
    flat = Qwen2VLConfig.from_hf(config)
    nested = Qwen2VLConfig.from_hf(theirs.to_dict())
    assert_same(flat, theirs)
    assert nested == flat


def test_absent_fields_get_transformers_defaults():
    # All but the merger's width, whose default does not fit the decoder's.
    config = {"vision_config": {"hidden_size": 8192}}
    assert_same(Qwen2VLConfig.from_hf(config), HFConfig(**copy.deepcopy(config)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rope_scaling={"type": "mrope", "mrope_section": [16, 24, 20]}), "must add up to half the head size, 64"),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_type='yarn' is not supported"),
        (dict(num_attention_heads=7), "hidden_size=1536 is not a multiple of num_attention_heads=7"),
        (dict(num_key_value_heads=5), "not a multiple of num_key_value_heads=5"),
        (dict(use_sliding_window=True, max_window_layers=2), "sliding-window attention is not supported"),
        (dict(hidden_act="gelu"), "the decoder's activation must be silu"),
        (dict(vision_hidden_act="relu"), "use one of quick_gelu"),
        (dict(vision_hidden_size=1280), "must be the decoder's hidden_size=1536"),
        (dict(vision_num_heads=128), "must be a multiple of 4"),
        (dict(vision_depth=0), "vision_config.depth=0 must be at least 1 and at most 1,000"),
        (dict(vocab_size=100000), "image_token_id=151655 is outside the vocabulary of 100000 rows"),
        (dict(hidden_size="1536"), "hidden_size='1536' must be a whole number"),
        (dict(model_type="llava"), "model_type='llava' is not supported"),
        (dict(vision_config=[]), "must add up|hidden_size"),
        (dict(rms_norm_eps=0), "rms_norm_eps=0 must be a finite number above 0"),
        (dict(rms_norm_eps=float("inf")), "rms_norm_eps=inf must be a finite number above 0"),
        (dict(initializer_range=10**400), "must be a finite number above 0"),
        (dict(num_hidden_layers=10**12), "num_layers=1000000000000 must be at least 1 and at most 1,000"),
        (dict(rope_scaling={"mrope_section": [16, 16, 16, 16]}), "must have three parts"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings='false' must be true or false"),
        (dict(use_sliding_window=True, max_window_layers="2"), "max_window_layers='2' must be a whole number"),
        (dict(layer_types="full_attention"), "layer_types='full_attention' must be a list"),
        (dict(head_dim="128"), "head_dim=128 must be"),
    ],
)
def test_what_is_refused(changes, message):
    config = changed(**changes) if "vision_config" not in changes else dict(FLAT, **changes)
    with pytest.raises(ConfigError, match=message):
        Qwen2VLConfig.from_hf(config)


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as caught:
        Qwen2VLConfig.from_hf(changed(hidden_act="gelu", vision_hidden_act="relu", attention_dropout=0.1))
    assert len(caught.value.violations) == 3


@pytest.mark.parametrize(("size", "rows"), [(1, 101), (2, 102), (4, 104)])
def test_padded_vocabulary_is_the_least_multiple(size, rows):
    config = Qwen2VLConfig.from_hf(changed(vocab_size=101) | dict.fromkeys(IDS, 5))
    assert config.padded_vocab_size(size) == rows


IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
