"""The benchmark's twin is a twin: the same terms and the same gradients as the objective."""

import pytest
import torch

from benchmarks.twin import OBJECTIVE, PaddedTwin
from raylib.objectives.pretraining import UnifiedObjective
from tests.factories import make_batch, make_model

LENGTHS = {"image_text": 12, "parallel": 14, "text": 16}


def gradients(module, model, batch):
    model.zero_grad()
    loss, terms = module(batch)
    loss.backward()
    return terms, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("head", ["masked", "all"])
@pytest.mark.parametrize("twins", [False, True])
def test_twin_terms_and_gradients_equal_objective(head, twins):
    model, batch = make_model(), make_batch(8)
    if twins:  # two drawings of one concept are no negatives of each other
        batch["image_text"]["image_id"][1] = batch["image_text"]["image_id"][0]
        # and pixels have statistics by channel, as ImageNet's
        model.vision.pixel_mean, model.vision.pixel_std = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
    terms, ours = gradients(UnifiedObjective(model, OBJECTIVE), model, batch)
    twin_terms, twin_gradients = gradients(PaddedTwin(model, head, LENGTHS), model, batch)
    del terms["itm_accuracy"]
    assert set(terms) == set(twin_terms)
    for name, value in terms.items():
        torch.testing.assert_close(twin_terms[name].double(), value.double(), rtol=1e-6, atol=1e-6, msg=name)
    for name, gradient in ours.items():
        torch.testing.assert_close(twin_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
