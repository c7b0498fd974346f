import torch

from raylib.metrics import mean, recalls


def test_recalls_against_sorting():
    torch.manual_seed(0)
    queries, keys = torch.randn(20, 8), torch.randn(45, 8)
    query_owner, key_owner = torch.arange(20), torch.arange(45) % 20
    out = recalls(queries, keys, query_owner, key_owner, chunk=7)
    for k in (1, 5, 10):
        hits = 0
        for i in range(20):
            first = sorted(range(45), key=lambda j: -float(queries[i] @ keys[j]))[:k]
            hits += any(key_owner[j] == i for j in first)
        assert out[k] == hits / 20


def test_a_collapsed_model_scores_nothing():
    same = torch.ones(30, 4)
    assert recalls(same, same, torch.arange(30), torch.arange(30)) == {1: 0.0, 5: 0.0, 10: 0.0}


def test_mean_of_nothing():
    assert mean([]) == 0.0
