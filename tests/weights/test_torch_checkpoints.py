"""The scripts' checkpoints against an oracle that reads the originals, and back."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sngpt_jax.config import ModelConfig
from sngpt_jax.weights.state_dict_files import InteropError
from sngpt_jax.weights.torch_checkpoints import export_state_dict, import_state_dict
from tests import golf_oracle

SIZE = {"vocab_size": 96, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 24}
LIKE_465 = golf_oracle.like("465", **SIZE, num_layers=4, mlp_dim=96)
LIKE_740 = golf_oracle.like("740", **SIZE, num_layers=3, mlp_dim=64, xsa_layers=3, rope_dims=4)
_ENDS = {"value_embed_layers": (5, 4), "recycle_layers": (1, 2, 1)}
LIKE_1573 = golf_oracle.like("1573", **SIZE, **_ENDS, num_layers=6, mlp_dim=96)
LIKE_333 = golf_oracle.like("333", **SIZE, num_layers=5, mlp_dim=88, logit_soft_cap=5.0)
SYSTEMS = pytest.mark.parametrize(
    ("config", "dialect"),
    [(LIKE_333, "plain"), (LIKE_465, "plain"), (LIKE_740, "plain"), (LIKE_1573, "banked")],
    ids=["333", "465", "740", "1573"],
)


def equal(found: golf_oracle.State, expected: golf_oracle.State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)


@SYSTEMS
def test_imported_model_computes_what_the_script_did(config, dialect):
    state = golf_oracle.random_state(config, dialect, seed=1)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 20))
    tokens[:, [0, 7]] = config.bos_id
    model = import_state_dict(state, config)
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golf_oracle.logits(state, config, tokens), atol=1e-4)


@SYSTEMS
def test_the_oracle_feels_every_tensor(config, dialect):
    """A tensor that the oracle passed over would be compared with nothing."""
    state = golf_oracle.random_state(config, dialect, seed=3)
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, (2, 12))
    before = golf_oracle.logits(state, config, tokens)
    for name, tensor in state.items():
        changed = golf_oracle.logits({**state, name: 0.5 * tensor + 0.1}, config, tokens)
        assert (np.abs(changed - before).max() > 1e-6) == (name != "blocks.0.attn.vr_lambda"), name


@SYSTEMS
def test_export_gives_back_every_bit(config, dialect):
    state = golf_oracle.random_state(config, dialect, seed=5)
    equal(export_state_dict(import_state_dict(state, config)), state)


@settings(max_examples=15, deadline=None)
@given(
    num_layers=st.integers(1, 5),
    smear=st.sampled_from(["none", "after_norm", "before_norm"]),
    bigram=st.sampled_from(["none", "xor", "sum"]),
    embed_layers=st.sets(st.integers(0, 4)),
    recycled=st.lists(st.integers(0, 1), max_size=3),
    flags=st.fixed_dictionaries(
        {
            "bigram_scale_init": st.sampled_from([0.0, 0.05]),
            "attention_gate": st.booleans(),
            "value_residual": st.booleans(),
        }
    ),
)
def test_any_combination_survives_the_round_trip(
    num_layers, smear, bigram, embed_layers, recycled, flags
):
    config = ModelConfig(
        **SIZE,
        **flags,
        num_layers=num_layers,
        mlp_dim=48,
        smear=smear,
        bigram_buckets=0 if bigram == "none" else 16,
        bigram_hash="sum" if bigram == "sum" else "xor",
        value_embed_layers=tuple(layer for layer in embed_layers if layer < num_layers),
        recycle_layers=tuple(layer for layer in recycled if layer < num_layers // 2),
    )
    embeds_or_recycles = config.value_embed_layers or config.recycle_layers
    banked = config.attention_gate or config.value_residual or embeds_or_recycles
    state = golf_oracle.random_state(config, "banked" if banked else "plain", seed=6)
    equal(export_state_dict(import_state_dict(state, config)), state)


def test_numbers_that_are_not_finite_in_float32_are_refused():
    state = golf_oracle.random_state(LIKE_465, "plain", seed=8)
    state["tok_emb.weight"] = np.full_like(state["tok_emb.weight"], np.nan)
    state["smear.gate"] = np.full(state["smear.gate"].shape, 1e300)
    with pytest.raises(InteropError, match=r"not finite in float32: tok_emb.weight, smear.gate$"):
        import_state_dict(state, LIKE_465)


def test_the_layout_is_read_from_the_names():
    banked = golf_oracle.random_state(LIKE_465, "banked", seed=7)
    plain = export_state_dict(import_state_dict(banked, LIKE_465))
    np.testing.assert_array_equal(plain["blocks.1.attn.c_v.weight"], banked["kv_bank"][4 + 1])
    np.testing.assert_array_equal(plain["blocks.3.attn.proj.weight"], banked["qo_bank"][4 + 3])
    np.testing.assert_array_equal(plain["blocks.2.mlp.fc.weight"], banked["mlp_up_bank"][2])
    assert not any("bank" in name for name in plain)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_become_float32(dtype):
    state = golf_oracle.random_state(LIKE_740, "plain", seed=8)
    state = {name: tensor.astype(dtype) for name, tensor in state.items()}
    found = export_state_dict(import_state_dict(state, LIKE_740))
    equal(found, {name: tensor.astype(np.float32) for name, tensor in state.items()})


def test_one_error_lists_every_tensor_at_fault():
    state = golf_oracle.random_state(LIKE_1573, "banked", seed=9)
    del state["smear.gate"], state["ve_layer_scales.1"]
    state["skip_weights"] = state["skip_weights"][:2]
    state["kv_bank"] = state["kv_bank"][:11].astype(np.int8)
    state["rotary.inv_freq"] = np.zeros(2, np.float32)
    with pytest.raises(InteropError) as error:
        import_state_dict(state, LIKE_1573)
    assert str(error.value).split(": ", 1)[1].split("; ") == [
        "skip_weights has shape [2, 32], expected [3, 32]",
        "smear.gate [32] is missing",
        "ve_layer_scales.1 [1] is missing",
        "kv_bank has shape [11, 16, 32], expected [12, 16, 32]",
        "kv_bank is int8, expected one of float16, bfloat16, float32, float64",
        "rotary.inv_freq [2] is not a tensor of this model",
    ]
