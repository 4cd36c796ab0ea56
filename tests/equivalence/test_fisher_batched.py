"""The batched path against the one-by-one path, architecture by architecture; granularity `token` against its definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from hf_ewc.config import FisherConfig
from hf_ewc.errors import DataError
from hf_ewc.fisher import Example, accumulate_squares, build_probe, collate, prepared
from hf_ewc.fisher.batched import BatchedSquares, LeftOver, Unsupported
from hf_ewc.fisher.engines import OneByOne, SummedGradient, choose_engine, self_check
from hf_ewc.fisher.head import Head
from hf_ewc.fisher.products import add_squared_products, add_squared_products_reference

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
OLD = dict(vocab_size=320, bos_token_id=2, eos_token_id=1)
FAMILIES = {
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8),
    "llama": LlamaConfig(**SMALL),
    "llama, biases and tied": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral": MistralConfig(**SMALL, sliding_window=8),
    "gpt2": GPT2Config(**OLD, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt-neox": GPTNeoXConfig(**OLD, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    "cohere, logits scaled": CohereConfig(**SMALL),
    "granite, logits divided": GraniteConfig(**SMALL, logits_scaling=3.0),
    "phi, biased head": PhiConfig(**{**SMALL, "num_key_value_heads": 4}),
}
PLENTY = 1 << 28


def model_of(family: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, where a wrong factor would not show
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


@pytest.fixture(scope="module")
def batch(tokenizer) -> dict[str, torch.Tensor]:
    """Questions with one or two scored tokens and repeated words, and running text, of different lengths."""
    questions = build_probe(FisherConfig(), tokenizer, rows=tiny.QUESTIONS).examples
    texts = build_probe(FisherConfig(probe="text", max_length=24), tokenizer, rows=[{"text": t} for t in tiny.TEXTS]).examples
    return collate(questions[:4] + texts[:3])


def one_by_one(model, batch) -> dict[str, torch.Tensor]:
    with prepared(model) as sums:
        assert all(accumulate_squares(model, batch, sums))
    return sums


def batched(model, batch, scratch=PLENTY, tokenwise=False) -> dict[str, torch.Tensor]:
    engine = BatchedSquares(model, scratch, tokenwise)
    with prepared(model) as sums:
        assert engine.add(batch, sums)
    assert engine.leftover == []
    return sums


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert list(left) == list(right)
    for name in left:  # each tensor on its own scale, so that small ones count
        torch.testing.assert_close({name: left[name]}, {name: right[name]}, rtol=rtol, atol=rtol * float(right[name].max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_squares_are_those_of_single_examples(family, batch):
    model = model_of(family)
    assert_same(batched(model, batch), one_by_one(model, batch))


@pytest.mark.parametrize("tied", [True, False])
def test_batched_squares_of_gemma2_with_soft_cap_and_scaled_embedding(batch, tied):
    model = tiny.make_model(tie_word_embeddings=tied, final_logit_softcapping=5.0)
    assert_same(batched(model, batch), one_by_one(model, batch))


@pytest.mark.parametrize("scratch", [1, PLENTY])
@pytest.mark.parametrize("announced", [{}, {"final_logit_softcapping": 2.0}, {"logit_scale": 0.3}, {"logits_scaling": 4.0}])
@pytest.mark.parametrize("both", [False, True])
def test_the_heads_gradient_is_that_of_autograd_through_scale_and_soft_cap(announced, both, scratch):
    announced = {**announced, "logit_scale": 0.5, "final_logit_softcapping": 2.0} if both else announced
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(8, 30)
    hidden = 3 * torch.randn(5, 8, generator=generator)
    targets, weights = torch.randint(30, (5,), generator=generator), torch.rand(5, generator=generator)
    x = hidden.clone().requires_grad_()
    logits = linear(x) * announced.get("logit_scale", 1.0) / announced.get("logits_scaling", 1.0)
    if cap := announced.get("final_logit_softcapping"):
        logits = cap * torch.tanh(logits / cap)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    (expected,) = torch.autograd.grad((losses * weights).sum(), x)
    found, gradient, _ = Head(linear, SimpleNamespace(**announced), scratch).forward_backward(hidden, targets, weights, None)
    torch.testing.assert_close(found, losses.detach())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scratch", [1, 20_000, 300_000])
def test_scratch_memory_does_not_change_the_squares(scratch, tied):
    model = tiny.make_model(tie_word_embeddings=tied)
    # of the first one's targets, 70 stands in its own text and 300 does not: only the head's end of a tied table knows that one
    examples = [Example([2, 70, 60, 70, 300], [-100, -100, 60, 70, 300]), Example([2, 50, 61], [-100, -100, 61])]
    together = collate(examples)
    assert_same(batched(model, together, scratch), one_by_one(model, together))


def test_padding_on_the_left_and_pad_tokens_that_are_words_do_not_change_the_squares(tokenizer, batch):
    model = tiny.make_model()
    examples = build_probe(FisherConfig(), tokenizer, rows=tiny.QUESTIONS).examples
    assert_same(batched(model, collate(examples, 77, "left")), one_by_one(model, collate(examples)))


def test_the_pad_token_inside_a_text_gets_no_gradient_from_the_embedding_as_in_autograd(batch):
    model = tiny.make_model()
    assert model.get_input_embeddings().padding_idx == 0
    inside = collate([Example([2, 50, 0, 60], [-100, 50, 0, 60]), Example([2, 50, 50], [-100, -100, 50])])
    assert_same(batched(model, inside), one_by_one(model, inside))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_that_really_happens_does_not_change_the_squares(batch, reentrant):
    model = tiny.make_model()
    plain = batched(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    engine = BatchedSquares(model, PLENTY)
    with prepared(model) as sums:
        engine.add(batch, sums)
    handle.remove()
    assert len(calls) == 2, "the layer should have been computed twice"
    assert_same(sums, plain)


def test_weights_and_drawn_labels_go_through_both_paths_alike(batch):
    model = tiny.make_model()
    generator = torch.Generator().manual_seed(5)
    rows = len(batch["input_ids"])
    drawn = {
        **batch,
        "weights": torch.rand(rows, generator=generator),
        "uniforms": torch.rand(batch["labels"].shape, generator=generator),
    }
    assert_same(batched(model, drawn), one_by_one(model, drawn))
    assert float(batched(model, drawn)["model.norm.weight"].sum()) != float(batched(model, batch)["model.norm.weight"].sum())


def test_an_infinite_loss_with_a_finite_gradient_is_reported_by_both_paths():
    model = model_of("phi, biased head")
    with torch.no_grad():
        model.lm_head.bias[70] = -torch.inf  # the model rules out 70, and the text has it
    healthy, sick = (collate([Example([2, 50, token], [-100, 50, token])]) for token in (60, 70))
    for engine in (OneByOne(model), BatchedSquares(model, PLENTY)):
        with prepared(model) as sums:
            assert engine.add(healthy, sums)
            assert not engine.add(sick, sums)


def test_losses_are_those_of_single_examples(batch):
    model = tiny.make_model(final_logit_softcapping=5.0)
    for scratch in (1, PLENTY):
        torch.testing.assert_close(BatchedSquares(model, scratch).losses(batch), OneByOne(model).losses(batch))


def test_the_model_is_left_as_it_was_found(batch):
    model = model_of("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batched(model, batch)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.grad is None for p in model.parameters())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("scored", [1, 2])
def test_a_tied_table_sees_the_bias_of_the_head(scored):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PhiConfig(**{**SMALL, "num_key_value_heads": 4}, tie_word_embeddings=True)).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        model.lm_head.bias.normal_()
    ids = [[2, 50, 60, 50, 70], [2, 51, 61]]
    examples = collate([Example(row, [-100] * (len(row) - scored) + row[-scored:]) for row in ids])
    with prepared(model) as sums:
        BatchedSquares(model, PLENTY).add(examples, sums)
    name = "model.embed_tokens.weight"
    assert_same({name: sums[name]}, {name: one_by_one(model, examples)[name]})


def test_bfloat16_gradients_are_squared_in_float32(batch):
    model = tiny.make_model()
    exact = one_by_one(model, batch)
    half = batched(model.to(torch.bfloat16), batch)
    for name, total in half.items():
        assert total.dtype == torch.float32
        assert float((total.sqrt() - exact[name].sqrt()).norm() / exact[name].sqrt().norm()) < 0.05, name


# -- what it does not understand ---------------------------------------------------------------------------------------------


def test_experts_go_through_the_one_by_one_path_and_the_rest_does_not(batch, caplog):
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=4)).eval()
    expected = one_by_one(model, batch)
    with prepared(model) as sums:
        engine, _, left = choose_engine(model, FisherConfig(), batch, sums)
        if isinstance(engine, OneByOne):  # the experts are more than half of this tiny model
            assert "more than half" in caplog.text
            engine = BatchedSquares(model, PLENTY)
            left = engine.leftover
        engine.add(batch, sums)
    assert left
    assert all("experts" in name or "gate" in name for name in left)
    assert_same(sums, expected)


def test_a_module_that_hides_its_examples_is_found_out_and_left_to_the_one_by_one_path(batch):
    # OPT joins batch and positions in its feed-forward part, and its table of positions takes an offset
    model = AutoModelForCausalLM.from_config(
        OPTConfig(**OLD, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
    ).eval()
    expected = one_by_one(model, batch)
    engine = BatchedSquares(model, PLENTY)
    with prepared(model) as sums:
        with pytest.raises(LeftOver, match="fc1"):
            engine.add(batch, sums)
        for total in sums.values():
            total.zero_()
        engine.add(batch, sums)
    assert any("fc1" in name for name in engine.leftover)
    assert not any("q_proj" in name for name in engine.leftover)
    assert_same(
        {n: s for n, s in sums.items() if "k_proj.bias" not in n}, {n: s for n, s in expected.items() if "k_proj.bias" not in n}
    )


class TwiceCalled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, *args, **kwargs):
        return 0.5 * (self.inner(x) + self.inner(2 * x))


def test_a_linear_that_is_called_twice_is_left_to_the_one_by_one_path(batch):
    model = tiny.make_model()
    model.model.layers[0].mlp = TwiceCalled(model.model.layers[0].mlp)
    expected = one_by_one(model, batch)
    with prepared(model) as sums:
        engine, _, left = choose_engine(model, FisherConfig(), batch, sums)
        engine.add(batch, sums)
    assert sorted(left) == sorted(name for name in sums if "layers.0.mlp" in name)
    assert_same(sums, expected)


def test_a_second_call_of_a_linear_is_noticed_in_the_pass_itself(batch):
    # the self-check sees the first batch only; what is called twice in a later one must not be squared apart
    model = tiny.make_model()
    model.model.layers[0].mlp = TwiceCalled(model.model.layers[0].mlp)
    with prepared(model) as sums, pytest.raises(LeftOver, match=r"layers.0.mlp.inner.down_proj"):
        BatchedSquares(model, PLENTY).add(batch, sums)


class Doubling(nn.Linear):
    """Looks like a linear layer to `isinstance`, and is not one."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_with_a_forward_of_their_own_are_not_taken_for_what_they_inherit_from(batch):
    model = tiny.make_model()
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = Doubling(old.in_features, old.out_features, bias=False)
    expected = one_by_one(model, batch)
    with prepared(model) as sums:
        engine, _, left = choose_engine(model, FisherConfig(), batch, sums)
        engine.add(batch, sums)
    assert left == ["model.layers.0.mlp.down_proj.weight"]
    assert_same(sums, expected)


def test_the_self_check_finds_a_parameter_that_disagrees_and_sends_it_back(batch, monkeypatch, caplog):
    from hf_ewc.fisher.rules import NormRule

    finish = NormRule.finish

    def wrong(self):
        finish(self)
        if "model.norm.weight" in self.names:
            self.now.sums["model.norm.weight"] *= 1.01

    monkeypatch.setattr(NormRule, "finish", wrong)
    model = tiny.make_model()
    with prepared(model) as sums:
        engine, worst, left = choose_engine(model, FisherConfig(), batch, sums)
        assert all(not total.any() for total in sums.values()), "the check must leave nothing behind"
        engine.add(batch, sums)
    assert left == ["model.norm.weight"]
    assert "model.norm.weight" in caplog.text
    assert worst < 1e-5
    assert_same(sums, one_by_one(model, batch))


def test_a_head_whose_bias_disagrees_is_left_to_the_one_by_one_path_as_a_whole(batch, monkeypatch):
    from hf_ewc.fisher.head import Head

    square = Head.square

    def wrong(self, scored, units, total, bias_total, embedded=None):
        square(self, scored, units, total, bias_total, embedded)
        bias_total *= 1.5

    monkeypatch.setattr(Head, "square", wrong)
    model = model_of("phi, biased head")
    with prepared(model) as sums:
        engine, _, left = choose_engine(model, FisherConfig(), batch, sums)
        engine.add(batch, sums)
    assert left == ["lm_head.weight", "lm_head.bias"]
    assert_same(sums, one_by_one(model, batch))


def test_a_nan_example_in_the_first_batch_does_not_cost_the_batched_path(batch):
    model = tiny.make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[319] = torch.nan
    assert not (batch["input_ids"] == 319).any()
    sick = {name: values.clone() for name, values in batch.items()}
    sick["input_ids"][2, 1] = 319
    with prepared(model) as sums:
        engine, worst, left = choose_engine(model, FisherConfig(), sick, sums)
    assert isinstance(engine, BatchedSquares)
    assert left == []
    assert worst < 1e-5


def test_a_head_that_the_config_does_not_announce_makes_everything_go_one_by_one(batch, caplog):
    model = tiny.make_model()
    forward = model.forward

    def other(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.logits = found.logits * 1.5
        return found

    model.forward = other
    with prepared(model) as sums:
        engine, worst, left = choose_engine(model, FisherConfig(), batch, sums)
    assert isinstance(engine, OneByOne)
    assert (worst, left) == (None, [])
    assert "more than half of the weights disagree" in caplog.text


class Particular(nn.Module):
    """Insists on what its neighbour is, and takes no copies of a norm's weight for it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        assert isinstance(self.norm.weight, nn.Parameter), "somebody has been here"
        x = self.norm(x)
        assert isinstance(self.norm.weight, nn.Parameter), "somebody has been here"
        return x


def test_a_model_that_raises_when_it_is_observed_goes_one_by_one_and_is_left_whole(batch, caplog):
    model = tiny.make_model()
    model.model.norm = Particular(model.model.norm)
    expected = one_by_one(model, batch)
    with prepared(model) as sums:
        engine, _, _ = choose_engine(model, FisherConfig(), batch, sums)
        engine.add(batch, sums)
    assert isinstance(engine, OneByOne)
    assert "somebody has been here" in caplog.text
    assert isinstance(model.model.norm.norm.weight, nn.Parameter)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert_same(sums, expected)


def test_a_model_without_one_linear_head_is_unsupported():
    model = tiny.make_model()
    with pytest.raises(Unsupported, match="backbone"):
        BatchedSquares(model.model, PLENTY)


def test_the_self_check_agrees_to_rounding_on_a_healthy_model(batch):
    model = tiny.make_model()
    with prepared(model) as sums:
        found = self_check(BatchedSquares(model, PLENTY), model, batch, sums)
    assert set(found) == set(sums)
    assert max(found.values()) < 1e-5


# -- granularity token -------------------------------------------------------------------------------------------------------


def position_by_position(model, example: Example) -> dict[str, torch.Tensor]:
    """
    The definition of granularity `token`: at each position, every module works with weights W + δ of its own; the gradient with
    respect to δ, squared, summed over positions. A tied table has one δ for its two ends.
    """
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    ids, labels = torch.tensor(example.input_ids)[None], torch.tensor(example.labels)
    for position in range(len(example.input_ids)):
        deltas = {name: torch.zeros_like(parameter, requires_grad=True) for name, parameter in model.named_parameters()}
        handles = []

        def here(x, axis, position=position):
            shape = [1] * x.dim()
            shape[axis] = x.shape[axis]
            return (torch.arange(x.shape[axis]) == position).float().view(shape)

        for module in model.modules():
            if isinstance(module, nn.Linear):
                delta = deltas[names[module.weight]]

                def linear(m, args, out, delta=delta):
                    return out + here(out, 1) * functional.linear(args[0], delta)

                handles.append(module.register_forward_hook(linear))
            elif isinstance(module, nn.Embedding):
                delta = deltas[names[module.weight]]

                def embedding(m, args, out, delta=delta):
                    return out + here(out, 1) * functional.embedding(args[0], delta, padding_idx=m.padding_idx) * m.embed_scale

                handles.append(module.register_forward_hook(embedding))
            elif "RMSNorm" in type(module).__name__:
                delta = deltas[names[module.weight]]

                def norm(m, args, out, delta=delta):
                    return out + here(out, 1) * (m._norm(args[0].float()) * delta)

                handles.append(module.register_forward_hook(norm))
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=0).logits[0]
        for handle in handles:
            handle.remove()
        # the soft cap comes after the head, so the hook on the head's own output is enough
        loss = functional.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        for name, gradient in zip(deltas, torch.autograd.grad(loss, list(deltas.values())), strict=True):
            sums[name] += gradient**2
    return sums


@pytest.mark.parametrize("tied", [True, False])
def test_granularity_token_squares_at_each_position(tied):
    model = tiny.make_model(tie_word_embeddings=tied)
    examples = [Example([2, 50, 60, 50, 70], [-100, -100, 60, 50, 70]), Example([2, 50, 60], [-100, -100, 60])]
    expected = position_by_position(model, examples[0])
    for name, total in position_by_position(model, examples[1]).items():
        expected[name] += total
    got = batched(model, collate(examples), tokenwise=True)
    assert_same(
        {name: total.detach() for name, total in got.items()}, {n: total.detach() for n, total in expected.items()}, 1e-4
    )
    whole = batched(model, collate(examples))
    ratio = sum(float(t.sum()) for t in got.values()) / sum(float(t.sum()) for t in whole.values())
    assert abs(ratio - 1) > 0.02, "another quantity than granularity `example`"


def test_granularity_token_knows_positions_from_heads_even_when_there_are_as_many():
    # q_norm of Gemma-3 sees (rows, heads, positions, width): with 4 heads and 4 positions the two look alike
    model = model_of("gemma3")
    engine = BatchedSquares(model, PLENTY, tokenwise=True)
    examples = [Example([2, 50, 60, 50, 70], [-100, -100, 60, 50, 70]), Example([2, 50, 60, 61], [-100, -100, 60, 61])]
    with prepared(model) as together, prepared(model) as apart:
        engine.add(collate(examples), together)
        for example in examples:  # the second one alone is 4 positions long
            engine.add(collate([example]), apart)
    assert engine.leftover == []
    assert_same(together, apart)


def test_granularity_token_is_refused_where_a_weight_has_no_positions(batch):
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=4)).eval()
    with prepared(model) as sums, pytest.raises(DataError, match=r"granularity: token.*experts.*granularity: example"):
        choose_engine(model, FisherConfig(granularity="token"), batch, sums)


# -- granularity batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scratch", [1, PLENTY])
def test_granularity_batch_squares_the_summed_gradient(batch, scratch):
    model = tiny.make_model()
    total = sum(
        -functional.log_softmax(model(input_ids=ids[mask.bool()][None]).logits[0, :-1], -1)
        .gather(-1, labels[mask.bool()][1:, None].clamp(min=0))[:, 0][labels[mask.bool()][1:] >= 0]
        .sum()
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    )
    expected = {
        name: gradient**2
        for (name, _), gradient in zip(
            model.named_parameters(), torch.autograd.grad(total, list(model.parameters())), strict=True
        )
    }
    engine = SummedGradient(model, scratch)
    with prepared(model) as sums:
        assert engine.add(batch, sums)
    assert_same(sums, expected)
    torch.testing.assert_close(
        engine.traces, [sum(float(t.double().sum()) for t in sums.values()) / len(batch["input_ids"])], rtol=1e-4, atol=0
    )


# -- the innermost sum -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "positions"), [(1, 1), (3, 1), (4, 7), (1, 5), (0, 3)])
@pytest.mark.parametrize("scratch", [1, 4096, PLENTY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_products_follow_their_definition(units, positions, scratch, dtype):
    generator = torch.Generator().manual_seed(units * 10 + positions)
    x, g = (torch.randn(units, positions, size, generator=generator).to(dtype) for size in (19, 11))
    lengths = [max(1, positions - u) for u in range(units)]
    for u, length in enumerate(lengths):
        g[u, length:] = 0
    got, expected = torch.full((11, 19), 0.5), torch.full((11, 19), 0.5)
    add_squared_products(x, g, got, lengths, scratch)
    add_squared_products_reference(x, g, expected)
    torch.testing.assert_close(got, expected)
