"""Settings of attention that no number shows."""

import subprocess
import sys


def test_attention_disables_cudnn_backend():
    """It builds a graph for every new shape, which is seconds a step with packed batches
    (benchmarks/results/gpu.jsonl)."""
    code = "import raylib.models.layers, torch; print(torch.backends.cuda.cudnn_sdp_enabled())"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )
