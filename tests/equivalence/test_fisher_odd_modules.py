"""Modules that hide their examples, heads with biases, norms of one's own: what the batched path must leave alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CTRLConfig, NemotronConfig, PhiConfig

from hf_ewc import FisherConfig
from hf_ewc.fisher import Example, accumulate_squares, collate, prepared
from hf_ewc.fisher.batched import BatchedSquares, LeftOver
from hf_ewc.fisher.engines import choose_engine

SMALL = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
PHI = PhiConfig(**{**SMALL, "num_key_value_heads": 4}, tie_word_embeddings=True)
CTRL = CTRLConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, dff=64, n_positions=128)
PLENTY = 1 << 28
BATCH = collate([Example([2, 50, 60, 50, 70], [-100, -100, 60, 50, 70]), Example([2, 50, 60], [-100, -100, 60])])


def one_by_one(model, batch):
    with prepared(model) as sums:
        assert all(accumulate_squares(model, batch, sums))
    return sums


def assert_same(left, right, rtol=1e-5):
    for name in left:
        torch.testing.assert_close({name: left[name]}, {name: right[name]}, rtol=rtol, atol=rtol * float(right[name].max()))


@pytest.mark.parametrize("config", [PHI, CTRL], ids=["phi", "ctrl"])
def test_a_tied_head_with_a_bias_gives_the_bias_its_own_square(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.bias is not None
    with prepared(model) as sums:
        engine, _, left = choose_engine(model, FisherConfig(), BATCH, sums)
        assert engine.add(BATCH, sums)
    assert left == []
    expected = one_by_one(model, BATCH)
    assert_same({n: s for n, s in sums.items() if "Wk.bias" not in n}, expected)  # those are 0 but for rounding


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_head.bias"])
def test_a_head_that_is_left_is_added_once_weight_and_bias(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PhiConfig(**{**SMALL, "num_key_value_heads": 4})).eval()
    engine = BatchedSquares(model, PLENTY)
    engine.leave({name})
    with prepared(model) as sums:
        engine.add(BATCH, sums)
    assert engine.leftover == ["lm_head.weight", "lm_head.bias"]
    assert_same(sums, one_by_one(model, BATCH))


class Flat(type(tiny.make_model().model)):
    """Looks its tokens up as one long row, which hides the examples from the table."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        found = self.embed_tokens(input_ids.reshape(-1)).view(*input_ids.shape, -1)
        return super().forward(inputs_embeds=found, **kwargs)


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_hides_its_examples_is_left_out_and_does_not_hang(tied):
    model = tiny.make_model(tie_word_embeddings=tied)
    model.model.__class__ = Flat
    with prepared(model) as sums:
        engine, _, left = choose_engine(model, FisherConfig(), BATCH, sums)
        assert left == ["model.embed_tokens.weight"]
        assert engine.add(BATCH, sums)
        assert engine.add(BATCH, sums)
    assert_same(sums, {name: 2 * total for name, total in one_by_one(model, BATCH).items()})


class Expert(nn.Module):
    """Sees the positions of token 77 only, (n, D) of them, of whichever row."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.up = inner, nn.Linear(32, 32, bias=False)

    def forward(self, x):
        y, chosen = self.inner(x), self.ids == 77
        return y.index_put((*chosen.nonzero(as_tuple=True),), y[chosen] + self.up(x[chosen])) if chosen.any() else y


def test_an_expert_that_by_chance_sees_as_many_tokens_as_there_are_rows_is_not_taken_for_one_token_per_row():
    model = tiny.make_model()
    expert = model.model.layers[0].mlp = Expert(model.model.layers[0].mlp)
    model.model.register_forward_pre_hook(lambda _, args, given: setattr(expert, "ids", given["input_ids"]), with_kwargs=True)
    later = collate([Example([2, 77, 77, 50, 70], [-100, -100, -100, 50, 70]), Example([2, 50, 60], [-100, -100, 60])])
    engine = BatchedSquares(model, PLENTY)
    with prepared(model) as sums:
        engine.add(BATCH, sums)  # no 77
        for total in sums.values():
            total.zero_()
        with pytest.raises(LeftOver, match=r"up\.weight"):
            engine.add(later, sums)
        for total in sums.values():
            total.zero_()
        engine.add(later, sums)
    assert_same(sums, one_by_one(model, later))


def test_as_many_scored_positions_as_rows_are_not_taken_for_one_each():
    model = tiny.make_model()
    batch = collate([Example([2, 50, 60], [-100, 50, 60]), Example([2, 50], [-100, -100])])
    with prepared(model) as sums:
        BatchedSquares(model, PLENTY).add(batch, sums)
    assert_same(sums, one_by_one(model, collate([Example([2, 50, 60], [-100, 50, 60])])))


def test_a_norm_that_inherits_from_torchs_goes_one_by_one_and_the_rest_does_not():
    model = AutoModelForCausalLM.from_config(NemotronConfig(**SMALL)).eval()  # LayerNorm with 1 + weight
    with prepared(model) as sums:
        engine, _, left = choose_engine(model, FisherConfig(), BATCH, sums)
        engine.add(BATCH, sums)
    assert isinstance(engine, BatchedSquares)
    assert all("norm" in name for name in left)
    assert_same(sums, one_by_one(model, BATCH))
