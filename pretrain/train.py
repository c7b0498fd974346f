"""One pretraining run: config, data, model, objective, loop, result."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain.batches import StepBatches
from pretrain.config import DataConfig, InitConfig, PretrainConfig
from pretrain.corpora import build_sample_corpus
from pretrain.dev_losses import DevLosses, dev_batches
from pretrain.evaluate import (
    ZeroShotRetrieval,
    compare_test_sets,
    recall_table,
    summarize_recall,
    write_result,
)
from raylib import checkpoint
from raylib.command import spell_commands
from raylib.display import open_pyplot, save_figure
from raylib.distributed import broadcast_from_rank0, rank
from raylib.errors import UserError
from raylib.fileio import copy_atomically
from raylib.launch import (
    config_hash,
    count_workers,
    drop_unneeded,
    hold,
    is_main_process,
    launch,
    no_log,
    open_run,
    run_folder,
    tracked,
)
from raylib.lock import require_owned
from raylib.loop import fit
from raylib.memory import GB, StepSize, find_settings, next_settings
from raylib.models import find_model, find_tokenizer
from raylib.models.base import load_weights
from raylib.models.hf_folders import read_config
from raylib.models.hf_weights import load_text, load_vision
from raylib.models.layers import BlockList
from raylib.models.preprocessor import Preprocessing, read_preprocessing
from raylib.models.recompute import set_recomputation
from raylib.models.unified import UnifiedModel
from raylib.monitoring import list_losses, read_metrics
from raylib.objectives.pretraining import UnifiedObjective
from raylib.provenance import DataFile, commit, data_hash, provenance
from raylib.randomness import hash64
from raylib.runtime import MemoryAdvice, Reporter, Runtime, advise_on_memory
from raylib.settings import ModelConfig
from raylib.text import Tokenizer


def run(config: PretrainConfig, reporter: Reporter | None = None) -> dict:
    """Run `config` where it says, or report that it is complete. Prints the table, where the time went, and
    the files; a search's `reporter` is told of each checkpoint.

    Raises:
        UserError: whatever is wrong with settings, data or a checkpoint, before any worker starts where
            possible.
    """
    if checkpoint.find_newest(run_folder(config)) is None:
        config.init.require_given(config.recipe or config.name)
        check_init(config.init)
    for _, term in config.objective.terms.items():
        term.load()  # a broken file of the user's is told before the run has a folder
    config.check_workers(count_workers(config))
    data = resolve_data(config)
    shape = config.model.image_size, config.fit.seed
    batches, dev = StepBatches(data, *shape), dev_batches(data, *shape)
    with hold(config):
        return _run_in(with_vocabulary(config, data), data, batches, dev, reporter)


def _run_in(
    config: PretrainConfig,
    data: DataConfig,
    batches: StepBatches,
    dev: StepBatches | None,
    reporter: Reporter | None,
) -> dict:
    """`run`, in a folder that it holds."""
    folder, log = run_folder(config), print if is_main_process(config) else no_log
    if is_main_process(config):
        terms = [term.path for _, term in config.objective.terms.items()]
        open_run(config, pretraining_files(config, data, batches, dev), data.verify, terms)
    if (folder / "result.json").is_file() and config.resume == "newest":
        drop_unneeded(config)
        log(f"run '{config.name}' is complete: {folder}/result.json (another name= starts another run)")
        return {}
    streams = ", ".join(f"{name} {config.data.streams[name].batch}" for name in batches.streams)
    where = f"{config.workers} workers" if config.runtime == "ray" else "runtime=local"
    log(f"run '{config.name}' in {folder}: {config.fit.steps} steps of {streams}, {where}", flush=True)
    if is_main_process(config):
        copy_atomically(data.tokenizer, folder / Path(data.tokenizer).name)
    with tracked(config) as tracking:
        result = launch(pretrain, config, folder, reporter)
        if result["finished"]:
            tracking.log_results("test", result["retrieval"])
            for name, scores in result["test_sets"].items():
                tracking.log_results(f"test_{name}", scores["retrieval"])
    if not result["finished"]:
        log(f"stopped at step {result['steps']} of {config.fit.steps}; the same command goes on from there")
        return result
    drop_unneeded(config)
    log(recall_table(result))
    if result["test_sets"]:
        log(f"\n{compare_test_sets(result)}\n")
    log(describe_times(result))
    export = spell_commands(f"python -m pretrain export {folder} DIR")
    log(f"{folder}/result.json, curve.png; export: {export}", flush=True)
    return result


def pretraining_files(
    config: PretrainConfig, data: DataConfig, batches: StepBatches, dev: StepBatches | None
) -> list[DataFile]:
    """Return the files that a run reads: manifests and shards of every stream and of the held-out samples,
    the tokenizer, the retrieval set, terms of users' own."""
    return [
        *batches.files(),
        *(dev.files() if dev else ()),
        DataFile(Path(data.tokenizer)),
        *([DataFile(Path(data.retrieval))] if data.retrieval else []),
        *(DataFile(Path(folder)) for folder in (data.test_sets or {}).values()),
        *(DataFile(term.path) for _, term in config.objective.terms.items()),
    ]


def resolve_data(config: PretrainConfig) -> DataConfig:
    """`config.data` with every folder that is not given taken from `config.corpus`, and the tokenizer from
    there or, for the embedded corpora, from `init`."""
    data = config.data
    changes: dict[str, Any] = {}
    if config.corpus in ("sample", "scenes"):
        corpus = build_sample_corpus(
            Path(config.runs).absolute() / "cache",
            data.tokenizer or _initial_tokenizer(config.init),
            scenes=config.corpus == "scenes",
        )
    else:
        corpus = Path(config.corpus).absolute()
    for name, stream in data.streams.items():
        if stream.batch and stream.folder is None:
            changes[name] = stream.model_copy(update={"folder": str(corpus / name)})
    changes["tokenizer"] = data.tokenizer or str(find_tokenizer(corpus))
    if data.retrieval is None and (corpus / "retrieval").is_dir():
        changes["retrieval"] = str(corpus / "retrieval")
    if data.test_sets is None and (corpus / "test_sets").is_dir():
        changes["test_sets"] = {
            folder.name: str(folder) for folder in sorted((corpus / "test_sets").iterdir())
        }
    if data.dev is None and (corpus / "dev").is_dir():
        changes["dev"] = str(corpus / "dev")
    return data.model_copy(update=changes)


def check_init(init: InitConfig) -> None:
    """Raises UserError: a folder of weights to start from is not there."""
    for folder in filter(None, (init.text, init.vision)):
        read_config(Path(folder))
    if init.model:
        find_model(init.model)


def _initial_tokenizer(init: InitConfig) -> Path | None:
    if init.model:
        return find_tokenizer(find_model(init.model))
    return find_tokenizer(Path(init.text)) if init.text else None


def with_vocabulary(config: PretrainConfig, data: DataConfig) -> PretrainConfig:
    """`config` with the tokenizer's size as `model.vocabulary`, if that is 0.

    Raises:
        UserError: it is another number.
    """
    size = Tokenizer.load(data.tokenizer).vocabulary
    if config.model.vocabulary not in (0, size):
        raise UserError(
            f"{data.tokenizer} has {size} pieces, the model {config.model.vocabulary}; set "
            f"model.vocabulary={size}"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocabulary": size})})


def build_model(config: PretrainConfig) -> UnifiedModel:
    """The model at step 0: seeded, then filled from `init`.

    Raises:
        UserError: a folder of `init` is missing or does not fit; `init.model` has other sizes (they are
            named).
    """
    torch.manual_seed(int(hash64(config.fit.seed, "model")) >> 1)
    model = UnifiedModel(config.model)
    if config.init.text:
        load_text(model, config.init.text, layers=config.init.layers)
    if config.init.vision:
        load_vision(model, config.init.vision)
        _tell_preprocessing(model, Path(config.init.vision))
    if config.init.model:
        _continue(model, config.init.model, config.init.layers)
    return model


def _tell_preprocessing(model: UnifiedModel, folder: Path) -> None:
    """Say so where the image encoder's folder prepares images otherwise than the run: the run's settings
    count, as mVLP's do on a ViT that had other ones."""
    used = Preprocessing(model.preprocess, model.pixel_mean, model.pixel_std)
    try:
        own = read_preprocessing(folder, read_config(folder).get("image_size", 224), None)
        otherwise = f"{own.config}, mean {own.pixel_mean}, deviation {own.pixel_std}" if own else ""
    except UserError as error:  # what the run does not use does not stop it
        own, otherwise = None, str(error)
    if otherwise and own != used and rank() == 0:
        print(
            f"note: {folder}: its preprocessor_config.json prepares images otherwise ({otherwise}) than this "
            f"run: model.preprocess ({used.config}), model.pixel_mean={used.pixel_mean}, "
            f"model.pixel_std={used.pixel_std}",
            flush=True,
        )


def _continue(model: UnifiedModel, folder: str, layers: tuple[int, ...] | None) -> None:
    """All weights of an export or a run into `model`. Images may get another resolution; what was an encoder
    of whole images may become one of windows as large; fusion by cross-attention one by self-attention alone
    (paper 2, "w/o uni-arch"), which has less weights; and by `layers` (`InitConfig.layers`) there may be more
    layers of text and fusion, or fewer."""
    before = UnifiedModel.from_pretrained(find_model(folder))
    new, old = model.sizes_to_store(), before.sizes_to_store()
    windowed = old["vision_window"] is None and new["vision_window"] == old["image_size"]
    free = ["dropout", "temperature", "image_size", "preprocess"]
    if windowed:
        free.append("vision_window")
    if (old["fusion"], new["fusion"]) == ("cross", "entangled"):
        free.append("fusion")
    if layers is not None:
        free += ["text_layers", "fusion_layers"]
    differ = [f"model.{k}={old[k]}" for k in new if new[k] != old[k] and k not in free]
    if differ:
        or_layers = " or init.layers" if any("_layers" in path for path in differ) else ""
        raise UserError(f"{folder} is another model: set {' '.join(differ)}{or_layers}")
    if not windowed and new["image_size"] != old["image_size"]:
        before.vision.resize(model.config.image_size)
    if layers is not None:
        before = _with_layers(before, folder, model.config, layers)
    weights = before.state_dict()
    if "fusion" in free:
        weights = {name: value for name, value in weights.items() if ".cross_" not in name}
    if windowed:
        weights["vision.place"] = model.state_dict()["vision.place"]  # random
    model.load_state_dict(weights)


def _with_layers(
    before: UnifiedModel, folder: str, sizes: ModelConfig, layers: tuple[int, ...]
) -> UnifiedModel:
    """`before`, its layers of text and of fusion replaced by those of it that `layers` numbers.

    Raises:
        UserError: not a text layer for each of text in `sizes`, and one of fusion for each of fusion.
    """
    text, stored = len(before.text.blocks), [*before.text.blocks, *before.fusion.blocks]
    of_text, of_fusion = layers[: sizes.text_layers], layers[sizes.text_layers :]
    if (
        (len(of_text), len(of_fusion)) != (sizes.text_layers, sizes.fusion_layers)
        or not all(layer < text for layer in of_text)
        or not all(text <= layer < len(stored) for layer in of_fusion)
    ):
        raise UserError(
            f"init.layers={list(layers)}: {folder} has text layers 0 to {text - 1}, fusion layers {text} to "
            f"{len(stored) - 1}; give {sizes.text_layers} of the first (model.text_layers), then "
            f"{sizes.fusion_layers} of the second (model.fusion_layers)"
        )
    for encoder, numbers in ((before.text, of_text), (before.fusion, of_fusion)):
        encoder.blocks = BlockList(copy.deepcopy(stored[number]) for number in numbers)
    return before


def pretrain(runtime: Runtime, config: PretrainConfig) -> dict:
    """Train on this worker; worker 0 writes `result.json` and the curve. Returns the result."""
    data = resolve_data(config)
    shape = (
        config.model.image_size,
        config.fit.seed,
        runtime.rank,
        runtime.world_size,
        config.model.preprocess,
    )
    batches, dev = StepBatches(data, *shape), dev_batches(data, *shape)
    model = build_model(config)
    set_recomputation(model, config.model.checkpointing, config.fit.micro_batches)
    objective = UnifiedObjective(model, config.objective, batches.streams)
    if data.cache_image_states and data.augment is None and not config.objective.train_vision:
        cache_image_states(batches, model, config, runtime)
    batches.image_tokens = model.count_image_tokens()
    tables: list[dict[str, Any]] = []
    sizes = config.model.image_size, config.model.positions, data.max_pixels, config.model.preprocess

    def read_set(folder: str) -> ZeroShotRetrieval:
        return ZeroShotRetrieval(folder, Tokenizer.load(data.tokenizer), *sizes)

    retrieval = read_set(data.retrieval) if data.retrieval else None
    bf16 = config.fit.uses_bf16(runtime.device)  # evaluation computes as training does
    dev_losses = DevLosses(objective, dev, bf16) if dev else dict

    def evaluate(model: UnifiedModel) -> dict[str, float]:
        if retrieval is None:
            return dev_losses()
        tables.append(retrieval(model, bf16))
        return summarize_recall(tables[-1]) | dev_losses()

    advice = MemoryAdvice(
        partial(advise_on_step, config, runtime),
        "set fit.bf16=true, or data.retrieval to fewer images, or run it on a device that nothing else uses",
    )
    describe = {"run": config.name}
    result = fit(objective, batches, runtime, config.fit, config.optim, evaluate, describe, advice=advice)
    tests: dict[str, dict[str, Any]] = {}
    if result["finished"]:
        objective.eval()
        where = "the evaluation", runtime.device, lambda: advice.evaluation
        with torch.inference_mode(), advise_on_memory(*where):
            if not tables and retrieval is not None:  # resumed after the last checkpoint
                evaluate(model)
            tests = {name: read_set(folder)(model, bf16) for name, folder in (data.test_sets or {}).items()}
    scores = tables[-1] if tables else {"retrieval": {}, "heldout": {}, "interval": {}}
    replaced = result.pop("samples_replaced")
    result = {
        "run": config.name,
        "seed": config.fit.seed,
        **result,
        "items_skipped": {
            "train": replaced,
            **(retrieval.count_missing_captions() if retrieval else {}),
        },
        "git": commit(),
        "config_sha256": config_hash(config),
        "data_sha256": data_hash(runtime.run),
        **provenance(runtime.device),
        "evaluation_precision": config.fit.describe_precision(runtime.device),
        **scores,
        "test_sets": tests,
    }
    if runtime.rank == 0 and result["finished"]:
        require_owned(runtime.run)
        plot_curve(runtime.run)
        write_result(runtime.run / "result.json", result)
    return result


def cache_image_states(
    batches: StepBatches, model: UnifiedModel, config: PretrainConfig, runtime: Runtime
) -> None:
    """Let `batches` have the states of images in their place. The image encoder is the run's own also where
    `init.model` has changed since it began."""
    if start := broadcast_from_rank0(checkpoint.find_newest(runtime.run)):
        load_weights(model, start)
    model.to(runtime.device)
    config.fit.set_precision(model, runtime.device)
    folder = Path(config.runs).absolute() / "encoded"
    batches.cache_image_states(model, folder, config.fit.uses_bf16(runtime.device))


def advise_on_step(config: PretrainConfig, runtime: Runtime, batch: dict) -> str:
    """Settings with which a worker's batch fits the memory of its device, by the estimate where that is a
    GPU."""
    workers, sharding = runtime.world_size, config.fit.sharding or runtime.sharding
    others = f"give it more than workers={workers}"
    if workers > 1 and sharding == "none":
        others += " or fit.sharding=zero2"
    others += "; a lower data.*.batch, or a smaller model, changes the results"
    plain = next_settings("model.checkpointing", config.model.checkpointing, config.fit.micro_batches)
    if runtime.device.type != "cuda":
        return f"set {plain}, or {others}"
    gpu = torch.cuda.get_device_properties(runtime.device).total_memory
    found = find_settings(
        config.model,
        config.objective,
        StepSize.of_batch(batch, workers),
        gpu,
        sharding=sharding,
        bf16=config.fit.uses_bf16(runtime.device),
        residual=config.fit.residual,
    )
    options = []
    for checkpointing, micro_batches, estimate in found:
        changes = [f"model.checkpointing={checkpointing}"] * (checkpointing != config.model.checkpointing)
        changes += [f"fit.micro_batches={micro_batches}"] * (micro_batches != config.fit.micro_batches)
        if changes and (checkpointing, micro_batches) != ("none", 1):
            options.append(f"{' '.join(changes)} (about {estimate.needed / GB:.0f} of {gpu / GB:.0f} GB)")
    return f"set {' or '.join(options) or plain}, or {others}"


def describe_times(result: dict[str, Any]) -> str:
    """One line: where the time went, and the peak memory of worker 0."""
    times, whole = result["times"], sum(result["times"].values())
    parts = [f"{name} {seconds:.1f} s ({100 * seconds / whole:.1f} %)" for name, seconds in times.items()]
    return f"{whole:.0f} s: {', '.join(parts)}; peak memory {result['peak_memory_gb']:.2f} GB a worker"


def plot_curve(run: Path) -> None:
    """`curve.png`: losses, those of held-out samples dashed, and R@1, over the steps."""
    records = read_metrics(run)
    figure, (left, right) = open_pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in list_losses(records):
        points = [(r["step"], r[name]) for r in records if name in r]
        term = name.removeprefix("loss/")
        (line,) = left.plot(*zip(*points, strict=True), label=term, linewidth=1)
        held_out = [(r["step"], r[dev]) for r in records if (dev := f"eval/dev_loss/{term}") in r]
        if held_out:
            left.plot(*zip(*held_out, strict=True), "--", color=line.get_color(), linewidth=1, marker=".")
    left.set(xlabel="step", ylabel="loss", title="terms, dashed of held-out samples")
    left.legend(fontsize=8)
    labels = {
        "eval/en_r1": "English",
        "eval/others_r1": "mean of the others",
        "eval/heldout_r1": "held-out concepts, all languages",
        "eval/itm_accuracy": "matching of held-out pairs (accuracy)",
    }
    for name, label in labels.items():
        points = [(r["step"], 100 * r[name]) for r in records if name in r]
        if points:
            right.plot(*zip(*points, strict=True), label=label, marker=".")
    if right.lines:
        right.legend(fontsize=8)
    right.set(
        xlabel="step", ylabel="%", title="zero-shot retrieval, R@1, mean of both directions", ylim=(0, None)
    )
    save_figure(figure, run / "curve.png")
