"""A process in which Polyglance cannot be imported loads exported folders by their own code, and prints what
they compute: `python remote_models.py FOLDER ... < inputs.json`; tests/test_huggingface.py."""

import json
import sys


def main(folders: list[str]) -> None:
    for name in ("raylib", "polyglance", "finetune", "pretrain"):
        sys.modules[name] = None  # importing it is an error

    import torch
    from transformers import AutoModel, AutoProcessor

    inputs, outputs = json.load(sys.stdin), {}
    for folder in folders:
        model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        batch = processor(
            images=inputs["images"], text=inputs["texts"], padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = model(**batch)
            found = {k: v.tolist() for k, v in output.items()}
            if "logits" not in found and model.model.has_match_head:
                found["match"] = model.match(**batch).tolist()
        outputs[folder] = found
    print(json.dumps(outputs))


if __name__ == "__main__":
    main(sys.argv[1:])
