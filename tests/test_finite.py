"""Numbers that are not finite are found, wherever they stand, and named."""

import numpy as np
import pytest
import torch

from raylib.errors import NotFinite, UserError
from raylib.finite import is_finite, require_finite, require_finite_file, require_finite_values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_finite_check_finds_one_bad_element_in_every_dtype(dtype, bad):
    tensor = torch.ones(1000, dtype=dtype)
    assert is_finite(tensor)
    tensor[777] = bad
    assert not is_finite(tensor) and not is_finite(-tensor)


def test_finite_check_is_not_fooled_by_cancelling_or_overflowing_sums():
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))
    assert is_finite(torch.full((4,), 3e38))  # the sum overflows, the elements do not
    assert is_finite(torch.full((9,), 6e4, dtype=torch.float16))
    assert is_finite(torch.arange(3)) and is_finite(np.array(["a"]) == "a") and is_finite(torch.empty(0))
    assert is_finite(1) and not is_finite(float("nan")) and not is_finite(np.array([np.nan], np.float32))


def test_finite_check_errors_name_the_tensor():
    with pytest.raises(NotFinite, match="image embeddings: not finite"):
        require_finite("image embeddings", torch.tensor([0.0, float("nan")]))
    with pytest.raises(NotFinite, match=r"result: languages.de.r1, losses\[1\] not finite"):
        require_finite_values(
            "result", {"languages": {"de": {"r1": float("nan")}}, "losses": [1.0, float("inf")], "n": 3}
        )
    with pytest.raises(UserError, match="model.safetensors: tensor head.weight is not finite"):
        require_finite_file(
            "model.safetensors", {"a": torch.zeros(2), "head.weight": torch.tensor([float("inf")])}
        )
