"""
λ = 1 has a meaning: ½ Σ F δ² is the KL from the base in nats per scored token, for small steps δ in independent directions.
"""

import pytest
import torch
import training
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from hf_ewc import FisherConfig, estimate_fisher

LENGTH, EXAMPLES = 24, 200


def _log_probs(model, ids):
    with torch.no_grad():
        return model(ids).logits[:, :-1].log_softmax(-1)


def test_half_the_fisher_weighted_distance_is_the_kl_per_token(base_folder, tmp_path):
    """
    With labels drawn from the model itself, the empirical Fisher is the true one in expectation, and E over random signs of δ
    removes the off-diagonal terms, which the diagonal does not hold: what is left must agree, the factor of T included.
    """
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((EXAMPLES, 1), model.config.bos_token_id)
    for _ in range(LENGTH):
        with torch.no_grad():
            probs = model(ids).logits[:, -1].softmax(-1)
        probs[:, model.config.bos_token_id] = 0  # inside a row it would mean a second document; 1 token of 320 shifts nothing
        ids = torch.cat([ids, torch.multinomial(probs, 1, generator=generator)], dim=1)
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids.tolist()]
    fisher = estimate_fisher(base_folder, FisherConfig(probe="text", dataset="memory"), dataset=rows, progress=False)
    assert fisher.normalizer == LENGTH * EXAMPLES

    base = training.weights(model)
    before = _log_probs(model, ids[:64])
    estimated, measured = 0.0, 0.0
    for _ in range(20):
        with torch.no_grad():
            for name, param in model.named_parameters():
                step = 2e-3 * torch.randn(param.shape, generator=generator)
                param.copy_(base[name] + step)
                estimated += float(0.5 * (fisher.per_token(name) * step**2).sum())
        after = _log_probs(model, ids[:64])
        measured += float(kl_div(after, before, log_target=True, reduction="sum")) / (64 * LENGTH)
    assert estimated == pytest.approx(measured, rel=0.15)
